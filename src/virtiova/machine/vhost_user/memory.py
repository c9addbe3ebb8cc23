# SPDX-License-Identifier: Apache-2.0
"""The machine's memory: one file, cut into regions that lie elsewhere for everybody who names them.

A byte has three addresses, no two of which are ever equal: its guest-physical address, our own ("user") address
that the protocol uses, and its offset in the file. A back end that takes one for another finds nothing there,
or a page that says so.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

from virtiova.addr import GPA, UVA
from virtiova.dma.ram import MappedRam, PageAllocator, RamBlock
from virtiova.errors import AccessError
from virtiova.machine.qemu.process import sealed_file
from virtiova.wire.vhost_user import MemoryRegion

_MIB: Final = 1 << 20

REGIONS: Final = (
    MemoryRegion(GPA(0), 0xA0000, UVA(0x7E5A_0000_0000), 9 * _MIB),
    MemoryRegion(GPA(_MIB), 3 * _MIB, UVA(0x7E58_4000_0000), 5 * _MIB),
    # Follows the one before for the guest, and for nobody else. The canaries' pages A lie there, and B here.
    MemoryRegion(GPA(4 * _MIB), 4 * _MIB, UVA(0x7E52_8000_0000), _MIB),
)
"""What the back end is told. The second and third are one run of guest memory, as below and above a hole."""

FILE_SIZE: Final = 10 * _MIB
_PAGES: Final = (GPA(_MIB), GPA(8 * _MIB))


class SharedMemory:
    """The file, mapped here; ``fd`` is what the back end gets for each region. Sealed: nobody can cut it short.

    ``regions`` are what the back end is told of it; the machine has all of `REGIONS` in any case. ``made`` makes RAM of
    the mapping.
    """

    def __init__(self, made: Callable[[mmap.mmap, Sequence[RamBlock]], MappedRam] = MappedRam) -> None:
        self.regions: tuple[MemoryRegion, ...] = REGIONS
        self.fd = sealed_file("virtiova-ram", FILE_SIZE)
        try:
            self._map = mmap.mmap(self.fd, FILE_SIZE)
        except BaseException:
            os.close(self.fd)
            raise
        self.ram = made(self._map, [RamBlock(region.gpa, region.size, region.offset) for region in REGIONS])
        self.pages = PageAllocator(self.ram, *_PAGES)

    def uva(self, gpa: int) -> UVA:
        """Our own address of a byte of guest memory; `AccessError` if there is none."""
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return UVA(region.uva + (gpa - region.gpa))
        raise AccessError(gpa, 1, "no RAM there")

    def at(self, gpa: int, length: int) -> bytes:
        """What is there now."""
        return self.ram.read(GPA(gpa), length)

    @staticmethod
    def offset(gpa: int) -> int:
        """Where in the file a byte of guest memory is; `AccessError` if there is none."""
        for region in REGIONS:
            if region.gpa <= gpa < region.gpa + region.size:
                return region.offset + (gpa - region.gpa)
        raise AccessError(gpa, 1, "no RAM there")

    def bytes_of_file(self) -> bytes:
        """All of the file: also what no region ever led to."""
        return self._map[:]

    def part_of_file(self, offset: int, length: int) -> bytes:
        """Some of it."""
        return self._map[offset : offset + length]

    def fill(self, offset: int, data: bytes) -> None:
        """Write to the file, past all regions."""
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.ram.close()
            self._map.close()
            os.close(fd)
