# SPDX-License-Identifier: Apache-2.0
"""Real QEMU: VT-d, programmed from outside, does what it was told, and its faults are read in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest

from qemu_kit import BLK
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import (
    AccessError,
)
from virtiova.iommu.vtd import VtdIommu, VtdUnit
from virtiova.machine.image import SECTOR, sector_text
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Fault
from virtiova.wire import vtd

pytestmark = pytest.mark.qemu

VTD_BASE = 0xFED90000
BEHIND_PORT = 0x0100
"""Requester id of a device behind the one root port."""


# -- VT-d from outside --------------------------------------------------------------------------------------------


@dataclass
class Rig:
    """A block device that fills one page at ``iova``, and two pages for it to land on."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: VtdIommu
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
def rig(options: str = "", *, queued: bool = False) -> Iterator[Rig]:
    with QemuMachine(BLK, f"intel{options}") as machine:
        if queued:
            tables = machine.pages.carve(256)
            iommu = VtdIommu(VtdUnit(machine.bus, machine.ram, tables, VTD_BASE, queued=True), BEHIND_PORT)
            machine.iommu = iommu
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        assert isinstance(machine.iommu, VtdIommu)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


@pytest.mark.parametrize("options", ["", ",aw-bits=48", ",caching-mode=on"])
@pytest.mark.parametrize("queued", [False, True])
def test_map_move_and_take_away(options: str, queued: bool) -> None:
    with rig(options, queued=queued) as it:
        assert it.iommu.levels == (4 if "48" in options else 3)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
        # What the device has cached is its own until it is told.
        assert it.fill() == (True, False)
        it.iommu.invalidate()
        assert it.fill() == (False, True)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        assert it.fill() == (False, True)
        assert it.iommu.faults() == []
        it.iommu.invalidate()
        assert it.fill() == (False, False)
        assert [fault.address for fault in it.iommu.faults()] == [it.iova]
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        assert not [line for line in it.machine.words() if "nvalidation" in line]


def test_the_user_may_choose_the_queue() -> None:
    with rig(",invalidation=queue") as it:
        assert it.machine.bus.read(VTD_BASE + vtd.GSTS, 4) & vtd.CMD_QUEUED
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
    with rig() as it:
        assert not it.machine.bus.read(VTD_BASE + vtd.GSTS, 4) & vtd.CMD_QUEUED


def test_the_queue_of_invalidations_wraps_around() -> None:
    with rig(queued=True) as it:
        for _ in range(600):
            it.iommu.invalidate()
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        it.iommu.invalidate()
        assert it.fill() == (False, False)


