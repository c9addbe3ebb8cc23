# SPDX-License-Identifier: Apache-2.0
"""A cell: one experiment on one machine, from start to verdict to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from virtiova.addr import AddressKind
from virtiova.errors import MachineError, ProtocolError, RefusedError
from virtiova.policy import RULES, Facts, Rules, departure, predict
from virtiova.ports import Machine
from virtiova.probe.experiment import Experiment
from virtiova.probe.judge import judge
from virtiova.probe.rig import NotApplicableError, Outcome, OutsideControl, Rig
from virtiova.result import Cell, Evidence, Path, path_order

MachineFactory = Callable[[], Machine]


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
    product = ""
    rig: Rig | None = None
    try:
        under_test = make()
    except RefusedError as error:
        evidence = Evidence(refused_by_machine=True, words=_lines(error.stderr), note=str(error))
        outcome = Outcome(first, evidence)
    except MachineError as error:
        outcome = _unknown(first, error)
    else:
        try:
            product = under_test.product
            rig = Rig(under_test, outside)
            outcome = experiment.run(rig)
        except NotApplicableError as reason:
            outcome = Outcome(first, Evidence(note=str(reason)))
            return _cell(machine, iommu, device, experiment, outcome, product, rules, applicable=False)
        except (MachineError, ProtocolError) as error:
            outcome = _unknown(first if rig is None or rig.negotiated is None else rig.facts(), error)
        finally:
            under_test.close()
    return _cell(machine, iommu, device, experiment, outcome, product, rules)


def _cell(
    machine: str,
    iommu: str,
    device: str,
    experiment: Experiment,
    outcome: Outcome,
    product: str,
    rules: Rules,
    *,
    applicable: bool = True,
) -> Cell:
    facts = outcome.facts
    prediction = predict(facts, rules)
    observed = judge(outcome.evidence) if applicable else Path.NOT_APPLICABLE
    cell = Cell(
        machine=machine,
        iommu=iommu,
        device=device,
        experiment=experiment.id,
        offered=facts.offered,
        accepted=facts.accepted,
        address=prediction.address if applicable else AddressKind.UNKNOWN,
        predicted=path_order(prediction.paths) if applicable else [],
        observed=observed,
        explained=None,
        evidence=outcome.evidence,
        reasons=list(prediction.reasons) if applicable else [],
    )
    if cell.mismatch:
        cell = replace(cell, explained=departure(product, facts, observed))
    return cell


def _unknown(facts: Facts, error: MachineError | ProtocolError) -> Outcome:
    words = _lines(error.stderr) if isinstance(error, MachineError) else []
    return Outcome(facts, Evidence(note=str(error), words=words))


def _lines(stderr: str) -> list[str]:
    return [line[:300] for line in stderr.splitlines() if line.strip()][-50:]
