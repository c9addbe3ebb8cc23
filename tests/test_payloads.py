# SPDX-License-Identifier: Apache-2.0
"""Addresses inside requests, on real QEMU: who takes them for what; and the drivers that put them there."""

from __future__ import annotations

import json
import re
from pathlib import Path as FilePath

import pytest

from judge_again import complaints, contradictions, judge_again, ways
from probe_kit import ON, Cells, qemu_cells
from virtiova import probe
from virtiova.addr import GPA, IOVA, Access
from virtiova.cli import exits, main
from virtiova.driver import gpu
from virtiova.driver.balloon import BalloonDriver
from virtiova.driver.memory import MemDriver, PmemDriver
from virtiova.driver.open import open_device
from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.experiment import EXPERIMENTS, find
from virtiova.probe.plan import all_experiments
from virtiova.probe.rig import Rig
from virtiova.report.json import document
from virtiova.result import Cell, Path

OF = {row.id: row.kinds for row in EXPERIMENTS.values() if row.kinds}
DOCUMENT = FilePath(__file__).parent.parent / "docs" / "payloads.md"


def cells_of(name: str, iommu: str, bit: str, machine: str = "q35") -> Cells:
    """The cell of one experiment, on the device that it is for; ``bit`` is that device's."""
    (kind,) = OF[name]
    if kind == "iommu":
        return qemu_cells(f"virtio-blk-pci{ON}", iommu + bit, "auto", (name,), machine)
    return qemu_cells(f"virtio-{kind}-pci{bit}", iommu, "auto", (name,), machine)


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
    "map-target": ("mixed", "mixed"),
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
    assert contradictions(again) == cell.disagreements == []
    if cell.observed is Path.MIXED:
        assert ways(again["evidence"]) == again["sides"] == {"payload": "around", "structures": "through"}


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


def touched(cell: Cell) -> set[tuple[str, str]]:
    """Role and page of all that was written to, but for the answers to requests."""
    return {(w.role, w.page) for w in cell.evidence.witnesses if w.touched and w.role != "driver"}


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("machine", "iommu"), [("q35", "intel"), ("q35", "virtio"), ("virt", "smmuv3"), ("virt", "virtio")]
)
def test_the_block_that_is_emptied_is_the_one_at_x(machine: str, iommu: str) -> None:
    """The device's own answer, to X by descriptor, was in the other block: that is where the tables lead."""
    (cell,) = cells_of("mem-unplug", iommu, ON, machine).values()
    assert touched(cell) == {("mapped", "A"), ("data", "B"), ("ring", "A"), ("control", "A")}
    page = {(w.role, w.page): w for w in cell.evidence.witnesses}
    assert bytes.fromhex(page["data", "B"].before).startswith(b"page B ")
    assert not any(bytes.fromhex(page["data", "B"].after))
    assert page["data", "B"].gpa == page["mapped", "B"].gpa == cell.evidence.x
    assert page["data", "A"].gpa == page["mapped", "A"].gpa != cell.evidence.x


@pytest.mark.qemu
def test_what_is_stored_is_what_lies_at_x() -> None:
    (cell,) = cells_of("pmem-region", "intel", ON).values()
    assert touched(cell) == {("mapped", "A"), ("ring", "A"), ("control", "A")}
    (delivery,) = cell.evidence.deliveries
    assert delivery.arrived == delivery.pages["B"] != delivery.pages["A"]
    assert delivery.gpas["B"] == cell.evidence.x
    assert bytes.fromhex(delivery.arrived).startswith(b"page B %08x" % delivery.gpas["B"])


@pytest.mark.qemu
@pytest.mark.parametrize("bit", ["", ON])
def test_what_is_mapped_to_x_is_not_translated_once_more(bit: str) -> None:
    """What the disk wrote to X itself was in page A; what it wrote to the address that leads to X is in page B."""
    (cell,) = cells_of("map-target", "virtio", bit).values()
    assert touched(cell) == {("mapped", "A"), ("data", "B"), ("ring", "A"), ("control", "A")}
    page = {(w.role, w.page): w for w in cell.evidence.witnesses}
    for home in "AB":
        assert page["mapped", home].gpa == page["data", home].gpa
    assert page["data", "B"].gpa == cell.evidence.x