@pytest.mark.parametrize(("options", "levels"), [("", 3), (",aw-bits=48", 4)])
def test_addresses_up_to_the_width_and_not_one_page_more(options: str, levels: int) -> None:
    with rig(options) as it:
        end = 1 << 12 + 9 * levels
        it.iova = IOVA(end - PAGE_SIZE)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        for iova, size in ((end, PAGE_SIZE), (end - PAGE_SIZE, 2 * PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE)):
            with pytest.raises(AccessError, match="width"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        for iova, size in ((1, PAGE_SIZE), (0, 1), (0, 0)):
            with pytest.raises(AccessError, match="4 KiB"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        with pytest.raises(AccessError, match="4 KiB"):
            it.iommu.map(IOVA(0), GPA(it.pages[0] + 512), PAGE_SIZE)


def test_a_buffer_over_two_pages_that_lie_apart() -> None:
    with rig() as it:
        iova = it.iommu.allocate(2 * PAGE_SIZE)
        it.iommu.map(iova, it.pages[1], PAGE_SIZE)
        it.iommu.map(IOVA(iova + PAGE_SIZE), it.pages[0], PAGE_SIZE)
        it.driver.run(it.driver.make_device_write([(iova + PAGE_SIZE - SECTOR, 2 * SECTOR)]))
        at = PAGE_SIZE - SECTOR
        assert it.machine.ram.read(GPA(it.pages[1] + at), SECTOR) == sector_text(1)
        assert it.machine.ram.read(it.pages[0], SECTOR) == sector_text(2)
        # The byte past the end of the second page belongs to nobody.
        assert it.machine.ram.read(GPA(it.pages[0] + SECTOR), at) == bytes(at)


def test_iovas_are_never_addresses_of_ram(blk: QemuMachine) -> None:
    ranges = [(blk.iommu.allocate(size), size) for size in (1, PAGE_SIZE, 3 * PAGE_SIZE, PAGE_SIZE + 1)]
    last = 64 << 20
    for iova, size in ranges:
        assert iova % PAGE_SIZE == 0
        assert iova > last, "in RAM, or adjacent to the range before"
        last = iova + size
    with pytest.raises(AccessError, match="no IOVAs left"):
        blk.iommu.allocate(1 << 39)


# -- faults in words ----------------------------------------------------------------------------------------------


def only_fault(it: Rig) -> Fault:
    (fault,) = it.iommu.faults()
    assert it.iommu.faults() == [], "reading clears them"
    low, high = fault.raw
    assert high >> 63
    assert low & ~0xFFF == fault.address
    record = vtd.FaultRecord.unpack(low, high)
    assert record is not None
    assert (record.write, record.source, record.text) == (fault.write, fault.source, fault.reason)
    return fault


@pytest.mark.parametrize("options", ["", ",aw-bits=48"])
@pytest.mark.parametrize(
    ("access", "write", "words"),
    [
        (Access.NONE, True, "no write permission"),
        (Access.READ, True, "no write permission"),
        (Access.NONE, False, "no read permission"),
        (Access.WRITE, False, "no read permission"),
    ],
)
def test_a_fault_says_who_where_and_why(options: str, access: Access, write: bool, words: str) -> None:
    with rig(options) as it:
        if access is not Access.NONE:
            it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, access)
        make = it.driver.make_device_write if write else it.driver.make_device_read
        it.driver.run(make([(it.iova, SECTOR)]))
        fault = only_fault(it)
        assert (fault.address, fault.write, fault.source) == (it.iova, write, BEHIND_PORT)
        assert fault.reason.startswith(words)
        assert not any(it.machine.ram.read(it.pages[0], PAGE_SIZE))


def test_faults_one_after_the_other() -> None:
    with rig() as it:
        for _ in range(5):
            assert it.fill() == (False, False)
            assert only_fault(it).address == it.iova


@pytest.mark.parametrize(
    ("source", "words"),
    [(BEHIND_PORT + 8, "context entry not present"), (0x0200, "root entry not present")],
)
def test_tables_for_another_device_are_no_tables_for_this_one(source: int, words: str) -> None:
    with QemuMachine(BLK) as machine:
        witness = machine.iommu
        machine.iommu = VtdIommu(VtdUnit(machine.bus, machine.ram, machine.pages.carve(64), VTD_BASE), source)
        driver = cast(BlkDriver, open_device(machine))
        request = driver.make_device_write([(driver.ops.alloc(SECTOR).addr, SECTOR)])
        request.go()
        assert not machine.wait(request.done, 0.1)
        faults = witness.faults()
        assert faults
        assert all(fault.source == BEHIND_PORT and fault.reason.startswith(words) for fault in faults)


def test_faults_of_other_devices_are_not_this_devices() -> None:
    with rig() as it:
        other = VtdIommu(VtdUnit(it.machine.bus, it.machine.ram, it.machine.pages.carve(64), VTD_BASE), 0x0028)
        assert it.fill() == (False, False)
        assert other.faults() == []


def test_an_address_beyond_the_width() -> None:
    with rig() as it:
        it.driver.run(it.driver.make_device_write([(1 << 39 | 0x204000, SECTOR)]))
        fault = only_fault(it)
        assert (fault.address, fault.reason.partition(" (")[0]) == (
            0x8000204000,
            "address beyond the address width",
        )


def test_tables_run_out_before_the_machine_does() -> None:
    with QemuMachine(BLK) as machine:
        tables = PageAllocator(machine.ram, machine.pages.page(), GPA(machine.pages.run(12) + 12 * PAGE_SIZE))
        iommu = VtdIommu(VtdUnit(machine.bus, machine.ram, tables, VTD_BASE), BEHIND_PORT)
        iommu.map(IOVA(0), GPA(0x800000), 2 << 20)
        with pytest.raises(AccessError, match="no RAM left"):
            iommu.map(IOVA(0), GPA(0x800000), 32 << 20)
