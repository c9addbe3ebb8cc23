# SPDX-License-Identifier: Apache-2.0
"""Feature negotiation, to the letter: virtio 1.4, 3.1.1, steps 1 to 6. FEATURES_OK is read back."""

from __future__ import annotations

from dataclasses import dataclass

from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, Status, has
from virtiova.ports import Transport


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What came of it. Feature words; ``features_ok`` is None where there is no such step: on the legacy
    interface, and for a vhost-user back end that has no status.

    A bit is accepted if it was offered, written by the driver, and kept after FEATURES_OK. What the device's
    registers read back is no witness: some devices give back a bit that they dropped.
    """

    offered: int
    written: int
    features_ok: bool | None

    @property
    def accepted(self) -> int:
        """The negotiated feature word; 0 after a refusal."""
        return 0 if self.features_ok is False else self.offered & self.written

    @property
    def refused(self) -> bool:
        """Did the device refuse the set?"""
        return self.features_ok is False

    def has(self, bit: int) -> bool:
        """Was ``bit`` negotiated?"""
        return has(self.accepted, bit)

    def in_rings(self, bit: int) -> bool:
        """Is the driver to lay its rings out by ``bit``? What it took is what it goes on with, also if the device
        refused it and it carries on all the same."""
        return has(self.offered & self.written, bit)

    @property
    def bit33(self) -> tuple[bool, bool]:
        """Bit 33: (offered, accepted)."""
        return has(self.offered, VIRTIO_F_ACCESS_PLATFORM), self.has(VIRTIO_F_ACCESS_PLATFORM)


def begin(transport: Transport) -> int:
    """Reset, ACKNOWLEDGE, DRIVER; the features that the device offers."""
    transport.reset()
    transport.write_status(Status.ACKNOWLEDGE)
    transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    return transport.read_features()


def finish(transport: Transport, offered: int, written: int) -> Negotiated:
    """Write the driver's features, then FEATURES_OK, and read back whether it stayed.

    On a refusal nothing more is written: whether to set FAILED or to carry on is the caller's choice.
    """
    transport.write_features(written)
    if transport.legacy:
        return Negotiated(offered, written, None)
    transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    status = transport.read_status()
    if not transport.confirms:
        return Negotiated(offered, written, None)
    kept = bool(status & Status.FEATURES_OK)
    return Negotiated(offered, written, kept)


def driver_ok(transport: Transport) -> None:
    """DRIVER_OK, step 8: from now on the device uses the queues."""
    status = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK
    transport.write_status(status if transport.legacy else status | Status.FEATURES_OK)


def give_up(transport: Transport) -> None:
    """FAILED: the driver has given up on the device (virtio 1.4, 2.1.1)."""
    transport.write_status(transport.read_status() | Status.FAILED)
