# SPDX-License-Identifier: Apache-2.0
"""Address spaces: what a device end may touch, with permission. Device code gets only this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from virtiova.addr import GPA, Access
from virtiova.dma.ram import ByteOrder


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` bytes that the device may touch, at ``gpa`` of RAM."""

    gpa: GPA
    length: int


@dataclass(frozen=True, slots=True)
class Miss:
    """No permission, or no mapping, for ``length`` bytes at ``address``. A miss is data, not an exception."""

    address: int
    length: int
    access: Access
    reason: str


class AddressSpace(Protocol):
    """What a device end may touch. `translate` never raises; the other calls raise `AccessError` on a miss."""

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at ``address``, in order; or the first part that is missing."""

    def read(self, address: int, length: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        """One acquire load."""

    def load_pair(self, address: int) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store."""

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store."""

    def fence(self) -> None:
        """A full fence."""
