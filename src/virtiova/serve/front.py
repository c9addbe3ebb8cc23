# SPDX-License-Identifier: Apache-2.0
"""What a host needs of whoever speaks with its front end: a vhost-user session, or one with the kernel's VDUSE.

A session knows its protocol, makes `events` of what it hears, and is told what came of each. Who translates, what rings
are and how they are served is the host's, and the same for both.
"""

from __future__ import annotations

from typing import Protocol

from virtiova.wire.vhost_user import ProtocolFeature


class Front(Protocol):
    """The session, as its host sees it."""

    features: int
    """The virtio features that were accepted."""
    status: int
    """The device status: as the driver wrote it; a host may add to it."""

    def agreed(self, feature: ProtocolFeature) -> bool:
        """Whether a feature of the vhost-user protocol was agreed upon."""

    def acknowledge(self, token: int, problem: str = "") -> None:
        """What the event with ``token`` wants is done, or cannot be for a reason. Raises `ProtocolError` for a problem
        of which the front end cannot be told."""

    def answer(self, token: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Answer the event with ``token`` by a value, encoded as vhost-user has it."""

    def took(self, replies: int) -> None:
        """IOTLB messages were done around the session, and so many of them want to be acknowledged."""

    def reset(self) -> None:
        """The device is as before any driver."""

    def abandon(self) -> tuple[int, ...]:
        """Forget all that is unfinished; the descriptors to close."""
