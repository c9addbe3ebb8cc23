# SPDX-License-Identifier: Apache-2.0
"""The control from outside: QEMU's edu device behind the same IOMMU, for devices that have no message to send."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.driver.edu import SECONDS
from virtiova.machine.qemu.command import CONTROL_DEVICE
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.canary import CanaryOps, Snapshot
from virtiova.result import Evidence

CONTROL_EXPERIMENT: Final = "control"
_LENGTH: Final = 64


def edu_outcome(machine_name: str, iommu: str, *, enabled: bool, qemu: str = "") -> Evidence:
    """Let the edu device write to X; the same two pages are payload and control at once.

    Its DMA takes 100 ms of QEMU's clock, which is why it is not part of every cell.
    """
    with QemuMachine(CONTROL_DEVICE, iommu, machine=machine_name, qemu=qemu) as machine:
        edu = machine.edu
        assert edu is not None  # the machine was made for it
        ops = CanaryOps(machine.ram, machine.pages, machine.iommu)
        region = ops.alloc(_LENGTH)
        if enabled:
            machine.iommu.enable()
        edu.enable()
        region.paint(0, _LENGTH)
        watches = region.watch("control", 0, _LENGTH)
        snapshot = Snapshot(machine.ram, watches)
        edu.write_ram(region.addr, _LENGTH)
        machine.wait(lambda: any(w.touched for w in snapshot.look()), SECONDS)
        seen = snapshot.look()
        return Evidence(
            x=region.addr,
            transfer="write",
            witnesses=[*(replace(w, role="data") for w in seen), *seen],
            control="edu" if machine.iommu.present else "machine",
            words=list(machine.words()),
        )
