# SPDX-License-Identifier: Apache-2.0
"""The work of one task of the matrix: what an executor is given, wherever it runs it."""

from __future__ import annotations

import functools

from virtiova.addr import AddressKind
from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu.options import OptionSpec
from virtiova.matrix.negotiate import TITLES, negotiation
from virtiova.matrix.plan import Planned
from virtiova.policy import RULES, Rules
from virtiova.probe.plan import Runner
from virtiova.result import Cell, Evidence, Path, Row
from virtiova.run.executor import Done


@functools.cache
def _runner() -> Runner:
    """One for this process: it remembers the controls that several cells share."""
    return Runner(jobs=1)


def run_planned(planned: Planned) -> Row:
    """Run one cell, here and now."""
    return run_with(_runner(), RULES, planned)


def run_with(runner: Runner, rules: Rules, planned: Planned) -> Row:
    """The same with a runner that has rules of its own."""
    task = planned.task
    if planned.missing:
        return _row(planned, Path.NOT_APPLICABLE, planned.missing)
    try:
        if task.experiment in TITLES:
            return Row(planned.system, planned.product, negotiation(task, rules))
        return Row(planned.system, planned.product, runner.run_one(task))
    except (UsageError, NotPossibleError) as error:
        # Nobody typed this: it is something that this QEMU does not have.
        return _row(planned, Path.NOT_APPLICABLE, str(error))


def answer(planned: Planned, done: Done[Row]) -> Row:
    """The row of a task that is done; one without an answer if it was lost."""
    return done.value if done.value is not None else _row(planned, Path.UNKNOWN, done.lost)


def _row(planned: Planned, observed: Path, note: str) -> Row:
    """A cell of which nothing is known but why."""
    task = planned.task
    cell = Cell(
        machine=task.machine,
        iommu=OptionSpec.parse(task.iommu).name,
        device=OptionSpec.parse(task.device).name,
        experiment=task.experiment,
        offered=None,
        accepted=None,
        address=AddressKind.UNKNOWN,
        predicted=[],
        observed=observed,
        explained=None,
        evidence=Evidence(note=note),
    )
    return Row(planned.system, planned.product, cell)
