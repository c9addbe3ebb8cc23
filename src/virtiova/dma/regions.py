# SPDX-License-Identifier: Apache-2.0
"""RAM in regions that a vhost-user front end hands over, each a range of a shared memory file.

A region has three addresses: guest-physical (GPA), the front end's own (UVA), and the offset in its
file. Bytes are reached by GPA alone, as in every other `Ram`; a UVA - ring addresses without bit 33,
what an IOTLB update points at - is resolved to GPAs at the edge, by `RegionRam.gpa_of`.

The front end is not trusted: a region that overlaps another, wraps, is not made of whole pages or
is not covered by its file is refused, and nothing of it is kept. A file that is shortened later gets
anonymous pages where its own are gone (`RegionRam.damaged`): nobody else sees them, so stop the queues.

`RegionRam.radix` is the native table of the same: GPA to host address, as an IOTLB has one of IOVAs. It is filled when
a region comes, as far as `EAGER` leaves go, and by `remember` after that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from virtiova import _core
from virtiova.addr import GPA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.ram import ByteOrder, RamBlock
from virtiova.dma.shared import PLAIN, Terms, map_shared
from virtiova.dma.space import MAX_ACCESS, Miss, Span
from virtiova.errors import AccessError, ProtocolError

MAX_REGIONS: Final = 509
"""Regions at a time, as many as KVM has slots for a guest's memory (QEMU, libvhost-user)."""

EAGER: Final = 4096
"""Leaves of the native table that are filled when a region comes: 3 GiB and two odd ends, at least."""

_END: Final = 1 << 64

Homes = tuple[tuple[int, int, int, _core.Window], ...]
"""Regions by user address: that, the bytes, the GPA, and the window that they are the whole of."""


class _Region:
    """``size`` bytes of a file, mapped here."""

    def __init__(self, gpa: int, size: int, uva: int, offset: int, fd: int, terms: Terms) -> None:
        self.gpa = gpa
        self.end = gpa + size
        self.size = size
        self.uva = uva
        self.offset = offset
        self.access = terms.access
        self.mapping, self.window = map_shared(fd, offset, size, f"region at 0x{gpa:x}", terms)

    def close(self) -> None:
        self.window.release()
        self.mapping.close()


