# SPDX-License-Identifier: Apache-2.0
"""What the matrix costs: 100 cells on all cores beside QEMU's own start and quit, and memory over the cells.

Usage: matrix.py [--cells N] [--rounds N]. The machine may be shared and noisy, so only the ratios mean something.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run import Bare, Figure, timed

from virtiova.cli.matrix import collect, pieces
from virtiova.matrix import SYSTEMS, Extent, Planned, plan, run_planned
from virtiova.matrix.plan import Plan
from virtiova.probe.plan import BEHAVIOURS, MODEL_DEVICES, Task, all_experiments
from virtiova.result import Row
from virtiova.run.executor import cores
from virtiova.run.processes import Processes
from virtiova.run.results import Results, fingerprint

_PRELOAD = ("virtiova.matrix.work",)
_COUNTS = (100, 1000, 10000)


def spread(count: int) -> list[Planned]:
    """Tasks of ``count`` cells of the matrix, or a few more: a mix on every IOMMU that has one, each of as many cells
    as it has devices, and the rest spread evenly over all else that there is, but negotiations and missing ones."""
    tasks = [p for p in plan(extent=Extent(full=True)).tasks if not p.missing and p.system != "types"]
    mixes = {p.task.machine + p.task.iommu: p for p in tasks if p.system == "mixes"}
    single = [p for p in tasks if p.system != "mixes"]
    rest = max(count - sum(p.span for p in mixes.values()), 0)
    return [*mixes.values(), *(single[index * len(single) // rest] for index in range(rest))]


def bare(planned: Planned) -> float:
    """Seconds of QEMU's own start and quit, with the command line of a cell."""
    task = planned.task
    devices = task.devices if task.beside else task.device
    return timed(lambda: Bare(devices, task.iommu, machine=task.machine, prefer=task.interface).quit())


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
    count = sum(p.span for p in tasks)
    yield Figure(
        f"{count} cells, {len(tasks)} machines, {boards} platforms, {cores()} cores", "s", "goal: at most 15", whole
    )
    yield Figure("sum of QEMU's own start and quit, one by one", "s", "", alone)
    yield Figure("cells / that sum", "x", "", ratio)
    yield Figure("cells / QEMU's own start and quit on as many cores", "x", "", side)


def memory() -> Iterable[Figure]:
    """The highest resident memory of a process that planned, ran, stored and reported so many cells."""
    for count in _COUNTS:
        done = subprocess.run(
            [sys.executable, __file__, "--store", str(count)], capture_output=True, text=True, check=True
        )
        yield Figure(f"peak memory, {count} cells run and written in every format", "MB", "", [float(done.stdout)])


def many(count: int) -> Plan:
    """``count`` cells that differ: every experiment on every device of the in-process machine, again and again, and
    as many that cannot be had, each with a reason of its own."""
    kinds = itertools.cycle(
        Task("model", iommu, f"{behaviour}:{device}", name)
        for behaviour in BEHAVIOURS
        for device in MODEL_DEVICES
        for iommu in ("soft", "none")
        for name in all_experiments(device)
    )
    systems = itertools.cycle(system.id for system in SYSTEMS)
    return Plan(
        [
            Planned(system, f"model {number}", task, f"not here, for reason {number}" if number % 2 else "")
            for number, system, task in zip(range(count), systems, kinds, strict=False)
        ]
    )


def store(count: int) -> None:
    """The command's own way with so many cells, from the plan to every format; print the peak in MB."""
    wanted = many(count)
    options = argparse.Namespace(jobs=None, quiet=True, scheduler=None)
    with Results(None, Row, fingerprint(wanted.tasks), wanted.count) as results:
        collect(wanted, results, options)
        assert len(results) == count
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
