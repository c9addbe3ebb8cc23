# SPDX-License-Identifier: Apache-2.0
"""A split ring laid into RAM by hand, byte by byte: the driver of the tests, honest or not; and who watches what a
device end looks at."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from virtiova.addr import GPA, Access
from virtiova.dma.ram import ByteOrder, MappedRam, RamBlock
from virtiova.dma.space import AddressSpace, Miss, Span
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


@dataclass
class Op:
    what: str
    address: int
    length: int


class Watched:
    """Records every access; a hook may change memory right after a load, as the other side can."""

    def __init__(self, inner: AddressSpace) -> None:
        self.inner = inner
        self.ops: list[Op] = []
        self.after: Callable[[Op], None] = lambda op: None

    def note(self, what: str, address: int, length: int) -> None:
        op = Op(what, address, length)
        self.ops.append(op)
        self.after(op)

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
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
