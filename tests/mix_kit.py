# SPDX-License-Identifier: Apache-2.0
"""Mixes: several devices in one real QEMU machine, for the tests of them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from probe_kit import ON
from virtiova.machine.qemu.boards import find_board
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.matrix.plan import mix
from virtiova.policy import RULES
from virtiova.probe import mix as mixing
from virtiova.probe.experiment import find
from virtiova.probe.plan import Runner, Task
from virtiova.probe.rig import Outcome, Rig
from virtiova.result import Cell

PLATFORMS = ("q35 intel", "q35 intel,invalidation=queue", "q35 amd", "q35 virtio", "virt smmuv3", "virt virtio")
SHARED = ("sun4u sabre", "pseries tce")
# The mixes of the matrix: with the bit, without, edu or rtl8139, legacy, with the bit; then two on a bypassed bus.
WAYS = ("translated", "bypass", "translated", "bypass", "translated", "direct", "direct")
TWO = [f"virtio-blk-pci{ON}", f"virtio-rng-pci{ON}"]
"""One that is asked, and its neighbour: both go through mappings of their own."""


def skip_if_missing(request: pytest.FixtureRequest) -> None:
    """A machine whose QEMU is not installed is skipped, and says so."""
    if "platform" not in request.fixturenames:
        return
    board = find_board(request.getfixturevalue("platform").split()[0])
    if shutil.which(board.binary) is None:
        pytest.skip(f"{board.binary} is not installed: apt install {board.package}")


@functools.cache
def mixed(platform: str, experiment: str, inverted: str = "") -> tuple[Cell, ...]:
    """The mix of a platform's board, asked once."""
    machine, iommu = platform.split()
    first, *others = mix(find_board(machine))
    rules = RULES.inverted(inverted) if inverted else RULES
    return tuple(Runner(jobs=1, rules=rules).run_all(Task(machine, iommu, first, experiment, beside=tuple(others))))


def ways(cells: tuple[Cell, ...] | list[Cell]) -> tuple[str, ...]:
    return tuple(str(cell.observed) for cell in cells)


def of_two(devices: list[str], name: str, before: Callable[[Rig], object] = lambda rig: None) -> list[Cell]:
    """An experiment on neighbours behind VT-d, with something done to the rig first."""
    honest = find(name)

    def run(rig: Rig) -> Outcome:
        before(rig)
        return honest.run(rig)

    with QemuMachine(devices, "intel") as machine:
        specs = [end.spec for end in machine.ends]
    return mixing.run_mix(
        lambda: QemuMachine(devices, "intel"),
        replace(honest, run=run),
        mixing.seats(specs, devices, name),
        outside=lambda seat, on: pytest.fail("they have messages of their own"),
    )
