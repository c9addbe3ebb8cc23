# SPDX-License-Identifier: Apache-2.0
"""What the probe costs: ratios within one run, interleaved, medians with their spread.

Usage: run.py [--rounds N] [--json]. The machine may be shared and noisy, so only the ratios mean something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.plan import Runner, Task, default_tasks

DEVICE = "virtio-blk-pci,iommu_platform=on"
CELLS = ("device-writes", "device-reads", "ring", "unmap", "not-taken")
_QUIT = b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'
_OPERATIONS = 2000


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: its name, unit, goal (empty: it is only reported) and the samples of all rounds."""

    name: str
    unit: str
    goal: str
    samples: list[float]

    def line(self) -> str:
        low, mid, high = min(self.samples), statistics.median(self.samples), max(self.samples)
        return f"{self.name:<58} {mid:8.2f} {self.unit:<5} ({low:.2f}..{high:.2f})  {self.goal}"


class Bare(QemuMachine):
    """QEMU with the same command line, started up to its first answer and told to quit, by its own monitor."""

    def _wire(self) -> None:
        """Nothing is done with it."""

    def quit(self) -> None:
        """Tell it to quit, and wait until it has."""
        self._qmp.sendall(_QUIT)
        if self._process.exit_code(5.0) != 0:
            raise SystemExit("QEMU did not quit when told to")
        self.close()


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cells(rounds: int) -> Iterable[Figure]:
    """A whole cell, start to verdict to stop, beside QEMU's own start and quit; one after the other, by turns."""
    runner = Runner(jobs=1)
    samples: dict[str, list[float]] = {name: [] for name in CELLS}
    bare, ratios = [], {name: [] for name in CELLS}  # type: ignore[var-annotated]
    for turn in range(rounds):
        names = CELLS[turn % len(CELLS) :] + CELLS[: turn % len(CELLS)]
        for name in names:
            alone = timed(lambda: Bare(DEVICE, "intel").quit())
            whole = timed(lambda name=name: runner.run_one(Task("q35", "intel", DEVICE, name)))  # type: ignore[misc]
            bare.append(alone * 1e3)
            samples[name].append(whole * 1e3)
            ratios[name].append(whole / alone)
    yield Figure("QEMU's own start and quit", "ms", "", bare)
    for name in CELLS:
        yield Figure(f"cell {name}", "ms", "", samples[name])
        yield Figure(f"cell {name} / QEMU's own start and quit", "x", "goal: at most 2", ratios[name])


def table(rounds: int) -> Iterable[Figure]:
    """The default table, cells side by side."""
    tasks = default_tasks()
    seconds = [timed(lambda: list(Runner().run(tasks))) for _ in range(max(3, rounds // 3))]
    yield Figure(f"default table, {len(tasks)} cells, {os.cpu_count()} cores", "s", "goal: under 5", seconds)


def start_up(rounds: int) -> Iterable[Figure]:
    """``virtiova --help`` beside a bare interpreter."""
    script = Path(sys.executable).with_name("virtiova")
    extra = []
    for _ in range(rounds):
        bare = timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
        shown = timed(lambda: subprocess.run([script, "--help"], check=True, stdout=subprocess.DEVNULL))
        extra.append((shown - bare) * 1e3)
    yield Figure("virtiova --help, over python -c pass", "ms", "goal: under 60", extra)


def operations(rounds: int) -> Iterable[Figure]:
    """One register access, waited for; and in one piece with others."""
    alone, piped, read = [], [], []
    with QemuMachine(DEVICE, "intel") as machine:
        bus, address = machine.bus, 0xFED90008
        for _ in range(rounds):
            alone.append(timed(lambda: [bus.read(address, 4) for _ in range(_OPERATIONS)]) / _OPERATIONS * 1e6)
            many = list(itertools.repeat((address, 4), _OPERATIONS))
            read.append(timed(lambda many=many: bus.read_many(many)) / _OPERATIONS * 1e6)  # type: ignore[misc]

            def post() -> None:
                for _ in range(_OPERATIONS):
                    bus.write(address, 4, 0)
                bus.flush()

            piped.append(timed(post) / _OPERATIONS * 1e6)
    yield Figure("MMIO read, waited for", "us", "", alone)
    yield Figure("MMIO read, pipelined", "us", "", read)
    yield Figure("MMIO write, posted", "us", "", piped)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: list[Figure] = []
    if not options.json:
        print("medians of one run, with (least..most); other load on the machine shows in the spread\n")
    for part in (cells, table, start_up, operations):
        for figure in part(options.rounds):
            figures.append(figure)
            if not options.json:
                print(figure.line(), flush=True)
    if options.json:
        print(json.dumps({"schema": "virtiova/cost/1", "figures": [asdict(figure) for figure in figures]}, indent=2))


if __name__ == "__main__":
    main()
