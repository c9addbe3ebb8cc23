# SPDX-License-Identifier: Apache-2.0
"""Where two ends of a ring meet: RAM that one end reaches its own way, and the other through an address space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from virtiova.addr import GPA, PAGE_SIZE, Access
from virtiova.dma.ops import DirectOps, DmaOps, DmaRegion, PlatformOps, RamRegion
from virtiova.dma.ram import ByteOrder, MappedRam, PageAllocator, Ram, RamBlock, VerbRam
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace, Miss, Span
from virtiova.iommu.soft import SoftIommu

Reach = Literal["mapped", "verbs"]
"""How a driver end gets at RAM: as memory of its own process, or by a machine's verbs."""
Way = Literal["direct", "platform"]
"""What it puts into the ring: guest-physical addresses, or an IOMMU's, with each page elsewhere in RAM."""

BASE: Final = 0x10_0000
"""Guest-physical start of RAM: no address of it is also an offset into the buffer behind it."""
CANARY: Final = 0xA5


class World:
    """RAM of ``pages`` pages, full of canaries, and DMA ops: regions with a page of nobody's behind each."""

    def __init__(self, reach: Reach = "mapped", way: Way = "direct", pages: int = 200) -> None:
        self.way = way
        self.verbs = 0
        """Verbs that were used so far."""
        self.memory = bytearray(bytes((CANARY,)) * (pages * PAGE_SIZE))
        block = RamBlock(GPA(BASE), len(self.memory), 0)
        self.mapped = mapped = MappedRam(self.memory, [block])
        """All of it, for whoever lays things there by hand."""
        # Verbs have addresses of the machine, not of the buffer behind it.
        self.ram: Ram = mapped if reach == "mapped" else VerbRam(self._read, self._write, [block])
        allocator = PageAllocator(self.ram, GPA(BASE), GPA(BASE + len(self.memory)))
        self.ops: DmaOps
        self.space: AddressSpace
        if way == "direct":
            self.ops, self.space = DirectOps(self.ram, allocator), FlatSpace(mapped)
        else:
            self.iommu = SoftIommu(mapped)
            """Where there is one: of the way ``platform``."""
            self.iommu.enable()
            self.ops, self.space = PlatformOps(self.ram, allocator, self.iommu), MediatedSpace(mapped, self.iommu)
        self.name, self.address = self.ops.name, self.ops.address
        self._given: set[int] = set()

    def _read(self, gpa: int, length: int) -> bytes:
        self.verbs += 1
        return bytes(self.memory[gpa - BASE : gpa - BASE + length])

    def _write(self, gpa: int, data: bytes) -> None:
        self.verbs += 1
        self.memory[gpa - BASE : gpa - BASE + len(data)] = data

    def alloc(self, size: int) -> RamRegion:
        """Zeroed memory for both ends."""
        region = self.ops.alloc(size)
        assert isinstance(region, RamRegion)
        self._given |= {gpa - BASE for gpa in region.gpas}
        return region

    def free(self, region: DmaRegion) -> None:
        """Take it away from both. What its pages hold then is nobody's matter."""
        self.ops.free(region)

    def stray(self) -> int | None:
        """The guest-physical address of a byte that changed although nobody was given it."""
        whole = bytes((CANARY,)) * PAGE_SIZE
        for at in range(0, len(self.memory), PAGE_SIZE):
            if at not in self._given and self.memory[at : at + PAGE_SIZE] != whole:
                page = self.memory[at : at + PAGE_SIZE]
                return BASE + at + next(place for place, byte in enumerate(page) if byte != CANARY)
        return None


@dataclass
class Op:
    """One access of a device end: ``load``, ``store`` or ``fence``."""

    what: str
    address: int
    length: int


class TooMuch(Exception):
    """A device end does not come to an end."""


class Watched:
    """An address space that records every access; a hook may change memory right after a load, as the other side can.

    ``most``: accesses after which `TooMuch` is raised.
    """

    def __init__(self, inner: AddressSpace, most: int | None = None) -> None:
        self.inner = inner
        self.most = most
        self.ops: list[Op] = []
        self.after: Callable[[Op], None] = lambda op: None

    def note(self, what: str, address: int, length: int) -> None:
        """One more."""
        op = Op(what, address, length)
        self.ops.append(op)
        if self.most is not None and len(self.ops) > self.most:
            raise TooMuch(f"{len(self.ops)} accesses to memory")
        self.after(op)

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """As the space behind it; so with all that follows."""
        return self.inner.translate(address, length, access)

    def read(self, address: int, length: int) -> bytes:
        data = self.inner.read(address, length)
        self.note("load", address, length)
        return data

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        value = self.inner.load16(address, order)
        self.note("load", address, 2)
        return value

    def load_pair(self, address: int) -> bytes:
        data = self.inner.load_pair(address)
        self.note("load", address, 16)
        return data

    def write(self, address: int, data: bytes) -> None:
        self.inner.write(address, data)
        self.note("store", address, len(data))

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        self.inner.store16(address, value, order)
        self.note("store", address, 2)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        self.inner.store32(address, value, order)
        self.note("store", address, 4)

    def fence(self) -> None:
        self.inner.fence()
        self.note("fence", 0, 0)
