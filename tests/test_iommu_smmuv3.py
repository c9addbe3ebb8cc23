# SPDX-License-Identifier: Apache-2.0
"""The SMMUv3 of a real QEMU from outside: its tables, its queues, its events, both of its stages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import pytest

from newer_qemu import newer_qemu
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.smmuv3 import Smmuv3Iommu, Smmuv3Unit
from virtiova.machine.image import SECTOR
from virtiova.machine.model import ModelMachine
from virtiova.machine.qemu.boards import VIRT
from virtiova.machine.qemu.command import DeviceSpec, refusal
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Fault
from virtiova.wire import smmuv3

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(
        shutil.which(VIRT.binary) is None, reason=f"{VIRT.binary} is not installed: apt install {VIRT.package}"
    ),
]

SMMU_BASE = 0x09050000
BEHIND_PORT = 0x0100
"""Requester id, and stream id, of a device behind the one root port."""
BLK = "virtio-blk-pci,iommu_platform=on"


# -- the SMMU from outside -----------------------------------------------------------------------------------------


@dataclass
class Rig:
    """A block device that fills one page at ``iova``, and two pages for it to land on."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: Smmuv3Iommu
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
def rig(options: str = "", qemu: str = "") -> Iterator[Rig]:
    with QemuMachine(BLK, f"smmuv3{options}", machine="virt", qemu=qemu) as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        assert isinstance(machine.iommu, Smmuv3Iommu)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


def only_page(faults: Sequence[Fault]) -> tuple[int, bool | None, int, str]:
    """A refused buffer leaves an event for every four bytes; they all say the same."""
    (said,) = {(fault.address & ~0xFFF, fault.write, fault.source, fault.reason) for fault in faults}
    return said


def map_move_and_take_away(it: Rig) -> None:
    it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
    assert it.fill() == (True, False)
    it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
    assert it.fill() == (True, False), "what was cached is used until the SMMU is told"
    it.iommu.invalidate()
    assert it.fill() == (False, True)
    it.iommu.unmap(it.iova, PAGE_SIZE)
    assert it.fill() == (False, True)
    assert it.iommu.faults() == []
    it.iommu.invalidate()
    assert it.fill() == (False, False)
    address, write, source, reason = only_page(it.iommu.faults())
    assert (address, write, source) == (it.iova, True, BEHIND_PORT)
    assert "F_TRANSLATION" in reason
    assert it.iommu.faults() == [], "reading clears them"
    it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
    assert it.fill() == (True, False)
    assert it.machine.words() == []


def test_map_move_and_take_away() -> None:
    with rig() as it:
        assert it.iommu.stage == 1
        map_move_and_take_away(it)


def test_both_queues_wrap_around() -> None:
    with rig() as it:
        for _ in range(300):
            it.iommu.invalidate()
        # 1024 events fit, and a refused sector makes one for every four bytes.
        for _ in range(10):
            assert it.fill() == (False, False)
            faults = it.iommu.faults()
            assert len(faults) >= SECTOR // 4
            assert only_page(faults)[0] == it.iova
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        assert it.iommu.faults() == []
        assert it.machine.bus.read(SMMU_BASE + smmuv3.GERROR, 4) == 0


def test_more_events_than_fit() -> None:
    with rig() as it:
        for _ in range(10):
            assert it.fill() == (False, False)
        assert 128 < len(it.iommu.faults()) <= 1024
        assert it.iommu.faults() == []
        assert it.fill() == (False, False)
        assert only_page(it.iommu.faults())[0] == it.iova


def test_off_and_on_again() -> None:
    with rig() as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.disable()
        assert not it.machine.bus.read(SMMU_BASE + smmuv3.CR0ACK, 4) & smmuv3.CR0_SMMUEN
        it.iommu.enable()
        assert it.fill() == (True, False)


