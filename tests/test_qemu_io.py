# SPDX-License-Identifier: Apache-2.0
"""Real QEMU: every kind of device does I/O with and without an IOMMU, and QMP agrees with what we negotiated."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import pytest

from qemu_kit import BLK
from virtiova.addr import IOVA, PAGE_SIZE
from virtiova.driver.base import Driver
from virtiova.driver.blk import BlkDriver
from virtiova.driver.edu import SECONDS as EDU_SECONDS
from virtiova.driver.negotiate import begin, finish
from virtiova.driver.net import NetDriver
from virtiova.driver.open import open_device
from virtiova.driver.rng import RngDriver
from virtiova.errors import (
    NegotiationError,
    UsageError,
    VirtiovaError,
)
from virtiova.features import Feature, names
from virtiova.machine.image import SECTOR, sector_text
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.ports import Machine

pytestmark = pytest.mark.qemu


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
        assert all((queue.ring.parts[0] >= 1 << 32) is translated for queue in driver.queues())
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
