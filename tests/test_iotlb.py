# SPDX-License-Identifier: Apache-2.0
"""What a front end answered, beyond what `check_address_space` asks (that it is asked: test_testing_spaces.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from virtiova import _core
from virtiova.addr import GPA, UVA, Access
from virtiova.dma import iotlb as module
from virtiova.dma.intervals import Interval, IntervalMap
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss, Span
from virtiova.errors import AccessError, ProtocolError

PAGE = 0x1000
END = 1 << 64
UPPER = (0xFEF00000, 0xFFFFFFFF01100000)
LOWER = (0x0, 0xFEE00000)


class Memory:
    """User addresses from ``base`` on lead to GPA 0 and on, cut at 8 pages; as a memory table would."""

    base = 0x7000_0000_0000
    homes: tuple[tuple[int, int, int, _core.Window], ...] = ()

    def gpa_of(self, uva: UVA, length: int) -> Sequence[Span] | Miss:
        start = uva - self.base
        if not 0 <= start <= 64 * PAGE - length:
            return Miss(uva, length, Access.RW, "in no region")
        spans: list[Span] = []
        end = start + length
        while start < end:
            step = min(end, (start // (8 * PAGE) + 1) * 8 * PAGE) - start
            spans.append(Span(GPA(start), step))
            start += step
        return spans

    def window_of(self, gpa: GPA, length: int) -> tuple[_core.Window, int]:
        raise AccessError(gpa, length, "addresses only")

    def watch(self, gone: Callable[[], None]) -> None:
        self.gone = gone


def user(page: int) -> UVA:
    return UVA(Memory.base + page * PAGE)


@pytest.fixture
def iotlb() -> Iotlb:
    return Iotlb(Memory())


def gpas(iotlb: Iotlb, address: int, length: int, access: Access = Access.READ) -> list[tuple[int, int]]:
    found = iotlb.lookup(address, length, access)
    assert not isinstance(found, Miss), found
    return [(span.gpa, span.length) for span in found]


def missed(iotlb: Iotlb, address: int, length: int, access: Access = Access.READ) -> tuple[int, int]:
    found = iotlb.lookup(address, length, access)
    assert isinstance(found, Miss), found
    assert found.access is access
    return found.address, found.length


def test_a_miss_names_the_first_part_that_is_missing(iotlb: Iotlb) -> None:
    assert missed(iotlb, 0xFFFF042, 2) == (0xFFFF042, 2)
    iotlb.update(0x10000, PAGE, user(3), Access.RW)
    assert gpas(iotlb, 0x10010, 16) == [(0x3010, 16)]
    assert missed(iotlb, 0x10FF0, 32) == (0x11000, 16)
    assert missed(iotlb, 0xFFFF, 2) == (0xFFFF, 2)
    assert iotlb.misses == 3
    assert iotlb.lookup(0x5000, 0, Access.RW) == []


def test_all_that_is_missing(iotlb: Iotlb) -> None:
    iotlb.update(0x11000, PAGE, user(0), Access.READ)
    iotlb.update(0x13000, PAGE, user(1), Access.RW)
    assert iotlb.missing(0x10FFF, 0x3001, Access.READ, 64) == [0x10000, 0x12000]
    assert iotlb.missing(0x10FFF, 0x3001, Access.WRITE, 64) == [0x10000, 0x11000, 0x12000]
    assert iotlb.missing(0x10FFF, 0x3001, Access.WRITE, 2) == [0x10000, 0x11000]
    assert iotlb.missing(END - 0x800, 0x1000, Access.READ, 64) == [END - PAGE]
    assert iotlb.missing(0x11000, PAGE, Access.READ, 64) == []
    assert iotlb.missing(0, 1 << 50, Access.READ, 3) == [0, PAGE, 2 * PAGE], "bounded, whatever is asked for"


def test_an_answer_replaces(iotlb: Iotlb) -> None:
    for access in (Access.READ, Access.RW, Access.RW, Access.WRITE):
        iotlb.update(0x1000, PAGE, user(1), access)
        assert len(iotlb) == 1
    assert missed(iotlb, 0x1000, 1, Access.READ) == (0x1000, 1)
    assert gpas(iotlb, 0x1000, 1, Access.WRITE) == [(0x1000, 1)]
    iotlb.update(0x1000, PAGE, user(7), Access.RW)
    assert gpas(iotlb, 0x1000, 1) == [(0x7000, 1)]
    iotlb.update(0x1000, PAGE, user(7), Access.NONE)
    assert missed(iotlb, 0x1000, 1) == (0x1000, 1)
    assert iotlb.updates == 6


def test_one_answer_over_two_regions(iotlb: Iotlb) -> None:
    iotlb.update(0x10000, 2 * PAGE, user(7), Access.RW)
    assert gpas(iotlb, 0x10FFE, 4) == [(0x7FFE, 2), (0x8000, 2)]
    assert len(iotlb) == 2


@pytest.mark.parametrize(("iova", "size"), [(0, 0), (0x1000, -1), (END - PAGE, PAGE + 1), (0, END + 1), (END, 1)])
def test_updates_that_mean_nothing(iotlb: Iotlb, iova: int, size: int) -> None:
    iotlb.update(0, PAGE, user(0), Access.RW)
    with pytest.raises(ProtocolError):
        iotlb.update(iova, size, user(1), Access.RW)
    assert gpas(iotlb, 0, PAGE) == [(0, PAGE)]


def test_an_answer_without_memory_leaves_nothing_there(iotlb: Iotlb) -> None:
    iotlb.update(0x1000, 2 * PAGE, user(0), Access.RW)
    with pytest.raises(AccessError, match="IOTLB update of 0x1000"):
        iotlb.update(0x1000, PAGE, UVA(0x1234), Access.RW)
    assert missed(iotlb, 0x1000, 1) == (0x1000, 1)
    assert gpas(iotlb, 0x2000, 1) == [(0x1000, 1)]


def test_the_two_halves_that_cover_everything(iotlb: Iotlb) -> None:
    """As QEMU sends them, in its order; the first ends exactly at 2**64."""
    everywhere = (0, 0xFEDFF000, 0xFEE00000, 0xFEEFF000, 0xFEF00000, 1 << 32, 1 << 48, END - PAGE)
    for at, iova in enumerate(everywhere):
        iotlb.update(iova, PAGE, user(at), Access.RW)
    assert iotlb.invalidate(*UPPER) == 4
    assert [len(iotlb), missed(iotlb, END - 1, 1)] == [4, (END - 1, 1)]
    assert iotlb.invalidate(*LOWER) == 2
    assert gpas(iotlb, 0xFEE00000, 1) == [(0x2000, 1)], "between the two, untouched"
    assert len(iotlb) == 2


@pytest.mark.parametrize("size", [0, END, END + 5, -1])
def test_everything_at_once(iotlb: Iotlb, size: int) -> None:
    for at, iova in enumerate((0, 0x5000, END - PAGE)):
        iotlb.update(iova, PAGE, user(at), Access.RW)
    assert iotlb.invalidate(0x5000, size) == 3
    assert len(iotlb) == 0


def test_an_invalidation_that_wraps(iotlb: Iotlb) -> None:
    for at, iova in enumerate((0, 0x5000, END - PAGE)):
        iotlb.update(iova, PAGE, user(at), Access.RW)
    assert iotlb.invalidate(END - 1, 2) == 2
    assert gpas(iotlb, 1, 1) == [(1, 1)]
    assert missed(iotlb, 0, 1) == (0, 1)
    assert missed(iotlb, END - 1, 1) == (END - 1, 1)
    assert iotlb.invalidates == 1


def test_a_front_end_cannot_fill_our_memory(iotlb: Iotlb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MAPPINGS", 10)
    for at in range(25):
        iotlb.update(at * 2 * PAGE, PAGE, user(0), Access.RW)
        assert gpas(iotlb, at * 2 * PAGE, 1) == [(0, 1)]
    assert len(iotlb) <= 10
    assert iotlb.flushes == 2


# -- the map of intervals against one entry for each address

SPACE = 48
spans = st.tuples(st.integers(0, SPACE - 1), st.integers(1, 20)).map(lambda s: (s[0], min(s[0] + s[1], SPACE)))


class IntervalsAgainstAddresses(RuleBasedStateMachine):
    """Every address by itself, in a dictionary: nothing to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.map = IntervalMap(load=4)
        self.model: dict[int, tuple[int, int]] = {}

    @rule(span=spans, to=st.integers(0, 1000), allowed=st.integers(1, 3))
    def put(self, span: tuple[int, int], to: int, allowed: int) -> None:
        self.map.cut(*span)
        self.map.put(Interval(*span, to, allowed))
        self.model.update({at: (to + at - span[0], allowed) for at in range(*span)})

    @rule(span=spans)
    def cut(self, span: tuple[int, int]) -> None:
        self.map.cut(*span)
        for at in range(*span):
            self.model.pop(at, None)

    @rule()
    def clear(self) -> None:
        self.map.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        for at in range(-1, SPACE + 1):
            found = self.map.find(at)
            assert (found and (found.target + at - found.start, found.allowed)) == self.model.get(at)
        listed = list(self.map)
        assert listed == sorted(listed)
        assert len(listed) == len(self.map)
        assert all(one.end <= two.start for one, two in itertools.pairwise(listed))


TestIntervals = IntervalsAgainstAddresses.TestCase


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3)), max_size=80),
    st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
)
def test_what_a_long_cut_leaves(put: list[tuple[int, int]], cut: tuple[int, int]) -> None:
    """Many lists at once, as the whole-space invalidations of QEMU."""
    mapping = IntervalMap(load=4)
    model: set[int] = set()
    for start, size in put:
        mapping.cut(start, start + size)
        mapping.put(Interval(start, start + size, start, 3))
        model.update(range(start, start + size))
    touched = len({each for each in mapping if each.start < cut[1] and each.end > cut[0]}) if cut[0] < cut[1] else 0
    assert mapping.cut(*cut) == touched
    model -= set(range(*cut))
    assert {at for each in mapping for at in range(each.start, each.end)} == model
    assert len(mapping) == len(list(mapping))
