# SPDX-License-Identifier: Apache-2.0
"""The split ring as bytes: offsets, flags, descriptors (virtio 1.4, 2.7). No I/O."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1
DESC_SIZE: Final = 16
MAX_SIZE: Final = 32768

_DESC = {"little": struct.Struct("<QIHH"), "big": struct.Struct(">QIHH")}


@dataclass(frozen=True, slots=True)
class Desc:
    """``struct virtq_desc``: ``length`` bytes at ``addr``."""

    addr: int
    length: int
    flags: int
    next: int

    def pack(self, order: ByteOrder = "little") -> bytes:
        """16 bytes as they lie in the ring."""
        return _DESC[order].pack(self.addr, self.length, self.flags, self.next)

    @classmethod
    def unpack(cls, data: bytes, order: ByteOrder = "little") -> Desc:
        """From 16 bytes that were copied out of the ring once."""
        return cls(*_DESC[order].unpack(data))


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Where the three parts of a split ring of ``size`` entries lie in one run of memory.

    ``used_align`` is 4 for the modern interface, 4096 for the legacy one (virtio 1.4, 2.7.2).
    """

    size: int
    used_align: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise ProtocolError(f"queue size {self.size} is no power of two of at most {MAX_SIZE}")

    @property
    def desc(self) -> int:
        return 0

    @property
    def avail(self) -> int:
        return DESC_SIZE * self.size

    @property
    def used(self) -> int:
        end = self.avail + 4 + 2 * self.size + 2
        return (end + self.used_align - 1) & ~(self.used_align - 1)

    @property
    def total(self) -> int:
        """Bytes from the first descriptor to the end of ``avail_event``."""
        return self.used + 4 + 8 * self.size + 2

    def avail_entry(self, index: int) -> int:
        """Offset in the available ring of entry ``index`` (free-running)."""
        return 4 + 2 * (index % self.size)

    def used_entry(self, index: int) -> int:
        """Offset in the used ring of element ``index`` (free-running)."""
        return 4 + 8 * (index % self.size)

    @property
    def used_event(self) -> int:
        """Offset in the available ring: up to which used index the driver wants no interrupt."""
        return 4 + 2 * self.size

    @property
    def avail_event(self) -> int:
        """Offset in the used ring: up to which available index the device wants no notification."""
        return 4 + 8 * self.size


def need_event(event: int, new: int, old: int) -> bool:
    """``vring_need_event``: did moving an index from ``old`` to ``new`` pass ``event``? (virtio 1.4, 2.7.7.2)"""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
