# SPDX-License-Identifier: Apache-2.0
"""One interface for whoever runs independent tasks, wherever that is."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """What came of one task: a value, or why there is none."""

    number: int
    """The task's, as it was given."""
    value: R | None
    lost: str = ""
    """In words, if there is no value: the worker died, or the work raised."""


class Executor(Protocol):
    """Runs tasks that know nothing of each other.

    ``work`` is a function of a module (or a `functools.partial` of one), so that it can be sent elsewhere. Tasks are
    taken from the iterable as there is room for them, and every task that was taken is answered once, in the order in
    which they become ready. Nothing is kept of a task that was answered. Work that raises, and a worker that dies,
    cost the one task.
    """

    def run(self, work: Callable[[T], R], tasks: Iterable[tuple[int, T]]) -> Generator[Done[R], None, None]:
        """Run them all; whoever stops early with the iterator's ``close`` ends what is under way."""


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def attempt(work: Callable[[T], R], number: int, task: T) -> Done[R]:
    """Do one task here; what it raises is its outcome."""
    try:
        return Done(number, work(task))
    except Exception as error:  # whatever it is, it costs this task only
        return Done(number, None, said(error))
