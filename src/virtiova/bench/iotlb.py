# SPDX-License-Identifier: Apache-2.0
"""What the IOTLB's messages cost with few and many mappings resident: a pair of them, and a miss.

A pair is UPDATE and INVALIDATE of a page that no request is about: sent in blocks of 100 pairs, each block ended by a
round trip, or each INVALIDATE acknowledged by itself. A miss is what it adds to a frame, one at a time, that its page
is not known: the front end's own answer is in it, and the same for everybody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from virtiova.addr import IOVA
from virtiova.bench.front import Session
from virtiova.bench.memory import PAGE, Memory, Shape, misses, pairs
from virtiova.bench.rows import Document, Row, Setting, Target, Trust
from virtiova.bench.run import How, Say, Steal, about, doubts, place, placed, rotated, session
from virtiova.bench.subjects import NET, TESTPMD, Running, Subject
from virtiova.errors import MachineError, UsageError, VirtiovaError

RESIDENT: Final = {NET.name: (0, 1000, 1900, 2000, 16384, 60_000), TESTPMD.name: (0, 1000, 1900)}
"""Mappings that are there besides: DPDK holds 2048 and throws others out at random."""
QUICK: Final = {NET.name: (0, 1900, 60_000), TESTPMD.name: (0, 1900)}
PAIR: Final = "pair"
ACKNOWLEDGED: Final = "pair, acknowledged"
MISS: Final = "miss"
_BLOCK: Final = 100
_PAGES: Final = 8192
_MISSES: Final = 256
_BESIDE: Final = 1900
_MOST: Final = 60_000


@dataclass(slots=True)
class _Key:
    """What a sample is of."""

    subject: str
    resident: int
    figure: str

    def __hash__(self) -> int:
        return hash((self.subject, self.resident, self.figure))


class IotlbRun:
    """All rounds of it."""

    def __init__(
        self, how: How, say: Say, *, resident: Sequence[int] = (), quick: bool = False, subjects: Sequence[str] = ()
    ) -> None:
        self._how, self._say = how, say
        known = QUICK if quick else RESIDENT
        words = [word.lower() for word in subjects]
        self._subjects = [one for one in (NET, TESTPMD) if not words or any(word in one.name for word in words)]
        if not self._subjects:
            raise UsageError(f"no subject of bench iotlb has {' or '.join(subjects)} in its name")
        limit = max(RESIDENT[TESTPMD.name])
        self._resident = {
            one.name: tuple(number for number in resident if one is NET or number <= limit) or known[one.name]
            for one in self._subjects
        }
        self.place = place(how.realtime)
        self.trust = Trust()
        self._samples: dict[_Key, dict[int, float]] = {}
        self._failures: dict[tuple[str, int], list[str]] = {}

    def listed(self) -> Iterator[str]:
        """What would be measured, a line for each number of each subject."""
        for subject in self._subjects:
            for resident in self._resident[subject.name]:
                yield f"{subject.name:<27} {resident:>6} resident  {subject.missing}".rstrip()

    def document(self) -> Document:
        """Measure it all."""
        self.trust.reasons += doubts(self.place)
        steal = Steal()
        todo = [(one, number) for one in self._subjects if not one.missing for number in self._resident[one.name]]
        with placed(self.place):
            for turn in range(self._how.rounds):
                self._say(f"round {turn + 1} of {self._how.rounds}")
                for number in map(int, rotated([str(at) for at in range(len(todo))], turn)):
                    subject, resident = todo[number]
                    try:
                        self._one(turn, subject, resident)
                    except VirtiovaError as error:
                        self._failures.setdefault((subject.name, resident), []).append(f"round {turn + 1}: {error}")
            self.trust.stolen = steal.share()
        rows = list(self._rows())
        return Document(rows, about(self.place, self._how), self.trust.verdict(rows))

    def _one(self, turn: int, subject: Subject, resident: int) -> None:
        with contextlib.ExitStack() as stack:
            # Not all are told of: what a miss is about is never among those.
            memory = stack.enter_context(contextlib.closing(Memory(Shape(resident + _MISSES, _PAGES))))
            running = stack.enter_context(contextlib.closing(Running(subject, self.place, 1)))
            front = stack.enter_context(session(running, memory, told=resident))
            work: tuple[tuple[str, Callable[[], float]], ...] = (
                (PAIR, lambda: block_pairs(front, resident, self._how.seconds)),
                (ACKNOWLEDGED, lambda: acknowledged_pairs(front, resident, self._how.seconds)),
                (MISS, lambda: _misses(front, resident)),
            )
            for figure, measure in work:
                front.waits.look()
                begin = time.monotonic_ns()
                value = measure()
                quiet = front.waits.quiet(time.monotonic_ns() - begin)
                self._samples.setdefault(_Key(subject.name, resident, figure), {})[turn] = value
                self.trust.samples += 1
                self.trust.disturbed += not quiet
            self.trust.waited += front.waits.waited
            self.trust.looked += front.waits.looked

    def _rows(self) -> Iterator[Row]:
        for subject in self._subjects:
            for resident in self._resident[subject.name]:
                failures = self._failures.get((subject.name, resident), [])
                note = subject.missing or (
                    f"failed in {len(failures)} of {self._how.rounds} rounds; {failures[0]}"[:300] if failures else ""
                )
                for figure in (PAIR, ACKNOWLEDGED, MISS):
                    key = _Key(subject.name, resident, figure)
                    row = Row("iotlb", subject.name, Setting(mappings=resident), figure, "us", note=note)
                    samples = self._samples.get(key, {})
                    yield replace(row, samples=tuple(samples.values()))
                    if subject is NET and TESTPMD in self._subjects:
                        yield from self._ratio(row, samples)

    def _ratio(self, row: Row, samples: dict[int, float]) -> Iterator[Row]:
        """To DPDK's with as many as it can hold, or with the same number."""
        resident = row.setting.mappings
        theirs = self._resident[TESTPMD.name]
        beside = resident if resident in theirs else max(theirs)
        other = self._samples.get(_Key(TESTPMD.name, beside, row.figure), {})
        target = Target(0.25, at_most=True) if (row.figure, resident, beside) == (PAIR, _MOST, _BESIDE) else None
        ratios = tuple(value / other[turn] for turn, value in samples.items() if turn in other)
        yield replace(
            row,
            figure=f"{row.figure}: ratio",
            unit="x",
            samples=ratios,
            note=row.note or ("" if ratios else TESTPMD.missing or "the other one has no figure"),
            beside=TESTPMD.name,
            beside_setting=None if beside == resident else Setting(mappings=beside),
            target=target,
        )


