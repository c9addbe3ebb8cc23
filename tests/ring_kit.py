# SPDX-License-Identifier: Apache-2.0
"""A split ring laid into RAM by hand, byte by byte: the driver of the tests, honest or not."""

from __future__ import annotations

import struct

from virtiova.addr import GPA
from virtiova.dma.ram import ByteOrder, MappedRam, RamBlock
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout


def make_ram(size: int, gpa: int = 0) -> MappedRam:
    """Zeroed RAM in one block."""
    return MappedRam(bytearray(size), [RamBlock(GPA(gpa), size, 0)])


class RawRing:
    """The three parts at ``base`` of RAM. Nothing is checked here: tests write what they like."""

    def __init__(self, ram: MappedRam, base: int, size: int = 8, order: ByteOrder = "little") -> None:
        self.layout = SplitLayout(size)
        self.ram = ram
        self.order: ByteOrder = order
        self.desc = base
        self.avail = base + self.layout.avail
        self.used = base + self.layout.used
        self.index = 0

    def put16(self, address: int, value: int) -> None:
        self.ram.write(GPA(address), (value & 0xFFFF).to_bytes(2, self.order))

    def get16(self, address: int) -> int:
        return int.from_bytes(self.ram.read(GPA(address), 2), self.order)

    def put_desc(self, index: int, desc: Desc, table: int | None = None) -> None:
        base = self.desc if table is None else table
        self.ram.write(GPA(base + 16 * index), desc.pack(self.order))

    def put_chain(self, first: int, *buffers: tuple[int, int, bool], table: int | None = None) -> None:
        """Buffers of (address, length, device writes) in descriptors ``first``, ``first`` + 1, ..."""
        for at, (address, length, write) in enumerate(buffers):
            last = at == len(buffers) - 1
            flags = (DESC_F_WRITE if write else 0) | (0 if last else DESC_F_NEXT)
            self.put_desc(first + at, Desc(address, length, flags, 0 if last else first + at + 1), table)

    def offer(self, *heads: int) -> None:
        """Make chains available."""
        for head in heads:
            self.put16(self.avail + self.layout.avail_entry(self.index), head)
            self.index += 1
        self.put16(self.avail + 2, self.index)

    @property
    def used_index(self) -> int:
        return self.get16(self.used + 2)

    def used_element(self, index: int) -> tuple[int, int]:
        """Head and length."""
        order = "<" if self.order == "little" else ">"
        at = self.used + self.layout.used_entry(index)
        head, length = struct.unpack(order + "II", self.ram.read(GPA(at), 8))
        return head, length
