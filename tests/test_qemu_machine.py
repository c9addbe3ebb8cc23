# SPDX-License-Identifier: Apache-2.0
"""Real QEMU: every kind of device does I/O, the IOMMU does what it was told, and nothing is ever left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

import virtiova
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator
from virtiova.driver.base import Driver
from virtiova.driver.blk import BlkDriver
from virtiova.driver.edu import SECONDS as EDU_SECONDS
from virtiova.driver.negotiate import begin, finish
from virtiova.driver.net import NetDriver
from virtiova.driver.open import open_device
from virtiova.driver.rng import RngDriver
from virtiova.errors import (
    AccessError,
    MachineError,
    NegotiationError,
    NotPossibleError,
    RefusedError,
    UsageError,
    VirtiovaError,
)
from virtiova.features import Feature, names
from virtiova.iommu.vtd import VtdIommu
from virtiova.machine.qemu import bus
from virtiova.machine.qemu.machine import SECTOR, QemuMachine, sector_text
from virtiova.ports import Fault, Machine
from virtiova.wire import vtd

pytestmark = pytest.mark.qemu

VTD_BASE = 0xFED90000
BEHIND_PORT = 0x0100
"""Requester id of a device behind the one root port."""
BLK = "virtio-blk-pci,iommu_platform=on"


@pytest.fixture
def blk() -> Iterator[QemuMachine]:
    """A block device with bit 33, behind VT-d."""
    with QemuMachine(BLK) as machine:
        yield machine


def child_environment() -> dict[str, str]:
    """For a child process that imports the package that is tested here."""
    return os.environ | {"PYTHONPATH": str(Path(virtiova.__file__).parent.parent)}


def is_port(machine: QemuMachine) -> Machine:
    """For the type checker: a QEMU machine is a machine."""
    return machine


# -- I/O ----------------------------------------------------------------------------------------------------------

FLAVOURS = {
    "off": "",
    "on": ",iommu_platform=on",
    "legacy": ",addr=4,disable-modern=on,disable-legacy=off",
}


def use_blk(machine: QemuMachine, driver: Driver) -> None:
    assert isinstance(driver, BlkDriver)
    assert driver.read(7, 1) == sector_text(7)
    assert driver.read(100, 8) == b"".join(sector_text(number) for number in range(100, 108))
    data = os.urandom(3 * SECTOR)
    driver.write(40, data)
    driver.flush()
    assert machine.peer.stored(40 * SECTOR, len(data)) == data
    assert machine.peer.stored(39 * SECTOR, SECTOR) == sector_text(39)
    assert machine.peer.stored(43 * SECTOR, SECTOR) == sector_text(43)
    assert driver.read(40, 3) == data
    assert driver.get_id() == "a serial"


def use_rng(machine: QemuMachine, driver: Driver) -> None:
    assert isinstance(driver, RngDriver)
    one, other = driver.random(256), driver.random(256)
    assert one
    assert other
    assert one != other
    assert len(set(one + other)) > 64


def use_net(machine: QemuMachine, driver: Driver) -> None:
    assert isinstance(driver, NetDriver)
    for length in (60, 1514):
        out, back = driver.frame(length), driver.frame(length)
        assert driver.exchange(back) == back
        machine.peer.received()
        driver.send(out)
        frames: list[bytes] = []

        def arrived(frames: list[bytes] = frames) -> bool:
            frames += machine.peer.received()
            return bool(frames)

        assert machine.wait(arrived, 2)
        assert frames == [out]


USE: dict[str, tuple[str, Callable[[QemuMachine, Driver], None]]] = {
    "blk": (",serial=a serial", use_blk),
    "rng": ("", use_rng),
    "net": ("", use_net),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("iommu", ["none", "intel"])
@pytest.mark.parametrize("kind", USE)
def test_io(kind: str, iommu: str, flavour: str) -> None:
    extra, use = USE[kind]
    with QemuMachine(f"virtio-{kind}-pci{FLAVOURS[flavour]}{extra}", iommu) as machine:
        driver = open_device(is_port(machine))
        use(machine, driver)
        on = flavour == "on"
        translated = on and iommu == "intel"
        assert isinstance(driver, BlkDriver | RngDriver | NetDriver)
        assert driver.negotiated.bit33 == (on, on)
        assert driver.negotiated.features_ok is (None if flavour == "legacy" else True)
        assert driver.transport.legacy is (flavour == "legacy")
        assert driver.ops.name == ("platform" if translated else "direct")
        assert all((queue.ring.desc >= 1 << 32) is translated for queue in driver.queues())
        assert machine.iommu.faults() == []
        assert machine.words() == []
        assert (machine.name, machine.device) == ("q35", f"virtio-{kind}-pci")
        assert machine.product.startswith("QEMU ")


@pytest.mark.parametrize("flavour", ["-non-transitional", "-transitional", ",disable-legacy=off"])
@pytest.mark.parametrize("prefer", ["modern", "legacy"])
def test_the_interface_of_choice(flavour: str, prefer: str) -> None:
    device = f"virtio-blk-pci{flavour},serial=a serial"
    if (flavour, prefer) == ("-non-transitional", "legacy"):
        with pytest.raises(UsageError, match="no legacy interface"):
            QemuMachine(device, prefer=prefer)
        return
    with QemuMachine(device, prefer=prefer) as machine:
        assert machine.transport is not None
        assert machine.transport.legacy is (prefer == "legacy")
        use_blk(machine, open_device(machine))


def test_a_driver_that_does_not_take_the_bit_is_refused(blk: QemuMachine) -> None:
    with pytest.raises(NegotiationError, match="refuses"):
        open_device(blk, features=1 << Feature.VERSION_1)
    assert blk.transport is not None
    assert blk.transport.read_status() & 0x80, "FAILED"


def test_a_device_is_not_bus_master_until_its_driver_says_so() -> None:
    """Without the bit master QEMU does no DMA for a device behind VT-d, and a new notify brings it to life."""
    with QemuMachine(BLK) as machine:
        driver = cast(BlkDriver, open_device(machine))
        master = driver.transport.bus_master
        assert master is not None
        master.set_bus_master(False)
        request = driver.make_device_write([(driver.ops.alloc(SECTOR).addr, SECTOR)])
        request.go()
        assert not machine.wait(request.done, 0.2)


def test_the_control_device_obeys_the_iommu() -> None:
    with QemuMachine("edu") as machine:
        assert machine.transport is None
        edu = machine.edu
        assert edu is not None
        page, bare = machine.pages.page(), machine.pages.page()
        # Above RAM, and within the 28 bits that this device masks its addresses with.
        iova = IOVA(0x0A000000)
        machine.iommu.map(iova, page, PAGE_SIZE)
        machine.iommu.enable()
        machine.ram.write(page, b"seen by the device")
        edu.enable()
        edu.read_ram(iova, 64)
        assert machine.wait(lambda: not edu.busy(), EDU_SECONDS)
        machine.ram.write(page, bytes(64))
        edu.write_ram(iova, 64)
        assert machine.wait(lambda: not edu.busy(), EDU_SECONDS)
        assert machine.ram.read(page, 18) == b"seen by the device"
        edu.write_ram(bare, 64)
        assert machine.wait(lambda: not edu.busy(), EDU_SECONDS)
        assert machine.ram.read(bare, 64) == bytes(64)
        (fault,) = machine.iommu.faults()
        assert (fault.address, fault.write) == (bare, True)
        machine.iommu.disable()
        edu.write_ram(bare, 64)
        assert machine.wait(lambda: not edu.busy(), EDU_SECONDS)
        assert machine.ram.read(bare, 18) == b"seen by the device"
        with pytest.raises(UsageError, match="no virtio device"):
            open_device(machine)


# -- QMP, the second witness --------------------------------------------------------------------------------------

# Names as QEMU's monitor has them, before the colon.
QMP_NAMES = {
    "RING_INDIRECT_DESC": "VIRTIO_RING_F_INDIRECT_DESC",
    "RING_EVENT_IDX": "VIRTIO_RING_F_EVENT_IDX",
    "VERSION_1": "VIRTIO_F_VERSION_1",
    "ACCESS_PLATFORM": "VIRTIO_F_IOMMU_PLATFORM",
}


def qmp_status(machine: QemuMachine) -> dict[str, object]:
    devices = cast(list[dict[str, str]], machine.qmp("x-query-virtio"))
    assert len(devices) == 1
    return cast(dict[str, object], machine.qmp("x-query-virtio-status", path=devices[0]["path"]))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", USE)
def test_qemu_agrees_with_what_we_negotiated(kind: str, flavour: str) -> None:
    with QemuMachine(f"virtio-{kind}-pci{FLAVOURS[flavour]}") as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver | RngDriver | NetDriver)
        status = qmp_status(machine)
        guest = cast(dict[str, list[str]], status["guest-features"])
        seen = {text.partition(":")[0] for text in guest["transports"]}
        taken = names(driver.negotiated.accepted >> 24 << 24)
        assert seen == {QMP_NAMES[name] for name in taken}
        assert len(guest["dev-features"]) == (driver.negotiated.accepted & 0xFFFFFF).bit_count()
        host = cast(dict[str, list[str]], status["host-features"])
        offered = any(text.startswith("VIRTIO_F_IOMMU_PLATFORM") for text in host["transports"])
        assert driver.negotiated.bit33[0] is offered is (flavour == "on")
        assert status["device-id"] == driver.device_id


def test_qmp_sees_the_refusal(blk: QemuMachine) -> None:
    assert blk.transport is not None
    offered = begin(blk.transport)
    assert finish(blk.transport, offered, 1 << Feature.VERSION_1).refused
    status = cast(dict[str, list[str]], qmp_status(blk)["status"])
    assert not any("FEATURES_OK" in text for text in status["statuses"])


def test_qmp_takes_many_commands_and_says_what_it_does_not_know(blk: QemuMachine) -> None:
    for _ in range(3):
        assert cast(dict[str, bool], blk.qmp("query-status"))["running"]
    with pytest.raises(VirtiovaError, match="no-such-command"):
        blk.qmp("no-such-command")
    assert cast(dict[str, bool], blk.qmp("query-status"))["running"]


# -- VT-d from outside --------------------------------------------------------------------------------------------


@dataclass
class Rig:
    """A block device that fills one page at ``iova``, and two pages for it to land on."""

    machine: QemuMachine
    driver: BlkDriver
    iommu: VtdIommu
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
def rig(options: str = "", *, queued: bool = False) -> Iterator[Rig]:
    with QemuMachine(BLK, f"intel{options}") as machine:
        if queued:
            tables = machine.pages.carve(256)
            iommu = VtdIommu(machine.bus, machine.ram, tables, BEHIND_PORT, VTD_BASE, queued=True)
            machine.iommu = iommu
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        assert isinstance(machine.iommu, VtdIommu)
        pages = machine.pages.page(), machine.pages.page()
        yield Rig(machine, driver, machine.iommu, machine.iommu.allocate(PAGE_SIZE), pages)


@pytest.mark.parametrize("options", ["", ",aw-bits=48", ",caching-mode=on"])
@pytest.mark.parametrize("queued", [False, True])
def test_map_move_and_take_away(options: str, queued: bool) -> None:
    with rig(options, queued=queued) as it:
        assert it.iommu.levels == (4 if "48" in options else 3)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.map(it.iova, it.pages[1], PAGE_SIZE)
        # What the device has cached is its own until it is told.
        assert it.fill() == (True, False)
        it.iommu.invalidate()
        assert it.fill() == (False, True)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        assert it.fill() == (False, True)
        assert it.iommu.faults() == []
        it.iommu.invalidate()
        assert it.fill() == (False, False)
        assert [fault.address for fault in it.iommu.faults()] == [it.iova]
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        assert not [line for line in it.machine.words() if "nvalidation" in line]


def test_the_user_may_choose_the_queue() -> None:
    with rig(",invalidation=queue") as it:
        assert it.machine.bus.read(VTD_BASE + vtd.GSTS, 4) & vtd.CMD_QUEUED
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
    with rig() as it:
        assert not it.machine.bus.read(VTD_BASE + vtd.GSTS, 4) & vtd.CMD_QUEUED


def test_the_queue_of_invalidations_wraps_around() -> None:
    with rig(queued=True) as it:
        for _ in range(600):
            it.iommu.invalidate()
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        it.iommu.unmap(it.iova, PAGE_SIZE)
        it.iommu.invalidate()
        assert it.fill() == (False, False)


@pytest.mark.parametrize(("options", "levels"), [("", 3), (",aw-bits=48", 4)])
def test_addresses_up_to_the_width_and_not_one_page_more(options: str, levels: int) -> None:
    with rig(options) as it:
        end = 1 << 12 + 9 * levels
        it.iova = IOVA(end - PAGE_SIZE)
        it.iommu.map(it.iova, it.pages[0], PAGE_SIZE)
        assert it.fill() == (True, False)
        for iova, size in ((end, PAGE_SIZE), (end - PAGE_SIZE, 2 * PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE)):
            with pytest.raises(AccessError, match="width"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        for iova, size in ((1, PAGE_SIZE), (0, 1), (0, 0)):
            with pytest.raises(AccessError, match="4 KiB"):
                it.iommu.map(IOVA(iova), it.pages[0], size)
        with pytest.raises(AccessError, match="4 KiB"):
            it.iommu.map(IOVA(0), GPA(it.pages[0] + 512), PAGE_SIZE)


def test_a_buffer_over_two_pages_that_lie_apart() -> None:
    with rig() as it:
        iova = it.iommu.allocate(2 * PAGE_SIZE)
        it.iommu.map(iova, it.pages[1], PAGE_SIZE)
        it.iommu.map(IOVA(iova + PAGE_SIZE), it.pages[0], PAGE_SIZE)
        it.driver.run(it.driver.make_device_write([(iova + PAGE_SIZE - SECTOR, 2 * SECTOR)]))
        at = PAGE_SIZE - SECTOR
        assert it.machine.ram.read(GPA(it.pages[1] + at), SECTOR) == sector_text(1)
        assert it.machine.ram.read(it.pages[0], SECTOR) == sector_text(2)
        # The byte past the end of the second page belongs to nobody.
        assert it.machine.ram.read(GPA(it.pages[0] + SECTOR), at) == bytes(at)


def test_iovas_are_never_addresses_of_ram(blk: QemuMachine) -> None:
    ranges = [(blk.iommu.allocate(size), size) for size in (1, PAGE_SIZE, 3 * PAGE_SIZE, PAGE_SIZE + 1)]
    last = 64 << 20
    for iova, size in ranges:
        assert iova % PAGE_SIZE == 0
        assert iova > last, "in RAM, or adjacent to the range before"
        last = iova + size
    with pytest.raises(AccessError, match="no IOVAs left"):
        blk.iommu.allocate(1 << 39)


# -- faults in words ----------------------------------------------------------------------------------------------


def only_fault(it: Rig) -> Fault:
    (fault,) = it.iommu.faults()
    assert it.iommu.faults() == [], "reading clears them"
    low, high = fault.raw
    assert high >> 63
    assert low & ~0xFFF == fault.address
    record = vtd.FaultRecord.unpack(low, high)
    assert record is not None
    assert (record.write, record.source, record.text) == (fault.write, fault.source, fault.reason)
    return fault


@pytest.mark.parametrize("options", ["", ",aw-bits=48"])
@pytest.mark.parametrize(
    ("access", "write", "words"),
    [
        (Access.NONE, True, "no write permission"),
        (Access.READ, True, "no write permission"),
        (Access.NONE, False, "no read permission"),
        (Access.WRITE, False, "no read permission"),
    ],
)
def test_a_fault_says_who_where_and_why(options: str, access: Access, write: bool, words: str) -> None:
    with rig(options) as it:
        if access is not Access.NONE:
            it.iommu.map(it.iova, it.pages[0], PAGE_SIZE, access)
        make = it.driver.make_device_write if write else it.driver.make_device_read
        it.driver.run(make([(it.iova, SECTOR)]))
        fault = only_fault(it)
        assert (fault.address, fault.write, fault.source) == (it.iova, write, BEHIND_PORT)
        assert fault.reason.startswith(words)
        assert not any(it.machine.ram.read(it.pages[0], PAGE_SIZE))


def test_faults_one_after_the_other() -> None:
    with rig() as it:
        for _ in range(5):
            assert it.fill() == (False, False)
            assert only_fault(it).address == it.iova


@pytest.mark.parametrize(
    ("source", "words"),
    [(BEHIND_PORT + 8, "context entry not present"), (0x0200, "root entry not present")],
)
def test_tables_for_another_device_are_no_tables_for_this_one(source: int, words: str) -> None:
    with QemuMachine(BLK) as machine:
        witness = machine.iommu
        machine.iommu = VtdIommu(machine.bus, machine.ram, machine.pages.carve(64), source, VTD_BASE)
        driver = cast(BlkDriver, open_device(machine))
        request = driver.make_device_write([(driver.ops.alloc(SECTOR).addr, SECTOR)])
        request.go()
        assert not machine.wait(request.done, 0.1)
        faults = witness.faults()
        assert faults
        assert all(fault.source == BEHIND_PORT and fault.reason.startswith(words) for fault in faults)


def test_faults_of_other_devices_are_not_this_devices() -> None:
    with rig() as it:
        other = VtdIommu(it.machine.bus, it.machine.ram, it.machine.pages.carve(64), 0x0028, VTD_BASE)
        assert it.fill() == (False, False)
        assert other.faults() == []


def test_an_address_beyond_the_width() -> None:
    with rig() as it:
        it.driver.run(it.driver.make_device_write([(1 << 39 | 0x204000, SECTOR)]))
        fault = only_fault(it)
        assert (fault.address, fault.reason.partition(" (")[0]) == (
            0x8000204000,
            "address beyond the address width",
        )


def test_tables_run_out_before_the_machine_does() -> None:
    with QemuMachine(BLK) as machine:
        tables = PageAllocator(machine.ram, machine.pages.page(), GPA(machine.pages.run(12) + 12 * PAGE_SIZE))
        iommu = VtdIommu(machine.bus, machine.ram, tables, BEHIND_PORT, VTD_BASE)
        iommu.map(IOVA(0), GPA(0x800000), 2 << 20)
        with pytest.raises(AccessError, match="no RAM left"):
            iommu.map(IOVA(0), GPA(0x800000), 32 << 20)


# -- what cannot be, in good words ---------------------------------------------------------------------------------


def test_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotPossibleError, match=r"qemu-system-x86_64 is not installed .*qemu-system-x86"):
        QemuMachine(BLK)


def test_a_device_that_can_still_be_legacy() -> None:
    with pytest.raises(RefusedError, match="iommu_platform=on,addr=3") as caught:
        QemuMachine("virtio-blk-pci,iommu_platform=on,addr=3")
    words = "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device"
    assert words in caught.value.stderr


@pytest.mark.parametrize(
    ("device", "iommu", "message"),
    [
        ("virtio-blk-pcj", "intel", "'virtio-blk-pcj'.*did you mean 'virtio-blk-pci'"),
        ("virtio-rgn-pci", "intel", "'virtio-rgn-pci'.*did you mean 'virtio-rng-pci'"),
        ("virtio-blk-pci,iomu_platform=on", "intel", "'iomu_platform'.*did you mean 'iommu_platform'"),
        ("virtio-net-pci,disable_legacy=on", "intel", "'disable_legacy'.*did you mean 'disable-legacy'"),
        ("virtio-blk-pci,iommu_platform=maybe", "intel", "'iommu_platform' expects 'on' or 'off'"),
        # QEMU quotes the whole option back, so that the bit's name in its words need not be the reason.
        ("virtio-blk-pci,iommu_platform=on,bus=nowhere", "intel", "'nowhere' not found"),
        ("virtio-blk-pci,iommu_platform=on,num-queues=many", "intel", "num-queues"),
        ("virtio-blk-pci,=on", "intel", "empty option"),
        ("", "intel", "neither a device nor an IOMMU"),
        ("virtio-blk-pci\n-nographic", "intel", "neither a device nor an IOMMU"),
        ("x" * 5000, "intel", "neither a device nor an IOMMU"),
        (BLK, "intell", "'intell'.*did you mean 'intel'"),
        (BLK, "none,aw-bits=48", "'none' has no options"),
        (BLK, "intel,aw_bits=48", "option of intel-iommu 'aw_bits'.*did you mean 'aw-bits'"),
        (BLK, "virtio,boot-bypas=off", "option of virtio-iommu-pci 'boot-bypas'.*did you mean 'boot-bypass'"),
    ],
)
def test_names_that_do_not_exist(device: str, iommu: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QemuMachine(device, iommu)


# -- trouble in the middle ----------------------------------------------------------------------------------------


def test_qemu_is_killed_in_the_middle(blk: QemuMachine) -> None:
    driver = cast(BlkDriver, open_device(blk))
    assert driver.read(1, 1) == sector_text(1)
    os.kill(blk.pid, signal.SIGKILL)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(MachineError, match="QEMU"):
            driver.read(2, 1)
    with pytest.raises(MachineError, match="-9"):
        blk.wait(lambda: False, 5)
    with pytest.raises(MachineError):
        blk.iommu.faults()
    assert time.monotonic() - started < 5
    assert isinstance(blk.words(), list)
    blk.close()
    blk.close()


def test_qemu_stops_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "ANSWER_SECONDS", 1.0)
    with QemuMachine(BLK) as machine:
        driver = cast(BlkDriver, open_device(machine))
        os.kill(machine.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(MachineError, match=r"did not answer.*still running"):
            driver.read(2, 1)
        assert time.monotonic() - started < 4
        pid = machine.pid
        started = time.monotonic()
        machine.close()
        assert time.monotonic() - started < 2
        assert gone(pid)


QMP_CHILD = """
import os, signal, sys, time
from virtiova.errors import MachineError
from virtiova.machine.qemu import bus
from virtiova.machine.qemu.machine import QemuMachine
bus.ANSWER_SECONDS = 1.0
def descriptors():
    return len(os.listdir("/proc/self/fd"))
