# SPDX-License-Identifier: Apache-2.0
"""DMA ops: how a driver gets memory that its device can reach. One set per device, never global.

The 2016 patch calls per-device DMA ops the clean design and settles for a test inside the ring code.
Here the choice is made once, by `virtiova.policy`, and handed down as one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access, AddressKind, DmaAddr
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram
from virtiova.errors import AccessError


class DmaRegion(Protocol):
    """Memory that a driver shares with its device: contiguous as the device sees it."""

    addr: DmaAddr
    """What the driver puts into the ring."""
    size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def load16(self, offset: int, order: ByteOrder = "little") -> int:
        """One acquire load of an index or flag that the device writes."""

    def load32(self, offset: int, order: ByteOrder = "little") -> int:
        """One acquire load."""

    def store16(self, offset: int, value: int, order: ByteOrder = "little") -> None:
        """One release store."""

    def fence(self) -> None:
        """A full fence."""


class DmaOps(Protocol):
    """Where a driver's addresses come from."""

    name: str
    """``direct``, ``platform`` or ``bounce``."""
    address: AddressKind

    def alloc(self, size: int) -> DmaRegion:
        """Zeroed memory of whole pages, at least ``size`` bytes, that the device may read and write."""

    def free(self, region: DmaRegion) -> None:
        """Take the region away from the device."""


class RamRegion:
    """A region whose pages of ``page_size`` bytes lie at ``gpas`` of a RAM, in the order in which the device sees
    them."""

    def __init__(self, ram: Ram, addr: DmaAddr, gpas: Sequence[GPA], page_size: int = PAGE_SIZE) -> None:
        self.addr = addr
        self.page_size = page_size
        self.size = len(gpas) * page_size
        self.gpas = tuple(gpas)
        self._ram = ram

    def _gpa(self, offset: int, length: int) -> GPA:
        if offset < 0 or offset + length > self.size:
            raise AccessError(self.addr + offset, length, f"outside of a DMA region of 0x{self.size:x} bytes")
        return GPA(self.gpas[offset // self.page_size] + offset % self.page_size)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0:
            step = min(length, self.page_size - offset % self.page_size)
            parts.append(self._ram.read(self._gpa(offset, step), step))
            offset, length = offset + step, length - step
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        while data:
            step = min(len(data), self.page_size - offset % self.page_size)
            self._ram.write(self._gpa(offset, step), data[:step])
            offset, data = offset + step, data[step:]

    def load16(self, offset: int, order: ByteOrder = "little") -> int:
        return self._ram.load16(self._gpa(offset, 2), order)

    def load32(self, offset: int, order: ByteOrder = "little") -> int:
        return self._ram.load32(self._gpa(offset, 4), order)

    def store16(self, offset: int, value: int, order: ByteOrder = "little") -> None:
        self._ram.store16(self._gpa(offset, 2), value, order)

    def fence(self) -> None:
        self._ram.fence()


def _page_count(size: int, page_size: int = PAGE_SIZE) -> int:
    return max(1, -(-size // page_size))


class DirectOps:
    """Guest-physical addresses, as the quirk wants them: the page's own address goes into the ring."""

    name = "direct"
    address = AddressKind.GPA

    def __init__(self, ram: Ram, pages: PageAllocator) -> None:
        self._ram = ram
        self._pages = pages

    def alloc(self, size: int) -> RamRegion:
        count = _page_count(size)
        first = self._pages.run(count)
        gpas = [GPA(first + i * PAGE_SIZE) for i in range(count)]
        return RamRegion(self._ram, DmaAddr(first), gpas)

    def free(self, region: DmaRegion) -> None:
        """Back to the allocator; the device reaches all of RAM anyway."""
        self._pages.release(GPA(region.addr), region.size // PAGE_SIZE)


class Mapper(Protocol):
    """The part of an IOMMU that DMA ops need."""

    page_size: int

    def allocate(self, size: int) -> IOVA: ...

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None: ...

    def unmap(self, iova: IOVA, size: int) -> None: ...

    def invalidate(self) -> None: ...


class PlatformOps:
    """The platform's DMA addresses: pages anywhere in RAM, mapped one by one at a fresh IOVA."""

    name = "platform"
    address = AddressKind.IOVA

    def __init__(self, ram: Ram, pages: PageAllocator, mapper: Mapper) -> None:
        self._ram = ram
        self._pages = pages
        self._mapper = mapper
        self._gpas: dict[int, list[GPA]] = {}
        self._idle: dict[int, list[IOVA]] = {}

    def alloc(self, size: int) -> RamRegion:
        page_size = self._mapper.page_size
        count = _page_count(size, page_size)
        idle = self._idle.get(count)
        iova = idle.pop() if idle else self._mapper.allocate(count * page_size)
        gpas = [self._pages.run(page_size // PAGE_SIZE, align=page_size) for _ in range(count)]
        for index, gpa in enumerate(gpas):
            self._mapper.map(IOVA(iova + index * page_size), gpa, page_size)
        self._gpas[iova] = gpas
        return RamRegion(self._ram, DmaAddr(iova), gpas, page_size)

    def free(self, region: DmaRegion) -> None:
        self._mapper.unmap(IOVA(region.addr), region.size)
        self._mapper.invalidate()
        page_size = self._mapper.page_size
        gpas = self._gpas.pop(region.addr)
        for gpa in gpas:
            self._pages.release(gpa, page_size // PAGE_SIZE)
        self._idle.setdefault(len(gpas), []).append(IOVA(region.addr))
