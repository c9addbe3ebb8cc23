# SPDX-License-Identifier: Apache-2.0
"""The native table of IOVAs against the intervals in Python that it caches: it may know less, never anything else."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from virtiova._core import Mapping, Radix, Window
from virtiova.addr import GPA, UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.ram import ByteOrder
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import MAX_ACCESS, MediatedSpace, Miss
from virtiova.errors import AccessError, ProtocolError

PAGE = 0x1000
MIB2 = 1 << 21
GIB = 1 << 30
BASE = UVA(0x7000_0000_0000)
UPPER = (0xFEF00000, 0xFFFFFFFF01100000)
LOWER = (0x0, 0xFEE00000)


def memory(pages: int) -> Window:
    return Window(mmap.mmap(-1, pages * PAGE))


# -- the table alone


@pytest.mark.parametrize(
    ("address", "first", "last", "leaf"),
    [
        (0x1234, 0x1000, 0x1FFF, PAGE),
        (0x1234, 0x1000, 0x1FFE, PAGE),
        (0x1234, 0x1000, 0x1234, PAGE),
        (0x1234, 0x1001, 0x2FFF, 0),
        (MIB2 + 5, MIB2, 2 * MIB2 - 1, MIB2),
        (MIB2 + 5, MIB2 - PAGE, 2 * MIB2 + PAGE - 1, MIB2),
        (MIB2 + 5, MIB2, 2 * MIB2 - 2, PAGE),
        (MIB2 - 1, MIB2 - PAGE, 2 * MIB2 - 1, PAGE),
        ((1 << 48) - 1, (1 << 48) - PAGE, (1 << 48) - 1, PAGE),
        (1 << 48, 1 << 48, (1 << 48) + PAGE - 1, 0),
        ((1 << 64) - 1, (1 << 64) - PAGE, (1 << 64) - 1, 0),
    ],
)
def test_the_largest_leaf_that_fits(address: int, first: int, last: int, leaf: int) -> None:
    radix = Radix(MAX_ACCESS)
    window = memory(1026)
    assert radix.fill(address, first, last, window, 0, 1) == leaf
    assert radix.covers(address, 1, 1) == bool(leaf)
    assert not radix.covers(address, 1, 2)
    radix.clear()
    window.release()


@pytest.mark.parametrize("length", [1, 3, 4, 0x800, PAGE - 1])
def test_of_a_page_of_which_only_the_beginning_is_mapped_nothing_else_is_there(length: int) -> None:
    radix, window = Radix(MAX_ACCESS), memory(2)
    assert radix.fill_all(MIB2 - PAGE, MIB2 + length - 1, window, 0, 3, 8) == 2
    assert radix.covers(MIB2 - PAGE, PAGE + length, 3)
    assert radix.covers(MIB2 + length - 1, 1, 3)
    assert not radix.covers(MIB2 + length, 1, 1)
    assert not radix.covers(MIB2, length + 1, 1)
    assert not radix.covers(MIB2 + PAGE - 1, 1, 1)
    radix.drop(MIB2, MIB2)
    assert not radix.covers(MIB2, 1, 1)
    assert radix.fill(MIB2, MIB2, MIB2 + length - 1, window, PAGE, 1) == PAGE
    assert radix.covers(MIB2, length, 1)
    assert not radix.covers(MIB2, length, 2)
    assert radix.fill(MIB2, MIB2, MIB2 + PAGE - 1, window, PAGE, 3) == PAGE, "all of it in place of a part"
    assert radix.covers(MIB2, PAGE, 3)
    radix.clear()
    window.release()


def test_a_gigabyte_is_one_leaf() -> None:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, GIB + PAGE)
    window = Mapping(fd, 0, GIB + PAGE, PAGE).window(0, GIB + PAGE)
    os.close(fd)
    radix = Radix(MAX_ACCESS)
    assert radix.fill(5 * GIB + 77, 5 * GIB, 6 * GIB - 1, window, PAGE, 3) == GIB
    assert radix.tables == 2
    assert radix.write(6 * GIB - 3, b"end")
    assert window.read(GIB + PAGE - 3, 3) == b"end"
    assert not radix.covers(6 * GIB - 1, 2, 1)
    radix.drop(5 * GIB + 12345, 5 * GIB + 12345)
    assert not radix.covers(5 * GIB, 1, 1), "a part of a leaf takes all of it"


def test_a_big_leaf_in_place_of_small_ones_and_the_other_way() -> None:
    window = memory(1024)
    radix = Radix(MAX_ACCESS)
    assert radix.fill(MIB2, MIB2, MIB2 + PAGE - 1, window, 5 * PAGE, 3) == PAGE
    assert radix.tables == 4
    assert radix.fill(MIB2, MIB2, 2 * MIB2 - 1, window, 0, 3) == MIB2
    assert radix.tables == 3
    window.write(7 * PAGE, b"seven")
    assert radix.read(MIB2 + 7 * PAGE, 5) == b"seven"
    assert radix.fill(MIB2, MIB2, MIB2 + PAGE - 1, window, 7 * PAGE, 3) == PAGE
    assert radix.read(MIB2, 5) == b"seven"
    assert not radix.covers(MIB2 + PAGE, 1, 1)


def test_forgetting_takes_no_more_than_it_must() -> None:
    """Pages on both sides of a border between two tables, and a bigger leaf next to them."""
    window = memory(1024)
    radix = Radix(MAX_ACCESS)
    pages = [MIB2 - 2 * PAGE, MIB2 - PAGE, MIB2, MIB2 + PAGE, MIB2 + 2 * PAGE]
    radix.fill(2 * MIB2, 2 * MIB2, 3 * MIB2 - 1, window, 0, 3)

    def left(first: int, last: int) -> list[bool]:
        for page in pages:
            radix.fill(page, page, page + PAGE - 1, window, 0, 3)
        radix.drop(first, last)
        return [radix.covers(page, PAGE, 3) for page in pages]

    assert left(MIB2, MIB2 + PAGE - 1) == [True, True, False, True, True]
    assert left(MIB2 - 1, MIB2) == [True, False, False, True, True]
    assert left(MIB2 - PAGE, MIB2 + 2 * PAGE - 1) == [True, False, False, False, True]
    assert left(MIB2 + 1, 2 * MIB2 - 1) == [True, True, False, False, False]
    assert left(0, MIB2 - 1) == [False, False, True, True, True]
    assert left(5, 4) == [True] * 5
    assert left(1 << 48, (1 << 64) - 1) == [True] * 5
    assert radix.covers(2 * MIB2, MIB2, 3)
    assert left(MIB2 + 2 * PAGE, (1 << 64) - 1) == [True, True, True, True, False]
    assert not radix.covers(2 * MIB2, 1, 1)


def test_tables_are_bounded() -> None:
    """One page in each gigabyte takes two tables of its own; it starts anew instead of taking more than 4096."""
    window = memory(1)
    radix = Radix(MAX_ACCESS)
    most = 0
    for at in range(5000):
        assert radix.fill(at << 30, at << 30, (at << 30) + PAGE - 1, window, 0, 1) == PAGE
        assert radix.covers(at << 30, 1, 1)
        most = max(most, radix.tables)
    assert 4000 < most <= 4096
    radix.clear()
    assert radix.tables == 0


def test_memory_stays_while_a_table_leads_there() -> None:
    window = memory(2)
    radix, other = Radix(MAX_ACCESS), Radix(MAX_ACCESS)
    for each in (radix, other, radix):
        each.fill(0, 0, 2 * PAGE - 1, window, 0, 3)
    radix.clear()
    with pytest.raises(BufferError):
        window.release()
    del other, each
    window.release()
    with pytest.raises(ValueError, match="released"):
        radix.fill(0, 0, PAGE - 1, window, 0, 3)


def test_numbers_of_any_size() -> None:
    window = memory(2)
    radix = Radix(8)
    radix.fill(0, 0, PAGE - 1, window, 0, 3)
    for address in (-1, 1 << 64, 1 << 100, (1 << 64) - 1):
        assert radix.read(address, 4) is None
        assert radix.load16(address) is None
        assert radix.load_pair(address) is None
        assert not radix.write(address, b"1234")
        assert not radix.store16(address, 1)
        assert not radix.store32(address, 1)
        assert not radix.covers(address, 4, 1)
    assert (radix.read(0, 9), radix.read(0, -1), radix.read(0, 8)) == (None, None, bytes(8))
    assert (radix.write(0, bytes(9)), radix.write(0, bytes(8))) == (False, True)
    assert (radix.load16(1), radix.load_pair(8)) == (None, None)
    assert not radix.store32(2, 1)
    assert not radix.covers(0, 1 << 63, 1)
    with pytest.raises(OverflowError):
        radix.store16(0, 0x10000)
    with pytest.raises(TypeError):
        radix.read("0", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "first", "last", "offset", "allowed"),
    [
        (0, 0, 2 * PAGE, 0, 3),
        (0, 0, PAGE - 1, PAGE + 1, 3),
        (0, 0, PAGE - 1, -1, 3),
        (PAGE, 0, PAGE - 1, 0, 3),
        (0, PAGE, 2 * PAGE - 1, 0, 3),
        (0, 0, (1 << 64) - 1, 0, 3),
        (0, 0, PAGE - 1, 0, 4),
    ],
)
def test_an_interval_has_to_be_in_its_window(address: int, first: int, last: int, offset: int, allowed: int) -> None:
    radix = Radix(MAX_ACCESS)
    with pytest.raises((IndexError, ValueError)):
        radix.fill(address, first, last, memory(2), offset, allowed)
    assert radix.tables == 0


def test_memory_that_is_not_at_a_page_is_left_to_the_authority() -> None:
    radix = Radix(MAX_ACCESS)
    assert radix.fill(0, 0, PAGE - 1, memory(2), 8, 3) == 0


# -- against the intervals

# Where things lie: 4 KiB pages next to each other, leaves of 2 MiB, both sides of the interrupt window, of 2**48,
# of 2**32, and the end of everything.
LAST = (1 << 64) - 3 * PAGE
PLACES = [0x10000, MIB2, GIB, 0xFEDFF000, 0xFEE00000, 0xFEF00000, 1 << 32, (1 << 48) - PAGE, LAST]
STEPS = [0, 0, PAGE, PAGE, 2 * PAGE, 8, PAGE - 8, -PAGE, MIB2, MIB2 - PAGE, MIB2 + 3 * PAGE]
iovas = st.builds(lambda place, step: (place + step) % (1 << 64), st.sampled_from(PLACES), st.sampled_from(STEPS))
sizes = st.sampled_from([PAGE, PAGE, PAGE, 2 * PAGE, 3 * PAGE, 16, PAGE + 16, MIB2, MIB2 + PAGE, 2 * MIB2 + PAGE])
lengths = st.sampled_from([1, 2, 16, 100, PAGE, PAGE + 1, 3 * PAGE, MIB2 + 5])
permissions = st.sampled_from([Access.READ, Access.WRITE, Access.RW, Access.RW])


ORDERS: list[ByteOrder] = ["little", "big"]
SIZE = MIB2 + 16 * PAGE
"""Of a region."""
FAR = GPA(16 * MIB2)


def said(act: Callable[[], object]) -> object:
    """What came of it: a value, or the words of the refusal."""
    try:
        return act()
    except AccessError as error:
        return str(error)


class RadixAgainstIntervals(RuleBasedStateMachine):
    """Two spaces over one IOTLB: `CachedSpace` may not be told from `MediatedSpace`, but by the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("radix")
        # Two regions, adjacent in the front end, not so in the guest; every page says where it is.
        self.model = bytearray(b"".join(page.to_bytes(8, "little") * (PAGE // 8) for page in range(2 * SIZE // PAGE)))
        os.pwrite(self.fd, self.model, 0)
        self.ram = RegionRam()
        self.iotlb = Iotlb(self.ram)
        self.native = CachedSpace(self.ram, self.iotlb)
        self.readable = MediatedSpace(self.ram, self.iotlb)
        self.stamp = 0

    @initialize()
    def regions(self) -> None:
        self.ram.add(GPA(0), SIZE, BASE, 0, self.fd)
        self.ram.add(FAR, SIZE, UVA(BASE + SIZE), SIZE, self.fd)

    def teardown(self) -> None:
        self.ram.clear()
        assert os.pread(self.fd, 2 * SIZE, 0) == self.model
        os.close(self.fd)

    def wrote(self, iova: int, data: bytes, spans: object) -> None:
        """That ``data`` is to be where the intervals said."""
        assert isinstance(spans, list | tuple), spans
        done = 0
        for span in spans:
            at = span.gpa if span.gpa < FAR else span.gpa - FAR + SIZE
            self.model[at : at + span.length] = data[done : done + span.length]
            assert os.pread(self.fd, span.length, at) == data[done : done + span.length]
            done += span.length
        assert done == len(data)

    @rule(iova=iovas, size=sizes, page=st.integers(0, 1060), odd=st.sampled_from([0, 0, 0, 0, 8]), access=permissions)
    def update(self, iova: int, size: int, page: int, odd: int, access: Access) -> None:
        with contextlib.suppress(ProtocolError):
            self.iotlb.update(iova, size, UVA(BASE + page * PAGE + odd), access)

    @rule(iova=iovas, page=st.integers(0, 1000), access=permissions)
    def update_again(self, iova: int, page: int, access: Access) -> None:
        """Two answers for one place, and one page at two places."""
        self.update(iova, PAGE, page, 0, access)
        self.update(iova, PAGE, page, 0, Access.RW)
        self.update((iova + PAGE) % (1 << 64), PAGE, page, 0, access)

    @rule(iova=iovas, size=st.one_of(sizes, st.sampled_from([0, 1, 1 << 40, (1 << 64) - 1])))
    def invalidate(self, iova: int, size: int) -> None:
        self.iotlb.invalidate(iova, size)

    @rule(half=st.sampled_from([UPPER, LOWER]))
    def invalidate_half(self, half: tuple[int, int]) -> None:
        self.iotlb.invalidate(*half)

    @rule()
    def flush(self) -> None:
        self.iotlb.flush()

    @rule()
    def forget_the_cache(self) -> None:
        self.iotlb.radix.clear()

    @precondition(lambda self: len(self.ram.blocks) == 2)
    @rule()
    def a_region_goes_and_comes(self) -> None:
        self.ram.remove(GPA(0), SIZE, BASE)
        self.ram.add(GPA(0), SIZE, BASE, 0, self.fd)
        assert len(self.iotlb) == 0

    @rule(iova=iovas, length=lengths)
    def read(self, iova: int, length: int) -> None:
        assert said(lambda: self.native.read(iova, length)) == said(lambda: self.readable.read(iova, length))

    @rule(iova=iovas, length=lengths)
    def write(self, iova: int, length: int) -> None:
        """What one writes the other reads, where both may; a write that misses changes nothing."""
        self.stamp += 1
        data = (self.stamp.to_bytes(8, "little") * (length // 8 + 1))[:length]
        spans = self.iotlb.lookup(iova, length, Access.WRITE)
        refused = said(lambda: self.native.write(iova, data))
        if refused is None:
            self.wrote(iova, data, spans)
        else:
            assert said(lambda: self.readable.write(iova, data)) == refused

    @rule(iova=iovas, order=st.sampled_from(ORDERS))
    def sized(self, iova: int, order: ByteOrder) -> None:
        for native, readable in (
            (lambda: self.native.load16(iova, order), lambda: self.readable.load16(iova, order)),
            (lambda: self.native.load_pair(iova), lambda: self.readable.load_pair(iova)),
        ):
            assert said(native) == said(readable)
        self.stamp = self.stamp + 1 & 0xFFFF
        for size, store in ((2, self.native.store16), (4, self.native.store32)):
            spans = self.iotlb.lookup(iova, size, Access.WRITE)
            if said(lambda: store(iova, self.stamp, order)) is None:  # noqa: B023
                self.wrote(iova, self.stamp.to_bytes(size, order), spans)

    @invariant()
    def the_cache_knows_nothing_else(self) -> None:
        for place in PLACES:
            for iova in (place, place + PAGE, place - 1, place + MIB2):
                for access in (Access.READ, Access.WRITE):
                    if self.iotlb.radix.covers(iova, 1, access.value):
                        assert not isinstance(self.iotlb.lookup(iova, 1, access), Miss)


TestRadix = RadixAgainstIntervals.TestCase
TestRadix.settings = settings(max_examples=50)