QemuMachine("virtio-rng-pci").close()
before = descriptors()
machine = QemuMachine("virtio-rng-pci")
assert machine.qmp("query-status")["running"]
os.kill(machine.pid, getattr(signal, sys.argv[1]))
time.sleep(0.1)
try:
    machine.qmp("query-status")
except MachineError:
    print("MachineError")
except Exception as error:
    print("not ours:", repr(error))
machine.close()
machine.close()
print("left:", descriptors() - before)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_qmp_of_a_machine_that_is_gone_or_stopped(how: str) -> None:
    """In a process of its own: the answer comes in bounded time, as an error of ours, and `close` closes."""
    done = subprocess.run(
        [sys.executable, "-c", QMP_CHILD, how],
        capture_output=True,
        env=child_environment(),
        text=True,
        timeout=12,
        check=False,
    )
    assert done.stdout.splitlines() == ["MachineError", "left: 0"], done.stderr


def test_a_request_that_never_completes(monkeypatch: pytest.MonkeyPatch, blk: QemuMachine) -> None:
    monkeypatch.setattr("virtiova.driver.base.REQUEST_SECONDS", 0.2)
    driver = cast(BlkDriver, open_device(blk))
    (queue,) = driver.queues()
    blk.iommu.unmap(IOVA(queue.region.addr), PAGE_SIZE)
    blk.iommu.invalidate()
    with pytest.raises(MachineError, match="did not complete"):
        driver.read(1, 1)