@pytest.mark.parametrize("access", [Access.NONE, Access.READ])
@pytest.mark.parametrize("write", [True, False])
def test_an_event_says_who_where_and_why(access: Access, write: bool) -> None:
    with rig() as it:
        if access is not Access.NONE:
            it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, access)
        make = it.driver.make_device_write if write else it.driver.make_device_read
        it.driver.run(make([(it.iova, SECTOR)]))
        faults = it.iommu.faults()
        if access is Access.READ and not write:
            assert faults == []
            return
        words = "F_PERMISSION" if access is Access.READ else "F_TRANSLATION"
        assert only_page(faults)[:3] == (it.iova, write, BEHIND_PORT)
        assert all(words in fault.reason for fault in faults)
        assert not any(it.machine.ram.read(it.pages[0], PAGE_SIZE))
        for fault in faults:
            event = smmuv3.Event.unpack(b"".join(word.to_bytes(4, "little") for word in fault.raw))
            assert (event.address, event.write, event.text) == (fault.address, fault.write, fault.reason)


def test_addresses_up_to_the_width_and_not_one_page_more() -> None:
    with rig() as it:
        end = 1 << smmuv3.ADDRESS_BITS
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
        with pytest.raises(AccessError, match="stage 1 of an SMMUv3 cannot allow writing without reading"):
            it.iommu.map(IOVA(0), it.pages[0], PAGE_SIZE, Access.WRITE)
        last = VIRT.ram_base + VIRT.ram_size
        for size in (1, PAGE_SIZE, 3 * PAGE_SIZE):
            iova = it.iommu.allocate(size)
            assert iova > last, "in RAM, or adjacent to the range before"
            last = iova + size
        with pytest.raises(AccessError, match="no IOVAs left"):
            it.iommu.allocate(end)


def test_tables_for_another_stream_are_no_tables_for_this_one() -> None:
    with QemuMachine(BLK, "smmuv3", machine="virt") as machine:
        tables = machine.pages.carve(256)
        unit = Smmuv3Unit(machine.bus, machine.ram, tables, SMMU_BASE)
        machine.iommu = Smmuv3Iommu(unit, BEHIND_PORT + 8)
        driver = cast(BlkDriver, open_device(machine))
        request = driver.make_device_write([(driver.ops.alloc(SECTOR).addr, SECTOR)])
        request.go()
        assert not machine.wait(request.done, 0.1)
        assert machine.iommu.faults() == [], "other devices' faults are not this device's"
        with pytest.raises(AccessError, match="stream table"):
            Smmuv3Iommu(unit, 0x0200)


def test_a_command_that_it_does_not_know() -> None:
    with rig() as it, pytest.raises(MachineError, match=r"did not finish its commands: .*GERROR 0x1"):
        it.iommu.unit._submit(bytes([0xFE]) + bytes(15))


# -- stage 2, where there is one -----------------------------------------------------------------------------------


def test_stage_2(pytestconfig: pytest.Config) -> None:
    with rig(",stage=2", qemu=newer_qemu(pytestconfig).directory) as second:
        assert second.iommu.stage == 2
        map_move_and_take_away(second)
        second.iommu.map(second.iova, second.pages[0], PAGE_SIZE, Access.WRITE)
        second.iommu.invalidate()
        second.driver.run(second.driver.make_device_read([(second.iova, SECTOR)]))
        assert "F_PERMISSION) at stage 2" in only_page(second.iommu.faults())[3]


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ("can't apply global arm-smmuv3.stage=2: Property 'arm-smmuv3.stage' not found", "stage"),
        ("qemu-system-aarch64: Property 'virt-7.2-machine.iommu-sys' not found", "iommu-sys"),
    ],
)
def test_a_qemu_that_is_too_old_is_no_failure(said: str, missing: str) -> None:
    spec = DeviceSpec.parse(BLK, VIRT, VIRT.iommu("smmuv3,stage=2"))
    error = refusal(VIRT.binary, [spec], said)
    assert isinstance(error, NotPossibleError)
    assert missing in str(error)


def test_a_stage_that_the_registers_do_not_name() -> None:
    class Registers:
        """An SMMUv3 whose IDR0 says: stage 1 only."""

        def read(self, address: int, size: int) -> int:
            return {smmuv3.IDR0: 0xD40101A, smmuv3.IDR1: 0x2730010, smmuv3.IDR5: 0x74}[address]

        def write(self, address: int, size: int, value: int) -> None:
            raise AssertionError("nothing is written before it is known what it can do")

        def flush(self) -> None: ...

    model = ModelMachine("honest", "blk")
    with pytest.raises(NotPossibleError, match="no stage 2"):
        Smmuv3Unit(Registers(), model.ram, model.pages, 0, stage=2)
