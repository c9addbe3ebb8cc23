# SPDX-License-Identifier: Apache-2.0
"""SPARC64 and PPC64 on real QEMU: big-endian machines, the patch's own examples, whose drivers know nothing of it."""

from __future__ import annotations

import functools
import shutil
from types import MappingProxyType
from typing import cast

import pytest

from probe_kit import KINDS, ON, Cells, observed, wrong
from virtiova import probe
from virtiova.addr import GPA, IOVA, PAGE_SIZE
from virtiova.driver.blk import BlkDriver
from virtiova.driver.net import NetDriver
from virtiova.driver.open import open_device
from virtiova.driver.rng import RngDriver
from virtiova.errors import MachineError, UsageError
from virtiova.features import VIRTIO_F_VERSION_1
from virtiova.iommu.sabre import SabreIommu
from virtiova.iommu.tce import H_PUT_TCE, LIOBN, WINDOW, TceIommu
from virtiova.machine.image import sector_text
from virtiova.machine.qemu.boards import BOARDS
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.wire.sabre import Entry, entry_offset

pytestmark = pytest.mark.qemu

IOMMUS = {"sun4u": "sabre", "pseries": "tce"}


def on(machine: str) -> pytest.MarkDecorator:
    """Skip where that machine's QEMU is not installed."""
    board = BOARDS[machine]
    return pytest.mark.skipif(
        shutil.which(board.binary) is None,
        reason=f"{board.binary} is not installed (Debian: apt-get install {board.package})",
    )


BOTH = [pytest.param(machine, marks=on(machine)) for machine in IOMMUS]
LEGACY = "virtio-{}-pci-transitional"


@functools.cache
def cells(machine: str, device: str, interface: str = "auto", *only: str) -> Cells:
    found = probe.qemu(device, IOMMUS[machine], only or None, machine=machine, interface=interface)
    return MappingProxyType({cell.experiment: cell for cell in found})


# -- the probe ----------------------------------------------------------------------------------------------------

AROUND = {
    **dict.fromkeys(("empty-tables", "unmapped", "read-only", "past-end", "unmap", "unmap-stale"), "bypass"),
    **dict.fromkeys(("device-writes", "device-reads", "ring", "indirect", "split-buffer"), "bypass"),
    **dict.fromkeys(("remap", "remap-stale", "never-offered", "renegotiate", "bus-master-off"), "bypass"),
}
THROUGH = {
    **dict.fromkeys(("empty-tables", "unmapped", "read-only", "past-end", "unmap", "unmap-stale"), "blocked"),
    **dict.fromkeys(("device-writes", "device-reads", "ring", "indirect", "split-buffer"), "translated"),
    **dict.fromkeys(("remap", "remap-stale", "carry-on", "no-version-1"), "translated"),
    **dict.fromkeys(("not-taken", "renegotiate"), "refused"),
    "bus-master-off": "blocked",
}
# What one of the two has and the other has not.
OWN = {
    ("sun4u", ""): {"translation-off": "direct"},
    ("sun4u", ON): {"translation-off": "direct"},
    ("pseries", ""): {"msi": "translated", "write-only": "bypass"},
    ("pseries", ON): {"msi": "translated", "write-only": "blocked"},
}


@pytest.mark.parametrize("bit", ["", ON], ids=["off", "on"])
@pytest.mark.parametrize("machine", BOTH)
def test_the_whole_probe(machine: str, bit: str) -> None:
    found = cells(machine, f"virtio-blk-pci{bit}")
    assert not wrong(list(found.values()))
    assert observed(found) == (THROUGH if bit else AROUND) | OWN[machine, bit]


@pytest.mark.parametrize("bit", ["", ON], ids=["off", "on"])
@pytest.mark.parametrize("kind", ["net", "rng"])
@pytest.mark.parametrize("machine", BOTH)
def test_the_quirk_of_the_patch(machine: str, kind: str, bit: str) -> None:
    """The tables point elsewhere, a device that is not virtio obeys them, and the quirk goes around."""
    found = cells(machine, f"virtio-{kind}-pci{bit}", "auto", "device-writes", "ring")
    assert observed(found) == dict.fromkeys(("device-writes", "ring"), "translated" if bit else "bypass")
    control = {"sun4u": "rtl8139", "pseries": "msi-x"}[machine]
    assert {cell.evidence.control for cell in found.values()} == {control}


@pytest.mark.sweep
@pytest.mark.parametrize("bit", ["", ON], ids=["off", "on"])
@pytest.mark.parametrize("kind", ["net", "rng"])
@pytest.mark.parametrize("machine", BOTH)
def test_the_whole_probe_of_other_devices(machine: str, kind: str, bit: str) -> None:
    found = cells(machine, f"virtio-{kind}-pci{bit}")
    assert not wrong(list(found.values()))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("machine", BOTH)
def test_the_whole_probe_of_legacy_devices(machine: str, kind: str) -> None:
    found = cells(machine, LEGACY.format(kind), "legacy")
    assert not wrong(list(found.values()))
    assert found["ring"].observed == found["device-writes"].observed == "bypass"