# -- nothing left behind ------------------------------------------------------------------------------------------


def children() -> dict[int, str]:
    """Processes that this one has started and not waited for: pid and state."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = stat.read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid():
                found[int(stat.parent.name)] = state
    return found


def gone(pid: int) -> bool:
    """Ended: no process of that id, or one that nobody has waited for yet."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return True
    return rest.split()[0] in "ZX"


def descriptors() -> dict[str, str]:
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[fd.name] = os.readlink(fd)
    return found


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:virtiova")


def shm_entries() -> set[str]:
    """Names in shared memory that could be ours or QEMU's; others come and go on any machine."""
    shm = Path("/dev/shm")
    names = {path.name for path in shm.iterdir()} if shm.is_dir() else set()
    return {name for name in names if "qemu" in name.lower() or "virtiova" in name.lower()}


def good(machine: QemuMachine) -> None:
    open_device(machine)


def killed(machine: QemuMachine) -> None:
    os.kill(machine.pid, signal.SIGKILL)
    machine.bus.ping()


def asked(machine: QemuMachine) -> None:
    machine.qmp("query-status")


def raises(machine: QemuMachine) -> None:
    raise KeyboardInterrupt


LIVES: list[tuple[str, Callable[[QemuMachine], None], type[BaseException] | None]] = [
    (BLK, good, None),
    ("virtio-net-pci", good, None),
    ("virtio-rng-pci,iommu_platform=on", good, None),
    ("virtio-blk-pci,iommu_platform=on,addr=3", good, RefusedError),
    ("virtio-blk-pci,no-such=1", good, UsageError),
    ("edu", good, UsageError),
    (BLK, killed, MachineError),
    (BLK, raises, KeyboardInterrupt),
]


