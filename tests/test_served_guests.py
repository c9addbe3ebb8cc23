# SPDX-License-Identifier: Apache-2.0
"""Real guests with disk, entropy and network served by us: right data, right addresses, and whatever ends them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from served_guest import (
    CLOUD,
    NEWER,
    NONE,
    VIRTIO_IOMMU,
    VTD,
    Assets,
    Guest,
    Server,
    assets,
    image,
    served,
    serving,
    value,
    values,
    wait_for,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

SECTORS = 8192
BLOCK = 65536
Servers = tuple[Server, Server, Server]


@pytest.fixture(scope="session")
def cloud() -> Assets:
    return assets(CLOUD)


@pytest.fixture(scope="session")
def newer() -> Assets:
    return assets(NEWER)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(image(SECTORS))
    return path


@pytest.fixture
def servers(tmp_path: Path, disk: Path) -> Iterator[Servers]:
    with serving(tmp_path, disk) as three:
        yield three


def devices(servers: Servers, *, bit: bool, extra: str = "") -> list[str]:
    blk, rng, net = servers
    return [
        *served("blk", blk.path, 0, bit=bit, extra=extra),
        *served("rng", rng.path, 1, bit=bit, extra=extra),
        *served("net", net.path, 2, bit=bit, extra=extra),
    ]


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def counters(log: str) -> dict[str, int]:
    """The last counters that a server told, as JSON."""
    line = [line for line in log.splitlines() if '"virtiova/serve/1"' in line][-1]
    told = json.loads(line[line.index("{") :])
    return {key: number for key, number in told.items() if isinstance(number, int)}


def exercise(guest: Guest, disk: Path, *, bit: bool) -> None:
    """All three devices do their work, with the bit as it was asked for."""
    kinds = {line.split()[0]: line.split()[1] for line in values(guest.do("devices"), "device")}
    kinds.pop("0x0017", "")  # the IOMMU itself
    assert kinds == dict.fromkeys(["0x0001", "0x0002", "0x0004"], str(int(bit)))
    assert value(guest.do("md5"), "md5") == md5(disk.read_bytes())
    written = value(guest.do("put 4 4 written-by-the-guest"), "put")
    assert value(guest.do("md5 4 4"), "md5") == written
    there = disk.read_bytes()
    assert md5(there[4 * BLOCK : 8 * BLOCK]) == written
    assert there[: 4 * BLOCK] + there[8 * BLOCK :] == image(SECTORS)[: 4 * BLOCK] + image(SECTORS)[8 * BLOCK :]
    said = guest.do("rng")
    assert value(said, "rng").startswith("virtio_rng")
    assert len(set(values(said, "random"))) == 2
    guest.do("net")
    assert guest.do("echoes 5 56") == ["echoes 5"]
    assert guest.do("echoes 3 1400") == ["echoes 3"]


def check_addresses(servers: Servers, *, bit: bool) -> None:
    """With the bit, addresses were IOVAs, asked for and taken back; without it there was nothing to ask."""
    for server in servers:
        log = server.stop()
        told = counters(log)
        assert told["requests"] > 0
        assert (told["faults"], told["broken"], told["refusals"]) == (0, 0, 0), log
        assert ("IOVAs, through the IOTLB" in log) is bit
        assert ("guest-physical, around any IOMMU" in log) is not bit
        asked = [told["misses"], told["updates"], told["invalidates"]]
        assert all(asked) if bit else not any(asked), log


def test_a_guest_behind_vtd(cloud: Assets, servers: Servers, disk: Path) -> None:
    """The bit set, and the guest's IOMMU strict: nearly every buffer is a miss, an update and an invalidation."""
    with Guest(cloud, devices(servers, bit=True)) as guest:
        guest.booted()
        exercise(guest, disk, bit=True)
        guest.tell("poweroff -f")
        assert guest.ended()
    with_bit = counters(servers[0].stop())
    assert with_bit["misses"] > 64 * 16, "4 MiB in pages of 4 KiB"
    assert with_bit["invalidates"] > 64 * 16
    check_addresses(servers, bit=True)


@pytest.mark.sweep
@pytest.mark.parametrize("bit", [True, False])
def test_a_guest_with_packed_rings(cloud: Assets, servers: Servers, disk: Path, bit: bool) -> None:
    with Guest(cloud, devices(servers, bit=bit, extra=",packed=on")) as guest:
        guest.booted()
        exercise(guest, disk, bit=bit)
        guest.tell("poweroff -f")
        assert guest.ended()
    for server in servers:
        assert "RING_PACKED" in server.stop()
    check_addresses(servers, bit=bit)


@pytest.mark.sweep
@pytest.mark.parametrize("bit", [True, False])
def test_a_guest_behind_virtio_iommu(newer: Assets, servers: Servers, disk: Path, bit: bool) -> None:
    with Guest(newer, devices(servers, bit=bit), iommu=VIRTIO_IOMMU) as guest:
        guest.booted()
        exercise(guest, disk, bit=bit)
        groups = {line.split()[0]: line.split()[2] for line in values(guest.do("devices"), "device")}
        assert groups["0x0002"].startswith("DMA"), "the group is there whatever the bit says"
        guest.tell("poweroff -f")
        assert guest.ended()
    check_addresses(servers, bit=bit)


@pytest.mark.sweep
@pytest.mark.parametrize("iommu", ["vtd", "none"])
def test_a_guest_without_the_bit(cloud: Assets, servers: Servers, disk: Path, iommu: str) -> None:
    with Guest(cloud, devices(servers, bit=False), iommu=VTD if iommu == "vtd" else NONE) as guest:
        guest.booted()
        exercise(guest, disk, bit=False)
    check_addresses(servers, bit=False)


