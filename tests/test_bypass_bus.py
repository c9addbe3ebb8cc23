# SPDX-License-Identifier: Apache-2.0
"""``bypass-bus=on``: the machine leads the PCI bus around an IOMMU that is there, and then nothing is in front."""

from __future__ import annotations

import shutil

import pytest

from probe_kit import ON, observed, qemu_cells, wrong
from virtiova.addr import PAGE_SIZE
from virtiova.errors import MachineError, UsageError
from virtiova.iommu.aside import AsideIommu
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.qemu.boards import BOARDS, find_board
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.result import Path

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
