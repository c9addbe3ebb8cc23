# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi and virtio-iommu of a real QEMU: what they translate, block, and keep for too long; AMD-Vi's own."""

from __future__ import annotations

import struct

import pytest

from probe_kit import KINDS, ON, observed, qemu_cells, wrong
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.errors import AccessError, UsageError
from virtiova.iommu.amdvi import AmdViIommu
from virtiova.machine.image import SECTOR, sector_text
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.edu import control_outcome
from virtiova.probe.rig import Rig as ProbeRig
from virtiova.result import Path
from virtiova.wire import amdvi
from x86_iommu_kit import BLK, NAMES, Direct, amd, rig

pytestmark = pytest.mark.qemu


# -- the probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iommu", NAMES)
@pytest.mark.parametrize("bit", ["", ON])
def test_every_experiment_on_blk_is_as_predicted_or_explained(iommu: str, bit: str) -> None:
    cells = qemu_cells(f"virtio-blk-pci{bit}", iommu)
    assert wrong(list(cells.values())) == []
    seen = observed(cells)
    assert len(seen) >= 19
    assert seen["msi"] == "translated", "the message goes through whatever bit 33 is"
    assert seen["translation-off"] == "direct"
    assert seen["device-writes"] == seen["device-reads"] == seen["ring"] == ("translated" if bit else "bypass")
    assert {cell.evidence.control for cell in cells.values() if cell.observed in ("translated", "bypass")} == {"msi-x"}


@pytest.mark.sweep
@pytest.mark.parametrize("iommu", NAMES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "blk"])
@pytest.mark.parametrize("bit", ["", ON])
def test_every_experiment_is_as_predicted_or_explained(iommu: str, kind: str, bit: str) -> None:
    assert wrong(list(qemu_cells(f"virtio-{kind}-pci{bit}", iommu).values())) == []


def test_what_is_taken_away_may_be_used_until_it_is_invalidated_on_amd_only() -> None:
    amd, virtio = (observed(qemu_cells(BLK, name)) for name in NAMES)
    assert (amd["unmap-stale"], amd["remap-stale"]) == ("stale", "stale")
    assert (virtio["unmap-stale"], virtio["remap-stale"]) == ("blocked", "translated")
    for seen in (amd, virtio):
        assert (seen["unmap"], seen["remap"]) == ("blocked", "translated")


def test_what_proves_that_a_blocked_device_was_alive() -> None:
    for name, word, faults in (("amd", "the same request", False), ("virtio", "fault record", True)):
        cells = qemu_cells(BLK, name)
        for experiment in ("unmapped", "read-only", "write-only", "unmap", "past-end", "empty-tables"):
            evidence = cells[experiment].evidence
            assert evidence.live.startswith(word)
            assert bool(evidence.faults) is faults


PATHS = ("device-writes", "ring", "unmapped", "translation-off")


@pytest.mark.parametrize("iommu", [*NAMES, "virtio,boot-bypass=off"])
def test_without_msi_x_the_control_is_another_device(iommu: str) -> None:
    cells = qemu_cells(f"{BLK},vectors=0", iommu, only=PATHS)
    assert observed(cells) == dict(zip(PATHS, ("translated", "translated", "blocked", "direct"), strict=True))
    assert {cell.evidence.control for cell in cells.values()} == {"edu"}


@pytest.mark.parametrize("iommu", NAMES)
def test_the_control_device_alone(iommu: str) -> None:
    for enabled, page in ((True, "A"), (False, "B")):
        touched = {w.page for w in control_outcome("q35", iommu, enabled=enabled).witnesses if w.touched}
        assert touched == {page}


def test_legacy_devices_go_around() -> None:
    for name, place in (("amd", ""), ("virtio", ",addr=5")):
        legacy = f"virtio-blk-pci{place},disable-modern=on,disable-legacy=off"
        assert observed(qemu_cells(legacy, name, only=("device-writes",))) == {"device-writes": "bypass"}


