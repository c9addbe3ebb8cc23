# SPDX-License-Identifier: Apache-2.0
"""Real QEMU 10, riscv64: the RISC-V IOMMU does what it was told, and every path is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from newer_qemu import newer_qemu
from probe_kit import GENERAL, ON, observed, wrong
from virtiova import probe
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import AccessError, MachineError, NotPossibleError, UsageError
from virtiova.iommu.riscv import RiscvIommu, RiscvUnit
from virtiova.machine.image import SECTOR
from virtiova.machine.model import ModelMachine
from virtiova.machine.qemu.boards import RISCV_VIRT
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.matrix import Selection, plan
from virtiova.matrix.plan import mix
from virtiova.ports import Fault
from virtiova.result import Cell, Path
from virtiova.wire import riscv_iommu as wire

pytestmark = pytest.mark.qemu

BASE = 0x03010000
SLOT_3 = 3 << 3
"""Requester id, and device id, of a device in slot 3 of the root bus."""
BLK = "virtio-blk-pci,iommu_platform=on"


@pytest.fixture(scope="module")
def qemu(pytestconfig: pytest.Config) -> str:
    return newer_qemu(pytestconfig).directory


def cells(qemu: str, device: str, iommu: str = "riscv", only: Sequence[str] | None = None) -> dict[str, Cell]:
    return {cell.experiment: cell for cell in probe.qemu(device, iommu, only, machine="riscv-virt", qemu=qemu)}


# -- what the experiments see behind it ----------------------------------------------------------------------------

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
KINDS = ["blk", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("net", "rng"))]


def without_reads(table: dict[str, str], kind: str) -> dict[str, str]:
    return {name: path for name, path in table.items() if kind != "rng" or name != "device-reads"}


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_bit(qemu: str, kind: str) -> None:
    seen = cells(qemu, f"virtio-{kind}-pci{ON}")
    assert list(seen) == GENERAL
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(BIT_ON, kind) | {"carry-on": CARRY_ON[kind]}
    assert seen["write-only"].observed is Path.NOT_APPLICABLE
    for name, words in (("unmapped", "write page fault"), ("empty-tables", "page fault")):
        assert words in seen[name].evidence.live
        assert {fault.source for fault in seen[name].evidence.faults} == {SLOT_3}


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_bit(qemu: str, kind: str) -> None:
    seen = cells(qemu, f"virtio-{kind}-pci")
    assert wrong(list(seen.values())) == []
    assert observed(seen) == without_reads(BIT_OFF, kind)
    assert {name: cell.explained for name, cell in seen.items() if cell.explained} == {
        "bus-master-off": "QEMU-BUS-MASTER"
    }


SOME = ("device-writes", "ring", "unmapped", "read-only", "unmap-stale", "remap", "translation-off", "msi")


@pytest.mark.parametrize("options", ["kind=pci", "paging=sv48", "paging=sv39x4", "kind=pci,paging=sv39x4"])
@pytest.mark.parametrize("bit", ["", ON])
def test_both_kinds_and_every_format(qemu: str, options: str, bit: str) -> None:
    table = BIT_ON if bit else BIT_OFF
    seen = cells(qemu, f"virtio-blk-pci{bit}", f"riscv,{options}", SOME)
    assert wrong(list(seen.values())) == []
    assert observed(seen) == {name: table[name] for name in SOME}


@pytest.mark.parametrize(
    ("iommu", "path"), [("none", "direct"), ("riscv", "translated"), ("riscv,kind=pci", "translated")]
)
def test_the_control_device(qemu: str, iommu: str, path: str) -> None:
    cell = cells(qemu, "edu", iommu)["control"]
    assert (cell.observed, cell.predicted) == (path, [path])


def test_the_other_iommus_of_the_board(qemu: str) -> None:
    for iommu, on, off in (("none", "direct", "direct"), ("virtio", "translated", "bypass")):
        for bit, path in ((ON, on), ("", off)):
            seen = cells(qemu, f"virtio-rng-pci{bit}", iommu, ("device-writes", "ring"))
            assert observed(seen) == dict.fromkeys(("device-writes", "ring"), path)


def test_a_device_id_that_takes_two_levels_of_directory(qemu: str) -> None:
    """One page holds 64 contexts: slot 16 is beyond."""
    seen = cells(qemu, f"{BLK},addr=10,disable-legacy=on", only=("device-writes", "unmapped", "msi"))
    assert observed(seen) == {"device-writes": "translated", "unmapped": "blocked", "msi": "translated"}
    assert {fault.source for fault in seen["unmapped"].evidence.faults} == {0x10 << 3}


def test_behind_a_root_port_it_is_known_by_the_bus_number_from_before(qemu: str) -> None:
    """The context of 01:00.0 is not looked at; what QEMU looks for is 00:00.0. Hence slot 3 of the root bus."""
    with QemuMachine(BLK, "riscv,place=root-port", machine="riscv-virt", qemu=qemu) as machine:
        iommu = machine.iommu
        assert isinstance(iommu, RiscvIommu)
        assert machine.bridged
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        request = driver.make_device_write([(driver.ops.alloc(SECTOR).addr, SECTOR)])
        request.go()
        assert not machine.wait(request.done, 0.1)
        assert iommu.faults() == [], "those of another device, as far as it can know"
        first = wire.Record.unpack(machine.ram.read(iommu.unit.records, wire.RECORD_SIZE))
        assert (first.cause, first.device) == (258, 0)


# -- the IOMMU from outside ----------------------------------------------------------------------------------------


@dataclass
class Rig:
    """A block device that fills one page at ``iova``, and two pages for it to land on."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: RiscvIommu
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
def rig(qemu: str, options: str = "") -> Iterator[Rig]:
    with QemuMachine(BLK, f"riscv{options}", machine="riscv-virt", qemu=qemu) as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        assert isinstance(machine.iommu, RiscvIommu)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


