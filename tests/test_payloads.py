# SPDX-License-Identifier: Apache-2.0
"""Addresses inside requests, on real QEMU: who takes them for what; and the drivers that put them there."""

from __future__ import annotations

import json
import re
from pathlib import Path as FilePath

import pytest

from judge_again import complaints, judge_again
from probe_kit import ON, Cells, qemu_cells
from virtiova.cli import exits, main
from virtiova.driver import gpu
from virtiova.driver.balloon import BalloonDriver
from virtiova.driver.memory import MemDriver, PmemDriver
from virtiova.driver.open import open_device
from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.experiment import EXPERIMENTS
from virtiova.probe.plan import all_experiments
from virtiova.report.json import document
from virtiova.result import Path

OF = {row.id: row.kinds for row in EXPERIMENTS.values() if row.kinds}
DOCUMENT = FilePath(__file__).parent.parent / "docs" / "payloads.md"


def cells_of(name: str, iommu: str, bit: str, machine: str = "q35") -> Cells:
    """The cell of one experiment, on the device that it is for."""
    (kind,) = OF[name]
    device = "blk" if kind == "iommu" else kind
    return qemu_cells(f"virtio-{device}-pci{bit}", iommu, "auto", (name,), machine)


# -- what is observed --------------------------------------------------------------------------------------------------

# Experiment: predicted and observed with the bit off and on, behind an IOMMU, and what explains the difference.
EXPECTED = {
    "gpu-backing": ("bypass", "translated"),
    "gpu-unmapped": ("bypass", "blocked"),
    "gpu-remap": ("bypass", "stale"),
    "balloon-inflate": ("bypass", "mixed"),
    "balloon-report": ("bypass", "translated"),
    "mem-unplug": ("bypass", "mixed"),
    "pmem-region": ("bypass", "mixed"),
    "map-target": ("n/a", "mixed"),
}
EXPLAINED = {("gpu-remap", ON): "QEMU-GPU-BACKING-STAYS"}
ROWS = [
    *(("q35", "intel", name, bit) for name in EXPECTED if name != "map-target" for bit in ("", ON)),
    *(("q35", "virtio", name, bit) for name in ("gpu-backing", "balloon-inflate", "map-target") for bit in ("", ON)),
    # QEMU 7.2 has no pmem for Arm.
    *(("virt", "smmuv3", name, ON) for name in EXPECTED if name not in ("map-target", "pmem-region")),
    ("pseries", "tce", "balloon-inflate", ON),
    ("sun4u", "sabre", "gpu-backing", ON),
]


@pytest.mark.qemu
@pytest.mark.parametrize(("machine", "iommu", "name", "bit"), ROWS)
def test_where_the_address_led(machine: str, iommu: str, name: str, bit: str) -> None:
    (cell,) = cells_of(name, iommu, bit, machine).values()
    assert cell.observed == EXPECTED[name][bool(bit)], cell.evidence
    assert cell.explained == EXPLAINED.get((name, bit))
    assert cell.mismatch is (cell.explained is not None)
    if cell.observed is Path.NOT_APPLICABLE:
        return
    assert (cell.offered, cell.accepted) == (bool(bit), bool(bit))
    # The others have no messages of their own, and nobody has any on the big-endian machines.
    outside = "rtl8139" if machine in ("pseries", "sun4u") else "edu"
    messages = outside == "edu" and OF[name] in {("gpu",), ("iommu",)}
    assert cell.evidence.control == ("msi-x" if messages else outside)
    # The second judge, who has nothing but the JSON.
    (again,) = json.loads(document([cell]))["cells"]
    assert judge_again(again) == cell.observed
    assert complaints(again) == []


@pytest.mark.qemu
@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("map-target", "gpu-unmapped", "gpu-remap")])
@pytest.mark.parametrize("bit", ["", ON])
def test_without_an_iommu_it_is_direct(name: str, bit: str) -> None:
    (cell,) = cells_of(name, "none", bit).values()
    assert (cell.predicted, cell.observed, cell.address) == ([Path.DIRECT], Path.DIRECT, "gpa")


@pytest.mark.qemu
def test_the_page_says_what_was_observed() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\w/]+) \| ([\w/]+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: (off, on) for name, off, on in rows} == EXPECTED


