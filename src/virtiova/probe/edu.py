# SPDX-License-Identifier: Apache-2.0
"""The control from outside: a device that is not virtio behind the same IOMMU, for devices that have no message to
send. The board says which: QEMU's edu, or a network chip where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.addr import AddressKind
from virtiova.driver.edu import SECONDS, ControlDevice
from virtiova.machine.qemu.boards import find_board
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.policy import RULES, Facts, Front, Rules, predict
from virtiova.ports import Machine
from virtiova.probe.canary import CanaryOps, Snapshot, Watch
from virtiova.probe.judge import judge
from virtiova.result import Cell, Evidence, Path, path_order

CONTROL_EXPERIMENT: Final = "control"
CONTROL_TITLE: Final = "positive control: a device that is not virtio writes to X"
_LENGTH: Final = 64
_PAINTED: Final = 512
"""Bytes of the page that somebody else may be told to write to."""


class ControlRig:
    """A control device of a machine, allowed to be bus master, and a canary page for it."""

    def __init__(self, machine: Machine, control: ControlDevice) -> None:
        self.machine = machine
        self._control = control
        self.data = CanaryOps(machine.ram, machine.pages, machine.iommu).alloc(_PAINTED)
        control.enable()

    def paint_data(self) -> list[Watch]:
        """Paint the canary page, as far as anybody is to reach it, and watch both of its homes."""
        self.data.paint(0, _PAINTED)
        return self.data.watch("data", 0, _PAINTED)

    def start(self) -> None:
        """Tell it to write to X, and do not wait."""
        self._control.write_ram(self.data.addr, _LENGTH)

    def write(self) -> Evidence:
        """Let it write to X, with the IOMMU as it is; the same two pages are payload and control at once."""
        machine, region = self.machine, self.data
        region.paint(0, _LENGTH)
        snapshot = Snapshot(machine.ram, region.watch("control", 0, _LENGTH))
        self.start()
        machine.wait(lambda: any(w.touched for w in snapshot.look()), SECONDS)
        seen = snapshot.look()
        return Evidence(
            x=region.addr,
            transfer="write",
            witnesses=[*(replace(w, role="data") for w in seen), *seen],
            control=machine.device if machine.iommu.present else "machine",
            words=list(machine.words()),
        )


def control_cell(cell: Cell, evidence: Evidence, front: Front, rules: Rules = RULES) -> Cell:
    """``cell``, which has the names, with what came of the control device behind ``front``."""
    prediction = predict(Facts(False, False, front=front, hardware=True), rules)
    return replace(
        cell,
        experiment=CONTROL_EXPERIMENT,
        address=AddressKind.IOVA if Path.TRANSLATED in prediction.paths else AddressKind.GPA,
        predicted=path_order(prediction.paths),
        observed=judge(evidence),
        evidence=evidence,
        reasons=list(prediction.reasons),
    )


def control_outcome(
    machine_name: str, iommu: str, *, enabled: bool, device: str | None = None, qemu: str = ""
) -> Evidence:
    """Let the control device (by default the board's) write to X.

    It is a machine of its own, and edu's DMA takes 100 ms of QEMU's clock, which is why it is not part of every cell.
    """
    name = device or find_board(machine_name).controls[0]
    with QemuMachine(name, iommu, machine=machine_name, qemu=qemu) as machine:
        control = machine.control
        assert control is not None  # the machine was made for it
        rig = ControlRig(machine, control)
        if enabled:
            machine.iommu.enable()
        elif machine.iommu.can_be_off:
            # Not all IOMMUs let everything through after reset.
            machine.iommu.disable()
        return rig.write()
