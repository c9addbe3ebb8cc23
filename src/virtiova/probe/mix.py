# SPDX-License-Identifier: Apache-2.0
"""A mix: several devices in one machine, each judged by itself, with the experiments that know of one device only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from virtiova.errors import MachineError, ProtocolError, RefusedError
from virtiova.machine.qemu.command import DeviceSpec
from virtiova.machine.qemu.end import DeviceEnd
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.policy import RULES, Facts, Front, Rules
from virtiova.probe.cell import asked, filled, names, refused, told, unknown
from virtiova.probe.edu import CONTROL_EXPERIMENT, ControlRig, control_cell
from virtiova.probe.experiment import Experiment, bring_up
from virtiova.probe.rig import FeaturesRefusedError, Rig
from virtiova.result import Cell, Evidence


@dataclass(frozen=True, slots=True)
class Seat:
    """A device of the mix, before the machine is up: how it was asked for, and what is known of it."""

    spec: DeviceSpec
    cell: Cell
    """With its names only."""
    at_start: Facts

    @property
    def front(self) -> Front:
        """What is in front of it."""
        return self.at_start.front


def seats(specs: Sequence[DeviceSpec], texts: Sequence[str], experiment: str) -> list[Seat]:
    """The devices of a mix. ``texts`` are what the user typed for them."""
    found = []
    several = len(specs) > 1
    for number, spec in enumerate(specs):
        behind = spec.board.in_front(spec.iommu) and not spec.goes_around
        facts = Facts(
            offered=spec.declared,
            accepted=spec.declared,
            front=Front.TRANSLATING if behind else Front.NONE,
            declared=spec.declared,
            can_be_legacy=spec.can_be_legacy,
        )
        asks = CONTROL_EXPERIMENT if spec.is_control else experiment
        cell = replace(
            told(names(spec.board.name, spec.iommu.name, spec.spec.name, asks), str(spec.iommu), texts[number]),
            number=number + 1 if several else 0,
            beside=[text for n, text in enumerate(texts) if n != number],
        )
        found.append(Seat(spec, cell, facts))
    return found


def run_mix(
    make: Callable[[], QemuMachine],
    experiment: Experiment | None,
    mix: Sequence[Seat],
    *,
    outside: Callable[[Seat, bool], Evidence],
    rules: Rules = RULES,
) -> list[Cell]:
    """Start one machine with all devices, bring all of them up, ask each in turn while all others are up; stop it.

    One cell for each seat, in their order: ``experiment`` for virtio devices (None: there are none), the control for
    others. ``outside`` is
    the control from another machine, for devices that have none of their own and no control device beside them.
    """
    try:
        machine = make()
    except RefusedError as error:
        return [_not_started(seat, number, error, rules) for number, seat in enumerate(mix)]
    except (MachineError, ProtocolError) as error:
        return [filled(seat.cell, unknown(seat.at_start, error), rules) for seat in mix]
    with machine:
        return _Mix(machine, mix, outside).run(experiment, rules)


def _not_started(seat: Seat, number: int, error: RefusedError, rules: Rules) -> Cell:
    if number == error.number:
        return filled(seat.cell, refused(seat.at_start, error), rules)
    none = MachineError(f"there was no machine to look at: {error}", error.stderr)
    return filled(seat.cell, unknown(seat.at_start, none), rules)


class _Mix:
    """The machine that is up, with a rig for each device."""

    def __init__(self, machine: QemuMachine, mix: Sequence[Seat], outside: Callable[[Seat, bool], Evidence]) -> None:
        self._outside = outside
        self._seats = mix
        self._failed: dict[int, MachineError | ProtocolError] = {}
        self._controls: dict[int, ControlRig] = {}
        self._rigs: dict[int, Rig] = {}
        for number, (seat, end) in enumerate(zip(mix, machine.ends, strict=True)):
            try:
                self._bring_up(number, seat, end)
            except (MachineError, ProtocolError) as error:
                self._failed[number] = error
        for rig in self._rigs.values():
            rig.others = [other for other in self._rigs.values() if other is not rig]
            rig.controls = list(self._controls.values())

    def _bring_up(self, number: int, seat: Seat, end: DeviceEnd) -> None:
        if end.control is not None:
            end.iommu.enable()
            self._controls[number] = ControlRig(end, end.control)
            return
        rig = self._rigs[number] = Rig(end, lambda on: self._control(seat, on))
        # Whether it refuses is for the experiment to say.
        with contextlib.suppress(FeaturesRefusedError):
            bring_up(rig)

    def run(self, experiment: Experiment | None, rules: Rules) -> list[Cell]:
        """Ask each device, with all others up."""
        cells = []
        for number, seat in enumerate(self._seats):
            if number in self._failed:
                cells.append(filled(seat.cell, unknown(seat.at_start, self._failed[number]), rules))
            elif number in self._controls:
                cells.append(self._run_control(seat, self._controls[number], rules))
            elif experiment is not None:
                cells.append(asked(seat.cell, self._rigs[number], experiment, seat.at_start, rules))
        return cells

    def _run_control(self, seat: Seat, control: ControlRig, rules: Rules) -> Cell:
        try:
            control.machine.iommu.enable()
            evidence = control.write()
        except (MachineError, ProtocolError) as error:
            evidence = unknown(seat.at_start, error).evidence
        return control_cell(seat.cell, evidence, seat.front, rules)

    def _control(self, seat: Seat, on: bool) -> Evidence:
        """For a device without messages of its own: a control device of this very machine, with the IOMMU in the state
        that the device has it in."""
        for number, control in self._controls.items():
            iommu = control.machine.iommu
            if self._seats[number].spec.goes_around == seat.spec.goes_around and (on or iommu.can_be_off):
                # With some IOMMUs that state is one for all devices, with others each device has its own.
                (iommu.enable if on else iommu.disable)()
                return control.write()
        return self._outside(seat, on)
