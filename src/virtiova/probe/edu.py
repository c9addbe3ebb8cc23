# SPDX-License-Identifier: Apache-2.0
"""The control from outside: a device that is not virtio behind the same IOMMU, for devices that have no message to
send. The board says which: QEMU's edu, or a network chip where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.driver.edu import SECONDS
from virtiova.machine.qemu.boards import find_board
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.canary import CanaryOps, Snapshot
from virtiova.result import Evidence

CONTROL_EXPERIMENT: Final = "control"
CONTROL_TITLE: Final = "positive control: a device that is not virtio writes to X"
_LENGTH: Final = 64


def control_outcome(
    machine_name: str, iommu: str, *, enabled: bool, device: str | None = None, qemu: str = ""
) -> Evidence:
    """Let the control device (by default the board's) write to X; the same two pages are payload and control at once.

    It is a machine of its own, and edu's DMA takes 100 ms of QEMU's clock, which is why it is not part of every cell.
    """
    name = device or find_board(machine_name).controls[0]
    with QemuMachine(name, iommu, machine=machine_name, qemu=qemu) as machine:
        control = machine.control
        assert control is not None  # the machine was made for it
        ops = CanaryOps(machine.ram, machine.pages, machine.iommu)
        region = ops.alloc(_LENGTH)
        if enabled:
            machine.iommu.enable()
        elif machine.iommu.can_be_off:
            # Not all IOMMUs let everything through after reset.
            machine.iommu.disable()
        control.enable()
        region.paint(0, _LENGTH)
        watches = region.watch("control", 0, _LENGTH)
        snapshot = Snapshot(machine.ram, watches)
        control.write_ram(region.addr, _LENGTH)
        machine.wait(lambda: any(w.touched for w in snapshot.look()), SECONDS)
        seen = snapshot.look()
        return Evidence(
            x=region.addr,
            transfer="write",
            witnesses=[*(replace(w, role="data") for w in seen), *seen],
            control=machine.device if machine.iommu.present else "machine",
            words=list(machine.words()),
        )
