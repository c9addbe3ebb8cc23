# SPDX-License-Identifier: Apache-2.0
"""ATS behind a root port: who has it, when it is on, and which invalidation ends a translation."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import pytest

from probe_kit import ON, observed, qemu_cells, wrong
from virtiova.addr import GPA, IOVA, PAGE_SIZE
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import ProtocolError
from virtiova.iommu.vtd import VtdIommu
from virtiova.machine.image import SECTOR
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.machine.qemu.pci import QemuFunction
from virtiova.machine.qemu.pci_host import Q35Host
from virtiova.transport.ats import Ats, find_ats
from virtiova.wire import pci, vtd

BLK = f"virtio-blk-pci{ON}"
WITH = ",ats=on"
DEVICE_TLB = "intel,device-iotlb=on"
BEHIND_PORT = 0x0100
VTD_BASE = 0xFED90000
PAGE_ONE = 2 | 3 << 4 | 1 << 16
"""An IOTLB descriptor for one page of domain 1 (VT-d 6.5.2.3)."""


class Function:
    """A PCI function whose extended configuration space is ``words`` by offset, and else 0."""

    source = BEHIND_PORT

    def __init__(self, words: dict[int, int]) -> None:
        self.words = words

    def read_config(self, offset: int, size: int) -> int:
        assert offset + size <= pci.EXTENDED_END
        return self.words.get(offset, 0) & (1 << 8 * size) - 1

    def write_config(self, offset: int, size: int, value: int) -> None:
        assert size == 2
        assert offset + size <= pci.EXTENDED_END
        self.words[offset] = value

    def config(self) -> bytes:
        raise NotImplementedError

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        raise NotImplementedError

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError


def header(ident: int, after: int) -> int:
    return ident | 1 << 16 | after << 20


@pytest.mark.parametrize(
    ("words", "control"),
    [
        ({}, None),
        ({0x100: 0xFFFFFFFF}, None),
        ({0x100: header(0x0F, 0)}, 0x106),
        ({0x100: header(0x01, 0x148), 0x148: header(0x0F, 0)}, 0x14E),
        ({0x100: header(0x01, 0x148), 0x148: header(0x0E, 0)}, None),
        # The lower two bits of the offset are reserved.
        ({0x100: header(0x01, 0xFFB), 0xFF8: header(0x0F, 0)}, 0xFFE),
        ({0x100: header(0x01, 0xFFF), 0xFFC: header(0x0E, 0)}, None),
    ],
)
def test_the_capability_is_found_in_the_list(words: dict[int, int], control: int | None) -> None:
    function = Function(words)
    ats = find_ats(function)
    assert (ats is None) is (control is None)
    if ats is not None and control is not None:
        assert not ats.enabled
        ats.set(on=True)
        assert ats.enabled
        assert function.words[control] == 1 << 15
        ats.set(on=False)
        assert not ats.enabled


@pytest.mark.parametrize(
    "words",
    [
        {0x100: header(1, 0x100)},
        {0x100: header(1, 0x200), 0x200: header(2, 0x100)},
        {0x100: header(1, 0x40)},
        # Its registers would be those of the next function.
        {0x100: header(1, 0xFFC), 0xFFC: header(0x0F, 0)},
    ],
)
def test_a_list_that_loops_or_leaves_its_place_is_refused(words: dict[int, int]) -> None:
    with pytest.raises(ProtocolError, match="extended capability list"):
        find_ats(Function(words))


def test_descriptors_and_the_context_entry() -> None:
    assert struct.unpack("<QQ", vtd.queue_device_tlb_all(0x0118)) == (0x118_00000003, 0x7FFFFFFFFFFFF001)
    plain, kept = (struct.unpack("<QQ", vtd.context_entry(0x5000, 3, 1, device_tlb=on)) for on in (False, True))
    assert plain == (0x5001, 0x101)
    assert kept == (0x5005, 0x101)
    assert pci.extended_capability(0x1481000F) == (0x0F, 0x148)


# -- a real QEMU --------------------------------------------------------------------------------------------------


def of(machine: QemuMachine) -> Ats | None:
    """The ATS of the device under test, by the machine's own configuration space."""
    source = BEHIND_PORT if machine.bridged else 0x18
    return find_ats(QemuFunction(Q35Host(machine.bus), machine.bus, source, 0, 0))


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("device", "iommu", "has", "on"),
    [
        (BLK, DEVICE_TLB, False, False),
        (BLK + WITH, DEVICE_TLB, True, True),
        (f"virtio-blk-pci{WITH}", DEVICE_TLB, True, True),
        (BLK + WITH, f"{DEVICE_TLB},invalidation=register", True, False),
        (BLK + WITH, "intel,invalidation=queue", True, False),
        (BLK + WITH, "virtio", True, False),
        # Only behind a root port: there the device is a PCI Express endpoint.
        (BLK + WITH, "amd", False, False),
    ],
)
def test_who_has_it_and_when_it_is_on(device: str, iommu: str, has: bool, on: bool) -> None:
    with QemuMachine(device, iommu) as machine:
        ats = of(machine)
        assert (ats is not None) is has
        assert not (ats and ats.enabled), "as after reset"
        machine.iommu.enable()
        assert bool(ats and ats.enabled) is on
        if machine.iommu.can_be_off:
            machine.iommu.disable()
        assert not (ats and ats.enabled)