@pytest.mark.qemu
@pytest.mark.parametrize(("machine", "iommu"), [("q35", "intel"), ("virt", "smmuv3")])
def test_the_iommu_was_told_although_the_gpu_reads_the_old_page(machine: str, iommu: str) -> None:
    """The same device, the same X, the same run: what it writes by descriptor is in the new page, and only there."""
    (cell,) = cells_of("gpu-remap", iommu, ON, machine).values()
    mapped = {w.page: w.touched for w in cell.evidence.witnesses if w.role == "mapped"}
    assert mapped == {"A": True, "B": False, "C": False}
    (delivery,) = cell.evidence.deliveries
    assert delivery.arrived == delivery.pages["C"]
    assert {w.page: w.gpa for w in cell.evidence.witnesses if w.role == "mapped"} == delivery.gpas


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("device", "iommu", "name"),
    [
        ("virtio-mem-pci", "intel", "mem-unplug"),
        ("virtio-pmem-pci", "intel", "pmem-region"),
        ("virtio-blk-pci", "virtio", "map-target"),
    ],
)
def test_a_question_that_was_not_put_has_no_answer(
    monkeypatch: pytest.MonkeyPatch, device: str, iommu: str, name: str
) -> None:
    """Without its mapping of X the experiment says so, instead of what it would have seen anyway."""
    with QemuMachine(device + ON, iommu) as machine:
        rig = Rig(machine)
        map_ = machine.iommu.map
        xs = {1 << 32} if name != "map-target" else set()

        def without_x(iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
            if name == "map-target" and int(gpa) == int(rig.ops.regions[-1].addr):
                # What leads to X is mapped after X was.
                machine.iommu.unmap(IOVA(gpa), size)
            if iova not in xs:
                map_(iova, gpa, size, access)

        monkeypatch.setattr(machine.iommu, "map", without_x)
        with pytest.raises(MachineError, match=r"X is not mapped as it was to be.* is in no page"):
            find(name).run(rig)


@pytest.mark.qemu
def test_a_gpu_is_not_blamed_if_the_iommu_was_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with QemuMachine(f"virtio-gpu-pci{ON}", "intel") as machine:
        rig = Rig(machine)
        tell = machine.iommu.invalidate
        told: list[int] = []

        def once() -> None:
            if not told:
                tell()
            told.append(1)

        monkeypatch.setattr(machine.iommu, "invalidate", once)
        with pytest.raises(MachineError, match="what was written to it by descriptor is in page C"):
            find("gpu-remap").run(rig)
        assert len(told) == 2


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
@pytest.mark.parametrize("bit", ["", ON])
def test_the_bit_in_the_row_is_the_iommus_own(bit: str) -> None:
    (cell,) = cells_of("map-target", "virtio", bit).values()
    assert (cell.offered, cell.accepted, cell.iommu_options) == (bool(bit), bool(bit), bit[1:])
    with QemuMachine("virtio-rng-pci", f"virtio{bit}") as machine:
        assert machine.iommu.own_bit33 == (bool(bit), bool(bit))


@pytest.mark.qemu
def test_what_is_mapped_is_seen_through_a_device_that_goes_through() -> None:
    (cell,) = qemu_cells("virtio-blk-pci", "virtio", "auto", ("map-target",)).values()
    assert (cell.observed, cell.evidence.note) == (
        Path.NOT_APPLICABLE,
        "a device that goes around the IOMMU shows nothing of its mappings",
    )


@pytest.mark.qemu
@pytest.mark.parametrize("iommu", ["intel", "amd", "none"])
def test_no_other_iommu_is_a_virtio_device(iommu: str) -> None:
    with QemuMachine("virtio-rng-pci", iommu) as machine:
        assert machine.iommu.own_bit33 is None


def test_no_experiment_knows_which_iommu_it_is_on() -> None:
    """What differs is a property of the port (docs/architecture.md)."""
    for module in (FilePath(probe.__file__).parent).glob("*.py"):
        assert not re.search(r"(from|import) virtiova\.iommu|isinstance\(rig\.iommu", module.read_text()), module.name


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
    assert ("if mixed             payload around, rings and tables through" in out) is (path == "mixed")
    assert (f"the address is a {payload} inside a request" in out) is (payload != "descriptor")


def test_explain_knows_no_other_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "rule", "--payload", "page-numbr"]) == exits.USAGE
    assert "did you mean 'page-number'" in capsys.readouterr().err