def only_page(faults: Sequence[Fault]) -> tuple[int, bool | None, int, str]:
    """A refused buffer leaves a record for every part of it; they all say the same."""
    (said,) = {(fault.address & ~0xFFF, fault.write, fault.source, fault.reason) for fault in faults}
    return said


@pytest.mark.parametrize("options", ["", ",paging=sv48", ",paging=sv39x4", ",kind=pci"])
def test_map_move_and_take_away(qemu: str, options: str) -> None:
    with rig(qemu, options) as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
        assert it.fill() == (True, False), "what was cached is used until IOTINVAL"
        it.iommu.invalidate()
        assert it.fill() == (False, True)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        assert it.fill() == (False, True)
        assert it.iommu.faults() == []
        it.iommu.invalidate()
        assert it.fill() == (False, False)
        words = "write guest page fault" if "x4" in options else "write page fault"
        address, write, source, reason = only_page(it.iommu.faults())
        assert (address, write, source) == (it.iova, True, SLOT_3)
        assert words in reason
        assert it.iommu.faults() == [], "reading clears them"
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        assert it.machine.words() == []


def test_both_queues_wrap_around_and_run_over(qemu: str) -> None:
    with rig(qemu) as it:
        for _ in range(300):
            it.iommu.invalidate()
        for _ in range(20):
            assert it.fill() == (False, False)
            faults = it.iommu.faults()
            assert only_page(faults)[0] == it.iova
        records = len(faults)
        assert it.iommu.unit.lost == 0
        for _ in range(1024 // records + 2):
            assert it.fill() == (False, False)
        assert records < len(it.iommu.faults()) < 1024
        assert it.iommu.unit.lost == 1
        assert it.fill() == (False, False)
        assert len(it.iommu.faults()) == records, "and after that it records again"
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)


def test_bare_is_its_off_state(qemu: str) -> None:
    with rig(qemu) as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.disable()
        assert it.machine.bus.read(BASE + wire.DDTP, 8) & 0xF == wire.BARE
        it.iommu.enable()
        assert it.machine.bus.read(BASE + wire.DDTP, 8) & 0xF == wire.ONE_LEVEL
        assert it.fill() == (True, False)
        it.iommu.disable()
        request = it.driver.make_device_write([(it.iova, SECTOR)])
        request.go()
        assert not it.machine.wait(request.done, 0.1), "its ring is at an IOVA, which is beyond RAM now"
        assert it.iommu.faults() == []