@contextlib.contextmanager
def moved(device: str, iommu: str = DEVICE_TLB) -> Iterator[tuple[QemuMachine, VtdIommu, BlkDriver, IOVA, list[GPA]]]:
    """A device that used ``iova`` while it was one page; in the tables it is another one by now."""
    with QemuMachine(device, iommu) as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        assert isinstance(machine.iommu, VtdIommu)
        pages = [machine.pages.page(), machine.pages.page()]
        iova = machine.iommu.allocate(PAGE_SIZE)
        machine.iommu.map(iova, pages[0], PAGE_SIZE)
        driver.run(driver.make_device_write([(iova, SECTOR)]))
        assert any(machine.ram.read(pages[0], SECTOR))
        machine.iommu.map(iova, pages[1], PAGE_SIZE)
        yield machine, machine.iommu, driver, iova, pages


@pytest.mark.qemu
@pytest.mark.parametrize("device", [BLK, BLK + WITH])
@pytest.mark.parametrize("iotlb", ["none", "page", "all"])
@pytest.mark.parametrize("told", ["", "before", "after"])
def test_for_a_device_inside_qemu_the_iotlb_descriptor_alone_acts(device: str, iotlb: str, told: str) -> None:
    with moved(device) as (machine, iommu, driver, iova, pages):
        words = {"none": [], "all": [vtd.queue_iotlb_global()], "page": [struct.pack("<QQ", PAGE_ONE, iova)]}[iotlb]
        of_device = [vtd.queue_device_tlb_all(BEHIND_PORT)] if told else []
        iommu.unit.submit(*(of_device + words if told == "before" else words + of_device))
        machine.ram.write(pages[0], bytes(SECTOR))
        driver.run(driver.make_device_write([(iova, SECTOR)]))
        old, new = (any(machine.ram.read(page, SECTOR)) for page in pages)
        assert (old, new) == ((True, False) if iotlb == "none" else (False, True))


@pytest.mark.qemu
@pytest.mark.parametrize(("device", "descriptors"), [(BLK, 1), (BLK + WITH, 2)])
def test_a_device_that_may_keep_translations_is_told_as_well(device: str, descriptors: int) -> None:
    with moved(device) as (machine, iommu, _, _, _):
        before = machine.bus.read(VTD_BASE + vtd.IQH, 8)
        iommu.invalidate()
        after = machine.bus.read(VTD_BASE + vtd.IQH, 8)
        assert after - before == 16 * descriptors
        ats = of(machine)
        if ats is not None:
            # It is the device that says so, and not what was written once.
            ats.set(on=False)
            iommu.invalidate()
            assert machine.bus.read(VTD_BASE + vtd.IQH, 8) - after == 16


@pytest.mark.qemu
@pytest.mark.parametrize("bit", ["", ON])
def test_every_experiment_with_ats_is_as_predicted_or_explained(bit: str) -> None:
    cells = qemu_cells(f"virtio-blk-pci{bit}{WITH}", DEVICE_TLB)
    assert wrong(list(cells.values())) == []
    without = observed(qemu_cells(f"virtio-blk-pci{bit}", "intel"))
    assert observed(cells) == without, "ATS changes who must be told, and nothing else"
