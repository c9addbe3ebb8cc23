# SPDX-License-Identifier: Apache-2.0
"""Strategies for histories of address spaces: where mappings are made, changed and taken away, and bytes moved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from virtiova.addr import GPA, PAGE_SIZE, Access
from virtiova.dma.ram import RamBlock
from virtiova.testing.memory import BASE, BLOCK, END
from virtiova.testing.spaces import History, Invalidate, Read, Sized, Step, Translate, Update, Write

WINDOW: Final = 8 * PAGE_SIZE
"""Bytes of IOVAs that one history is about, so that its steps meet."""
ANY: Final = (Access.RW, Access.READ, Access.WRITE)


# To make a strategy takes longer than to draw from it. There are few that differ.
_kept = functools.lru_cache(maxsize=512)
_FLAGS: Final = st.booleans()


@dataclass(frozen=True, slots=True)
class Terrain:
    """What can be mapped: in pieces of ``granule`` bytes (a power of two, 16 to 4096), IOVAs of ``width`` bits."""

    granule: int = PAGE_SIZE
    width: int = 64

    @_kept
    def bases(self) -> SearchStrategy[int]:
        """Where a history takes place: where an IOVA is also the address of RAM, at 0, in between, at the top."""
        return st.sampled_from([BASE, 0, 1 << (self.width - 2), self.top])

    @property
    def top(self) -> int:
        """The last window that there is."""
        return (1 << self.width) - WINDOW

    @_kept
    def updates(self, base: int, access: Sequence[Access] = ANY, most: int = 3 * PAGE_SIZE) -> SearchStrategy[Update]:
        """A mapping within the window: of ``most`` bytes at most, to RAM, never to the same address."""
        unit = self.granule

        def made(size: int, at: int, to: int, allowed: Access) -> Update:
            iova = base + unit * (at % ((WINDOW - size) // unit + 1))
            gpa = BASE + unit * (to % ((END - BASE - size) // unit + 1))
            if gpa == iova:
                gpa += unit if gpa + size < END else -unit
            return Update(iova, gpa, size, allowed)

        pages = st.integers(1, most // PAGE_SIZE).map(lambda count: count * PAGE_SIZE)
        sizes = pages if unit == PAGE_SIZE else st.one_of(pages, st.integers(1, most // unit).map(lambda n: n * unit))
        numbers = st.integers(0, (END - BASE) // unit)
        return st.builds(made, sizes, numbers, numbers, st.sampled_from(access))

    @_kept
    def places(self, base: int) -> SearchStrategy[int]:
        """An address in the window, often beside a border."""
        borders = st.builds(
            lambda piece, by: base + min(max(piece * self.granule + by, 0), WINDOW - 1),
            st.integers(0, WINDOW // self.granule),
            st.integers(-3, 3),
        )
        return st.one_of(borders, st.integers(base, base + WINDOW - 1))

    @_kept
    def reads(self, base: int) -> SearchStrategy[Step]:
        """A read that begins in the window and ends in the space."""
        return st.builds(lambda at, n: Read(at, self._fit(at, n)), self.places(base), _LENGTHS)

    @_kept
    def writes(self, base: int) -> SearchStrategy[Step]:
        """A write, likewise."""
        numbers = st.integers(0, 7)
        return st.builds(lambda at, n, k: Write(at, self._fit(at, n), k), self.places(base), _LENGTHS, numbers)

    def _fit(self, at: int, length: int) -> int:
        return min(length, (1 << self.width) - at)

    @_kept
    def invalidates(self, base: int) -> SearchStrategy[Step]:
        """Some pieces of the window."""
        unit = self.granule
        pieces = st.integers(0, WINDOW // unit - 1)
        return st.builds(
            lambda at, n: Invalidate(base + at * unit, unit * min(n + 1, WINDOW // unit - at)), pieces, pieces
        )

    @_kept
    def sized(self, base: int) -> SearchStrategy[Step]:
        """An access of 2, 4 or 16 bytes, mostly aligned, where another word of the protocol would straddle."""
        verbs = st.sampled_from(["load16", "store16", "store32", "load_pair"])
        places = st.one_of(st.builds(lambda at: at & ~15, self.places(base)), self.places(base))
        values = st.integers(0x102, 0xFFFF)
        return st.builds(Sized, verbs, places, values, _FLAGS)

    @_kept
    def translates(self, base: int) -> SearchStrategy[Step]:
        """A look-up without an access."""
        access = st.sampled_from(ANY)
        return st.builds(lambda at, n, a: Translate(at, self._fit(at, n), a), self.places(base), _LENGTHS, access)

    @_kept
    def accesses(self, base: int) -> SearchStrategy[Step]:
        """A read or a write."""
        return st.one_of(self.reads(base), self.writes(base))


_LENGTHS: Final = st.one_of(
    st.sampled_from([1, 2, 8, 16, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE]), st.integers(1, 3 * PAGE_SIZE)
)


def iotlb_histories(granule: int = PAGE_SIZE, width: int = 64, *, full: bool = False) -> SearchStrategy[History]:
    """Any history of an IOTLB: a list of `Update`, `Invalidate`, `Read` and `Write`; ``full``: `Sized` and `Translate`,
    too. All of one window of IOVAs, some two dozen steps and more."""
    terrain = Terrain(granule, width)

    def steps(base: int) -> SearchStrategy[History]:
        kinds: list[SearchStrategy[Step]] = [
            terrain.updates(base),
            terrain.accesses(base),
            terrain.accesses(base),
            terrain.invalidates(base),
        ]
        if full:
            kinds += [terrain.sized(base), terrain.translates(base)]
        # Lists of lists are longer, and get short as fast.
        few = st.lists(st.one_of(kinds), min_size=1, max_size=12)
        return st.lists(few, min_size=1, max_size=12).map(lambda lists: [step for each in lists for step in each])

    return terrain.bases().flatmap(steps)


def memory_maps(most: int = 4) -> SearchStrategy[tuple[RamBlock, ...]]:
    """RAM in 1 to ``most`` blocks for a `Memory`: of 1 to 3 pages each, with or without holes between them. Where in
    the buffer a block is has nothing to do with where it is in the guest; a page of nobody's lies between any two."""
    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=most)

    def made(rows: list[tuple[int, int]], order: list[int]) -> tuple[RamBlock, ...]:
        starts, gpa = [], int(BASE)
        for pages, hole in rows:
            starts.append(gpa)
            gpa += (pages + hole) * PAGE_SIZE
        offsets, offset = {}, PAGE_SIZE
        for number in order:
            offsets[number] = offset
            offset += (rows[number][0] + 1) * PAGE_SIZE
        return tuple(
            RamBlock(GPA(starts[number]), pages * PAGE_SIZE, offsets[number]) for number, (pages, _) in enumerate(rows)
        )

    return sizes.flatmap(lambda rows: st.builds(made, st.just(rows), st.permutations(range(len(rows)))))