def test_off_lets_nothing_through_once_what_was_cached_is_forgotten(qemu: str) -> None:
    with rig(qemu) as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.unit.set_mode(wire.OFF)
        assert it.fill() == (True, False), "QEMU asks for the mode only where it has no context in its cache"
        it.iommu.unit.submit(wire.iodir_inval())
        request = it.driver.make_device_write([(it.iova, SECTOR)])
        request.go()
        assert not it.machine.wait(request.done, 0.1)
        assert {(f.source, f.reason) for f in it.iommu.faults()} == {
            (SLOT_3, "all accesses disallowed (RISC-V IOMMU cause 256)")
        }


@pytest.mark.parametrize("access", [Access.NONE, Access.READ])
@pytest.mark.parametrize("write", [True, False])
def test_a_record_says_who_where_and_why(qemu: str, access: Access, write: bool) -> None:
    with rig(qemu) as it:
        if access is not Access.NONE:
            it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, access)
        make = it.driver.make_device_write if write else it.driver.make_device_read
        it.driver.run(make([(it.iova, SECTOR)]))
        faults = it.iommu.faults()
        if access is Access.READ and not write:
            assert faults == []
            return
        assert only_page(faults)[:3] == (it.iova, write, SLOT_3)
        assert not any(it.machine.ram.read(it.pages[0], PAGE_SIZE))
        types = {wire.Record.unpack(b"".join(w.to_bytes(4, "little") for w in f.raw)).transaction for f in faults}
        assert types == {3}, "QEMU gives the type of a write to reads, too: the cause is what says it"


def test_a_write_through_a_cached_page_that_can_be_read_only_leaves_no_record(qemu: str) -> None:
    """Silence is no evidence: the page was read before, so that the IOMMU knows it by heart."""
    with rig(qemu) as it:
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, Access.READ)
        it.driver.run(it.driver.make_device_read([(it.iova, SECTOR)]))
        assert it.fill() == (False, False)
        assert it.iommu.faults() == []


def test_addresses_up_to_the_width_and_not_one_page_more(qemu: str) -> None:
    with rig(qemu) as it:
        end = wire.SV39.end
        it.iova = IOVA(end - PAGE_SIZE)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        for iova, size in ((end, PAGE_SIZE), (end - PAGE_SIZE, 2 * PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE)):
            with pytest.raises(AccessError, match="width"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        with pytest.raises(AccessError, match="4 KiB"):
            it.iommu.map(IOVA(0), GPA(it.pages[0] + 512), PAGE_SIZE)
        with pytest.raises(AccessError, match="cannot allow writing without reading"):
            it.iommu.map(IOVA(0), it.pages[0], PAGE_SIZE, Access.WRITE)
        assert it.iommu.allocate(1) > RISCV_VIRT.ram_base + RISCV_VIRT.ram_size
        with pytest.raises(AccessError, match="no IOVAs left"):
            it.iommu.allocate(end)


def test_a_command_that_it_does_not_know(qemu: str) -> None:
    with rig(qemu) as it, pytest.raises(MachineError, match=r"did not finish its commands: .*cqcsr 0x10401"):
        it.iommu.unit.submit(bytes([0x7E]) + bytes(15))


# -- what is not there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "paging", "message"),
    [
        (0, wire.SV39, "no RISC-V IOMMU of version 1"),
        (0x10, wire.SV39, "has no sv39"),
        (0x10 | 1 << 9, wire.SV39X4, "has no sv39x4"),
    ],
)
def test_what_the_capabilities_do_not_name(capabilities: int, paging: wire.Paging, message: str) -> None:
    class Registers:
        def read(self, address: int, size: int) -> int:
            assert (address, size) == (BASE, 8)
            return capabilities

        def write(self, address: int, size: int, value: int) -> None:
            raise AssertionError("nothing is written before it is known what it can do")

        def flush(self) -> None: ...

    model = ModelMachine("honest", "blk")
    with pytest.raises(NotPossibleError, match=message):
        RiscvUnit(Registers(), model.ram, model.pages, BASE, paging=paging)


