# SPDX-License-Identifier: Apache-2.0
"""Intervals of 64-bit addresses that never overlap, each with where it leads and what is allowed there.

Kept in order in short lists, so that one of 60,000 is put in or taken out as fast as one of ten.
Neighbours are never joined: two that touch may lead to memory that does not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

LOAD: Final = 256
"""Intervals in a list before it is cut into two."""


class Interval(NamedTuple):
    """Addresses from ``start`` up to, not including, ``end`` lead to ``target`` and on."""

    start: int
    end: int
    target: int
    allowed: int
    """The value of an `Access`: a test of plain numbers, as this is done for every access."""


class IntervalMap:
    """A sorted map from intervals to targets. `cut` before `put`: an overlap is the caller's mistake."""

    def __init__(self, load: int = LOAD) -> None:
        self.load: Final = load
        """Intervals in a list before it is cut into two."""
        self._firsts: list[int] = []
        self._starts: list[list[int]] = []
        self._lists: list[list[Interval]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Interval]:
        for each in self._lists:
            yield from each

    def rows(self) -> tuple[list[int], list[list[int]], list[list[Interval]]]:
        """The first start of each list; the starts in each; the lists. For `_core.Answers`, to be changed in place."""
        return self._firsts, self._starts, self._lists

    def changed(self, by: int) -> None:
        """There are ``by`` more, as whoever changed `rows` says."""
        self._count += by

    def clear(self) -> None:
        """Forget all."""
        self._firsts, self._starts, self._lists, self._count = [], [], [], 0

    def find(self, address: int) -> Interval | None:
        """The interval that holds ``address``."""
        row = bisect_right(self._firsts, address) - 1
        if row < 0:
            return None
        found = self._lists[row][bisect_right(self._starts[row], address) - 1]
        return found if address < found.end else None

    def put(self, new: Interval) -> None:
        """Add an interval where none is."""
        row = max(bisect_right(self._firsts, new.start) - 1, 0)
        if not self._lists:
            self._firsts, self._starts, self._lists = [new.start], [[]], [[]]
        starts, row_list = self._starts[row], self._lists[row]
        column = bisect_left(starts, new.start)
        starts.insert(column, new.start)
        row_list.insert(column, new)
        self._firsts[row] = starts[0]
        self._count += 1
        if len(starts) > self.load:
            half = len(starts) // 2
            self._firsts.insert(row + 1, starts[half])
            self._starts.insert(row + 1, starts[half:])
            self._lists.insert(row + 1, row_list[half:])
            del starts[half:], row_list[half:]

    def cut(self, start: int, end: int) -> int:
        """Take out all from ``start`` up to ``end``; what sticks out on either side stays. How many it touched."""
        if start >= end:
            return 0
        one = self._cut_one(start, end)
        if one is not None:
            return one
        first = self.find(start)
        last = self.find(end - 1)
        count = self._delete(start if first is None else first.start, end)
        if first is not None and first.start < start:
            self.put(first._replace(end=start))
        if last is not None and last.end > end:
            self.put(Interval(end, last.end, last.target + (end - last.start), last.allowed))
        return count

    def _cut_one(self, start: int, end: int) -> int | None:
        """What nearly all cuts are: nothing is there, or one interval exactly. None if it is neither."""
        row = bisect_right(self._firsts, start) - 1
        if row < 0:
            return None if self._firsts and self._firsts[0] < end else 0
        starts = self._starts[row]
        column = bisect_right(starts, start) - 1
        after = column + 1
        if after < len(starts):
            if starts[after] < end:
                return None
        elif row + 1 < len(self._firsts) and self._firsts[row + 1] < end:
            return None
        found = self._lists[row][column]
        if found.end <= start:
            return 0
        if found.start != start or found.end != end or not column:
            return None
        del starts[column], self._lists[row][column]
        self._count -= 1
        return 1

    def _place(self, address: int) -> tuple[int, int]:
        """Row and column of the first interval that starts at ``address`` or later; row past the last if none."""
        row = bisect_right(self._firsts, address) - 1
        if row < 0:
            return 0, 0
        column = bisect_left(self._starts[row], address)
        return (row, column) if column < len(self._starts[row]) else (row + 1, 0)

    def _delete(self, start: int, end: int) -> int:
        """Take out all intervals that start from ``start`` up to ``end``."""
        row, column = self._place(start)
        stop, rest = self._place(end)
        if (row, column) == (stop, rest):
            return 0
        if row == stop:
            count = rest - column
            del self._starts[row][column:rest], self._lists[row][column:rest]
        else:
            count = len(self._starts[row]) - column
            del self._starts[row][column:], self._lists[row][column:]
            count += sum(len(each) for each in self._starts[row + 1 : stop])
            if stop < len(self._starts):
                count += rest
                del self._starts[stop][:rest], self._lists[stop][:rest]
            del self._firsts[row + 1 : stop], self._starts[row + 1 : stop], self._lists[row + 1 : stop]
        # At most two lists were cut into, and a list that is empty now has no first.
        for at in (row + 1, row):
            if at < len(self._starts):
                if self._starts[at]:
                    self._firsts[at] = self._starts[at][0]
                else:
                    del self._firsts[at], self._starts[at], self._lists[at]
        self._count -= count
        return count