def test_amd_of_this_qemu_does_not_see_a_device_behind_a_bridge() -> None:
    cells = qemu_cells(BLK, "amd,place=root-port", only=("device-writes", "unmapped", "msi"))
    for cell in cells.values():
        assert (cell.observed, cell.explained) == (Path.DIRECT, "QEMU-AMD-BUS-NUMBER")
    with pytest.raises(UsageError, match=r"'root-prot'.*did you mean 'root-port'"):
        QemuMachine(BLK, "amd,place=root-prot")


@pytest.mark.parametrize(
    ("iommu", "told"),
    [("amd", False), ("amd,pt=on", True), ("amd,pt=off", False), ("amd,pt=yes", True), ("virtio", False)],
)
def test_whether_the_iommu_was_told_to_pass_through_is_a_fact(iommu: str, told: bool) -> None:
    """Our own word is pt=off; what the user says replaces it. QEMU 7.2 translates either way."""
    with QemuMachine(BLK, iommu) as machine:
        assert (machine.pass_through, [end.pass_through for end in machine.ends]) == (told, [told])
        assert ProbeRig(machine).facts().pass_through is told


# -- the port, by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_map_move_and_take_away(name: str) -> None:
    with rig(name) as it:
        caches = it.iommu.caches
        assert (it.iommu.name, it.iommu.present, caches) == (name, True, name == "amd")
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
        assert it.fill() == ((True, False) if caches else (False, True))
        it.iommu.invalidate()
        assert it.fill() == (False, True)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        assert it.fill() == (False, caches)
        it.iommu.invalidate()
        assert it.fill() == (False, False)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, Access.READ)
        assert it.fill() == (False, False)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        it.iommu.invalidate()
        assert it.fill() == (True, False)


