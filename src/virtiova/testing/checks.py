# SPDX-License-Identifier: Apache-2.0
"""What all checks of the kit are made of: a name, a sentence that is cited, and a search for the shortest history that
breaks it.

A history is data: a list of steps that print as Python. Hypothesis makes them, and makes them shorter once one fails;
of its own output nothing is shown. So a check is the same from pytest, from another runner and from plain Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from virtiova.errors import UsageError

T = TypeVar("T")
Result = Literal["pass", "fail", "expected", "n/a"]
"""``expected``: it fails, as the caller said that it would."""

EXAMPLES: Final = 60
"""Histories that a check tries, unless it is told otherwise."""
PARE: Final = 1000
"""Histories that are tried at most to make one shorter."""
SHRINK: Final = (Phase.generate, Phase.shrink)


class CheckFailed(AssertionError):
    """What was checked is wrong. ``outcomes`` are those of the checks that failed; the message has it all in words."""

    def __init__(self, message: str, outcomes: Sequence[Outcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


class NotApplicable(Exception):
    """The check has nothing to look at here; the message says what it would need."""


class Wrong(Exception):
    """What one history showed: ``steps`` in words, the last one being where it went wrong, and ``what`` went wrong."""

    def __init__(self, steps: Sequence[str], what: str) -> None:
        super().__init__(what)
        self.steps = tuple(steps)
        self.what = what

    def __str__(self) -> str:
        return "\n".join([*(f"    {step}" for step in self.steps), *self.what.splitlines()])


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look. ``examples``: histories for each check. ``seed``: others with another one, the same again with
    the same."""

    examples: int = EXAMPLES
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is checked. Call it: it returns nothing, or raises `CheckFailed` or `NotApplicable`.

    ``str(check)`` is its name, so that it can be a parameter of a test of pytest's (``ids=str``).
    """

    name: str
    title: str
    """What holds if it passes, as a sentence."""
    citation: str
    """What that rests on."""
    body: Callable[[], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        try:
            self.body()
        except Wrong as wrong:
            raise CheckFailed(f"{self.name}: not so: {self.title} ({self.citation})\n{wrong}") from wrong.__cause__

    def outcome(self, expected: str | None = None) -> Outcome:
        """What comes of it, instead of an exception. ``expected``: why it is expected to fail, if it is."""
        begin = time.perf_counter()
        result: Result = "pass"
        words = ""
        cause: BaseException | None = None
        try:
            self()
        except CheckFailed as failed:
            result, words, cause = "fail" if expected is None else "expected", str(failed), failed.__cause__
        except NotApplicable as reason:
            result, words = "n/a", str(reason)
        return Outcome(self.name, self.title, self.citation, result, words, time.perf_counter() - begin, cause)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one check. ``words``: the shortest history, or why it has nothing to look at."""

    name: str
    title: str
    citation: str
    result: Result
    words: str
    seconds: float
    cause: BaseException | None = field(default=None, repr=False, compare=False)
    """What the code under test raised, if that is what is wrong."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of all checks, in their order. Prints as a table."""

    subject: str
    outcomes: tuple[Outcome, ...]

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, name: str) -> Outcome:
        return {each.name: each for each in self.outcomes}[name]

    def __str__(self) -> str:
        width = max((len(each.name) for each in self.outcomes), default=0)
        said = [each.words if each.result == "n/a" else each.title for each in self.outcomes]
        rows = [f"{each.result:8}  {each.name:{width}}  {text}" for each, text in zip(self.outcomes, said, strict=True)]
        return "\n".join([f"{self.subject}: {len(self.outcomes)} checks", *rows])


def choose(checks: Iterable[Check], only: Iterable[str] | None) -> list[Check]:
    """All checks, or those that are named. Raises `UsageError` for a name that there is not."""
    every = list(checks)
    if only is None:
        return every
    wanted = list(only)
    for name in wanted:
        if name not in map(str, every):
            raise UsageError.unknown("check", name, map(str, every))
    return [check for check in every if check.name in wanted]


def run(subject: str, checks: Sequence[Check], expected: Mapping[str, str]) -> Report:
    """Run all of them, and raise one `CheckFailed` about those that failed and were not ``expected`` to, or that passed
    although they were."""
    for name in expected:
        choose(checks, [name])
    report = Report(subject, tuple(check.outcome(expected.get(check.name)) for check in checks))
    failed = [each for each in report if each.result == "fail"]
    better = [each for each in report if each.name in expected and each.result != "expected"]
    parts = [each.words for each in failed]
    parts += [f"{each.name}: expected to fail ({expected[each.name]}), but: {each.result}" for each in better]
    if parts:
        names = " ".join(each.name for each in [*failed, *better])
        head = f"{subject}: {len(parts)} of {len(report)} checks: {names}"
        raise CheckFailed("\n\n".join([head, *parts]), [*failed, *better]) from (failed[0].cause if failed else None)
    return report


def search_histories(
    strategy: SearchStrategy[Sequence[T]],
    play: Callable[[Sequence[T]], None],
    effort: Effort,
    simpler: Callable[[T], Iterable[T]] | None = None,
) -> None:
    """The same for histories, of which each step can be left out. Raises the `Wrong` of one that needs all it has.

    ``simpler``: what may stand in place of a step, none of which leads back to it. Without it Hypothesis finds simpler
    numbers, which takes longer.
    """
    tried: list[Sequence[T]] = []

    def noted(history: Sequence[T]) -> None:
        tried[:] = [history]
        play(history)

    try:
        search(strategy, noted, effort, phases=SHRINK if simpler is None else SHRINK[:1])
    except Wrong as wrong:
        last = _pared(tried[0], play, simpler or (lambda step: ())) if wrong.steps else None
        raise last or wrong from (last or wrong).__cause__


def _pared(
    history: Sequence[T], play: Callable[[Sequence[T]], None], simpler: Callable[[T], Iterable[T]]
) -> Wrong | None:
    """Take out steps, and make others simpler, as long as it stays wrong; what is left shows, if anything changed."""
    steps, last, left = list(history), None, PARE

    def breaks(other: list[T]) -> bool:
        nonlocal steps, last, left
        left -= 1
        try:
            play(other)
        except Wrong as wrong:
            steps, last = other, wrong
            return True
        return False

    again = True
    while again and left > 0:
        before = steps
        size = len(steps)
        while size:
            at = len(steps) - size
            while at >= 0 and left > 0:
                breaks([*steps[:at], *steps[at + size :]])
                at -= size
            size //= 2
        for at in range(len(steps)):
            for other in simpler(steps[at]):
                if left > 0 and breaks([*steps[:at], other, *steps[at + 1 :]]):
                    break
        again = steps != before
    return last


def search(
    strategy: SearchStrategy[T], play: Callable[[T], None], effort: Effort, *, phases: Sequence[Phase] = SHRINK
) -> None:
    """Let ``play`` have what ``strategy`` makes, and raise the `Wrong` of the simplest example that breaks it."""

    @seed(effort.seed)
    @settings(
        max_examples=effort.examples,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def example(made: T) -> None:
        play(made)

    try:
        example()
    except Flaky as flaky:
        why = "the same history does not always give the same: what is checked keeps something that is not its own"
        raise Wrong((), why) from flaky