def live(device: str, use: Callable[[QemuMachine], None], error: type[BaseException] | None) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext(), QemuMachine(device) as machine:
        use(machine)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for temporary files that nobody else uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == str(tmp_path)
    return tmp_path


def test_twenty_machines_leave_nothing_behind(temporary: Path) -> None:
    live(*LIVES[0])
    before = children(), descriptors(), mappings(), shm_entries()
    for number in range(20):
        live(*LIVES[number % len(LIVES)])
    assert (children(), descriptors(), mappings(), shm_entries()) == before
    assert list(temporary.iterdir()) == []


def test_a_machine_that_was_asked_over_qmp_leaves_nothing_behind() -> None:
    live(BLK, asked, None)
    before = children(), descriptors(), mappings()
    live(BLK, asked, None)
    assert (children(), descriptors(), mappings()) == before


def test_a_running_machine_has_no_file_with_a_name(blk: QemuMachine) -> None:
    """What has no name cannot stay: memory, image, BIOS and sockets are all anonymous."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{blk.pid}/fd").iterdir()]
    named = [link for link in links if link.startswith("/") and not link.endswith(" (deleted)")]
    assert set(named) <= {"/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"}
    sockets = {link.partition(":")[2].strip("[]") for link in links if link.startswith("socket:")}
    assert sockets
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        assert len(fields) == 7 or fields[6] not in sockets, "a socket with a path"


CHILD = """
import os, sys, time
from virtiova.driver.open import open_device
from virtiova.machine.qemu.machine import QemuMachine
machine = QemuMachine("virtio-blk-pci,iommu_platform=on")
open_device(machine)
print(machine.pid, flush=True)
how = sys.argv[1]
if how == "exit":
    sys.exit(0)
if how == "error":
    raise RuntimeError("in the middle")
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt", "exit", "error"])
def test_no_qemu_outlives_its_process(how: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        text=True,
    )
    with child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        if how in ("kill", "interrupt"):
            assert not gone(pid)
            child.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
        deadline = time.monotonic() + 2
        child.wait(10)
        while not gone(pid):
            assert time.monotonic() < deadline, "QEMU is still there"
            time.sleep(0.01)