# -- firmware

TEXT = b"booted from the served disk"


def boot_sector() -> bytes:
    """16-bit code that writes TEXT to the first serial port, and halts."""
    code = bytes.fromhex("31c0 8ed8 baf803 be157c ac 84c0 7403 ee ebf8 f4 ebfd")
    return (code + b"\r\n" + TEXT + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


@pytest.mark.parametrize("bit", [True, False])
def test_firmware_boots_from_the_disk(tmp_path: Path, disk: Path, bit: bool) -> None:
    """SeaBIOS is a driver, too: it takes bit 33, and its addresses are IOVAs that an idle VT-d leaves as they are."""
    disk.write_bytes(boot_sector() + image(SECTORS)[512:])
    with Server(tmp_path, "blk", "blk", str(disk), "--read-only") as blk:
        with Guest(None, served("blk", blk.path, 0, bit=bit, extra=",bootindex=0")) as guest:
            end = time.monotonic() + 60
            while TEXT.decode() not in guest.line(end, "boot"):
                pass
        log = blk.stop()
    assert ("IOVAs" in log) is bit
    assert (counters(log)["misses"] > 0) is bit
    assert counters(log)["faults"] == 0


@pytest.mark.sweep
def test_firmware_before_the_kernel_leaves_nothing_behind(cloud: Assets, servers: Servers, disk: Path) -> None:
    """SeaBIOS reads the disk with guest-physical IOVAs; the kernel's are others. What the firmware's were mapped to
    must be forgotten at the kernel's start, or the first guest-physical address that is an IOVA as well hits it."""
    with Guest(cloud, served("blk", servers[0].path, 0, bit=True)) as guest:
        guest.booted()
        assert value(guest.do("md5"), "md5") == md5(disk.read_bytes())
        log = servers[0].log()
    taken = {line for line in log.splitlines() if line.startswith("virtiova: features 0x")}
    assert len(taken) == 2, "of the firmware, and of the kernel"
    assert log.count("IOVAs, through the IOTLB") == 2, "each got a space of its own"


# -- ends and new beginnings


@pytest.mark.sweep
@pytest.mark.parametrize("bit", [True, False])
def test_the_guest_reboots(cloud: Assets, servers: Servers, disk: Path, bit: bool) -> None:
    with Guest(cloud, devices(servers, bit=bit)) as guest:
        guest.booted()
        exercise(guest, disk, bit=bit)
        disk.write_bytes(image(SECTORS))
        guest.tell("reboot -f")
        guest.booted()
        exercise(guest, disk, bit=bit)
    check_addresses(servers, bit=bit)


def _alone(server: Server) -> bool:
    return "the front end has gone" in server.log()


@pytest.mark.sweep
@pytest.mark.parametrize("bit", [True, False])
def test_qemu_is_killed_under_load_and_comes_again(cloud: Assets, servers: Servers, disk: Path, bit: bool) -> None:
    with Guest(cloud, devices(servers, bit=bit)) as guest:
        guest.booted()
        guest.do("net")
        guest.do("while true; do dd if=/dev/vda of=/dev/null bs=65536 iflag=direct; done >/dev/null 2>&1 &")
        guest.do("ping -i 0.01 10.0.2.2 >/dev/null & dd if=/dev/hwrng of=/dev/null 2>/dev/null &")
        guest.do("sleep 1")
        guest.kill()
    for server in servers:
        wait_for(partial(_alone, server), "the end of the connection")
    with Guest(cloud, devices(servers, bit=bit)) as guest:
        guest.booted()
        exercise(guest, disk, bit=bit)
    assert all(counters(server.stop())["connections"] == 2 for server in servers)


@pytest.mark.sweep
def test_the_driver_is_taken_away_in_the_middle(cloud: Assets, servers: Servers, disk: Path) -> None:
    """Unbinding resets the device while requests are under way; binding negotiates anew."""
    with Guest(cloud, devices(servers, bit=True)) as guest:
        guest.booted()
        guest.do("d=$(basename $(realpath /sys/block/vda/device)); b=/sys/bus/virtio/drivers/virtio_blk")
        for _ in range(3):
            guest.do("dd if=/dev/vda of=/dev/null bs=65536 iflag=direct 2>/dev/null & usleep 100000")
            guest.do("echo $d >$b/unbind; wait; echo $d >$b/bind; await /dev/vda")
            assert value(guest.do("md5"), "md5") == md5(disk.read_bytes())
        exercise(guest, disk, bit=True)
    check_addresses(servers, bit=True)


@pytest.mark.sweep
def test_the_disk_is_unplugged_and_plugged_in_again(cloud: Assets, servers: Servers, disk: Path) -> None:
    with Guest(cloud, devices(servers, bit=True)) as guest:
        guest.booted()
        guest.do("dd if=/dev/vda of=/dev/null bs=65536 iflag=direct 2>/dev/null & usleep 100000")
        for _ in range(2):
            guest.qmp("device_del", {"id": "blk0"}, event="DEVICE_DELETED")
            guest.do("wait; ! test -e /dev/vda")
            place = {"driver": "vhost-user-blk-pci", "id": "blk0", "bus": "rp0", "chardev": "c0"}
            guest.qmp("device_add", place | {"iommu_platform": True, "ats": True})
            assert value(guest.do("await /dev/vda && md5"), "md5") == md5(disk.read_bytes())
        exercise(guest, disk, bit=True)
    check_addresses(servers, bit=True)
