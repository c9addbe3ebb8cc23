# SPDX-License-Identifier: Apache-2.0
"""The work of one task of the matrix: what an executor is given, wherever it runs it."""

from __future__ import annotations

import functools
from dataclasses import replace

from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu.options import OptionSpec
from virtiova.matrix import boots, guests
from virtiova.matrix.backends import here
from virtiova.matrix.handed import BY_NAME
from virtiova.matrix.negotiate import TITLES, negotiation
from virtiova.matrix.plan import Planned
from virtiova.policy import RULES, Rules
from virtiova.probe.cell import names, told
from virtiova.probe.plan import Runner, with_options
from virtiova.result import Cell, Evidence, Path, Row
from virtiova.run.executor import Done


@functools.cache
def _runner() -> Runner:
    """One for this process: it remembers the controls that several cells share."""
    return Runner(jobs=1)


def run_planned(planned: Planned) -> list[Row]:
    """Run one task, here and now; as many rows as its `Planned.span`."""
    return run_with(_runner(), RULES, planned)


def run_with(runner: Runner, rules: Rules, planned: Planned) -> list[Row]:
    """The same with a runner that has rules of its own."""
    task = planned.task
    if planned.missing:
        return _rows(planned, Path.NOT_APPLICABLE, planned.missing)
    if task.backend is not None:
        task = replace(task, backend=here(task.backend))
    if planned.rows:
        seen_on, cells = boots.run(BY_NAME[planned.guest], planned.rows, offline=planned.offline, rules=rules)
        return [Row(planned.system, seen_on or planned.product, cell) for cell in cells]
    try:
        if planned.guest:
            cells = guests.boot(planned.guest, offline=planned.offline, rules=rules)
        elif task.experiment in TITLES:
            cells = [with_options(negotiation(task, rules), task)]
        else:
            cells = runner.run_all(task)
    except (UsageError, NotPossibleError) as error:
        # Nobody typed this: it is something that this QEMU does not have.
        return _rows(planned, Path.NOT_APPLICABLE, f"{_asked(planned)}{error}")
    return [Row(planned.system, planned.product, _served(planned, cell)) for cell in cells]


def answer(planned: Planned, done: Done[list[Row]]) -> list[Row]:
    """The rows of a task that is done; rows without an answer if it was lost, or answered something else."""
    rows = done.value
    if rows is None or len(rows) != planned.span:
        return _rows(planned, Path.UNKNOWN, done.lost or "the answer has no meaning")
    return rows


def _asked(planned: Planned) -> str:
    """What the device was to offer, where no register of it says so: with one device, that is all that differs."""
    if planned.task.beside or planned.guest or planned.task.experiment in TITLES:
        return ""
    return "with the bit: " if OptionSpec.parse(planned.task.device).on("iommu_platform") else "without the bit: "


def _served(planned: Planned, cell: Cell) -> Cell:
    """A cell with the name of the process that the device is, as one more thing that tells it from others."""
    if not planned.backend:
        return cell
    return replace(cell, device_options=",".join(filter(None, (cell.device_options, f"by={planned.backend}"))))


def _rows(planned: Planned, observed: Path, note: str) -> list[Row]:
    """Cells of which nothing is known but why: as many as the task has."""
    if planned.rows:
        cells = boots.without(BY_NAME[planned.guest], planned.rows, observed, note)
        return [Row(planned.system, planned.product, cell) for cell in cells]
    task = planned.task
    cell = replace(
        names(task.machine, OptionSpec.parse(task.iommu).name, OptionSpec.parse(task.device).name, task.experiment),
        observed=observed,
        evidence=Evidence(note=note),
    )
    row = Row(planned.system, planned.product, _served(planned, with_options(cell, task)))
    if not task.beside:
        return [row] * planned.span
    cells = [
        replace(
            told(cell, task.iommu, device),
            device=OptionSpec.parse(device).name,
            number=number,
            beside=[*task.devices[: number - 1], *task.devices[number:]],
        )
        for number, device in enumerate(task.devices, 1)
    ]
    return [replace(row, cell=cell) for cell in cells]