Histories = Callable[[Terrain], SearchStrategy[History]]
"""What a check tries, where it can be mapped."""


def _composed(make: Callable[[DrawFn, Terrain, int], list[Step]]) -> Histories:
    """Histories of one window, by a function that draws them."""

    def strategy(terrain: Terrain) -> SearchStrategy[History]:
        @st.composite
        def drawn(draw: DrawFn) -> History:
            return make(draw, terrain, draw(terrain.bases()))

        return drawn()

    return strategy


def _some(draw: DrawFn, steps: SearchStrategy[Step], least: int = 1, most: int = 6) -> list[Step]:
    return draw(_lists(steps, least, most))


@_kept
def _lists(steps: SearchStrategy[Step], least: int, most: int) -> SearchStrategy[list[Step]]:
    return st.lists(steps, min_size=least, max_size=most)


def _all_over(base: int, first: int = 0, last: int = WINDOW) -> list[Step]:
    """Every page of the window is used once, both ways: what may be remembered is."""
    pages = range(base + first, base + last, PAGE_SIZE)
    return [step for at in pages for step in (Read(at, 2), Write(at + 8, 2, at // PAGE_SIZE % 8))]


_TOUCHES: Final = st.lists(
    st.tuples(st.integers(0, 3 * PAGE_SIZE), st.integers(0, 3 * PAGE_SIZE), _FLAGS), min_size=1, max_size=6
)


@_composed
def one_mapping(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """A mapping, and accesses within."""
    update = draw(terrain.updates(base, (Access.RW,)))
    steps: list[Step] = [update]
    for at, length, write in draw(_TOUCHES):
        start = at % update.size
        count = 1 + length % (update.size - start)
        steps.append(Write(update.iova + start, count, at % 8) if write else Read(update.iova + start, count))
    return steps


@_composed
def nothing_mapped(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Accesses where nothing is mapped, mostly where an IOVA is the address of RAM; and where something else is."""
    base = draw(st.sampled_from([int(BASE), int(BASE), base]))
    steps: list[Step] = []
    if draw(_FLAGS):
        steps.append(draw(terrain.updates(base, most=PAGE_SIZE)))
    return steps + _some(draw, terrain.accesses(base))


@_composed
def permissions(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Pages that may be read, written, or both, used in both ways, one by one."""
    steps: list[Step] = [draw(terrain.updates(base, most=PAGE_SIZE))]
    (update,) = steps
    assert isinstance(update, Update)
    for _ in range(draw(st.integers(1, 4))):
        at = update.iova + draw(st.integers(0, update.size - 8))
        steps.append(Write(at, 8, 1) if draw(_FLAGS) else Read(at, 8))
    return steps


@_composed
def mixed_permissions(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Neighbours with other permissions, and accesses across the border between them."""
    one, other = draw(st.permutations(ANY))[:2]
    unit = terrain.granule
    steps: list[Step] = [Update(base, BASE + 2 * unit, unit, one), Update(base + unit, BASE + 3 * unit, unit, other)]
    return steps + _some(draw, _across(base + unit))


@_kept
def _across(border: int, most: int = 40) -> SearchStrategy[Step]:
    """An access to the bytes on both sides of a border."""
    before, after = st.integers(1, most // 2), st.integers(1, most // 2)
    reads = st.builds(lambda one, other: Read(border - one, one + other), before, after)
    writes = st.builds(lambda one, other: Write(border - one, one + other, one % 8), before, after)
    return st.one_of(reads, writes)


@_composed
def changed_permission(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """The same memory with another permission, by an update alone, after it was used."""
    update = draw(terrain.updates(base, most=PAGE_SIZE))
    steps: list[Step] = []
    for access in draw(st.lists(st.sampled_from(ANY), min_size=2, max_size=4)):
        steps.append(Update(update.iova, update.gpa, update.size, access))
        steps += draw(st.permutations([Read(update.iova, 4), Write(update.iova, 4, 2)]))
    return steps


@_composed
def neighbours(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Adjacent IOVAs with memory that is not, and accesses across."""
    unit = terrain.granule
    count = (END - BASE) // unit
    first = draw(st.integers(0, count - 1))
    second = draw(st.integers(0, count - 1).filter(lambda at: at != first + 1))
    pieces = [BASE + first * unit, BASE + second * unit]
    steps: list[Step] = [
        Update(base + at * unit, gpa if gpa != base + at * unit else gpa ^ unit, unit, Access.RW)
        for at, gpa in enumerate(pieces)
    ]
    return draw(st.permutations(steps)) + _some(draw, _across(base + unit))


@_composed
def blocks_of_ram(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """One mapping over two blocks of RAM, which lie elsewhere in this process."""
    pages = draw(st.integers(1, 2))
    border = base + pages * PAGE_SIZE
    steps: list[Step] = [Update(base, BASE + BLOCK - pages * PAGE_SIZE, 4 * PAGE_SIZE, Access.RW)]
    return steps + _some(draw, _across(border, 2 * PAGE_SIZE))


@_composed
def aliases(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Two IOVAs of one page, of which one is taken back."""
    unit = terrain.granule
    gpa = BASE + unit * draw(st.integers(8, 11))
    one, other = base, base + unit * draw(st.integers(1, 3))
    steps: list[Step] = [Update(one, gpa, unit, Access.RW), Update(other, gpa, unit, draw(st.sampled_from(ANY)))]
    steps += _some(draw, st.sampled_from([Write(one + 4, 8, 1), Read(other + 4, 8), Write(other + 6, 8, 2)]))
    steps.append(Invalidate(one, unit))
    return [*steps, Read(other + 4, 8), Read(one + 4, 8), Write(one + 4, 8, 3)]


@_composed
def updates_over_updates(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Updates over mappings that are in use: all, the middle, an end."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(2, 3))):
        steps.append(draw(terrain.updates(base, most=4 * PAGE_SIZE)))
        steps += _all_over(base) if draw(_FLAGS) else _some(draw, terrain.accesses(base), 1, 3)
    return steps + _all_over(base)


@_composed
def taken_back(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Mappings that were used, and are invalidated: whole, in part, several at once; and what is left of them."""
    steps: list[Step] = list(draw(st.lists(terrain.updates(base, most=4 * PAGE_SIZE), min_size=1, max_size=3)))
    steps += _all_over(base)
    for _ in range(draw(st.integers(1, 2))):
        steps.append(draw(terrain.invalidates(base)))
        steps += _all_over(base)
    return steps


@_composed
def all_taken_back(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Everything is invalidated, at once or in two parts that meet, after mappings at 0, at the top and in between."""
    end, half = 1 << terrain.width, 1 << (terrain.width - 1)
    odd = 0xFEE00000
    ways: list[list[Step]] = [
        [Invalidate(0, end)],
        [Invalidate(half, half), Invalidate(0, half)],
        [Invalidate(odd, end - odd), Invalidate(0, odd)],
    ]
    parts = draw(st.sampled_from(ways))
    page = PAGE_SIZE
    places = draw(st.lists(st.sampled_from([0, 1 << (terrain.width - 2), end - page]), min_size=1, unique=True))
    mapped: list[Step] = [Update(at, BASE + (n + 1) * page, page, Access.RW) for n, at in enumerate(places)]
    used: list[Step] = [Read(at + page - 4, 4) for at in places]
    again: list[Step] = [Update(places[0], BASE + 7 * page, page, Access.RW), Read(places[0], 4)]
    return [*mapped, *used, *parts, *used, *(again if draw(_FLAGS) else [])]


@_composed
def top_of_the_space(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Mappings up to the last byte that there is."""
    end, unit = 1 << terrain.width, terrain.granule
    size = unit * draw(st.integers(1, 3))
    steps: list[Step] = [Update(end - size, BASE + 2 * PAGE_SIZE, size, Access.RW)]
    for length in draw(st.lists(st.integers(1, min(size, 64)), min_size=1, max_size=3)):
        steps.append(Read(end - length, length) if length % 2 else Write(end - length, length, 1))
    if draw(_FLAGS):
        steps.append(Invalidate(end - unit, unit))
    return [*steps, Read(end - 1, 1), Write(end - 4, 4, 2), Read(end - size, size)]


@_composed
def around_the_end(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """An access past the last byte, with something mapped there and something at 0."""
    end = 1 << terrain.width
    steps: list[Step] = [
        Update(end - PAGE_SIZE, BASE + PAGE_SIZE, PAGE_SIZE, Access.RW),
        Update(0, BASE + 2 * PAGE_SIZE, PAGE_SIZE, Access.RW),
    ]
    return steps + _some(draw, _across(end), 1, 4)


@_composed
def partly_mapped(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Accesses of which the first part is mapped and a later one is not, or not for that."""
    unit = terrain.granule
    pieces = draw(st.integers(1, 2))
    rest = draw(st.sampled_from([None, Access.READ, Access.WRITE]))
    steps: list[Step] = [Update(base, BASE + 2 * PAGE_SIZE, pieces * unit, Access.RW)]
    if rest is not None:
        steps.append(Update(base + pieces * unit, BASE + 4 * PAGE_SIZE, unit, rest))
    return steps + _some(draw, _across(base + pieces * unit, 2 * PAGE_SIZE), 1, 4)


@_composed
def nothing_at_all(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Accesses of no bytes, anywhere."""
    steps: list[Step] = [draw(terrain.updates(base))] if draw(_FLAGS) else []
    return steps + _some(draw, terrain.places(base).flatmap(lambda at: st.sampled_from([Read(at, 0), Write(at, 0, 0)])))


@_composed
def far_too_much(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Lengths that nothing can be behind, from a place where something is mapped."""
    steps: list[Step] = [Update(base, BASE + 5 * PAGE_SIZE, PAGE_SIZE, Access.RW)]
    lengths = st.sampled_from([1 << 20, 1 << 32, 1 << 48, (1 << 63) - 1])
    return steps + _some(draw, st.builds(Read, terrain.places(base), lengths), 1, 3)


@_composed
def sized_accesses(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Single loads and stores, among mappings with any permission."""
    updates = draw(st.lists(terrain.updates(base, (*ANY, Access.RW)), min_size=1, max_size=3))
    steps: list[Step] = list(updates)
    for one in draw(st.lists(terrain.sized(base), min_size=4, max_size=16)):
        assert isinstance(one, Sized)
        inside = updates[one.value % len(updates)]
        steps.append(replace(one, iova=inside.iova + one.iova % inside.size) if one.value % 4 else one)
    return steps


@_composed
def look_ups(draw: DrawFn, terrain: Terrain, base: int) -> list[Step]:
    """Look-ups alone, among mappings with any permission."""
    steps: list[Step] = list(draw(st.lists(terrain.updates(base), min_size=1, max_size=3)))
    return steps + _some(draw, terrain.translates(base), 2, 8)
