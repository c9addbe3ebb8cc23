# SPDX-License-Identifier: Apache-2.0
"""A cell: one experiment on one machine, from start to verdict to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from virtiova.addr import AddressKind
from virtiova.errors import MachineError, ProtocolError, RefusedError
from virtiova.machine.qemu.options import OptionSpec
from virtiova.policy import RULES, Facts, Rules, departure, predict
from virtiova.ports import Machine
from virtiova.probe.experiment import Experiment
from virtiova.probe.judge import disagreements, judge
from virtiova.probe.rig import FeaturesRefusedError, NotApplicableError, Outcome, OutsideControl, Rig
from virtiova.result import Cell, Evidence, Path, path_order

MachineFactory = Callable[[], Machine]


def names(machine: str, iommu: str, device: str, experiment: str) -> Cell:
    """A cell of which nothing is known but its names."""
    return Cell(
        machine=machine,
        iommu=iommu,
        device=device,
        experiment=experiment,
        offered=None,
        accepted=None,
        address=AddressKind.UNKNOWN,
        predicted=[],
        observed=Path.UNKNOWN,
        explained=None,
        evidence=Evidence(),
    )


def told(cell: Cell, iommu: str, device: str) -> Cell:
    """A cell with what IOMMU and device were told, as the user typed it."""
    front, what = OptionSpec.parse(iommu), OptionSpec.parse(device)
    return replace(cell, iommu_options=front.told(), device_options=what.told("iommu_platform"))


def run_cell(
    make: MachineFactory,
    experiment: Experiment,
    *,
    machine: str,
    iommu: str,
    device: str,
    at_start: Facts | None = None,
    outside: OutsideControl | None = None,
    rules: Rules = RULES,
) -> Cell:
    """Start a machine, run one experiment, judge it, stop the machine.

    ``machine``, ``iommu`` and ``device`` are the cell's names. ``at_start`` are the facts that are known before the
    machine starts: they predict whether it may refuse the device. Whatever goes wrong with the machine or the device
    is an outcome (`refused`, `unknown`), not an exception; usage errors are exceptions.
    """
    first = at_start or Facts(offered=None, accepted=None)
    cell = names(machine, iommu, device, experiment.id)
    try:
        under_test = make()
    except RefusedError as error:
        return filled(cell, refused(first, error), rules)
    except (MachineError, ProtocolError) as error:
        return filled(cell, unknown(first, error), rules)
    rig: Rig | None = None
    try:
        rig = Rig(under_test, outside)
        return asked(cell, rig, experiment, first, rules)
    except (MachineError, ProtocolError) as error:
        return filled(cell, unknown(_known(rig, first), error, under_test), rules)
    finally:
        under_test.close()


def asked(cell: Cell, rig: Rig, experiment: Experiment, first: Facts, rules: Rules = RULES) -> Cell:
    """Run one experiment on a device of a machine that is up, and judge it. Never raises on account of the machine."""
    applicable = True
    try:
        outcome = _run(experiment, rig)
    except NotApplicableError as reason:
        applicable = False
        outcome = Outcome(_known(rig, first), Evidence(note=str(reason)))
    except (MachineError, ProtocolError) as error:
        outcome = unknown(_known(rig, first), error, rig.machine)
    return filled(cell, outcome, rules, rig=rig, applicable=applicable)


def filled(
    cell: Cell, outcome: Outcome, rules: Rules = RULES, *, rig: Rig | None = None, applicable: bool = True
) -> Cell:
    """``cell``, which has the names, with what was declared, is predicted, and was observed."""
    facts = outcome.facts
    prediction = predict(facts, rules)
    observed = judge(outcome.evidence) if applicable else Path.NOT_APPLICABLE
    negotiated = rig is not None and rig.negotiated is not None
    cell = replace(
        cell,
        # What was asked for is no observation: without negotiation nothing is known of the offer.
        offered=facts.offered if negotiated else None,
        accepted=facts.accepted if negotiated else None,
        address=prediction.address if applicable else AddressKind.UNKNOWN,
        predicted=path_order(prediction.paths) if applicable else [],
        observed=observed,
        evidence=outcome.evidence,
        reasons=list(prediction.reasons) if applicable else [],
        disagreements=disagreements(outcome.evidence, prediction) if applicable else [],
        sides=prediction.sides if applicable else None,
    )
    if cell.mismatch and not cell.disagreements and rig is not None:
        # Asked for only where it matters: it may cost a process.
        cell = replace(cell, explained=departure(rig.machine.product, facts, observed))
    return cell


def _run(experiment: Experiment, rig: Rig) -> Outcome:
    try:
        return experiment.run(rig)
    except FeaturesRefusedError:
        # The driver has taken the bit if it was offered: that is what the refusal is held against.
        facts = rig.facts()
        return rig.outcome(replace(facts, accepted=facts.offered), None)


def refused(facts: Facts, error: RefusedError) -> Outcome:
    """The machine would not start with the device."""
    return Outcome(facts, Evidence(refused_by_machine=True, words=_lines(error.stderr), note=str(error)))


def _known(rig: Rig | None, first: Facts) -> Facts:
    """The facts so far: those of the negotiation if it was reached."""
    return first if rig is None or rig.negotiated is None else rig.facts()


def unknown(facts: Facts, error: MachineError | ProtocolError, machine: Machine | None = None) -> Outcome:
    """The machine, or the device, did not get as far as an answer."""
    words = _lines(error.stderr) if isinstance(error, MachineError) else []
    if machine is not None:
        words = list(machine.words()) or words
    return Outcome(facts, Evidence(note=str(error), words=words))


def _lines(stderr: str) -> list[str]:
    return [line[:300] for line in stderr.splitlines() if line.strip()][-50:]
