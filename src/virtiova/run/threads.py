# SPDX-License-Identifier: Apache-2.0
"""Threads of this process: the least overhead, where the work is mostly waiting for machines."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from virtiova.run.executor import Done, attempt, cores

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """``jobs`` threads (`Executor`). Native code that crashes takes this process with it: see `Processes`."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or cores()

    def run(self, work: Callable[[T], R], tasks: Iterable[tuple[int, T]]) -> Generator[Done[R], None, None]:
        """As `Executor.run`."""
        todo = iter(tasks)
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="virtiova-task")
        running: set[Future[Done[R]]] = set()
        try:
            while True:
                # One more than there are threads, so that none waits for us.
                for number, task in islice(todo, self.jobs + 1 - len(running)):
                    running.add(pool.submit(attempt, work, number, task))
                if not running:
                    return
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
