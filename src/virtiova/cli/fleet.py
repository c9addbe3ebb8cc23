# SPDX-License-Identifier: Apache-2.0
"""Many gathered machines at a time: read and judged in worker processes, and counted as they come.

A task is one file. Files that hold views of one machine (the same UUID) are judged together in a second pass: which
those are is only known when all were read.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.cli.scan_inputs import look_at
from virtiova.collect import keys as k
from virtiova.collect.facts import View
from virtiova.errors import UsageError
from virtiova.result.scan import Scan, ScannedMachine, apart
from virtiova.run.executor import Done, Executor
from virtiova.run.processes import Processes
from virtiova.run.results import Results, fingerprint
from virtiova.scan import scan_views

PRELOAD: Final = ("virtiova.cli.fleet", "virtiova.collect.gathered", "virtiova.collect.linux", "tarfile")
SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".xml")
_LONGEST: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """Files to be judged together, each with its content where the worker may not have the file."""

    paths: tuple[str, ...]
    contents: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """What came of a task: what is said, and the UUIDs of the machines in it."""

    paths: list[str]
    uuids: list[str] = field(default_factory=list)
    scan: Scan = field(default_factory=Scan)


def expand(inputs: Sequence[str]) -> list[str]:
    """The files that were named, and of a folder that is no gathered machine itself those in it."""
    found: list[str] = []
    for name in inputs:
        inside = []
        if os.path.isdir(name):
            inside = [each.path for each in os.scandir(name) if each.name.endswith(SUFFIXES) and each.is_file()]
        found += sorted(inside) or [name]
    return found


def judge(task: Task) -> Box:
    """Read the files of a task and judge what is in them. Runs in a worker, wherever that is."""
    views: list[View] = []
    if task.contents:
        with tempfile.TemporaryDirectory(prefix="virtiova-") as folder:
            for number, (path, data) in enumerate(zip(task.paths, task.contents, strict=True)):
                here = os.path.join(folder, str(number), os.path.basename(path))
                os.mkdir(os.path.dirname(here))
                with open(here, "xb") as file:
                    file.write(data)
                views += look_at(here, path)
    else:
        for path in task.paths:
            views += look_at(path)
    uuids = sorted({uuid for view in views if (uuid := view.machine.get(k.UUID))})
    return Box(list(task.paths), uuids, scan_views(views))


class Fleet:
    """The scans of many files, those that belong together as one. Use it as a context manager; iterate as often as
    you like: they are on disk, and read again each time."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._tasks = [Task((path,)) for path in paths]
        self._again: set[int] = set()
        self._cleanup = contextlib.ExitStack()
        self._single = self._results(self._tasks)
        self._joint = self._results([])

    def _results(self, tasks: Sequence[Task]) -> Results[Box]:
        return self._cleanup.enter_context(Results(None, Box, fingerprint(tasks), len(tasks)))

    def run(self, executor: Executor, *, send: bool = False, show: bool = False) -> None:
        """Read and judge all. ``send``: the workers may not have the files. ``show``: count on standard error."""
        _all(self._tasks, self._single, executor, send=send, show=show)
        groups = _together((number, self._single[number].uuids) for number in range(len(self._tasks)))
        if groups:
            tasks = [Task(tuple(self.paths[number] for number in group)) for group in groups]
            self._again = {number for group in groups for number in group}
            self._joint = self._results(tasks)
            _all(tasks, self._joint, executor, send=send, show=show)

    def __iter__(self) -> Iterator[Scan]:
        return apart(self._scans())

    def _scans(self) -> Iterator[Scan]:
        for number in range(len(self._tasks)):
            if number not in self._again:
                yield self._single[number].scan
        for box in self._joint:
            yield box.scan

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()


def _all(tasks: Sequence[Task], results: Results[Box], executor: Executor, *, send: bool, show: bool) -> None:
    """Run the tasks; what is lost is said of the files that it is about."""
    work = (_sent(tasks) if send else enumerate(tasks)) if tasks else iter(())
    with contextlib.closing(executor.run(judge, work)) as answers:
        for done in answers:
            results.add(done.number, _box(tasks[done.number], done))
            if show:
                sys.stderr.write(f"\r{len(results)}/{len(tasks)} files")
                sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[K")


def _sent(tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
    """The same with what is in the files. One that cannot be read is left to the worker, which says so."""
    for number, task in enumerate(tasks):
        try:
            contents = []
            for path in task.paths:
                if not os.path.isfile(path) or os.path.getsize(path) > _LONGEST:
                    raise OSError(path)
                with open(path, "rb") as file:
                    contents.append(file.read(_LONGEST))
            yield number, Task(task.paths, tuple(contents))
        except OSError:
            yield number, task


def _box(task: Task, done: Done[Box]) -> Box:
    if done.value is not None:
        return done.value
    name = ", ".join(task.paths)
    lost = ScannedMachine(name, "configuration", list(task.paths), {}, [f"{name}: {done.lost}"])
    return Box(list(task.paths), [], Scan("configuration", [lost]))


def _together(found: Iterable[tuple[int, Sequence[str]]]) -> list[list[int]]:
    """The numbers of files that share a UUID, directly or by way of others; only groups of several."""
    parent: dict[int, int] = {}
    first: dict[str, int] = {}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, uuids in found:
        parent[number] = number
        for uuid in uuids:
            parent[root(number)] = root(first.setdefault(uuid, number))
    groups: dict[int, list[int]] = {}
    for number in parent:
        groups.setdefault(root(number), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def executor_for(jobs: int | None, scheduler: str | None) -> contextlib.AbstractContextManager[Executor]:
    """Worker processes here, or a Dask cluster."""
    if jobs is not None and jobs < 1:
        raise UsageError("--jobs takes a number from 1 on")
    if scheduler is None:
        return contextlib.nullcontext(Processes(jobs, preload=PRELOAD))
    from virtiova.run.cluster import Cluster

    return contextlib.closing(Cluster(scheduler))
