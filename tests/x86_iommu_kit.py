# SPDX-License-Identifier: Apache-2.0
"""A block device behind an IOMMU of q35, brought up, and two pages for it to land on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from virtiova.addr import GPA, IOVA, PAGE_SIZE
from virtiova.dma.ops import DirectOps
from virtiova.driver.blk import BlkDriver
from virtiova.driver.negotiate import begin, driver_ok, finish
from virtiova.driver.open import DRIVER_FEATURES, open_device
from virtiova.features import driver_features
from virtiova.iommu.amdvi import AmdViIommu
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.image import SECTOR
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Iommu

BLK = "virtio-blk-pci,iommu_platform=on"
NAMES = ("amd", "virtio")
SILENT = 0.1
"""Seconds that a device which ought to stay silent is given."""


@dataclass
class Rig:
    """A block device with bit 33, brought up behind an IOMMU, and two pages for one address."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: Iommu
    iova: IOVA
    pages: tuple[GPA, GPA]

    def fill(self) -> tuple[bool, bool]:
        """Let the device write to ``iova``; which of the two pages did it touch?"""
        for page in self.pages:
            self.machine.ram.write(page, bytes(PAGE_SIZE))
        self.driver.run(self.driver.make_device_write([(self.iova, SECTOR)]))
        one, other = (any(self.machine.ram.read(page, SECTOR)) for page in self.pages)
        return one, other


@contextlib.contextmanager
def rig(iommu: str) -> Iterator[Rig]:
    with QemuMachine(BLK, iommu) as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


def amd(it: Rig) -> AmdViIommu:
    assert isinstance(it.iommu, AmdViIommu)
    return it.iommu


def virtio(it: Rig) -> VirtioIommu:
    assert isinstance(it.iommu, VirtioIommu)
    return it.iommu


class Direct:
    """A block driver that passes guest-physical addresses whatever is in front: it works if nothing translates."""

    def __init__(self, machine: QemuMachine) -> None:
        transport = machine.transport
        assert transport is not None
        self._machine = machine
        offered = begin(transport)
        negotiated = finish(transport, offered, driver_features(offered, BlkDriver.table) & DRIVER_FEATURES)
        assert negotiated.bit33 == (True, True)
        assert transport.bus_master is not None
        transport.bus_master.set_bus_master(True)
        ops = DirectOps(machine.ram, machine.pages)
        self.driver = BlkDriver(transport, ops, negotiated, machine.peer, machine.wait)
        self.driver.start()
        driver_ok(transport)

    def reads(self) -> bool:
        """Does the device get through to its ring and to a buffer?"""
        region = self.driver.ops.alloc(SECTOR)
        request = self.driver.make_device_write([(region.addr, SECTOR)])
        request.go()
        if not self._machine.wait(request.done, SILENT):
            return False
        request.queue.ring.poll()
        return region.read(0, SECTOR)[:7] == b"sector "
