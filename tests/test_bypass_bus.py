# SPDX-License-Identifier: Apache-2.0
"""``bypass-bus=on``: the machine leads the PCI bus around an IOMMU that is there, and then nothing is in front."""

from __future__ import annotations

import shutil
from typing import cast

import pytest

from probe_kit import ON, observed, qemu_cells, wrong
from virtiova import probe
from virtiova.addr import GPA, IOVA, PAGE_SIZE
from virtiova.errors import MachineError, UsageError
from virtiova.iommu.aside import AsideIommu
from virtiova.iommu.unit import PlatformIommu
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.qemu.boards import BOARDS, find_board
from virtiova.machine.qemu.command import AROUND_BUS
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.edu import ControlRig
from virtiova.probe.experiment import bring_up
from virtiova.probe.rig import Rig
from virtiova.result import Path
from virtiova.wire import vtd

pytestmark = pytest.mark.qemu

PATHS = ("msi", "device-writes", "device-reads", "ring", "indirect", "split-buffer")
BYPASSED = [
    ("q35", "intel"),
    ("q35", "intel,device-iotlb=on"),
    ("q35", "amd"),
    ("q35", "amd,place=root-port"),
    ("q35", "virtio"),
    ("virt", "smmuv3"),
    ("virt", "virtio"),
]


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    """A machine whose QEMU is not installed is skipped, and says so."""
    board = find_board(request.getfixturevalue("machine") if "machine" in request.fixturenames else "q35")
    if shutil.which(board.binary) is None:
        pytest.skip(f"{board.binary} is not installed: apt install {board.package}")


BLK = f"virtio-blk-pci{ON}"
VTD_BASE = 0xFED90000


def around(iommu: str) -> str:
    return f"{iommu},bypass-bus=on"


def test_every_iommu_of_qemu_that_can_be_bypassed_is_here() -> None:
    named = {(machine, iommu.split(",", maxsplit=1)[0]) for machine, iommu in BYPASSED}
    assert named == {
        (board.name, name) for board in BOARDS.values() for name, it in board.iommus.items() if "bypass-bus" in it.ours
    }


@pytest.mark.parametrize(("machine", "iommu"), BYPASSED)
@pytest.mark.parametrize("bit", ["", ON])
def test_it_is_direct_whatever_the_bit_and_the_control_says_so(machine: str, iommu: str, bit: str) -> None:
    only = (*PATHS, "unmapped", "translation-off")
    seen = qemu_cells(f"virtio-net-pci{bit}", around(iommu), "auto", only, machine)
    assert wrong(list(seen.values())) == []
    assert observed(seen) == dict.fromkeys(PATHS, "direct")
    for name in PATHS:
        evidence = seen[name].evidence
        assert evidence.control == "msi-x"
        assert {w.page for w in evidence.witnesses if w.role == "control" and w.touched} == {"B"}
    assert seen["unmapped"].evidence.note == "no IOMMU is in front of the device"
    assert {(cell.iommu, cell.iommu_options) for cell in seen.values()} == {tuple(around(iommu).split(",", maxsplit=1))}


@pytest.mark.parametrize(("machine", "iommu"), [("q35", "none"), ("virt", "none"), *BYPASSED])
def test_the_control_device(machine: str, iommu: str) -> None:
    both = [(iommu, "direct")] if iommu == "none" else [(around(iommu), "direct"), (iommu, "translated")]
    for spec, path in both:
        cell = qemu_cells("edu", spec, "auto", None, machine)["control"]
        assert (cell.observed, cell.predicted) == (path, [path])
        assert cell.evidence.control == ("machine" if iommu == "none" else "edu")


@pytest.mark.parametrize(("machine", "iommu"), [("q35", "intel"), ("virt", "smmuv3")])
def test_a_device_without_messages_takes_its_control_from_outside(machine: str, iommu: str) -> None:
    for spec, path in ((iommu, Path.BYPASS), (around(iommu), Path.DIRECT)):
        cell = qemu_cells("virtio-blk-pci,vectors=0", spec, "auto", ("device-writes",), machine)["device-writes"]
        assert (cell.observed, cell.evidence.control, cell.mismatch) == (path, "edu", False)


BEHIND = [(machine, iommu) for machine, iommu in BYPASSED if "place" not in iommu]


def landed(control: ControlRig) -> set[str]:
    """The pages that the control device's bytes are in."""
    return {w.page for w in control.write().witnesses if w.touched}


@pytest.mark.parametrize(("machine", "iommu"), BEHIND)
def test_all_that_is_asked_of_an_iommu_aside_is_done_by_the_iommu(machine: str, iommu: str) -> None:
    """As a device that is behind it after all would find."""
    with QemuMachine("edu", iommu, machine=machine) as it:
        assert it.control is not None
        front, it.iommu = it.iommu, AsideIommu(cast(PlatformIommu, it.iommu), present=True)
        control = ControlRig(it, it.control)
        it.iommu.enable()
        assert landed(control) == {"A"}
        it.iommu.unmap(IOVA(control.data.addr), PAGE_SIZE)
        it.iommu.invalidate()
        assert landed(control) == set()
        assert bool(it.iommu.faults()) is (iommu != "amd"), "QEMU's AMD-Vi records no page faults"
        assert front.faults() == [], "they have been taken"
        it.iommu.disable()
        assert landed(control) == {"B"}
        assert it.iommu.allocate(PAGE_SIZE) < front.allocate(PAGE_SIZE)


