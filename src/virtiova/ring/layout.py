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


PACKED_F_AVAIL: Final = 1 << 7
PACKED_F_USED: Final = 1 << 15
EVENT_ENABLE: Final = 0
EVENT_DISABLE: Final = 1
EVENT_DESC: Final = 2
"""Only for one descriptor, which the other half of the structure names; with bit 29 only (virtio 1.4, 2.8.10)."""
EVENT_FLAGS: Final = 3
"""The bits of the flags that mean something."""

_PACKED = struct.Struct("<QIHH")


@dataclass(frozen=True, slots=True)
class PackedDesc:
    """``struct pvirtq_desc``, little-endian on every machine: ``length`` bytes at ``addr``, buffer ``id``."""

    addr: int
    length: int
    id: int
    flags: int

    def pack(self) -> bytes:
        """16 bytes as they lie in the ring."""
        return _PACKED.pack(self.addr, self.length, self.id, self.flags)

    @classmethod
    def unpack(cls, data: bytes) -> PackedDesc:
        """From 16 bytes that were copied out of the ring once."""
        return cls(*_PACKED.unpack(data))


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the three parts of a packed ring of ``size`` entries lie in one run of memory (virtio 1.4, 2.8).

    Both ends count the descriptors that they went past, free-running: ``place`` below is such a number. The ring wrap
    counter is 1 in the first lap, 0 in the second, and so on.
    """

    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise ProtocolError(f"queue size {self.size} is not 1 to {MAX_SIZE}")

    @property
    def desc(self) -> int:
        return 0

    @property
    def driver(self) -> int:
        """Offset of the driver's event suppression structure."""
        return DESC_SIZE * self.size

    @property
    def device(self) -> int:
        """Offset of the device's."""
        return self.driver + 4

    @property
    def total(self) -> int:
        """Bytes from the first descriptor to the end of the last structure."""
        return self.device + 4

    def entry(self, place: int) -> int:
        """Offset of a descriptor in the ring."""
        return DESC_SIZE * (place % self.size)

    def wrap(self, place: int) -> bool:
        """The ring wrap counter there."""
        return place // self.size % 2 == 0

    def available(self, place: int) -> int:
        """The flags of a descriptor there that is available; the others are its own."""
        return PACKED_F_AVAIL if self.wrap(place) else PACKED_F_USED

    def used(self, place: int) -> int:
        """The flags of a descriptor there that is used."""
        return PACKED_F_AVAIL | PACKED_F_USED if self.wrap(place) else 0

    def encode(self, place: int) -> int:
        """As events and vhost have it: the index in the ring, and the wrap counter in bit 15."""
        return place % self.size | self.wrap(place) << 15

    def decode(self, word: int) -> int:
        """The least place of that word. Raises `ProtocolError` for an index that is not in the ring."""
        index = word & 0x7FFF
        if index >= self.size:
            raise ProtocolError(f"descriptor {index} of a packed ring, wanted less than {self.size}")
        return index if word >> 15 & 1 else index + self.size

    def passed(self, word: int, new: int, old: int) -> bool:
        """Did moving from place ``old`` to ``new`` go past the descriptor that an event names? Past one that is not in
        the ring, too: to be told too often is no harm. Nobody waits for what lies more than a lap back."""
        if word & 0x7FFF >= self.size:
            return new != old
        return 0 < (new - self.decode(word)) % (2 * self.size) <= min(new - old, self.size)


PACKED_FLAGS: Final = PACKED_F_AVAIL | PACKED_F_USED
"""The two flags by which the ends of a packed ring tell each other whose a descriptor is."""