@pytest.mark.qemu
def test_the_exception_is_the_payload_and_not_the_ring() -> None:
    """With the bit the balloon's ring and page numbers are read through the IOMMU; the page that they name is not."""
    (cell,) = cells_of("balloon-inflate", "intel", ON).values()
    touched = {(w.role, w.page) for w in cell.evidence.witnesses if w.touched}
    assert touched == {("data", "B"), ("ring", "A"), ("control", "A")}
    (page,) = [w for w in cell.evidence.witnesses if (w.role, w.page) == ("data", "B")]
    assert bytes.fromhex(page.before).startswith(b"page B ")
    assert not any(bytes.fromhex(page.after))
    assert "page-number-is-physical" in {reason.rule for reason in cell.reasons}
    assert (cell.address, cell.evidence.x) == ("gpa", page.gpa)


@pytest.mark.qemu
def test_pixels_are_the_witness_of_a_gpu() -> None:
    (cell,) = cells_of("gpu-backing", "intel", ON).values()
    (delivery,) = cell.evidence.deliveries
    text = bytes.fromhex(delivery.arrived)
    assert text.startswith(b"page A %08x. " % delivery.gpas["A"])
    assert (len(text), cell.address) == (gpu.COLOURS, "iova")


@pytest.mark.qemu
def test_a_balloon_is_refused_by_qemu_if_its_driver_does_as_linux_does() -> None:
    (cell,) = qemu_cells(f"virtio-balloon-pci{ON}", "intel", "auto", ("not-taken",)).values()
    assert (cell.observed, cell.accepted) == (Path.REFUSED, False)


@pytest.mark.qemu
def test_reporting_without_the_feature_does_not_apply() -> None:
    device = "virtio-balloon-pci,free-page-reporting=off"
    cells = qemu_cells(device, "intel", "auto", ("balloon-report", "balloon-inflate"))
    assert [str(cell.observed) for cell in cells.values()] == ["n/a", "bypass"]
    assert cells["balloon-report"].evidence.note == "free page reporting is not offered"


@pytest.mark.qemu
def test_elsewhere_it_does_not_apply_and_says_why() -> None:
    for cell in qemu_cells("virtio-rng-pci", "intel", "auto", tuple(EXPECTED)).values():
        assert (cell.observed, cell.predicted, cell.mismatch) == (Path.NOT_APPLICABLE, [], False)
        assert re.search("only .* (devices have such requests|by request)|no IOMMU", cell.evidence.note)


@pytest.mark.qemu
@pytest.mark.parametrize("bit", ["", ON])
@pytest.mark.parametrize("kind", ["balloon", "mem"])
def test_a_device_that_fills_no_buffers_is_not_asked_to(kind: str, bit: str) -> None:
    names = ("device-writes", "translation-off", "bus-master-off", "carry-on")
    cells = qemu_cells(f"virtio-{kind}-pci{bit}", "intel", "auto", names)
    assert {str(cell.observed) for cell in cells.values()} == {"n/a"}
    assert cells["device-writes"].evidence.note == "this device fills no buffer of the driver's choice"


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("bit", "paths"),
    [("", ["bypass", "bypass", "n/a", "bypass"]), (ON, ["translated", "translated", "n/a", "blocked"])],
)
def test_a_gpu_is_asked_what_every_device_is_asked(bit: str, paths: list[str]) -> None:
    cells = qemu_cells(f"virtio-gpu-pci{bit}", "intel", "auto", ("device-writes", "ring", "device-reads", "past-end"))
    assert [str(cell.observed) for cell in cells.values()] == paths
    assert not any(cell.mismatch for cell in cells.values())


def test_devices_are_asked_what_they_have_an_answer_to() -> None:
    everybody = all_experiments("virtio-blk-pci")
    assert not set(everybody) & OF.keys()
    for kind in ("gpu", "balloon", "mem", "pmem"):
        mine = all_experiments(f"virtio-{kind}-pci{ON}")
        assert mine == everybody + [name for name, kinds in OF.items() if kinds == (kind,)]
    assert all_experiments("virtio-balloon-pci-transitional") == all_experiments("virtio-balloon-device")
    assert set(OF) == set(EXPECTED)


