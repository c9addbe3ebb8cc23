# SPDX-License-Identifier: Apache-2.0
"""Sabre's IOMMU as bytes, and the tables that are made of them, walked a second time as the manual says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import MappedRam, PageAllocator, RamBlock
from virtiova.errors import AccessError, ProtocolError
from virtiova.iommu.sabre import SabreIommu
from virtiova.wire import sabre
from virtiova.wire.sabre import PAGE, Entry

BASE = 0x1FE00000000
RAM_END = 16 << 20
TABLES = 4 << 20

sizes = st.integers(0, 7)
pages = st.integers(0, 2**28 - 1).map(lambda number: number * PAGE)


def test_registers_and_bits() -> None:
    assert (sabre.CONTROL, sabre.TSB_BASE, sabre.FLUSH) == (0x200, 0x208, 0x210)
    assert sabre.control(0, on=True) == 1
    assert sabre.control(7, on=True) == 0x70001
    assert sabre.control(3, on=False) == 0x30000
    assert sabre.register(0x70001) == bytes.fromhex("0000000000070001")


def test_reach() -> None:
    assert [sabre.reach(size) >> 20 for size in range(8)] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert [sabre.table_bytes(size) >> 10 for size in (0, 7)] == [8, 1024]
    assert sabre.size_for(8 << 20) == 0
    assert sabre.size_for((8 << 20) + 1) == 1
    with pytest.raises(AccessError):
        sabre.size_for((1 << 30) + 1)
    for size in (-1, 8):
        with pytest.raises(ProtocolError):
            sabre.reach(size)


def test_the_index_wraps() -> None:
    # Seen on QEMU: with size 0, 0xA00000 and 0x40200000 are translated by entry (X >> 13) & 1023.
    for address in (0xA00000, 0x40200000):
        assert sabre.entry_offset(address, 0) == 8 * (address >> 13 & 1023) == 8 * 256


@given(st.integers(0, 2**64 - 1), sizes)
def test_every_offset_lies_in_the_table(address: int, size: int) -> None:
    offset = sabre.entry_offset(address, size)
    assert offset % 8 == 0
    assert 0 <= offset < sabre.table_bytes(size)


def test_entries() -> None:
    assert Entry(True, 0x812000, True).pack() == bytes.fromhex("8000000000812002")
    assert Entry(True, 0x812000, False).pack() == bytes.fromhex("8000000000812000")
    assert Entry(False, 0x812000, True).pack() == bytes(8)


@given(pages, st.booleans())
def test_entries_there_and_back(address: int, writable: bool) -> None:
    entry = Entry(True, address, writable)
    assert Entry.unpack(entry.pack()) == entry


@given(st.binary(min_size=8, max_size=8))
def test_any_entry_has_a_meaning(data: bytes) -> None:
    entry = Entry.unpack(data)
    assert entry.valid == bool(data[0] & 0x80)
    assert entry.address % PAGE == 0
    assert 0 <= entry.address < 1 << 41
    assert Entry.unpack(entry.pack()) == entry


@given(st.binary(max_size=20).filter(lambda data: len(data) != 8))
def test_an_entry_has_eight_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Entry.unpack(data)


@pytest.mark.parametrize("address", [1, PAGE_SIZE, 1 << 41, -PAGE])
def test_only_pages_can_be_pointed_at(address: int) -> None:
    with pytest.raises(AccessError):
        Entry(True, address, True).pack()


# -- the IOMMU over plain memory ----------------------------------------------------------------------------------


class Registers:
    """Where writes to registers end: by offset from the bridge's base, as the bytes that were on the bus."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}

    def read(self, address: int, size: int) -> int:
        return int.from_bytes(self.held.get(address - BASE, bytes(size)), "little")

    def write(self, address: int, size: int, value: int) -> None:
        self.held[address - BASE] = value.to_bytes(size, "little")

    def flush(self) -> None: ...


class Hardware:
    """The same memory and registers, read the other way round: by a device's access."""

    def __init__(self) -> None:
        self.ram = MappedRam(bytearray(RAM_END), [RamBlock(GPA(0), RAM_END, 0)])
        self.registers = Registers()
        tables = PageAllocator(self.ram, GPA(TABLES), GPA(TABLES + (4 << 20)))
        self.iommu = SabreIommu(self.registers, self.ram, tables, BASE, RAM_END)

    def reach(self, address: int) -> tuple[int, bool] | None:
        """Physical address and whether it can be written; None if the access is refused."""
        control = int.from_bytes(self.registers.held.get(0x200, bytes(8)), "big")
        if not control & 1:
            return address, True
        table = int.from_bytes(self.registers.held[0x208], "big")
        index = (address >> 13) % (1024 << (control >> 16 & 7))
        entry = int.from_bytes(self.ram.read(GPA(table + 8 * index), 8), "big")
        if not entry >> 63:
            return None
        return entry & 0x1FFFFFFE000 | address & 0x1FFF, bool(entry & 2)


def test_on_and_off() -> None:
    it = Hardware()
    assert it.reach(0x123456) == (0x123456, True)
    it.iommu.enable()
    assert it.reach(0x123456) is None
    assert 0x210 in it.registers.held
    it.iommu.disable()
    assert it.reach(0x123456) == (0x123456, True)


@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 511), st.sampled_from([0, 1, 3])), max_size=12))
def test_what_is_mapped_is_reached(steps: list[tuple[int, int, int]]) -> None:
    it = Hardware()
    it.iommu.enable()
    expected: dict[int, tuple[int, bool]] = {}
    for page, frame, access in steps:
        iova, gpa = page * PAGE, (8 << 20) + frame * PAGE
        if access:
            it.iommu.map(IOVA(iova), GPA(gpa), PAGE, Access(access))
            expected[iova] = gpa, bool(access & 2)
        else:
            it.iommu.unmap(IOVA(iova), PAGE)
            expected.pop(iova, None)
    for page, _, _ in steps:
        for iova in (page * PAGE, (page ^ 1) * PAGE):
            wanted = expected.get(iova)
            assert it.reach(iova + 5) == (None if wanted is None else (wanted[0] + 5, wanted[1]))


def test_an_iova_is_never_an_address_of_ram() -> None:
    it = Hardware()
    seen = [it.iommu.allocate(size) for size in (1, PAGE, 3 * PAGE)]
    assert seen == [RAM_END, RAM_END + 2 * PAGE, RAM_END + 4 * PAGE]
    with pytest.raises(AccessError, match="no IOVAs left"):
        it.iommu.allocate(RAM_END)


def test_what_cannot_be_mapped() -> None:
    it = Hardware()
    with pytest.raises(AccessError, match="writing without reading"):
        it.iommu.map(IOVA(0), GPA(0), PAGE, Access.WRITE)
    for iova, size in ((PAGE_SIZE, PAGE), (0, PAGE_SIZE), (0, 0), (2 * RAM_END, PAGE), (-PAGE, PAGE)):
        with pytest.raises(AccessError):
            it.iommu.map(IOVA(iova), GPA(0), size)
        with pytest.raises(AccessError):
            it.iommu.unmap(IOVA(iova), size)
    assert it.iommu.faults() == []
