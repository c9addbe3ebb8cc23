# SPDX-License-Identifier: Apache-2.0
"""virtio-iommu of a real QEMU: its requests, its bypass, its faults."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from virtiova.addr import PAGE_SIZE, Access
from virtiova.dma.ops import DirectOps
from virtiova.driver.iommu import EVENTS, TAKEN, IommuDriver
from virtiova.errors import MachineError
from virtiova.iommu.virtio import VirtioIommu
from virtiova.machine.image import SECTOR
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Fault
from virtiova.wire import virtio_iommu as wire
from virtiova.wire.virtio_iommu import Reason, Status
from x86_iommu_kit import BLK, SILENT, Direct, Rig, rig, virtio

pytestmark = pytest.mark.qemu


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