@pytest.mark.parametrize("control", ["rtl8139", "edu"])
@pytest.mark.parametrize("machine", BOTH)
def test_a_device_that_is_not_virtio_obeys(machine: str, control: str) -> None:
    if (machine, control) == ("sun4u", "edu"):
        # QEMU has no edu for that processor.
        with pytest.raises(UsageError):
            cells(machine, control)
        return
    assert observed(cells(machine, control)) == {"control": "translated"}


# -- byte order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["virtio-{}-pci", "virtio-{}-pci" + ON, LEGACY])
@pytest.mark.parametrize("machine", BOTH)
def test_devices_do_what_they_are_for(machine: str, device: str) -> None:
    interface = "legacy" if device == LEGACY else "auto"
    for kind in KINDS:
        with QemuMachine(device.format(kind), IOMMUS[machine], machine=machine, prefer=interface) as it:
            driver = open_device(it)
            assert it.transport is not None
            assert it.transport.byte_order == ("big" if device == LEGACY else "little")
            if isinstance(driver, BlkDriver):
                assert driver.capacity() == 2048
                assert driver.read(3, 2) == sector_text(3) + sector_text(4)
                driver.write(9, b"\x5a" * 512)
                assert it.peer.stored(9 * 512, 512) == b"\x5a" * 512
            elif isinstance(driver, NetDriver):
                frame = driver.frame(60)
                driver.send(frame)
                assert it.peer.received() == [frame]
                assert driver.exchange(frame) == frame
            else:
                assert isinstance(driver, RngDriver)
                assert driver.random(64) != driver.random(64)


@pytest.mark.parametrize("machine", BOTH)
def test_without_version_1_new_registers_have_old_rings(machine: str) -> None:
    with QemuMachine("virtio-blk-pci", IOMMUS[machine], machine=machine) as it:
        driver = open_device(it, features=0)
        assert isinstance(driver, BlkDriver)
        assert not driver.negotiated.has(VIRTIO_F_VERSION_1)
        assert it.transport is not None
        assert it.transport.byte_order == "big"
        assert driver.read(7) == sector_text(7)


# -- sun4u --------------------------------------------------------------------------------------------------------


@on("sun4u")
def test_sabre_table_and_registers() -> None:
    with QemuMachine("virtio-blk-pci" + ON, "sabre", machine="sun4u") as it:
        assert isinstance(it.iommu, SabreIommu)
        it.iommu.map(IOVA(0x6000), GPA(0x800000), it.iommu.page_size)
        it.iommu.enable()
        # Read back in bus order: registers and entries are big-endian.
        control = int.from_bytes(it.bus.read_bytes(0x1FE00000200, 8), "big")
        table = int.from_bytes(it.bus.read_bytes(0x1FE00000208, 8), "big")
        size = control >> 16 & 7
        assert (control & 1, 1 << 23 << size) == (1, 2 * BOARDS["sun4u"].ram_size)
        entry = it.ram.read(GPA(table + entry_offset(0x6000, size)), 8)
        assert Entry.unpack(entry) == Entry(True, 0x800000, True)
        it.iommu.disable()
        assert not int.from_bytes(it.bus.read_bytes(0x1FE00000200, 8), "big") & 1


# -- pseries ------------------------------------------------------------------------------------------------------


@on("pseries")
def test_hypercalls_are_answered() -> None:
    with QemuMachine("virtio-blk-pci" + ON, "tce", machine="pseries") as it:
        assert isinstance(it.iommu, TceIommu)
        call = it.iommu.hypercall
        it.iommu.map(IOVA(0x7000), GPA(0x8000000), PAGE_SIZE)
        # What lies beyond the window, or in one that does not exist, is no argument (H_PARAMETER).
        assert call(H_PUT_TCE, LIOBN, WINDOW, 0x8000003) == -4
        assert call(H_PUT_TCE, LIOBN + 1, 0, 0x8000003) == -4
        # A number that is none (H_FUNCTION).
        assert call(0xFFF0) == -2


@on("pseries")
def test_the_machine_runs_while_its_processor_sleeps() -> None:
    with QemuMachine("virtio-rng-pci" + ON, "tce", machine="pseries") as it:
        driver = open_device(it)
        assert cast(dict[str, bool], it.qmp("query-status"))["running"]
        for _ in range(20):
            it.iommu.map(IOVA(0x9000), it.pages.page(), PAGE_SIZE)
        assert cast(dict[str, bool], it.qmp("query-status"))["running"]
        assert isinstance(driver, RngDriver)
        driver.random(64)
        with open(f"/proc/{it.pid}/stat", encoding="ascii") as stat:
            ticks = sum(int(field) for field in stat.read().rpartition(")")[2].split()[11:13])
        # A processor that ran firmware, or a loop, would be at it all the time.
        assert ticks < 200


@on("pseries")
def test_a_lost_debug_stub_is_a_machine_error() -> None:
    with QemuMachine("virtio-blk-pci", "tce", machine="pseries") as it:
        it._process.kill()
        with pytest.raises(MachineError, match="QEMU"):
            it.iommu.map(IOVA(0), GPA(0x8000000), PAGE_SIZE)