class RegionRam:
    """RAM made of regions that come and go. Implements ``BlockRam``; every access outside raises `AccessError`."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._by_uva: list[_Region] = []
        self._uvas: list[int] = []
        self._homes: Homes = ()
        self._watchers: list[Callable[[], None]] = []
        self._faults = _core.faults()
        self._damaged: tuple[GPA, ...] = ()
        self.radix: Final = _core.Radix(MAX_ACCESS)
        """Where a GPA is, as a host address, to read and write. It may know less than there is, never anything else."""

    # -- the front end's side

    def add(self, gpa: GPA, size: int, uva: UVA, offset: int, fd: int, terms: Terms = PLAIN) -> None:
        """Map ``size`` bytes at ``offset`` of the file ``fd`` as RAM at ``gpa``, the front end's ``uva``, on ``terms``.

        ``fd`` stays the caller's, to close at any time. Raises `ProtocolError`, with nothing changed, for
        zero or unaligned numbers, a range that wraps or overlaps another, more than `MAX_REGIONS`, or a
        file that is too short, not of memory, or not to be written.
        """
        if (gpa | size | uva | offset) & PAGE_MASK or size <= 0:
            raise ProtocolError(
                f"region at 0x{gpa:x}: size 0x{size:x}, user address 0x{uva:x}, offset 0x{offset:x}: "
                f"wanted multiples of {PAGE_SIZE}, and some bytes"
            )
        for what, start in (("guest-physical", gpa), ("user", uva), ("file", offset)):
            if not 0 <= start <= _END - size:
                raise ProtocolError(f"region at 0x{gpa:x}: 0x{size:x} bytes at {what} address 0x{start:x} wrap")
        if len(self._regions) >= MAX_REGIONS:
            raise ProtocolError(f"region at 0x{gpa:x}: there are {MAX_REGIONS} already")
        for other in self._regions:
            if gpa < other.end and other.gpa < gpa + size:
                raise ProtocolError(f"region at 0x{gpa:x}: overlaps the one at 0x{other.gpa:x}")
            if uva < other.uva + other.size and other.uva < uva + size:
                raise ProtocolError(f"region at 0x{gpa:x}: its user addresses overlap those of 0x{other.gpa:x}")
        region = _Region(gpa, size, uva, offset, fd, terms)
        self._regions.append(region)
        self._sort()
        self._enter(region)

    def remove(self, gpa: GPA, size: int, uva: UVA) -> None:
        """Take away the region with exactly these numbers. Raises `ProtocolError` if there is none."""
        for region in self._regions:
            if (region.gpa, region.size, region.uva) == (gpa, size, uva):
                self._regions.remove(region)
                self._drop([region])
                return
        raise ProtocolError(f"no region at 0x{gpa:x} of 0x{size:x} bytes at user address 0x{uva:x}")

    def clear(self) -> None:
        """Take away all regions."""
        gone, self._regions = self._regions, []
        self._drop(gone)

    def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` whenever a region goes, before its memory does: whoever remembers addresses forgets them."""
        self._watchers.append(gone)

    @property
    def damaged(self) -> tuple[GPA, ...]:
        """The regions of which the file was shortened under us, and bytes behind its end were accessed.

        They stay so until they are taken away. Cheap to ask for after every batch.
        """
        faults = _core.faults()
        if faults != self._faults:
            self._faults = faults
            self._damaged = tuple(GPA(region.gpa) for region in self._regions if region.mapping.faults)
        return self._damaged

    def _drop(self, gone: Sequence[_Region]) -> None:
        self._sort()
        if gone:
            for tell in self._watchers:
                tell()
            # A window cannot go while the table leads there.
            self.radix.clear()
        for region in gone:
            region.close()
        for region in self._regions if gone else ():
            self._enter(region)
        self._faults = -1  # look again

    def _enter(self, region: _Region) -> None:
        self.radix.fill_all(region.gpa, region.end - 1, region.window, 0, region.access.value, EAGER)

    def _sort(self) -> None:
        self._regions.sort(key=lambda region: region.gpa)
        self._starts = [region.gpa for region in self._regions]
        self._by_uva = sorted(self._regions, key=lambda region: region.uva)
        self._uvas = [region.uva for region in self._by_uva]
        self._homes = tuple((region.uva, region.size, region.gpa, region.window) for region in self._by_uva)

    @property
    def homes(self) -> Homes:
        """The regions as `_core.Answers` wants them. Another object as soon as there are other regions."""
        return self._homes

    def gpa_of(self, uva: UVA, length: int) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at the front end's ``uva``, one span a region; or what is missing."""
        spans: list[Span] = []
        address, end = int(uva), uva + length
        while address < end:
            at = bisect_right(self._uvas, address) - 1
            region = self._by_uva[at] if at >= 0 else None
            if region is None or address >= region.uva + region.size:
                return Miss(address, end - address, Access.RW, "in no region of the front end's memory table")
            step = min(end, region.uva + region.size) - address
            spans.append(Span(GPA(region.gpa + (address - region.uva)), step))
            address += step
        return spans

    # -- Ram

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        """The regions by address; ``offset`` is that in the region's own file."""
        return tuple(RamBlock(GPA(region.gpa), region.size, region.offset) for region in self._regions)

    def window_of(self, gpa: GPA, length: int) -> tuple[_core.Window, int]:
        """The window that holds all of the bytes, and the offset of the first one in it."""
        return self._find(gpa, length)

    def _find(self, gpa: int, length: int, align: int = 1) -> tuple[_core.Window, int]:
        if gpa % align:
            raise AccessError(gpa, length, f"not aligned to {align} bytes")
        at = bisect_right(self._starts, gpa) - 1
        if at >= 0 and gpa + length <= self._regions[at].end:
            region = self._regions[at]
            return region.window, gpa - region.gpa
        raise AccessError(gpa, length, "in no region of the memory table, or not in one alone")

    def remember(self, gpa: int, length: int) -> None:
        """Put what there is of ``length`` bytes at ``gpa`` into the native table."""
        end = gpa + length
        while gpa < end:
            at = bisect_right(self._starts, gpa) - 1
            if at < 0 or gpa >= self._regions[at].end:
                return
            region = self._regions[at]
            leaf = self.radix.fill(gpa, region.gpa, region.end - 1, region.window, 0, region.access.value)
            if not leaf:
                return
            gpa = (gpa & -leaf) + leaf

    def read(self, gpa: GPA, length: int) -> bytes:
        """Copy ``length`` bytes out, no order promised."""
        window, offset = self._find(gpa, length)
        return window.read(offset, length)

    def write(self, gpa: GPA, data: bytes) -> None:
        """Copy bytes in, no order promised."""
        window, offset = self._find(gpa, len(data))
        window.write(offset, data)

    def load16(self, gpa: GPA, order: ByteOrder = "little") -> int:
        """One 16-bit load, acquire."""
        window, offset = self._find(gpa, 2, 2)
        return window.load16(offset, order == "big")

    def load32(self, gpa: GPA, order: ByteOrder = "little") -> int:
        """One 32-bit load, acquire."""
        window, offset = self._find(gpa, 4, 4)
        return window.load32(offset, order == "big")

    def load_pair(self, gpa: GPA) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""
        window, offset = self._find(gpa, 16, 16)
        return window.load_pair(offset)

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 16-bit store, release."""
        window, offset = self._find(gpa, 2, 2)
        window.store16(offset, value, order == "big")

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 32-bit store, release."""
        window, offset = self._find(gpa, 4, 4)
        window.store32(offset, value, order == "big")

    def fence(self) -> None:
        """A full fence."""
        _core.fence()
