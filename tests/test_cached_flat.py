# SPDX-License-Identifier: Apache-2.0
"""A memory table's native table against its regions, and what goes into a native table before any use."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from virtiova._core import Mapping, Radix, Window
from virtiova.addr import GPA, UVA, Access
from virtiova.dma import iotlb, regions
from virtiova.dma.cached import CachedFlatSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.ram import ByteOrder
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import MAX_ACCESS, FlatSpace
from virtiova.errors import AccessError, ProtocolError

PAGE = 0x1000
MIB2 = 1 << 21
FILE = 4 * MIB2
STARTS = [0, PAGE, MIB2 - PAGE, MIB2, 3 * MIB2, (1 << 48) - MIB2, 1 << 48, (1 << 64) - MIB2]
SIZES = [PAGE, 3 * PAGE, MIB2, MIB2 + PAGE]
ORDERS: list[ByteOrder] = ["little", "big"]
addresses = st.one_of(
    st.integers(0, 5 * MIB2),
    st.builds(lambda a, b: max(0, a + b), st.sampled_from(STARTS), st.integers(-20, MIB2 + 20)),
)


def said(act: Callable[[], object]) -> object:
    try:
        return act()
    except AccessError as error:
        return str(error)


class RadixAgainstRegions(RuleBasedStateMachine):
    """`CachedFlatSpace` may not be told from `FlatSpace`, but by the clock. Regions come and go, adjacent or not."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("flat")
        os.pwrite(self.fd, b"".join(at.to_bytes(8, "little") for at in range(0, FILE, 8)), 0)
        self.ram = RegionRam()
        self.native = CachedFlatSpace(self.ram)
        self.readable = FlatSpace(self.ram)
        self.stamp = 0

    def teardown(self) -> None:
        self.ram.clear()
        assert self.ram.radix.tables == 0
        os.close(self.fd)

    @rule(gpa=st.sampled_from(STARTS), size=st.sampled_from(SIZES), offset=st.integers(0, FILE // PAGE - 1))
    def add(self, gpa: int, size: int, offset: int) -> None:
        try:
            self.ram.add(GPA(gpa), size, UVA(gpa // 2), offset * PAGE, self.fd)
        except ProtocolError:
            return
        if gpa + size <= 1 << 48:
            assert self.ram.radix.covers(gpa, size, Access.RW.value), "what is there is in the table, before any use"

    @rule(which=st.integers(0, 10))
    def remove(self, which: int) -> None:
        if blocks := self.ram.blocks:
            block = blocks[which % len(blocks)]
            self.ram.remove(block.gpa, block.size, UVA(block.gpa // 2))
            assert not self.ram.radix.covers(block.gpa, 1, Access.READ.value)

    @rule()
    def clear(self) -> None:
        self.ram.clear()

    @rule()
    def forget_the_cache(self) -> None:
        self.ram.radix.clear()

    @rule(gpa=addresses, length=st.sampled_from([0, 1, 16, PAGE, MIB2 + 5, MAX_ACCESS + 1]))
    def read(self, gpa: int, length: int) -> None:
        assert said(lambda: self.native.read(gpa, length)) == said(lambda: self.readable.read(gpa, length))

    @rule(gpa=addresses, length=st.sampled_from([0, 1, 16, PAGE, MIB2 + 5]))
    def write(self, gpa: int, length: int) -> None:
        self.stamp += 1
        data = (self.stamp.to_bytes(8, "little") * (length // 8 + 1))[:length]
        outcome = said(lambda: self.native.write(gpa, data))
        if outcome is None:
            assert self.readable.read(gpa, length) == data
        else:
            assert said(lambda: self.readable.write(gpa, data)) == outcome

    @rule(gpa=addresses, order=st.sampled_from(ORDERS))
    def sized(self, gpa: int, order: ByteOrder) -> None:
        for at in (gpa, gpa & ~15):
            assert said(lambda: self.native.load16(at, order)) == said(lambda: self.readable.load16(at, order))  # noqa: B023
            assert said(lambda: self.native.load_pair(at)) == said(lambda: self.readable.load_pair(at))  # noqa: B023
            self.stamp = self.stamp + 1 & 0xFFFF
            for size, store in ((2, self.native.store16), (4, self.native.store32)):
                if said(lambda: store(at, self.stamp, order)) is None:  # noqa: B023
                    assert self.readable.read(at, size) == self.stamp.to_bytes(size, order)

    @invariant()
    def the_table_knows_nothing_else(self) -> None:
        for place in STARTS:
            for gpa in (place, place + PAGE, place + MIB2 - 1):
                if self.ram.radix.covers(gpa, 1, Access.RW.value):
                    assert isinstance(said(lambda: self.ram.read(GPA(gpa), 1)), bytes)  # noqa: B023


RadixAgainstRegions.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestRadixAgainstRegions = RadixAgainstRegions.TestCase


# -- before any use


@pytest.fixture
def ram() -> Iterator[RegionRam]:
    fd = os.memfd_create("eager")
    os.ftruncate(fd, FILE)
    made = RegionRam()
    made.add(GPA(0), FILE, UVA(0), 0, fd)
    os.close(fd)
    yield made
    made.clear()


def test_an_answer_is_in_the_native_table_at_once(ram: RegionRam) -> None:
    table = Iotlb(ram)
    table.update(MIB2 - PAGE, MIB2 + 2 * PAGE, UVA(0), Access.READ)
    assert table.radix.covers(MIB2 - PAGE, MIB2 + 2 * PAGE, Access.READ.value)
    assert not table.radix.covers(MIB2 - PAGE, 1, Access.WRITE.value)
    assert not table.radix.covers(MIB2 - PAGE, MIB2 + 2 * PAGE + 1, Access.READ.value)
    table.invalidate(MIB2, PAGE)
    assert not table.radix.covers(MIB2, 1, Access.READ.value)
    assert table.lookup(MIB2 + PAGE, PAGE, Access.READ)


def test_one_answer_costs_no_more_than_so_many_leaves(ram: RegionRam) -> None:
    """1000 pages around a border of 2 MiB have no larger leaf."""
    table = Iotlb(ram)
    start = MIB2 - 500 * PAGE
    table.update(start, 1000 * PAGE, UVA(0), Access.RW)
    assert table.radix.covers(start, iotlb.EAGER * PAGE, Access.RW.value)
    assert not table.radix.covers(start + iotlb.EAGER * PAGE, 1, Access.RW.value)
    table.remember(start + 999 * PAGE, 1)
    assert table.radix.covers(start + 999 * PAGE, 1, Access.RW.value)


def test_a_region_of_many_leaves_is_entered_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "EAGER", 3)
    fd = os.memfd_create("many")
    os.ftruncate(fd, FILE)
    made = RegionRam()
    made.add(GPA(PAGE), MIB2, UVA(0), 0, fd)
    os.close(fd)
    assert made.radix.covers(PAGE, 3 * PAGE, Access.RW.value)
    assert not made.radix.covers(4 * PAGE, 1, Access.RW.value)
    space = CachedFlatSpace(made)
    space.write(4 * PAGE, b"beyond")
    assert made.radix.covers(4 * PAGE, 1, Access.RW.value)
    assert made.read(GPA(4 * PAGE), 6) == b"beyond"
    made.clear()


# -- the call by itself


def test_fill_all_enters_pages_of_which_it_has_the_beginning() -> None:
    radix, window = Radix(MAX_ACCESS), Window(mmap.mmap(-1, 4 * PAGE))
    assert radix.fill_all(0x1800, 0x47FF, window, 0x800, 3, 100) == 3
    assert not radix.covers(0x1FFF, 1, 1)
    assert radix.covers(0x2000, 2 * PAGE, 3)
    assert radix.covers(0x4000, 0x800, 3)
    assert not radix.covers(0x4800, 1, 1)
    window.write(PAGE, b"here")
    assert radix.read(0x2000, 4) == b"here"
    # Memory that no leaf can lead to, no permission, no place below 2**48, the last page of all, no leaves wanted.
    assert radix.fill_all(0x10000, 0x10FFF, window, 8, 3, 100) == 0
    assert radix.fill_all(0x10000, 0x10FFF, window, 0, 0, 100) == 0
    assert radix.fill_all((1 << 48) - PAGE, (1 << 48) + PAGE - 1, window, 0, 3, 100) == 1
    assert radix.fill_all((1 << 64) - PAGE, (1 << 64) - 1, window, 0, 3, 100) == 0
    assert radix.fill_all(0x10000, 0x10FFF, window, 0, 3, 0) == 0
    for wrong in ((0x2000, 0x1FFF, 0, 3), (0, 1 << 63, 0, 3), (0, PAGE - 1, 0, 4)):
        with pytest.raises(ValueError, match="wanted an interval"):
            radix.fill_all(wrong[0], wrong[1], window, wrong[2], wrong[3], 1)
    with pytest.raises(IndexError):
        radix.fill_all(0, 5 * PAGE - 1, window, 0, 3, 1)
    with pytest.raises(BufferError):
        window.release()
    radix.clear()
    window.release()


def test_fill_all_makes_no_room_for_itself() -> None:
    """What is used stays: without a free table, nothing more is entered, and nothing is forgotten."""
    fd = os.memfd_create("room")
    os.ftruncate(fd, PAGE)
    radix, window = Radix(MAX_ACCESS), Mapping(fd, 0, PAGE, PAGE).window(0, PAGE)
    os.close(fd)
    count = 0
    while radix.fill_all(count * MIB2, count * MIB2 + PAGE - 1, window, 0, 3, 1):
        count += 1
    assert 4000 < count < 4096
    assert radix.covers(0, 1, 3)
    # One that is asked for makes room.
    assert radix.fill(count * MIB2, count * MIB2, count * MIB2 + PAGE - 1, window, 0, 3) == PAGE
    assert not radix.covers(0, 1, 3)
    radix.clear()
    window.release()