@pytest.mark.parametrize(
    ("iommu", "message"),
    [
        ("riskv", "'riskv'.*did you mean 'riscv'"),
        ("riscv,paging=sv57", "unknown paging 'sv57'"),
        ("riscv,kind=isa", "unknown kind 'isa'"),
        ("riscv,knd=pci", "'knd'.*did you mean 'kind'"),
    ],
)
def test_names_that_do_not_exist(iommu: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QemuMachine(BLK, iommu, machine="riscv-virt")


# -- several devices -----------------------------------------------------------------------------------------------

MIX = mix(RISCV_VIRT)


@pytest.mark.parametrize("iommu", ["riscv", "riscv,kind=pci,paging=sv39x4", "virtio"])
def test_each_device_of_a_mix_has_its_own_domain(qemu: str, iommu: str) -> None:
    names = ("device-writes", "at-once", "others-page")
    seen = list(probe.qemu(MIX, iommu, names, machine="riscv-virt", qemu=qemu))
    assert wrong(seen) == []
    assert [len(MIX), len(seen)] == [5, 15]
    paths = [cell.observed for cell in seen]
    assert paths[:5] == paths[5:10] == ["translated", "bypass", "translated", "bypass", "translated"]
    assert paths[10:] == ["blocked", "bypass", "translated", "bypass", "blocked"]
    # Each has the records that are its own: slots 6 and 10, which take one level of directory and two.
    sources = [{fault.source for fault in cell.evidence.faults} for cell in seen[10:]]
    if iommu != "virtio":
        assert sources == [{6 << 3}, set(), set(), set(), {10 << 3}]
    for cell in seen[5:10]:
        others = cell.evidence.neighbours
        # One that has looked at its ring before it was told is over too early (see test_neighbours).
        assert cell.experiment == "control" or (len(others) == 4 and any(each.under_way for each in others))


@pytest.mark.parametrize("paging", ["sv39", "sv39x4"])
def test_what_is_cached_for_one_device_is_not_anothers(qemu: str, paging: str) -> None:
    """The same address means one page to one device and another to the other, without any invalidation between."""
    devices = [BLK, f"{BLK},disable-legacy=on", BLK]
    with QemuMachine(devices, f"riscv,paging={paging}", machine="riscv-virt", qemu=qemu) as machine:
        one, _, third = machine.ends
        assert isinstance(one.iommu, RiscvIommu)
        assert isinstance(third.iommu, RiscvIommu)
        assert one.iommu.unit is third.iommu.unit
        drivers = [open_device(end) for end in (one, third)]
        mode = machine.bus.read(BASE + wire.DDTP, 8) & 0xF
        assert mode == wire.TWO_LEVELS, "slots 6 and 8 are on either side of the border"
        pages = [machine.pages.page(), machine.pages.page()]
        iova = max(one.iommu.allocate(PAGE_SIZE), third.iommu.allocate(PAGE_SIZE))
        for end, page in zip((one, third), pages, strict=True):
            end.iommu.map(iova, page, PAGE_SIZE)
        for driver, page in zip(drivers, pages, strict=True):
            assert isinstance(driver, BlkDriver)
            for each in pages:
                machine.ram.write(each, bytes(SECTOR))
            driver.run(driver.make_device_write([(iova, SECTOR)]))
            assert [any(machine.ram.read(each, SECTOR)) for each in pages] == [each == page for each in pages]


def test_the_matrix_has_its_mixes(qemu: str, pytestconfig: pytest.Config) -> None:
    rows = plan(Selection(only=("mixes", "riscv-virt")), [newer_qemu(pytestconfig)]).tasks
    there = {row.task.iommu for row in rows if row.task.qemu == qemu and not row.missing}
    assert there == {"riscv", "virtio"}
    assert {row.span for row in rows if not row.missing} == {len(MIX)}
