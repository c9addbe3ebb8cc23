# SPDX-License-Identifier: Apache-2.0
"""A ring of a driver's and its native end, in one process and without a thread: engines are tried step by step."""

from __future__ import annotations

import mmap
import os
import struct

from virtiova._core import Drain, Radix, Window
from virtiova.dma.space import MAX_ACCESS
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout

PAGE = 0x1000
IOVA = 0x7_0000_0000
"""Where memory is for the device: nowhere near its own offsets."""


class World:
    """``pages`` pages of memory, mapped page by page at ``IOVA`` with gaps, in another order; a ring in the first."""

    def __init__(self, pages: int = 96, size: int = 64) -> None:
        self.memory = mmap.mmap(-1, pages * PAGE)
        self.window = Window(self.memory)
        self.radix = Radix(MAX_ACCESS)
        self.layout = SplitLayout(size)
        assert self.layout.total <= 2 * PAGE
        for page in range(pages):
            self.map(page)
        self.drain = self.fresh()
        self.available = 0
        self.free = list(range(size))

    def fresh(self) -> Drain:
        """The device's end of the ring, at its start."""
        desc, avail, used = (self.dma(at) for at in (0, self.layout.avail, self.layout.used))
        return Drain(self.radix, desc, avail, used, self.layout.size, event_idx=True, indirect=False)

    def map(self, page: int, to: int | None = None) -> None:
        """Let the device find a page, its own or another one."""
        first = self.dma(page * PAGE)
        offset = (page if to is None else to) * PAGE
        assert self.radix.fill(first, first, first + PAGE - 1, self.window, offset, 3) == PAGE

    def unmap(self, page: int) -> None:
        """Take it away."""
        self.radix.drop(self.dma(page * PAGE), self.dma(page * PAGE) + PAGE - 1)

    @staticmethod
    def dma(offset: int) -> int:
        """What the driver calls a byte. The two pages of the ring lie side by side, the others do not."""
        page, at = divmod(offset, PAGE)
        return IOVA + (page if page < 2 else 2 * page) * PAGE + at

    def offer(self, *buffers: tuple[int, int, bool]) -> int:
        """Make a chain of (offset, length, writable) available, each within a page; its head."""
        return self.offer_at(*((self.dma(offset), length, writable) for offset, length, writable in buffers))

    def offer_at(self, *buffers: tuple[int, int, bool]) -> int:
        """The same by the device's addresses."""
        taken = [self.free.pop(0) for _ in buffers]
        for at, (address, length, writable) in enumerate(buffers):
            more = at + 1 < len(buffers)
            flags = (DESC_F_WRITE if writable else 0) | (DESC_F_NEXT if more else 0)
            desc = Desc(address, length, flags, taken[at + 1] if more else 0)
            self.memory[16 * taken[at] : 16 * taken[at] + 16] = desc.pack()
        avail = self.layout.avail
        slot = avail + 4 + 2 * (self.available % self.layout.size)
        self.memory[slot : slot + 2] = struct.pack("<H", taken[0])
        self.available = (self.available + 1) & 0xFFFF
        self.memory[avail + 2 : avail + 4] = struct.pack("<H", self.available)
        return taken[0]

    @property
    def used(self) -> list[tuple[int, int]]:
        """What the driver was given back: heads and lengths, the last lap of the ring."""
        (index,) = struct.unpack_from("<H", self.memory, self.layout.used + 2)
        laps = range(max(0, index - self.layout.size), index)
        places = (self.layout.used + self.layout.used_entry(at) for at in laps)
        return [struct.unpack_from("<II", self.memory, place) for place in places]

    def put(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data

    def get(self, offset: int, length: int) -> bytes:
        return self.memory[offset : offset + length]

    def close(self) -> None:
        self.radix.clear()
        self.window.release()


def forget(fd: int) -> None:
    """Nothing of a file stays in memory, so that reading it has to wait."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
