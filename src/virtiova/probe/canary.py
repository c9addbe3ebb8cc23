# SPDX-License-Identifier: Apache-2.0
"""Canary pages: whatever a driver shares with its device exists twice, so that every access shows its path.

Each page of driver memory has one address X and two homes: page **A**, where the IOMMU maps X, and page **B**, at
guest-physical X. Both hold the same ring, header or table, so the device works whichever way it goes, and
whatever it writes lands in one of the two. No address is ever the identity, and a forgotten copy shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access, AddressKind, DmaAddr
from virtiova.dma.ops import DmaRegion, RamRegion
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram
from virtiova.errors import AccessError
from virtiova.ports import Iommu
from virtiova.result import Witness

SHOWN: Final = 32
"""Bytes of a change that the evidence keeps."""


def paint(page: str, gpa: int, length: int) -> bytes:
    """What an untouched page holds: text that names it, different for every page and easy to read in a dump."""
    return (b"page %c %08x. " % (ord(page), gpa) * (length // 16 + 1))[:length]


@dataclass(frozen=True, slots=True)
class Watch:
    """Bytes that are looked at before and after."""

    role: str
    page: str
    gpa: int
    length: int
    until: bytes | None = None
    """What the driver will have put there before the device can; None: what is there now."""

    @property
    def offset(self) -> int:
        """In its 4 KiB page."""
        return self.gpa % PAGE_SIZE


class TwinRegion:
    """Memory at one device address with two homes (`DmaRegion`).

    Writes go to both. A load takes whichever home differs from what the driver itself wrote last, because that is
    the one that the device wrote to.
    """

    def __init__(self, ram: Ram, x: int, a: Sequence[GPA], page_size: int = PAGE_SIZE) -> None:
        self.addr = DmaAddr(x)
        self.page_size = page_size
        self.size = len(a) * page_size
        b = [GPA(x + index * page_size) for index in range(len(a))]
        self.homes = {page: RamRegion(ram, self.addr, gpas, page_size) for page, gpas in (("A", a), ("B", b))}
        self._ram = ram
        self._shadow = bytearray(self.size)

    def gpa(self, page: str, offset: int = 0) -> GPA:
        """Where the byte at ``offset`` lives in home ``page``."""
        return GPA(self.homes[page].gpas[offset // self.page_size] + offset % self.page_size)

    def read(self, offset: int, length: int) -> bytes:
        wrote = bytes(self._shadow[offset : offset + length])
        a, b = (home.read(offset, length) for home in self.homes.values())
        return a if a != wrote else b

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise AccessError(self.addr + offset, len(data), "outside of the region")
        self._shadow[offset : offset + len(data)] = data
        for home in self.homes.values():
            home.write(offset, data)

    def load16(self, offset: int, order: ByteOrder = "little") -> int:
        wrote = int.from_bytes(self._shadow[offset : offset + 2], order)
        a, b = (home.load16(offset, order) for home in self.homes.values())
        return a if a != wrote else b

    def load32(self, offset: int, order: ByteOrder = "little") -> int:
        wrote = int.from_bytes(self._shadow[offset : offset + 4], order)
        a, b = (home.load32(offset, order) for home in self.homes.values())
        return a if a != wrote else b

    def store16(self, offset: int, value: int, order: ByteOrder = "little") -> None:
        self._shadow[offset : offset + 2] = value.to_bytes(2, order)
        for home in self.homes.values():
            home.store16(offset, value, order)

    def fence(self) -> None:
        self._ram.fence()

    def redirect(self, page: str, old: int, new: int, order: ByteOrder = "little") -> None:
        """In home ``page`` only, let the descriptor that points to ``old`` point to ``new``."""
        home = self.homes[page]
        wanted = old.to_bytes(8, order)
        for offset in range(0, self.size, 16):
            if home.read(offset, 8) == wanted:
                home.write(offset, new.to_bytes(8, order))
                return
        raise AccessError(self.addr, self.size, f"no descriptor points to 0x{old:x}")

    def paint(self, offset: int, length: int) -> None:
        """Fill part of a page of both homes with what names them."""
        for page, home in self.homes.items():
            home.write(offset, paint(page, self.gpa(page, offset), length))

    def watch(self, role: str, offset: int, length: int, until: bytes | None = None) -> list[Watch]:
        """Watch part of a page in both homes."""
        return [Watch(role, page, self.gpa(page, offset), length, until) for page in self.homes]


class CanaryOps:
    """DMA ops whose every page is a canary. ``address`` is what policy says the driver passes."""

    name = "canary"

    def __init__(self, ram: Ram, pages: PageAllocator, iommu: Iommu) -> None:
        self.address = AddressKind.UNKNOWN
        self._ram = ram
        self._iommu = iommu
        self.page_size = iommu.page_size
        # Two arenas, each from a 2 MiB border on: A and B of a page are then told apart at a glance.
        self._a = pages.carve(512, align=2 << 20)
        self._b = pages.carve(512, align=2 << 20)
        self.map_pages = True
        """Whether new regions are put into the IOMMU's tables."""
        self.known: set[int] = set()
        """Device addresses of all pages handed out."""
        self.regions: list[TwinRegion] = []

    def alloc(self, size: int) -> TwinRegion:
        page_size = self.page_size
        count = max(1, -(-size // page_size))
        x = self._b.run(count * page_size // PAGE_SIZE, align=page_size)
        # A page of its own for each: no two of them are adjacent.
        a = [self._a.run(page_size // PAGE_SIZE, align=page_size) for _ in range(count)]
        region = TwinRegion(self._ram, x, a, page_size)
        self.regions.append(region)
        # The page after each run is a gap that stays unmapped; a fault there is ours as well.
        self.known.update(range(x, x + (count + 1) * page_size, PAGE_SIZE))
        if self.map_pages:
            self.map(region)
        return region

    def map(self, region: TwinRegion, access: Access = Access.RW) -> None:
        """Point the region's address at its home A, page by page."""
        for index, gpa in enumerate(region.homes["A"].gpas):
            self._iommu.map(IOVA(region.addr + index * self.page_size), gpa, self.page_size, access)

    def free(self, region: DmaRegion) -> None:
        self._iommu.unmap(IOVA(region.addr), region.size)
        self._iommu.invalidate()

    def spare(self, page: str) -> GPA:
        """A painted page that nothing points to yet, in the arena of the A pages."""
        gpa = self._a.run(self.page_size // PAGE_SIZE, align=self.page_size)
        self._ram.write(gpa, paint(page, gpa, PAGE_SIZE))
        return gpa


class Snapshot:
    """The watched bytes at one moment, to be compared with a later one."""

    def __init__(self, ram: Ram, watches: Iterable[Watch]) -> None:
        self._ram = ram
        self._before = [(watch, watch.until or ram.read(GPA(watch.gpa), watch.length)) for watch in watches]

    def look(self) -> list[Witness]:
        """One witness for each watch: the bytes around the first change, or the first bytes if there is none."""
        return [self._witness(watch, before) for watch, before in self._before]

    def _witness(self, watch: Watch, before: bytes) -> Witness:
        after = self._ram.read(GPA(watch.gpa), watch.length)
        start = next((i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new), 0)
        end = start + SHOWN
        return Witness(
            role=watch.role,
            page=watch.page,
            gpa=watch.gpa - watch.offset,
            offset=watch.offset + start,
            before=before[start:end].hex(),
            after=after[start:end].hex(),
        )