# -- virtio-iommu's own bit --------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_the_iommus_own_bit_makes_no_difference_to_what_it_maps_to() -> None:
    (cell,) = cells_of("map-target", "virtio,iommu_platform=on", ON).values()
    assert (cell.predicted, cell.observed) == ([Path.MIXED], Path.MIXED)
    with QemuMachine("virtio-rng-pci", "virtio,iommu_platform=on") as machine:
        assert isinstance(machine.iommu, VirtioIommu)
        assert machine.iommu.driver.negotiated.bit33 == (True, True)


# -- the drivers -------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_a_balloon_by_hand() -> None:
    with QemuMachine(f"virtio-balloon-pci{ON}", "intel") as machine:
        driver = open_device(machine)
        assert isinstance(driver, BalloonDriver)
        page = driver.ops.alloc(4096)
        page.write(0, b"kept" * 8)
        driver.run(driver.make_report([(page.addr, 4096)]))
        assert page.read(0, 32) == bytes(32)
        for wrong in (1, 4095, 1 << 44):
            with pytest.raises(UsageError, match="is not the address of a page"):
                driver.make_inflate([wrong])
        with pytest.raises(UsageError, match="fills no buffers"):
            driver.make_device_write([(page.addr, 512)])


@pytest.mark.qemu
def test_memory_by_hand() -> None:
    with QemuMachine("virtio-mem-pci", "none") as machine:
        driver = open_device(machine)
        assert isinstance(driver, MemDriver)
        config = driver.config
        assert (config.addr, config.plugged_size) == (1 << 32, 0)
        driver.plug(config.addr, 1)
        assert driver.config.plugged_size == config.block_size
        with pytest.raises(MachineError, match="did not plug"):
            driver.plug(config.addr, 1)
        driver.run(driver.make_unplug(config.addr, 1))
        assert driver.config.plugged_size == 0
    with QemuMachine("virtio-pmem-pci", "none") as machine:
        pmem = open_device(machine)
        assert isinstance(pmem, PmemDriver)
        assert pmem.region == (1 << 32, 2 << 20)


@pytest.mark.parametrize(
    "pixmap",
    [
        b"",
        b"P6\n16 16\n255\n",
        b"P6\n16 16\n255\n" + bytes(767),
        b"P6\n16 16\n255\n" + bytes(769),
        b"P6\n17 16\n255\n" + bytes(768),
        b"P5\n16 16\n255\n" + bytes(768),
        b"P6\n16 16\n255\n" + bytes(1 << 20),
    ],
)
def test_a_picture_that_is_none(pixmap: bytes) -> None:
    with pytest.raises(ProtocolError, match="no picture of 16x16 pixels"):
        gpu.picture(pixmap)


def test_colours_are_three_bytes_of_four() -> None:
    assert gpu.pixels(b"RGBrgb") == b"BGR\0bgr\0"
    assert gpu.picture(b"P6\n16 16\n255\n" + bytes(range(256)) * 3) == bytes(range(256)) * 3


# -- hostile devices ---------------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("kind", ["mem", "pmem"])
def test_a_configuration_that_cannot_be(monkeypatch: pytest.MonkeyPatch, kind: str, byte: int) -> None:
    with QemuMachine(f"virtio-{kind}-pci", "none") as machine:
        driver = open_device(machine)
        monkeypatch.setattr(driver, "transport", _Config(byte))
        with pytest.raises(ProtocolError, match="device says that it has"):
            assert driver.config if isinstance(driver, MemDriver) else driver.region  # type: ignore[attr-defined]


class _Config:
    def __init__(self, byte: int) -> None:
        self._byte = byte

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes([self._byte]) * length


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "path"),
    [("descriptor", "translated"), ("gpu-backing", "translated")]
    + [(kind, "mixed") for kind in ("page-number", "memory-block", "pmem-region", "map-target")],
)
def test_explain_knows_addresses_inside_requests(payload: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "rule", "--offered", "yes", "--accepted", "yes", "--payload", payload]) == exits.OK
    out = capsys.readouterr().out
    assert f"allowed paths        {path}" in out
    assert (f"the address is a {payload} inside a request" in out) is (payload != "descriptor")


def test_explain_knows_no_other_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "rule", "--payload", "page-numbr"]) == exits.USAGE
    assert "did you mean 'page-number'" in capsys.readouterr().err