@pytest.mark.parametrize("name", NAMES)
def test_off_and_on_again_keeps_what_is_mapped(name: str) -> None:
    with rig(name) as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.disable()
        it.iommu.disable()
        it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
        it.iommu.enable()
        it.iommu.enable()
        assert it.fill() == (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_over_two_pages_that_lie_apart(name: str) -> None:
    with rig(name) as it:
        iova = it.iommu.allocate(2 * PAGE_SIZE)
        it.iommu.map(iova, it.pages[1], PAGE_SIZE)
        it.iommu.map(IOVA(iova + PAGE_SIZE), it.pages[0], PAGE_SIZE)
        it.driver.run(it.driver.make_device_write([(iova + PAGE_SIZE - SECTOR, 2 * SECTOR)]))
        assert it.machine.ram.read(GPA(it.pages[1] + PAGE_SIZE - SECTOR), SECTOR) == sector_text(1)
        assert it.machine.ram.read(it.pages[0], SECTOR) == sector_text(2)


@pytest.mark.parametrize(("name", "end"), [("amd", 1 << 39), ("virtio", 1 << 64)])
def test_addresses_up_to_the_width_and_not_one_page_more(name: str, end: int) -> None:
    with rig(name) as it:
        it.iova = IOVA(end - PAGE_SIZE)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        for iova, size in ((end, PAGE_SIZE), (end - PAGE_SIZE, 2 * PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE)):
            with pytest.raises(AccessError, match=r"width|input range"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        for iova, size in ((1, PAGE_SIZE), (0, 1), (0, 0)):
            with pytest.raises(AccessError, match="not a range"):
                it.iommu.unmap(IOVA(iova), size)
        with pytest.raises(AccessError, match="not the address"):
            it.iommu.map(IOVA(0), GPA(it.pages[0] + 512), PAGE_SIZE)
        with pytest.raises(AccessError, match="no IOVAs left"):
            it.iommu.allocate(end)


@pytest.mark.parametrize("name", NAMES)
def test_iovas_are_never_addresses_of_ram(name: str) -> None:
    with QemuMachine(BLK, name) as machine:
        last = 64 << 20
        for size in (1, PAGE_SIZE, 3 * PAGE_SIZE, PAGE_SIZE + 1):
            iova = machine.iommu.allocate(size)
            assert iova % PAGE_SIZE == 0
            assert iova > last, "in RAM, or adjacent to the range before"
            last = iova + size


# -- AMD-Vi -------------------------------------------------------------------------------------------------------


def test_the_command_buffer_wraps_around() -> None:
    with rig("amd") as it:
        for _ in range(300):
            it.iommu.invalidate()
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        it.iommu.invalidate()
        assert it.fill() == (False, False)


def test_amd_logs_no_event_even_where_it_notices_a_fault() -> None:
    """A departure up to QEMU 10.0; if this fails, QEMU logs events, and the documents want an update."""
    with rig("amd") as it:
        iommu, far = amd(it), IOVA(1 << 34)
        iommu.map(far, it.pages[0], PAGE_SIZE)
        middle = GPA(iommu.table(far, 2) + 8 * amdvi.table_index(far, 2))
        (entry,) = struct.unpack("<Q", it.machine.ram.read(middle, 8))
        it.machine.ram.write(middle, struct.pack("<Q", entry & ~1))
        it.iommu.invalidate()
        it.iova = far
        assert it.fill() == (False, False)
        assert iommu.faults() == []
        assert iommu.unit.lost_faults == 0


def test_amd_obeys_a_leaf_that_is_not_present() -> None:
    """A departure of QEMU 7.2: the PR bit of a leaf is not looked at, its permissions are. So `unmap` writes zero."""
    with rig("amd") as it:
        iommu = amd(it)
        iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        leaf = GPA(iommu.table(it.iova, 1) + 8 * amdvi.table_index(it.iova, 1))
        (entry,) = struct.unpack("<Q", it.machine.ram.read(leaf, 8))
        it.machine.ram.write(leaf, struct.pack("<Q", entry & ~1))
        iommu.invalidate()
        assert it.fill() == (True, False)


def event(code: int, source: int, flags: int, address: int) -> bytes:
    return struct.pack("<IIQ", source, code << 28 | flags, address)


def test_events_are_read_once_and_those_of_others_are_left_out() -> None:
    """QEMU writes none, so the records are put there by hand; the tail register is the real one."""
    with rig("amd") as it:
        iommu = amd(it)
        ours = event(2, 0x18, 1 << 21, 0x203098)
        log = [ours, event(2, 0x20, 0, 0x1000), event(5, 0, 0, 0x203010), bytes(16)]
        for index, data in enumerate(log):
            it.machine.ram.write(GPA(iommu.unit.event_log + 16 * index), data)
        it.machine.bus.write(0xFED80000 + amdvi.EVENT_TAIL, 8, 16 * len(log))
        faults = iommu.faults()
        assert [(fault.address, fault.write, fault.source) for fault in faults] == [
            (0x203098, True, 0x18),
            (0x203010, False, -1),
        ]
        assert faults[0].reason == "page fault (AMD-Vi event 0x2)"
        assert faults[0].raw == struct.unpack("<QQ", ours)
        assert iommu.faults() == []


@pytest.mark.parametrize(
    ("entry", "goes_around"),
    [
        (bytes(32), True),
        (amdvi.device_entry(0, 1, levels=0), True),
        (amdvi.device_entry(0, 1, levels=0, access=Access.NONE), False),
        (amdvi.device_entry(0, 1, access=Access.NONE), False),
    ],
    ids=["V=0", "no tables", "no tables, no permission", "no permission"],
)
def test_device_table_entries_without_tables(entry: bytes, goes_around: bool) -> None:
    with QemuMachine(BLK, "amd") as machine:
        iommu = machine.iommu
        assert isinstance(iommu, AmdViIommu)
        iommu.enable()
        iommu.unit.set_device_entry(0x18, entry)
        assert Direct(machine).reads() is goes_around
