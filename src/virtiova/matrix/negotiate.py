# SPDX-License-Identifier: Apache-2.0
"""Negotiation alone, with device types that there is no driver for here.

What can be observed is a refusal, of the machine or of FEATURES_OK. Where the negotiation is kept no byte was moved,
so there is no path to observe: the cell is ``n/a``, and says in its evidence that FEATURES_OK was kept.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from virtiova.driver.negotiate import Negotiated, begin, finish
from virtiova.driver.open import DRIVER_FEATURES, DRIVERS
from virtiova.errors import MachineError, ProtocolError, RefusedError, UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM
from virtiova.machine.qemu.boards import find_board
from virtiova.machine.qemu.command import DeviceSpec
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.policy import RULES, Facts, Front, Rules, departure, predict
from virtiova.probe.judge import judge
from virtiova.probe.plan import Task
from virtiova.result import Cell, Evidence, Path, Prediction, path_order

NEGOTIATE: Final = "negotiate"
"""The driver takes bit 33 if it is offered."""
WITHOUT: Final = "negotiate-without"
"""The driver does not take the offered bit 33."""
TITLES: Final = {
    NEGOTIATE: "negotiation alone: is FEATURES_OK kept when the driver takes what is offered?",
    WITHOUT: "negotiation alone: is FEATURES_OK kept when the driver does not take an offered bit 33?",
}
_TRANSPORT_BITS: Final = DRIVER_FEATURES & ~0xFFFFFF
"""No bit of a device type that there is no driver for: nobody here would know what to do about it."""
_ECHO: Final = re.compile(r"^\S+: -device \S+: ")
_IS_IOMMU: Final = "virtio-iommu-pci"


def negotiation(task: Task, rules: Rules = RULES) -> Cell:
    """Start the machine, negotiate, judge, stop."""
    board = find_board(task.machine)
    iommu = board.iommu(task.iommu)
    spec = DeviceSpec.of_any_type(task.device, board, iommu)
    front = Front.TRANSLATING if board.in_front(iommu) else Front.NONE
    facts = Facts(
        offered=spec.declared,
        accepted=spec.declared,
        front=front,
        declared=spec.declared,
        can_be_legacy=spec.can_be_legacy,
    )
    cell = Cell(
        machine=task.machine,
        iommu=iommu.name,
        device=spec.spec.name,
        experiment=task.experiment,
        offered=None,
        accepted=None,
        address=predict(facts, rules).address,
        predicted=[],
        observed=Path.NOT_APPLICABLE,
        explained=None,
        evidence=Evidence(),
    )
    if spec.spec.name == _IS_IOMMU:
        return replace(cell, evidence=Evidence(note="it is an IOMMU itself, and never behind one"))
    try:
        with QemuMachine(spec, task.iommu, machine=task.machine, qemu=task.qemu) as machine:
            return _negotiate(machine, cell, facts, rules)
    except RefusedError as error:
        return _refused(cell, spec, error, predict(facts, rules))
    except UsageError as error:
        return _not_alone(cell, spec, str(error).removeprefix("QEMU: "))
    except (MachineError, ProtocolError) as error:
        words = _lines(error.stderr) if isinstance(error, MachineError) else []
        return replace(cell, observed=Path.UNKNOWN, evidence=Evidence(note=str(error), words=words))


def _refused(cell: Cell, spec: DeviceSpec, error: RefusedError, prediction: Prediction) -> Cell:
    """QEMU would not start: because of the bit, or because the type wants something that it was not given."""
    # QEMU repeats the option that it complains about, which names the bit in any case.
    if not any("iommu_platform" in _ECHO.sub("", line) for line in error.stderr.splitlines()):
        return _not_alone(cell, spec, error.stderr)
    evidence = Evidence(refused_by_machine=True, words=_lines(error.stderr), note=str(error))
    return _with(cell, prediction, judge(evidence), evidence)


def _not_alone(cell: Cell, spec: DeviceSpec, stderr: str) -> Cell:
    """A type that wants a back end, or something else that nobody gave it."""
    words = _lines(stderr)
    said = _ECHO.sub("", words[-1]) if words else "it ended without a word"
    bit = "with" if spec.declared else "without"
    return replace(cell, evidence=Evidence(note=f"{bit} the bit, QEMU does not start it alone: {said}", words=words))


def _lines(stderr: str) -> list[str]:
    return [line[:300] for line in stderr.splitlines() if line.strip()][-20:]


def _negotiate(machine: QemuMachine, cell: Cell, facts: Facts, rules: Rules) -> Cell:
    transport = machine.transport
    assert transport is not None  # only the control device has none
    machine.iommu.enable()
    offered = begin(transport)
    # Where there is a driver it takes what it knows: a type may insist on a bit of its own.
    own = DRIVERS[transport.device_id].table if transport.device_id in DRIVERS else 0
    word = offered & (_TRANSPORT_BITS | own)
    if cell.experiment == WITHOUT:
        word &= ~(1 << VIRTIO_F_ACCESS_PLATFORM)
    negotiated = finish(transport, offered, word)
    bit_offered, bit_accepted = negotiated.bit33
    facts = replace(facts, offered=bit_offered, accepted=bit_accepted, declared=None, insists=machine.insists)
    if negotiated.refused:
        # What the driver wanted counts for the prediction; a refused bit was not accepted.
        facts = replace(facts, accepted=bool(word >> VIRTIO_F_ACCESS_PLATFORM & 1))
    prediction = predict(facts, rules)
    cell = replace(cell, offered=bit_offered, accepted=bit_accepted)
    evidence, observed = _evidence(machine, negotiated, prediction)
    cell = _with(cell, prediction, observed, evidence)
    if cell.mismatch:
        cell = replace(cell, explained=departure(machine.product, facts, observed))
    return cell


def _evidence(machine: QemuMachine, negotiated: Negotiated, prediction: Prediction) -> tuple[Evidence, Path]:
    kept = negotiated.features_ok is not False
    evidence = Evidence(features_ok=negotiated.features_ok, words=machine.words())
    if not kept:
        return evidence, judge(evidence)
    if prediction.paths == {Path.REFUSED}:
        # It is no refusal, and nothing else was predicted; where its bytes would go has not been seen.
        note = "FEATURES_OK was kept, where a refusal was predicted; there is no driver here that would show more"
        return replace(evidence, note=note), Path.UNKNOWN
    kind = machine.transport.device_id if machine.transport else 0
    return replace(evidence, note=f"FEATURES_OK kept; no byte was moved (device type {kind})"), Path.NOT_APPLICABLE


def _with(cell: Cell, prediction: Prediction, observed: Path, evidence: Evidence) -> Cell:
    return replace(
        cell,
        address=prediction.address,
        predicted=path_order(prediction.paths),
        observed=observed,
        evidence=evidence,
        reasons=list(prediction.reasons),
    )
