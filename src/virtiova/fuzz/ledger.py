# SPDX-License-Identifier: Apache-2.0
"""What of the machine's memory the back end may change: a copy that only we write to, and the pages it was granted."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import Final

from virtiova.addr import GPA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.ram import ByteOrder, MappedRam, RamBlock
from virtiova.machine.vhost_user.memory import FILE_SIZE, SharedMemory
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage, MemoryRegion

_ODD: Final = 1 << 21
"""Bytes of an update from which on nobody keeps its pages apart: what it grants stays granted."""
_SHOWN: Final = 16


class Mirrored(MappedRam):
    """RAM of which a copy is kept, by offset in its file, that gets our own writes only."""

    def __init__(self, buffer: mmap.mmap, blocks: Sequence[RamBlock]) -> None:
        super().__init__(buffer, blocks)
        # A fresh file: nothing but zeros.
        self.copy = bytearray(len(buffer))

    def write(self, gpa: GPA, data: bytes) -> None:
        at = self._offset(gpa, len(data))
        self.copy[at : at + len(data)] = data
        super().write(gpa, data)

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        at = self._aligned(gpa, 2)
        self.copy[at : at + 2] = value.to_bytes(2, order)
        super().store16(gpa, value, order)

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        at = self._aligned(gpa, 4)
        self.copy[at : at + 4] = value.to_bytes(4, order)
        super().store32(gpa, value, order)


class Ledger:
    """The machine's memory under a fuzzer, and what was granted of it.

    With bit 33 that is every page of the file that an UPDATE allows to write, until an INVALIDATE of its addresses is
    acknowledged; without, all of the regions that the back end was told of. Between the regions, and around them, lie
    pages that are never granted. What is not sure to be forbidden counts as granted.
    """

    def __init__(self) -> None:
        self._ram: list[Mirrored] = []
        self.memory = SharedMemory(self._make)
        self._paint()
        self._by_page: dict[int, set[int]] = {}
        """Pages of the file, by the page of addresses that leads there."""
        self._for_good: set[int] = set()
        self._leaving: list[set[int]] = []

    def _make(self, buffer: mmap.mmap, blocks: Sequence[RamBlock]) -> Mirrored:
        self._ram.append(Mirrored(buffer, blocks))
        return self._ram[0]

    def _paint(self) -> None:
        """What is never granted is not zero: a device that writes zeros is seen as well."""
        at = 0
        for start, size in [*sorted((region.offset, region.size) for region in self.memory.regions), (FILE_SIZE, 0)]:
            gap = b"\x5a" * (start - at)
            self.memory.fill(at, gap)
            self._ram[0].copy[at:start] = gap
            at = start + size

    def told(self, message: IotlbMessage) -> None:
        """An IOTLB message is about to be sent. Of an INVALIDATE `takes_back` has to know."""
        if message.kind is not IotlbKind.UPDATE or Access.WRITE not in message.perm:
            return
        pages = list(self._pages(message.uaddr, message.size))
        aligned = not (message.iova | message.uaddr | message.size) & PAGE_MASK
        if not aligned or message.size > _ODD or len(pages) * PAGE_SIZE != message.size:
            self._for_good.update(pages)
            return
        for index, page in enumerate(pages):
            self._by_page.setdefault(message.iova // PAGE_SIZE + index, set()).add(page)

    def _pages(self, uaddr: int, size: int) -> Iterable[int]:
        """The pages of the file behind user addresses, as far as there are some, in order."""
        end = uaddr + size
        for region in sorted(self.memory.regions, key=lambda each: each.uva):
            first, last = max(uaddr, region.uva), min(end, region.uva + region.size)
            if first < last:
                start = region.offset + first - region.uva
                yield from range(start // PAGE_SIZE, (start + last - first - 1) // PAGE_SIZE + 1)

    def takes_back(self, iova: int, size: int) -> set[int]:
        """An INVALIDATE is about to be sent: the pages that it takes back, if no other address leads to them. They are
        granted until `took_back`; what is told after this is granted anew."""
        first, last = -(-iova // PAGE_SIZE), (iova + size) // PAGE_SIZE
        gone = [page for page in self._by_page if first <= page < last]
        taken = set[int]().union(*(self._by_page.pop(page) for page in gone))
        self._leaving.append(taken)
        return taken

    def took_back(self, taken: set[int]) -> None:
        """It is acknowledged: what came to these pages until now was allowed, and no more is."""
        self._leaving.remove(taken)
        for page in taken - self._allowed():
            at = page * PAGE_SIZE
            self._ram[0].copy[at : at + PAGE_SIZE] = self.memory.part_of_file(at, PAGE_SIZE)

    def _allowed(self) -> set[int]:
        return self._for_good.union(*self._by_page.values(), *self._leaving)

    def granted(self, regions: Sequence[MemoryRegion]) -> None:
        """All of these regions, for good: there is no bit 33, so that a descriptor may name any of it."""
        for region in regions:
            first = region.offset // PAGE_SIZE
            self._for_good.update(range(first, (region.offset + region.size - 1) // PAGE_SIZE + 1))

    def strayed(self) -> str:
        """Where a page has changed that was not granted, and how; empty if none has."""
        now, ours = self.memory.bytes_of_file(), self._ram[0].copy
        if now == ours:
            return ""
        allowed = self._allowed()
        for page in range(len(now) // PAGE_SIZE):
            at = page * PAGE_SIZE
            if page in allowed or now[at : at + PAGE_SIZE] == ours[at : at + PAGE_SIZE]:
                continue
            offset = next(at + i for i in range(PAGE_SIZE) if now[at + i] != ours[at + i])
            was, came = ours[offset : offset + _SHOWN].hex(), now[offset : offset + _SHOWN].hex()
            return f"{self._named(offset)} was {was} and is {came}"
        return ""

    def _named(self, offset: int) -> str:
        for region in self.memory.regions:
            if region.offset <= offset < region.offset + region.size:
                return f"guest-physical 0x{region.gpa + offset - region.offset:x}, which was not granted,"
        return f"offset 0x{offset:x} of the memory file, which is in no region,"