@pytest.mark.parametrize(("machine", "iommu"), BEHIND)
def test_the_iommu_of_a_bypassed_device_is_on(machine: str, iommu: str) -> None:
    """edu is behind it, and nobody but the bypassed device has it switched on."""
    with QemuMachine([f"{BLK},place=bypass", "edu"], iommu, machine=machine) as it:
        around, edu = it.ends
        assert isinstance(around.iommu, AsideIommu)
        assert edu.control is not None
        control = ControlRig(edu, edu.control)
        if around.iommu.can_be_off:
            around.iommu.disable()
        assert landed(control) == {"B"}
        bring_up(Rig(around))
        # An endpoint of virtio-iommu that is attached to no domain reaches nothing once bypass is off.
        assert landed(control) == (set() if iommu == "virtio" else {"A"})


@pytest.mark.parametrize("devices", [[f"{BLK},place=bypass", BLK], [BLK, f"{BLK},place=bypass"]])
def test_the_tables_of_a_bypassed_device_are_what_vtd_would_walk(devices: list[str]) -> None:
    with QemuMachine(devices, "intel") as it:
        (number,) = (n for n, end in enumerate(it.ends) if end.spec.goes_around)
        around = it.ends[number]
        rig = Rig(around)
        bring_up(rig)
        assert it.bus.read(VTD_BASE + vtd.GSTS, 4) & vtd.CMD_TRANSLATE
        # Behind the only root port on the bus that is led around.
        source = (AROUND_BUS + 1) << 8
        root = it.bus.read(VTD_BASE + vtd.RTADDR, 8) & ~0xFFF

        def entry(table: int, offset: int) -> int:
            return int.from_bytes(it.ram.read(GPA(table + offset), 8), "little")

        contexts = entry(root, 16 * (source >> 8))
        assert contexts & 1
        table = entry(contexts & ~0xFFF, 16 * (source & 0xFF))
        assert table & 1
        for shift in (30, 21, 12):
            table = entry(table & ~0xFFF, 8 * (rig.data.addr >> shift & 0x1FF))
            assert table & 3 == 3
        assert table & ~0xFFF == rig.data.gpa("A")


@pytest.mark.parametrize(("machine", "iommu"), BYPASSED)
def test_several_devices_of_a_bypassed_bus_each_show_it(machine: str, iommu: str) -> None:
    devices = [BLK, f"virtio-net-pci{ON}", "virtio-rng-pci"]
    cells = list(probe.qemu(devices, around(iommu), ["device-writes", "at-once"], machine=machine))
    assert wrong(cells) == []
    assert [cell.observed for cell in cells] == [Path.DIRECT] * 6
    for cell in cells:
        assert cell.evidence.control == "msi-x"
        assert {w.page for w in cell.evidence.witnesses if w.role == "control" and w.touched} == {"B"}


def test_off_is_as_if_nothing_was_said() -> None:
    with QemuMachine(BLK, "intel,bypass-bus=off") as machine:
        assert machine.iommu.in_front
    with QemuMachine(BLK, around("intel")) as machine:
        assert isinstance(machine.iommu, AsideIommu)
        assert (machine.iommu.name, machine.iommu.present, machine.iommu.in_front) == ("intel", True, False)


@pytest.mark.parametrize("name", ["intel", "amd", "virtio"])
def test_a_value_that_does_not_exist(name: str) -> None:
    with pytest.raises(UsageError, match=r"bypass-bus 'om'.*did you mean 'on'"):
        find_board("q35").iommu(f"{name},bypass-bus=om")


def test_virtio_iommu_does_not_know_the_endpoint_and_would_let_nothing_through() -> None:
    with QemuMachine(BLK, around("virtio")) as machine:
        assert isinstance(machine.iommu, AsideIommu)
        iommu = machine.iommu.behind
        assert isinstance(iommu, VirtioIommu)
        assert iommu.driver.bypass is True, "as after reset"
        iova = iommu.allocate(PAGE_SIZE)
        iommu.map(iova, machine.pages.page(), PAGE_SIZE)
        iommu.enable()
        assert iommu.driver.bypass is False
        iommu.unmap(iova, PAGE_SIZE)
        iommu.disable()
        assert iommu.driver.bypass is True


def test_an_endpoint_that_is_not_known_is_an_error_where_the_bus_goes_through_the_iommu() -> None:
    with QemuMachine(BLK, around("virtio")) as machine:
        assert isinstance(machine.iommu, AsideIommu)
        known = machine.iommu.behind
        assert isinstance(known, VirtioIommu)
        with pytest.raises(MachineError, match="refuses ATTACH: NOENT"):
            VirtioIommu(known.unit, 0x100).enable()


def test_an_endpoint_that_is_known_after_all_is_attached() -> None:
    """So that a machine which does not lead the bus around is seen to translate, and not taken for one that does."""
    with QemuMachine(BLK, "virtio") as machine:
        front = machine.iommu
        assert isinstance(front, VirtioIommu)
        iommu = VirtioIommu(front.unit, 0x100, around=True)
        iommu.enable()
        assert iommu.driver.bypass is True
        iommu.map(iommu.allocate(PAGE_SIZE), machine.pages.page(), PAGE_SIZE)
        iommu.detach()
