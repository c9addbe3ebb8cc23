# SPDX-License-Identifier: Apache-2.0
"""A Dask cluster: the same tasks, sent to the workers of a scheduler. Needs ``virtiova[cluster]``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, Final, TypeVar

from virtiova import __version__
from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.run.executor import Done, attempt, said

T = TypeVar("T")
R = TypeVar("R")

CONNECT_SECONDS: Final = 10.0
_AHEAD: Final = 2
"""Tasks in the cluster for each of its threads: one that runs, one that waits."""


class Cluster:
    """The workers of the Dask scheduler at ``address`` (`Executor`).

    A worker that dies has its tasks run again by another one; a task that took several workers with it is lost.
    Raises `NotPossibleError` without Dask, `MachineError` if nobody answers, `UsageError` if a worker has another
    version of this package (or none).
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise NotPossibleError("--scheduler needs Dask: pip install '.[cluster]' from a checkout") from error
        try:
            self._client: Any = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except ValueError as error:
            raise UsageError(f"{address!r} is no address of a Dask scheduler: {error}") from error
        except OSError as error:
            raise MachineError(f"no Dask scheduler answers at {address}") from error
        self._check()

    def _check(self) -> None:
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            self.close()
            raise MachineError("the Dask scheduler has no workers")
        versions = self._client.run(_version, on_error="return")
        wrong = {name: text for name, text in versions.items() if text != __version__}
        if wrong:
            self.close()
            name, text = next(iter(wrong.items()))
            raise UsageError(f"worker {name} has virtiova {text}, here is {__version__}")

    @property
    def jobs(self) -> int:
        """The threads of all workers that there are now."""
        return max(1, sum(int(count) for count in self._client.nthreads().values()))

    def run(self, work: Callable[[T], R], tasks: Iterable[tuple[int, T]]) -> Generator[Done[R], None, None]:
        """As `Executor.run`."""
        from distributed import as_completed

        todo = iter(tasks)
        numbers: dict[str, int] = {}
        waiting: Any = as_completed([], loop=self._client.loop, raise_errors=False)
        running: dict[str, Any] = {}
        try:
            while True:
                for number, task in islice(todo, max(0, _AHEAD * self.jobs - len(running))):
                    # Not pure: two equal tasks are two observations.
                    future = self._client.submit(attempt, work, number, task, pure=False)
                    numbers[future.key], running[future.key] = number, future
                    waiting.add(future)
                if not running:
                    return
                future = next(waiting)
                number = numbers.pop(future.key)
                del running[future.key]
                yield _done(future, number)
        finally:
            self._client.cancel(list(running.values()))

    def close(self) -> None:
        """Leave the cluster; it goes on."""
        self._client.close()


def _done(future: Any, number: int) -> Done[Any]:
    error = None if future.status == "finished" else future.exception()
    if error is not None:
        return Done(number, None, f"lost on the cluster: {said(error)}")
    if future.status != "finished":
        return Done(number, None, f"lost on the cluster: {future.status}")
    answer = future.result()
    future.release()
    return answer if isinstance(answer, Done) else Done(number, None, "the worker's answer has no meaning")


def _version() -> str:
    """Runs on a worker."""
    from virtiova import __version__ as theirs

    return theirs
