# SPDX-License-Identifier: Apache-2.0
"""What the matrix costs: 100 cells on all cores beside QEMU's own start and quit, and memory over the cells.

Usage: matrix.py [--cells N] [--rounds N]. The machine may be shared and noisy, so only the ratios mean something.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run import Bare, Figure, timed

from virtiova.cli.matrix import pieces
from virtiova.matrix import Extent, Planned, plan, run_planned
from virtiova.probe.plan import Task
from virtiova.result import Row
from virtiova.run.executor import cores
from virtiova.run.processes import Processes
from virtiova.run.results import Results, fingerprint

_PRELOAD = ("virtiova.matrix.work",)
_COUNTS = (100, 1000, 10000)


def spread(count: int) -> list[Planned]:
    """``count`` cells of the matrix, spread evenly over all that it has, without negotiations and missing ones."""
    tasks = [p for p in plan(extent=Extent(full=True)).tasks if not p.missing and p.system not in ("types", "mixes")]
    return [tasks[index * len(tasks) // count] for index in range(count)]


def bare(planned: Planned) -> float:
    """Seconds of QEMU's own start and quit, with the command line of a cell."""
    task = planned.task
    return timed(lambda: Bare(task.device, task.iommu, machine=task.machine).quit())


def cells(count: int, rounds: int) -> Iterable[Figure]:
    """The cells on all cores, and the same command lines started and told to quit, by turns."""
    tasks = spread(count)
    whole, alone, ratio, side = [], [], [], []
    for _ in range(rounds):
        seconds = timed(lambda: list(Processes(preload=_PRELOAD).run(run_planned, iter(enumerate(tasks)))))
        total = sum(bare(planned) for planned in tasks)
        with ThreadPoolExecutor(cores()) as pool:
            beside = timed(lambda pool=pool: list(pool.map(bare, tasks)))  # type: ignore[misc]
        whole.append(seconds)
        alone.append(total)
        side.append(seconds / beside)
        ratio.append(seconds / total)
    boards = len({(p.task.machine, p.task.iommu) for p in tasks})
    yield Figure(f"{count} cells, {boards} platforms, {cores()} cores", "s", "goal: at most 15", whole)
    yield Figure("sum of QEMU's own start and quit, one by one", "s", "", alone)
    yield Figure("cells / that sum", "x", "", ratio)
    yield Figure("cells / QEMU's own start and quit on as many cores", "x", "", side)


def memory() -> Iterable[Figure]:
    """The highest resident memory of a process that stored and reported so many cells."""
    for count in _COUNTS:
        done = subprocess.run(
            [sys.executable, __file__, "--store", str(count)], capture_output=True, text=True, check=True
        )
        yield Figure(f"peak memory, {count} cells stored and written in every format", "MB", "", [float(done.stdout)])


def store(count: int) -> None:
    """Store a cell ``count`` times, write every format, and print the peak."""
    (row,) = run_planned(Planned("most", "QEMU", Task("model", "soft", "honest:blk", "device-writes")))
    with Results(None, Row, fingerprint(range(count)), count) as results:
        for number in range(count):
            results.add(number, row)
        for kind in ("json", "html", "svg", "xml", "txt"):
            with open(os.devnull, "w", encoding="utf-8") as file:
                file.writelines(pieces(kind, results))
    # Not ru_maxrss, which counts whoever started us as well.
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.store is not None:
        store(options.store)
        return
    for part in (functools.partial(cells, options.cells, options.rounds), memory):
        for figure in part():
            print(figure.line(), flush=True)


if __name__ == "__main__":
    main()