def block_pairs(front: Session, resident: int, seconds: float) -> float:
    """Microseconds of a pair, of the median block of 100."""
    block = pairs(max(0, resident // 2), _BLOCK)
    front.front.barrier()
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(took) < 3:
        begin = time.monotonic_ns()
        front.front.stream(block)
        front.front.barrier()
        took.append((time.monotonic_ns() - begin) / 1e3 / _BLOCK)
    return sorted(took)[len(took) // 2]


def acknowledged_pairs(front: Session, resident: int, seconds: float) -> float:
    """Microseconds of a pair whose INVALIDATE is acknowledged, as a machine monitor has it."""
    blocks = [(pairs(number, 1)[:44], _page(number)) for number in range(resident // 2, resident // 2 + _BLOCK)]
    took: list[float] = []
    end = time.monotonic() + seconds / 2
    while time.monotonic() < end or len(took) < 3:
        begin = time.monotonic_ns()
        for update, page in blocks:
            front.front.stream(update)
            front.front.invalidate(page, PAGE)
        took.append((time.monotonic_ns() - begin) / 1e3 / _BLOCK)
    return sorted(took)[len(took) // 2]


def _page(number: int) -> IOVA:
    """The page that `pairs` makes the pair of that number of."""
    return IOVA(int.from_bytes(pairs(number, 1)[12:20], "little"))


def _misses(front: Session, resident: int) -> float:
    """Microseconds that a miss adds: the median frame to a page for the first time, less that to one that is known."""
    first, again = (front.each(misses(front.memory.shape, resident)) for _ in range(2))
    if front.front.counters.misses < _MISSES:
        raise MachineError(f"it asked {front.front.counters.misses} times for {_MISSES} pages that it was not told of")
    return first - again
