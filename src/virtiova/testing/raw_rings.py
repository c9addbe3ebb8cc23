# SPDX-License-Identifier: Apache-2.0
"""Rings laid into RAM by hand, byte by byte: the driver of whoever tests a device end, honest or not."""

from __future__ import annotations

import struct

from virtiova.addr import GPA
from virtiova.dma.ram import ByteOrder, MappedRam
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, PackedDesc, PackedLayout, SplitLayout


class RawRing:
    """The three parts of a split ring at ``base`` of RAM. Nothing is checked here: write what you like."""

    def __init__(self, ram: MappedRam, base: int, size: int = 8, order: ByteOrder = "little") -> None:
        self.layout = SplitLayout(size)
        self.ram = ram
        self.order: ByteOrder = order
        self.desc = base
        self.avail = base + self.layout.avail
        self.used = base + self.layout.used
        self.index = 0

    def put16(self, address: int, value: int) -> None:
        """16 bits, in the ring's byte order."""
        self.ram.write(GPA(address), (value & 0xFFFF).to_bytes(2, self.order))

    def get16(self, address: int) -> int:
        """The same."""
        return int.from_bytes(self.ram.read(GPA(address), 2), self.order)

    def put_desc(self, index: int, desc: Desc, table: int | None = None) -> None:
        """A descriptor of the ring, or of the ``table`` at that address."""
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
        """How many the device has used, as it says."""
        return self.get16(self.used + 2)

    def used_element(self, index: int) -> tuple[int, int]:
        """Head and length."""
        order = "<" if self.order == "little" else ">"
        at = self.used + self.layout.used_entry(index)
        head, length = struct.unpack(order + "II", self.ram.read(GPA(at), 8))
        return head, length


class RawPackedRing:
    """A packed ring at ``base`` of RAM. Nothing is checked here: write what you like."""

    def __init__(self, ram: MappedRam, base: int, size: int = 8) -> None:
        self.layout = PackedLayout(size)
        self.ram = ram
        self.desc = base
        self.driver = base + self.layout.driver
        self.device = base + self.layout.device
        self.place = 0

    def put_desc(self, place: int, desc: PackedDesc) -> None:
        """A descriptor with all its flags as they are."""
        self.ram.write(GPA(self.desc + self.layout.entry(place)), desc.pack())

    def get_desc(self, place: int) -> PackedDesc:
        """What is there."""
        return PackedDesc.unpack(self.ram.read(GPA(self.desc + self.layout.entry(place)), 16))

    def offer(self, *buffers: tuple[int, int, bool], number: int = 0) -> None:
        """Make a list of (address, length, device writes) available; its buffer id is in the last descriptor only."""
        rows = []
        for at, (address, length, write) in enumerate(buffers):
            last = at == len(buffers) - 1
            flags = (DESC_F_WRITE if write else 0) | (0 if last else DESC_F_NEXT)
            rows.append((address, length, number if last else 0xFFFF, flags))
        self.offer_rows(*rows)

    def offer_rows(self, *rows: tuple[int, int, int, int]) -> None:
        """The same of (address, length, id, flags besides those that say whose it is)."""
        for address, length, number, flags in rows:
            self.put_desc(self.place, PackedDesc(address, length, number, flags | self.layout.available(self.place)))
            self.place += 1

    def wish(self, value: int, place: int = 0) -> None:
        """The driver's event suppression."""
        word = self.layout.encode(place).to_bytes(2, "little") + value.to_bytes(2, "little")
        self.ram.write(GPA(self.driver), word)

    def device_wish(self) -> tuple[int, int]:
        """The device's event suppression: place and flags."""
        word = self.ram.read(GPA(self.device), 4)
        return int.from_bytes(word[:2], "little"), int.from_bytes(word[2:], "little")
