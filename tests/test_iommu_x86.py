# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi and virtio-iommu of a real QEMU: what they translate, block, keep for too long, and report."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from probe_kit import KINDS, ON, observed, qemu_cells, wrong
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ops import DirectOps
from virtiova.driver.blk import BlkDriver
from virtiova.driver.iommu import EVENTS, TAKEN, IommuDriver
from virtiova.driver.negotiate import begin, driver_ok, finish
from virtiova.driver.open import DRIVER_FEATURES, open_device
from virtiova.errors import AccessError, MachineError, UsageError
from virtiova.features import driver_features
from virtiova.iommu.amdvi import AmdViIommu
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.image import SECTOR, sector_text
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Fault, Iommu
from virtiova.probe.edu import control_outcome
from virtiova.probe.rig import Rig as ProbeRig
from virtiova.result import Path
from virtiova.wire import amdvi
from virtiova.wire import virtio_iommu as wire
from virtiova.wire.virtio_iommu import Reason, Status

pytestmark = pytest.mark.qemu

BLK = "virtio-blk-pci,iommu_platform=on"
NAMES = ("amd", "virtio")
SILENT = 0.1
"""Seconds that a device which ought to stay silent is given."""


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


@dataclass
class Rig:
    """A block device with bit 33, brought up behind an IOMMU, and two pages for one address."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: Iommu
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
def rig(iommu: str) -> Iterator[Rig]:
    with QemuMachine(BLK, iommu) as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


def amd(it: Rig) -> AmdViIommu:
    assert isinstance(it.iommu, AmdViIommu)
    return it.iommu


def virtio(it: Rig) -> VirtioIommu:
    assert isinstance(it.iommu, VirtioIommu)
    return it.iommu


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


# -- virtio-iommu: requests ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare(options: str = "") -> Iterator[IommuDriver]:
    """The driver of a virtio-iommu whose endpoint 0x100 is attached to nothing."""
    with QemuMachine(BLK, f"virtio{options}") as machine:
        iommu = machine.iommu
        assert isinstance(iommu, VirtioIommu)
        yield iommu.driver


ENDPOINT = 0x100
"""Of a device behind the root port: bus << 8 | devfn."""


def test_what_qemu_offers() -> None:
    with bare() as driver:
        assert driver.negotiated.offered & 0x7F == 0x77
        assert driver.negotiated.bit33 == (False, False)
        config = driver.config
        assert (config.granule, config.input_first, config.input_last) == (PAGE_SIZE, 0, 2**64 - 1)
        assert (config.domain_first, config.domain_last, config.probe_size) == (0, 2**32 - 1, 512)
        assert driver.bypass is True
        # Where messages to the processors go: not to be mapped.
        assert [(r.first, r.last, r.msi) for r in driver.probe(ENDPOINT)] == [(0xFEE00000, 0xFEEFFFFF, True)]
        assert driver.probe(0x55) == []


def pages(first: int, last: int) -> tuple[int, int]:
    """A range of pages, both ends included, as addresses with both ends included."""
    return first * PAGE_SIZE, (last + 1) * PAGE_SIZE - 1


UNMAP_EXAMPLES: list[tuple[list[tuple[int, int]], tuple[int, int], Status, list[bool]]] = [
    ([], (0, 4), Status.OK, []),
    ([(0, 9)], (0, 9), Status.OK, [False]),
    ([(0, 4), (5, 9)], (0, 9), Status.OK, [False, False]),
    ([(0, 9)], (0, 4), Status.RANGE, [True]),
    ([(0, 4), (5, 9)], (0, 4), Status.OK, [False, True]),
    ([(0, 4)], (0, 9), Status.OK, [False]),
    ([(0, 4), (10, 14)], (0, 14), Status.OK, [False, False]),
]


def test_the_unmap_examples_of_the_specification() -> None:
    """virtio 1.4, 5.13.6.6: mappings, what is unmapped, the answer, and which mappings are still there."""
    with bare() as driver:
        for domain, (mapped, unmapped, answer, left) in enumerate(UNMAP_EXAMPLES, 1):
            # Attached to a new domain, the endpoint leaves its old one, which ends with that.
            assert driver.attach(domain, ENDPOINT) == Status.OK
            for first, last in mapped:
                assert driver.map(domain, *pages(first, last), 0x800000) == Status.OK
            assert driver.unmap(domain, *pages(*unmapped)) == answer
            there = [driver.map(domain, *pages(first, last), 0x800000) == Status.INVAL for first, last in mapped]
            assert there == left


def test_statuses() -> None:
    with bare() as driver:
        assert driver.attach(1, ENDPOINT) == Status.OK
        assert driver.map(1, *pages(0, 3), 0x800000) == Status.OK
        assert driver.map(1, *pages(3, 5), 0x800000) == Status.INVAL
        assert driver.map(9, *pages(0, 3), 0x800000) == Status.NOENT
        assert driver.unmap(9, *pages(0, 3)) == Status.NOENT
        assert driver.attach(1, 0x55) == Status.NOENT
        assert driver.attach(1, ENDPOINT, flags=2) == Status.INVAL
        assert driver.detach(1, 0x55) == Status.NOENT
        assert driver.detach(9, ENDPOINT) == Status.INVAL
        assert driver.request(struct.pack("<B3x16x", 0x77)) == Status.UNSUPP
        # Departures of QEMU 7.2. Wanted are: RANGE for what is not aligned, a refusal of a reserved region, INVAL
        # for a reserved field that is not zero.
        assert driver.map(1, 0x10001, 0x10FFF, 0x800000) == Status.OK
        assert driver.map(1, 0xFEE00000, 0xFEE00FFF, 0x800000) == Status.OK
        assert driver.request(struct.pack("<B3xIIII", 1, 1, ENDPOINT, 0, 1)) == Status.OK
        assert driver.detach(1, ENDPOINT) == Status.OK
        assert driver.map(1, *pages(0, 3), 0x800000) == Status.NOENT, "the domain ended with its last endpoint"


def test_a_bypass_domain_has_no_mappings() -> None:
    with bare() as driver:
        assert driver.attach(1, ENDPOINT, flags=wire.ATTACH_F_BYPASS) == Status.OK
        assert driver.map(1, *pages(0, 3), 0x800000) == Status.INVAL
        assert driver.unmap(1, *pages(0, 3)) == Status.INVAL


def test_a_refusal_in_words() -> None:
    with rig("virtio") as it:
        iommu = virtio(it)
        assert iommu.driver.map(iommu.domain, it.iova, it.iova + 2 * PAGE_SIZE - 1, it.pages[0]) == Status.OK
        with pytest.raises(MachineError, match=r"refuses UNMAP of 0x\w+\+0x1000: RANGE"):
            iommu.unmap(it.iova, PAGE_SIZE)


# -- virtio-iommu: bypass -----------------------------------------------------------------------------------------


class Direct:
    """A block driver that passes guest-physical addresses whatever is in front: it works if nothing translates."""

    def __init__(self, machine: QemuMachine) -> None:
        transport = machine.transport
        assert transport is not None
        self._machine = machine
        offered = begin(transport)
        negotiated = finish(transport, offered, driver_features(offered, BlkDriver.table) & DRIVER_FEATURES)
        assert negotiated.bit33 == (True, True)
        assert transport.bus_master is not None
        transport.bus_master.set_bus_master(True)
        ops = DirectOps(machine.ram, machine.pages)
        self.driver = BlkDriver(transport, ops, negotiated, machine.peer, machine.wait)
        self.driver.start()
        driver_ok(transport)

    def reads(self) -> bool:
        """Does the device get through to its ring and to a buffer?"""
        region = self.driver.ops.alloc(SECTOR)
        request = self.driver.make_device_write([(region.addr, SECTOR)])
        request.go()
        if not self._machine.wait(request.done, SILENT):
            return False
        request.queue.ring.poll()
        return region.read(0, SECTOR)[:7] == b"sector "


@dataclass(frozen=True)
class State:
    """One row of the truth table: how the IOMMU is left, and whether the endpoint then goes through."""

    bypass: bool
    attach: int | None
    goes_through: bool
    reason: int | None = None


STATES = {
    "not attached, bypass 1": State(True, None, True),
    "not attached, bypass 0": State(False, None, False, Reason.UNKNOWN),
    "bypass domain, bypass 0": State(False, wire.ATTACH_F_BYPASS, True),
    "bypass domain, bypass 1": State(True, wire.ATTACH_F_BYPASS, True),
    "normal domain, bypass 0": State(False, 0, False, Reason.MAPPING),
    "normal domain, bypass 1": State(True, 0, False, Reason.MAPPING),
}


@pytest.mark.parametrize("boot", ["", ",boot-bypass=off"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_bypass_truth_table(state: State, boot: str) -> None:
    """virtio 1.4, 5.13.6, for a device that offers BYPASS_CONFIG; QEMU does not offer the older BYPASS."""
    with QemuMachine(BLK, f"virtio{boot}") as machine:
        iommu = machine.iommu
        assert isinstance(iommu, VirtioIommu)
        assert iommu.driver.bypass is (not boot), "before anything was written"
        iommu.driver.set_bypass(state.bypass)
        if state.attach is not None:
            assert iommu.driver.attach(1, ENDPOINT, flags=state.attach) == Status.OK
        assert Direct(machine).reads() is state.goes_through
        assert {event.reason for event, _ in iommu.driver.events()} == ({state.reason} - {None})


@pytest.mark.parametrize("boot", ["", ",boot-bypass=off"])
def test_before_the_driver_accepts_anything(boot: str) -> None:
    """The boot state counts for a driver that does not take BYPASS_CONFIG, too."""
    with QemuMachine(BLK, f"virtio{boot}") as machine:
        first = machine.iommu
        assert isinstance(first, VirtioIommu)
        taken = TAKEN & ~(1 << wire.F_BYPASS_CONFIG)
        again = IommuDriver(first.driver.transport, DirectOps(machine.ram, machine.pages), taken=taken)
        assert again.bypass is None
        assert Direct(machine).reads() is (not boot)


def test_detached_with_bypass_off_is_blocked_for_another_reason_than_never_attached() -> None:
    with rig("virtio,boot-bypass=off") as it:
        iommu = virtio(it)
        assert iommu.driver.bypass is False
        it.driver.run(it.driver.make_device_write([(it.driver.ops.alloc(SECTOR).addr, SECTOR)]))
        assert iommu.faults() == []
        iommu.detach()
        request = it.driver.make_device_write([(it.iova, SECTOR)])
        request.go()
        assert not it.machine.wait(request.done, SILENT)
        assert {fault.raw[0] & 0xFF for fault in iommu.faults()} == {Reason.DOMAIN}
        assert iommu.driver.bypass is False, "detaching is no way around"
        iommu.driver.set_bypass(True)
        assert Direct(it.machine).reads(), "with bypass it is one (5.13.6.4)"


# -- virtio-iommu: faults -----------------------------------------------------------------------------------------


def after(it: Rig, access: Access, *, write: bool) -> Sequence[Fault]:
    """The faults of one request to ``iova``, mapped with ``access``."""
    if access:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, access)
    make = it.driver.make_device_write if write else it.driver.make_device_read
    it.driver.run(make([(it.iova, SECTOR)]))
    return it.iommu.faults()


@pytest.mark.parametrize(
    ("access", "write", "flags"),
    [
        (Access.READ, True, 0x102),
        (Access.WRITE, False, 0x101),
        (Access.NONE, True, 0x100),
        (Access.NONE, False, 0x100),
    ],
)
def test_a_fault_says_who_where_and_why(access: Access, write: bool, flags: int) -> None:
    with rig("virtio") as it:
        faults = after(it, access, write=write)
        assert faults[0].address == it.iova
        for fault in faults:
            assert it.iova <= fault.address < it.iova + SECTOR, "exact, not the page only"
            assert fault.source == ENDPOINT
            assert fault.reason == "no mapping that allows it (virtio-iommu fault 0x2)"
            assert (fault.raw[0] & 0xFF, fault.raw[0] >> 32) == (Reason.MAPPING, flags)
            assert fault.write is {0x100: None, 0x101: False, 0x102: True}[flags], "none for no mapping at all"
        assert not any(it.machine.ram.read(it.pages[0], PAGE_SIZE))
        assert it.iommu.faults() == [], "reading clears them"


def test_event_buffers_are_given_back_and_a_loss_is_noticed() -> None:
    with rig("virtio") as it:
        for _ in range(4):
            assert len(after(it, Access.NONE, write=True)) > 100
        assert virtio(it).lost_faults == 0
        # One event for every four bytes: more than there are buffers.
        it.iommu.unmap(it.iova, PAGE_SIZE)
        it.driver.run(it.driver.make_device_write([(it.iova, 4 * SECTOR)]))
        assert len(it.iommu.faults()) == EVENTS
        assert virtio(it).lost_faults == 1
        assert len(after(it, Access.NONE, write=True)) > 100


def test_a_virtio_iommu_that_offers_bit_33_itself() -> None:
    with rig("virtio,iommu_platform=on") as it:
        assert virtio(it).driver.negotiated.bit33 == (True, True)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
