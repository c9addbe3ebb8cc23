# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space as a scan reads it, against lspci; functions off the virtio bus; what is offered."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysfs_kit import BIT_33, VERSION_1, Box, config_space
from virtiova.collect import keys as k
from virtiova.errors import ProtocolError
from virtiova.result import Path as Way
from virtiova.wire import pci

ROOT = "/sys/devices/pci0000:00"


def lspci(config: bytes, folder: Path) -> str:
    """What lspci makes of it, from a dump as it prints itself."""
    rows = [f"{at:02x}: " + config[at : at + 16].hex(" ") for at in range(0, len(config), 16)]
    dump = folder / "dump"
    dump.write_text("00:02.0 Device\n" + "\n".join(rows) + "\n")
    command = ["lspci", "-F", str(dump), "-vvv", "-n"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.parametrize("ats", [None, False, True])
def test_ats_is_what_lspci_says(ats: bool | None, tmp_path: Path) -> None:
    config = config_space(ats=ats)
    said = lspci(config, tmp_path)
    assert ("Address Translation Service (ATS)" in said) == (ats is not None), said
    box = Box(tmp_path / "box")
    box.virtio(box.function(f"{ROOT}/0000:00:02.0", config=config))
    _, device = box.one()
    assert device.facts.get(k.ATS) == (ats is not None)
    assert device.facts.get(k.ATS_ENABLED) == ("ATSCtl:\tEnable+" in said if ats is not None else None)


def test_who_sees_64_bytes_knows_nothing_of_ats(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0", config=config_space(ats=True)[:64]))
    view, device = box.one()
    assert device.facts.get(k.ATS) is None
    assert (device.facts.get(k.PCI_ID), device.facts.get(k.PCI_REVISION)) == ("1af4:1042", 1)
    assert view.problems == []


@pytest.mark.parametrize(("ident", "legacy"), [(0x1001, True), (0x103F, True), (0x1042, False)])
def test_transitional_ids_can_be_legacy(ident: int, legacy: bool, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0", ident))
    _, device = box.one()
    assert device.facts.get(k.CAN_BE_LEGACY) == legacy
    assert device.facts.get(k.PCI_REVISION) == (0 if legacy else 1)


def test_a_list_that_loops_is_a_problem(tmp_path: Path) -> None:
    config = bytearray(config_space(ats=True))
    struct.pack_into("<I", config, 0x150, 0x000F | 1 << 16 | 0x100 << 20)
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0", config=bytes(config)))
    view, device = box.one()
    assert device.facts.get(k.ATS) is None
    assert view.problems == ["/sys/bus/pci/devices/0000:00:02.0/config: PCI extended capability list loops at 0x100"]


def test_a_function_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0", config=b"\xff" * 256))
    view, _ = box.one()
    assert view.problems == ["/sys/bus/pci/devices/0000:00:02.0/config: all ones: the function does not answer"]


@given(st.binary(min_size=0, max_size=4096))
def test_extended_capabilities_of_any_bytes_end(tail: bytes) -> None:
    config = (bytes(0x100) + tail)[:4096]
    try:
        found = list(pci.extended_capabilities(lambda offset, length: config[offset : offset + length]))
    except ProtocolError:
        return
    assert len({at for _, at in found}) == len(found)
    assert all(0x100 <= at <= len(config) - 4 for _, at in found)


# -- functions that are not on the virtio bus --------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["vfio-pci", "uio_pci_generic", "igb_uio", "virtio_vfio_pci"])
def test_a_function_given_to_user_space_is_a_device(driver: str, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.function(f"{ROOT}/0000:00:02.0", driver=driver)
    _, device = box.one()
    assert (device.name, device.facts.get(k.TYPE)) == ("0000:00:02.0", "blk")
    assert (device.facts.get(k.VFIO), device.facts.get(k.DRIVER)) == (True, driver)
    assert device.facts.get(k.PLACE) == "pci:00:02.0"
    row = box.row()
    assert (row.offered, row.accepted, row.address) == (None, None, "0000:00:02.0")


def test_a_function_without_a_driver_is_a_device(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.function(f"{ROOT}/0000:00:02.0", 0x1000, driver="")
    _, device = box.one()
    # Transitional: the type is the subsystem's.
    assert (device.facts.get(k.TYPE), device.facts.get(k.VFIO), device.facts.get(k.DRIVER)) == ("blk", False, "")


def test_what_only_shares_the_vendor_is_none(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.function(f"{ROOT}/0000:00:02.0", 0x1110)
    assert box.view().devices == []


def test_a_device_of_the_bus_is_not_there_twice(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0"))
    box.function(f"{ROOT}/0000:00:03.0", driver="vfio-pci")
    assert [device.name for device in box.view().devices] == ["virtio0", "0000:00:03.0"]


def test_vfio_without_an_iommu_is_nothing_in_front(tmp_path: Path) -> None:
    box = Box(tmp_path)
    function = box.function(f"{ROOT}/0000:00:02.0", driver="vfio-pci")
    box.group(0, "unknown", [function])
    box.file("/sys/kernel/iommu_groups/0/name", "vfio-noiommu\n")
    box.file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    view, device = box.one()
    assert (view.machine.get(k.NOIOMMU), device.facts.get(k.BEHIND_IOMMU)) == (True, False)
    assert k.GROUP not in device.facts
    assert Way.DIRECT in box.row().predicted
    assert not {Way.BYPASS, Way.TRANSLATED} & set(box.row().predicted)


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "place", "bridged"),
    [
        (f"{ROOT}/0000:00:1f.7", "pci:00:1f.7", False),
        (f"{ROOT}/0000:00:02.0/0000:01:00.0", "pci:00:02.0/00.0", True),
        (f"{ROOT}/0000:00:02.0/0000:01:00.0/0000:02:03.0/0000:04:01.2", "pci:00:02.0/00.0/03.0/01.2", True),
        ("/sys/devices/pci0000:40/0000:40:01.0", "pci:40:01.0", False),
        ("/sys/devices/platform/4010000000.pcie/pci0000:00/0000:00:01.0", "pci:00:01.0", False),
        ("/sys/devices/pci0001:00/0001:00:00.0/0001:01:00.0", "pci:0001:00:00.0/00.0", True),
        ("/sys/devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0", "pci:00:0e.0/06.0/00.0", True),
    ],
)
def test_places_are_bridges_without_bus_numbers(path: str, place: str, bridged: bool, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(path))
    _, device = box.one()
    assert (device.facts.get(k.PLACE), device.facts.get(k.BRIDGED)) == (place, bridged)
    assert device.facts.get(k.ADDRESS) == path.rpartition("/")[2]


# -- what is offered ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "offered", "problem"),
    [
        ("5\n32\n33\n", True, ""),
        ("5\n32\n", False, ""),
        ("", False, ""),
        ("5\n32\n33\n100\n", True, ""),
        ("0x20\n", None, "'0x20' is no list of feature bits"),
        ("99999999999999999999\n", None, "'99999999999999999999' is no list of feature bits"),
    ],
)
def test_debugfs_says_what_is_offered(said: str, offered: bool | None, problem: str, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0"))
    box.file("/sys/kernel/debug/virtio/virtio0/device_features", said)
    view, device = box.one()
    assert device.facts.get(k.OFFERED) == offered
    path = "/sys/kernel/debug/virtio/virtio0/device_features"
    assert view.problems == ([f"{path}: {problem}"] if problem else [])


def test_what_was_taken_was_offered(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0"), word=VERSION_1 | BIT_33)
    _, device = box.one()
    assert (device.facts.get(k.ACCEPTED), device.facts.get(k.OFFERED)) == (True, True)


def test_offered_and_not_taken_is_seen_with_debugfs(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0"))
    box.file("/sys/kernel/debug/virtio/virtio0/device_features", "32\n33\n")
    row = box.row()
    assert (row.offered, row.accepted) == (True, False)


@pytest.mark.parametrize(
    ("status", "word", "offered", "accepted"),
    [
        ("0x00000007", 0, False, False),  # The legacy interface, where there is no such bit.
        ("0x0000000f", 0, None, False),
        ("0x0000000f", VERSION_1, None, False),
        ("0x0000000b", VERSION_1 | BIT_33, True, True),
        ("0x00000083", VERSION_1 | BIT_33, None, None),  # Refused: what the driver chose did not stand.
        ("0x00000001", VERSION_1 | BIT_33, None, None),  # Left over from a driver that is gone.
        ("0x00000000", VERSION_1 | BIT_33, None, None),
    ],
)
def test_what_the_status_says_of_the_features(
    status: str, word: int, offered: bool | None, accepted: bool | None, tmp_path: Path
) -> None:
    box = Box(tmp_path)
    box.virtio(box.function(f"{ROOT}/0000:00:02.0"), word=word, status=f"{status}\n")
    _, device = box.one()
    assert (device.facts.get(k.OFFERED), device.facts.get(k.ACCEPTED)) == (offered, accepted)
    assert device.facts.get(k.STARTED) == bool(int(status, 16) & 4)
