# SPDX-License-Identifier: Apache-2.0
"""Local worker processes, as many as there are cores: one that crashes or hangs costs the one task it had.

`concurrent.futures.ProcessPoolExecutor` gives up the whole pool when one process dies, and cannot end one that
hangs; so each worker has a pipe of its own here, and is known by it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, TypeVar

from virtiova.run.executor import Done, attempt, cores

T = TypeVar("T")
R = TypeVar("R")

_END_SECONDS: Final = 2.0
TASK_SECONDS: Final = 300.0
"""How long one task may take before its worker counts as hung. A cell takes well below a second; a guest, a minute."""


@dataclass(slots=True)
class _Worker:
    """One process, our end of its pipe, and the number of the task it has (-1: none)."""

    process: BaseProcess
    pipe: Connection[Any, Any]
    number: int = -1
    deadline: float = 0.0


class Processes:
    """``jobs`` worker processes (`Executor`), each with at most one task.

    Workers come from a fork server that imports the modules ``preload`` once, so that a worker is ready at once
    and no thread of this process is forked. A task that takes longer than ``seconds`` is lost with its worker.
    """

    def __init__(self, jobs: int | None = None, *, seconds: float = TASK_SECONDS, preload: Sequence[str] = ()) -> None:
        self.jobs = jobs or cores()
        self._seconds = seconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def run(self, work: Callable[[T], R], tasks: Iterable[tuple[int, T]]) -> Generator[Done[R], None, None]:
        """As `Executor.run`."""
        todo = iter(tasks)
        idle: list[_Worker] = []
        busy: list[_Worker] = []
        try:
            while True:
                while len(busy) < self.jobs and (following := next(todo, None)) is not None:
                    worker = idle.pop() if idle else self._start(work)
                    self._give(worker, *following)
                    busy.append(worker)
                if not busy:
                    return
                for worker in self._ready(busy):
                    busy.remove(worker)
                    done: Done[R] = self._take(worker)
                    if worker.process.is_alive():
                        idle.append(worker)
                    yield done
        finally:
            for worker in (*idle, *busy):
                _end(worker)

    def _start(self, work: Callable[[T], R]) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, work), name="virtiova-worker", daemon=True)
        process.start()
        # Theirs must be open in the worker only: its end is then the worker's.
        theirs.close()
        return _Worker(process, ours)

    def _give(self, worker: _Worker, number: int, task: object) -> None:
        worker.number = number
        worker.deadline = time.monotonic() + self._seconds
        # A worker that is already dead is found out when its answer is read.
        with contextlib.suppress(OSError):
            worker.pipe.send((number, task))

    def _ready(self, busy: list[_Worker]) -> list[_Worker]:
        """Those that answered or died; after their time is over, those that hang."""
        first = min(worker.deadline for worker in busy)
        ready = wait([worker.pipe for worker in busy], max(0.0, first - time.monotonic()))
        if ready:
            return [worker for worker in busy if worker.pipe in ready]
        return [worker for worker in busy if worker.deadline <= time.monotonic()]

    def _take(self, worker: _Worker) -> Done[R]:
        """A worker's answer, or why there is none; the worker is then ended."""
        lost = f"no answer within {self._seconds:g} s; the worker was ended"
        try:
            if worker.pipe.poll():
                answer = worker.pipe.recv()
                if isinstance(answer, Done) and answer.number == worker.number:
                    return answer
                lost = "the worker's answer has no meaning"
        except EOFError:
            worker.process.join(_END_SECONDS)
            lost = _how(worker.process.exitcode)
        except Exception as error:  # unpickling may raise anything
            lost = f"the worker's answer could not be read: {error}"
        _end(worker)
        return Done(worker.number, None, lost)


def _how(code: int | None) -> str:
    if code is None:
        return "the worker closed its pipe"
    return f"the worker died of signal {-code}" if code < 0 else f"the worker ended with status {code}"


def _end(worker: _Worker) -> None:
    """End a worker: politely, so that it ends its machine, then not."""
    worker.pipe.close()
    worker.process.terminate()
    worker.process.join(_END_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(_END_SECONDS)


def _serve(pipe: Connection[Any, Any], work: Callable[[T], R]) -> None:
    """The worker: tasks in, answers out, until the pipe is closed (also by the death of whoever holds its end)."""
    # A Ctrl-C on the terminal reaches everybody; who ends whom is decided by the one who started us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, task = pipe.recv()
            pipe.send(attempt(work, number, task))
