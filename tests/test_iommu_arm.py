# SPDX-License-Identifier: Apache-2.0
"""Real QEMU, aarch64: the SMMUv3 does what it was told, virtio-mmio is in front of nothing, and every path is seen."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from types import MappingProxyType
from typing import cast

import pytest

from probe_kit import GENERAL, KINDS, ON, Cells, observed, wrong
from virtiova import probe
from virtiova.addr import GPA
from virtiova.driver.blk import BlkDriver
from virtiova.driver.net import NetDriver
from virtiova.driver.open import open_device
from virtiova.driver.rng import RngDriver
from virtiova.errors import ProtocolError, UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.iommu.aside import AsideIommu
from virtiova.iommu.unit import PlatformIommu
from virtiova.machine.image import sector_text
from virtiova.machine.model import ModelMachine
from virtiova.machine.qemu.boards import VIRT, VIRT_MMIO
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Machine
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import find
from virtiova.result import Path
from virtiova.transport.mmio import MmioTransport, open_slot
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


@functools.cache
def cells(
    device: str,
    iommu: str = "smmuv3",
    machine: str = "virt",
    only: Sequence[str] | None = None,
    interface: str = "auto",
) -> Cells:
    """Cells by the name of the experiment; each is observed once, whoever looks."""
    found = probe.qemu(device, iommu, only, machine=machine, interface=interface)
    return MappingProxyType({cell.experiment: cell for cell in found})


# -- what the experiments see behind the SMMU ----------------------------------------------------------------------

PATHS = ("device-writes", "device-reads", "ring", "indirect", "split-buffer")
TABLES = ("empty-tables", "past-end", "unmapped", "read-only", "unmap")
BIT_ON = (
    dict.fromkeys(("msi", *PATHS, "remap"), "translated")
    | dict.fromkeys((*TABLES, "bus-master-off"), "blocked")
    | {"translation-off": "direct", "unmap-stale": "stale", "remap-stale": "stale"}
    | {"not-taken": "refused", "renegotiate": "refused", "no-version-1": "translated"}
)
BIT_OFF = dict.fromkeys((*PATHS, *TABLES, "unmap-stale", "remap", "remap-stale"), "bypass") | {
    "msi": "translated",
    "translation-off": "direct",
    "bus-master-off": "bypass",
    "never-offered": "bypass",
    "renegotiate": "bypass",
}
CARRY_ON = {"blk": "translated", "net": "blocked", "rng": "blocked"}
"""virtio-blk serves a kick whatever its status; the other two look at DRIVER_OK first."""


READS = {"device-reads", "write-only"}


def without_reads(table: dict[str, str], kind: str) -> dict[str, str]:
    return {name: path for name, path in table.items() if kind != "rng" or name not in READS}


@pytest.mark.parametrize("kind", ["blk", "net", pytest.param("rng", marks=pytest.mark.sweep)])
def test_with_the_bit(kind: str) -> None:
    seen = cells(f"virtio-{kind}-pci{ON}")
    assert list(seen) == GENERAL
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(BIT_ON, kind) | {"carry-on": CARRY_ON[kind]}
    explained = {name: cell.explained for name, cell in seen.items() if cell.explained}
    blk = {"carry-on": "QEMU-KICK-AFTER-REFUSAL"} if kind == "blk" else {}
    assert explained == {"no-version-1": "QEMU-DECIDES-AT-PLUG"} | blk


@pytest.mark.parametrize("kind", ["rng", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("blk", "net"))])
def test_without_the_bit(kind: str) -> None:
    seen = cells(f"virtio-{kind}-pci")
    assert list(seen) == GENERAL
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(BIT_OFF, kind)
    assert {name: cell.explained for name, cell in seen.items() if cell.explained} == {
        "bus-master-off": "QEMU-BUS-MASTER"
    }


def test_write_only_is_a_word_that_stage_1_does_not_have() -> None:
    cell = cells(BLK)["write-only"]
    assert (cell.observed, cell.predicted) == (Path.NOT_APPLICABLE, [])
    assert cell.evidence.note == "this IOMMU cannot allow writing without reading"

    class NoWriteOnly(ModelMachine):
        def __init__(self) -> None:
            super().__init__("honest", "blk")
            self.iommu.write_only = False

    again = run_cell(NoWriteOnly, find("write-only"), machine="model", iommu="soft", device="model-blk")
    assert (again.observed, again.evidence.note) == (Path.NOT_APPLICABLE, cell.evidence.note)


@pytest.mark.parametrize(
    ("name", "words"), [("unmapped", "F_TRANSLATION"), ("read-only", "F_PERMISSION"), ("past-end", "F_TRANSLATION")]
)
def test_what_is_blocked_leaves_an_event(name: str, words: str) -> None:
    evidence = cells(BLK)[name].evidence
    assert evidence.live.startswith("fault record")
    assert words in evidence.live
    assert {fault.source for fault in evidence.faults} == {BEHIND_PORT}
    assert all(len(fault.raw) == 8 for fault in evidence.faults)


def test_the_legacy_interface_through_the_mapped_io_window() -> None:
    only = ("device-writes", "device-reads", "ring", "msi")
    seen = cells("virtio-blk-pci-transitional", only=only, interface="legacy")
    assert observed(seen) == {
        "device-writes": "bypass",
        "device-reads": "bypass",
        "ring": "bypass",
        "msi": "translated",
    }
    assert not any(cell.mismatch or cell.offered for cell in seen.values())


@pytest.mark.parametrize("bit", ["", ON])
def test_no_iommu(bit: str) -> None:
    seen = cells(f"virtio-blk-pci{bit}", "none", only=("device-writes", "ring", "unmapped"))
    assert observed(seen) == {"device-writes": "direct", "ring": "direct"}
    assert {cell.evidence.control for cell in seen.values() if cell.evidence.witnesses} == {"machine"}


# -- virtio-iommu --------------------------------------------------------------------------------------------------

ACTS_AT_ONCE = {"unmap-stale": "blocked", "remap-stale": "translated", "write-only": "blocked"}


@pytest.mark.parametrize("kind", ["blk", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("net", "rng"))])
def test_virtio_iommu_with_the_bit(kind: str) -> None:
    seen = cells(f"virtio-{kind}-pci{ON}", "virtio")
    assert wrong(list(seen.values())) == []
    table = without_reads(BIT_ON | ACTS_AT_ONCE, kind)
    assert observed(seen) == table | {"carry-on": CARRY_ON[kind]}


@pytest.mark.parametrize("kind", ["net", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("blk", "rng"))])
def test_virtio_iommu_without_the_bit(kind: str) -> None:
    seen = cells(f"virtio-{kind}-pci", "virtio")
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(BIT_OFF | {"write-only": "bypass"}, kind)


@pytest.mark.parametrize("control", ["edu", "rtl8139"])
def test_virtio_iommu_is_in_front_of_the_control_devices(control: str) -> None:
    assert observed(cells(control, "virtio")) == {"control": "translated"}


# -- virtio-mmio ---------------------------------------------------------------------------------------------------

MMIO = [(bit, interface) for bit in ("", ON) for interface in ("modern", "legacy")]


@pytest.mark.parametrize(("bit", "interface"), MMIO)
@pytest.mark.parametrize("kind", KINDS)
def test_mmio_is_direct_whatever_the_bit(kind: str, bit: str, interface: str) -> None:
    seen = cells(f"virtio-{kind}-device{bit}", "smmuv3", "virt-mmio", (*PATHS, "unmapped", "msi"), interface)
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(dict.fromkeys(PATHS, "direct"), kind)
    negotiated = bool(bit) and interface == "modern"
    for name in observed(seen):
        cell = seen[name]
        # Version 1 has no room for the bit, which QEMU takes without a word.
        assert (cell.offered, cell.accepted) == (negotiated, negotiated)
        assert cell.evidence.control == "machine"
        assert cell.evidence.words == []
        pages = {w.page for w in cell.evidence.witnesses if w.role in ("data", "ring") and w.touched}
        assert pages <= {"B"}


def test_mmio_negotiation() -> None:
    seen = cells(
        f"virtio-blk-device{ON}", "smmuv3", "virt-mmio", ("not-taken", "carry-on", "no-version-1", "renegotiate")
    )
    assert wrong(list(seen.values())) == []
    assert observed(seen) == {
        "not-taken": "refused",
        "carry-on": "direct",
        "no-version-1": "direct",
        "renegotiate": "refused",
    }


def test_a_device_that_were_behind_it_after_all_would_show() -> None:
    """The port of virt-mmio, around an SMMU that is in front: `direct` is predicted, and not what is seen."""

    def make() -> QemuMachine:
        machine = QemuMachine(BLK, "smmuv3", machine="virt")
        machine.iommu = AsideIommu(cast(PlatformIommu, machine.iommu), present=False)
        return machine

    cell = run_cell(make, find("device-writes"), machine="virt-mmio", iommu="smmuv3", device="virtio-blk-device")
    assert (cell.observed, cell.predicted, cell.mismatch) == (Path.TRANSLATED, [Path.DIRECT], True)


def test_mmio_translates_every_stream_in_the_background() -> None:
    with QemuMachine("virtio-rng-device", "smmuv3", machine="virt-mmio") as machine:
        aside = machine.iommu
        assert isinstance(aside, AsideIommu)
        aside.enable()
        assert machine.bus.read(SMMU_BASE + smmuv3.CR0ACK, 4) & smmuv3.CR0_SMMUEN
        table = GPA(machine.bus.read(SMMU_BASE + smmuv3.STRTAB_BASE, 8) & ~0x3F)
        entries = machine.ram.read(table, 512 * smmuv3.STE_SIZE)
        assert entries == entries[: smmuv3.STE_SIZE] * 512
        assert entries[0] & 1


@pytest.mark.parametrize("interface", ["modern", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_mmio_io(kind: str, interface: str) -> None:
    serial = ",serial=a serial" if kind == "blk" else ""
    with QemuMachine(f"virtio-{kind}-device{serial}", "none", machine="virt-mmio", prefer=interface) as machine:
        assert machine.transport is not None
        assert machine.transport.legacy is (interface == "legacy")
        assert (machine.transport.msi, machine.transport.bus_master) == (None, None)
        driver = open_device(cast(Machine, machine))
        assert driver.negotiated.features_ok is (None if interface == "legacy" else True)  # type: ignore[attr-defined]
        if isinstance(driver, BlkDriver):
            assert driver.read(100, 8) == b"".join(sector_text(number) for number in range(100, 108))
            assert driver.get_id() == "a serial"
        elif isinstance(driver, NetDriver):
            frame = driver.frame(1000)
            assert driver.exchange(frame) == frame
        elif isinstance(driver, RngDriver):
            assert len(set(driver.random(256))) > 32
        assert machine.words() == []


def test_mmio_registers() -> None:
    with QemuMachine("virtio-rng-device", "none", machine="virt-mmio") as machine:
        transport = machine.transport
        assert isinstance(transport, MmioTransport)
        assert (transport.device_id, transport.byte_order) == (4, "little")
        transport.reset()
        assert transport.queue_size(0) >= 8
        assert transport.queue_size(1) == 0
        transport.enable_queue(0, 8, 0x40800000, 0x40801000, 0x40802000, None)
        with pytest.raises(ProtocolError, match="in use already"):
            transport.enable_queue(0, 8, 0x40800000, 0x40801000, 0x40802000, None)
        with pytest.raises(ProtocolError, match="no vectors"):
            transport.enable_queue(0, 8, 0x40800000, 0x40801000, 0x40802000, 0)
        with pytest.raises(ProtocolError, match=r"no virtio-mmio at 0x09000000"):
            MmioTransport(machine.bus, 0x09000000)
        assert VIRT_MMIO.slots is not None
        assert isinstance(open_slot(machine.bus, VIRT_MMIO.slots), MmioTransport)
        for slot in VIRT_MMIO.slots.addresses()[:31]:
            assert machine.bus.read(slot + 8, 4) == 0, "the first device is in the last slot"
    with QemuMachine("virtio-rng-device,iommu_platform=on", "none", machine="virt-mmio", prefer="legacy") as machine:
        transport = machine.transport
        assert isinstance(transport, MmioTransport)
        assert not has(transport.read_features(), VIRTIO_F_ACCESS_PLATFORM)
        with pytest.raises(ProtocolError, match="in one piece"):
            transport.enable_queue(0, 8, 0x40800000, 0x40801000, 0x40802000, None)


# -- names that do not exist ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "iommu", "machine", "message"),
    [
        ("virtio-blk-pci", "smmuv3", "virt-mmio", "'virtio-blk-pci'.*did you mean 'virtio-blk-device'"),
        ("virtio-rng-device", "smmuv3", "virt", "'virtio-rng-device'.*did you mean 'virtio-rng-pci'"),
        ("edu", "smmuv3", "virt-mmio", "'edu'.*valid: .*virtio-blk-device"),
        (BLK, "smmuv2", "virt", "'smmuv2'.*did you mean 'smmuv3'"),
        (BLK, "smmuv3,bypas-bus=on", "virt", "'bypas-bus'.*did you mean 'bypass-bus'"),
        (BLK, "smmuv3,stage=3", "virt", "unknown stage '3'"),
        (BLK, "smmuv3", "virt-mmoi", "'virt-mmoi'.*did you mean 'virt-mmio'"),
        ("virtio-blk-device", "smmuv3,bypass-bus=on", "virt-mmio", "'smmuv3' has no options"),
    ],
)
def test_names_that_do_not_exist(device: str, iommu: str, machine: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QemuMachine(device, iommu, machine=machine)


def test_an_interface_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"'legcy'.*did you mean 'legacy'"):
        QemuMachine("virtio-blk-device", "none", machine="virt-mmio", prefer="legcy")
