# SPDX-License-Identifier: Apache-2.0
"""Files of a system that mean nothing, are huge, loop, or may not be read: a sentence each, never a traceback."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysfs_kit import VERSION_1, Box, acpi_table, dmar, features
from virtiova.collect import keys as k
from virtiova.collect import linux
from virtiova.collect.linux.read import folded
from virtiova.collect.tree import LiveTree
from virtiova.errors import ProtocolError
from virtiova.wire import acpi

FUNCTION = "/sys/devices/pci0000:00/0000:00:02.0"
DEVICE = "/sys/bus/virtio/devices/virtio0"
TABLES = "/sys/firmware/acpi/tables"


def disk(root: Path) -> Box:
    box = Box(root)
    box.virtio(box.function(FUNCTION))
    return box


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("status", "xyz\n", "'xyz' is no number"),
        ("status", "0x1ff\n", "0x1ff is no device status"),
        ("status", "\x1b[2J\x00\x07", r"'\x1b[2J\x00\x07' is no number"),
        ("status", "0x" + "f" * 40, "is no number"),
        ("device", "balloon", "'balloon' is no number"),
        ("features", "101\n", "'101' are no features: 3 characters, wanted 64 or 128 of 0 and 1"),
        ("features", "2" * 64, "are no features: 64 characters"),
        ("features", "\xff\xfe\x00" * 30, "are no features"),
        ("features", "01" * (1 << 19), "are no features: 4096 characters"),
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_a_value_that_means_nothing_is_a_problem(name: str, content: str, words: str, tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.at(f"{FUNCTION}/virtio0/{name}").write_bytes(content.encode("latin-1"))
    view, device = box.one()
    assert len(view.problems) == 1, view.problems
    assert view.problems[0].startswith(f"{DEVICE}/{name}: ")
    assert words in view.problems[0]
    assert len(view.problems[0]) < 200
    assert view.problems[0].isprintable()
    key = {"status": k.STATUS, "device": k.TYPE, "features": k.FEATURES}[name]
    assert key not in device.facts
    # Without one of them it is not known what was accepted, and the rest is.
    assert (k.ACCEPTED in device.facts) == (name == "device")
    assert device.facts.get(k.ADDRESS) == "0000:00:02.0"
    assert box.row().accepted in (None, False)


def test_an_empty_file_is_no_fact(tmp_path: Path) -> None:
    box = disk(tmp_path)
    for name in ("status", "device"):
        box.at(f"{FUNCTION}/virtio0/{name}").write_bytes(b"\0\n")
    view, device = box.one()
    assert view.problems == []
    assert k.STATUS not in device.facts
    assert box.row().type == "unknown"


def test_more_feature_bits_than_today(tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.file(f"{FUNCTION}/virtio0/features", features(VERSION_1 | 1 << 127, 128))
    _, device = box.one()
    assert device.facts.get(k.FEATURES) == VERSION_1 | 1 << 127


def test_an_unknown_type_is_kept(tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.file(f"{FUNCTION}/virtio0/device", "0x004d\n")
    assert box.row().type == "type 77"


def test_links_that_loop_or_lead_nowhere(tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.at("/sys/bus/virtio/devices/virtio1").symlink_to("virtio1")
    box.at("/sys/bus/virtio/devices/virtio2").symlink_to("../../../gone")
    box.at(f"{FUNCTION}/iommu_group").symlink_to("iommu_group")
    box.at("/sys/bus/pci/devices/0000:00:03.0").symlink_to("0000:00:03.0")
    view = box.view()
    assert [device.name for device in view.devices] == ["virtio0", "virtio1", "virtio2"]
    assert view.devices[0].facts.get(k.GROUP) == "iommu_group"
    assert view.devices[1].facts.get(k.ADDRESS) is None
    assert len(box.scan().devices) == 3


def test_files_that_block_or_are_folders(tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.at(f"{FUNCTION}/virtio0/status").unlink()
    os.mkfifo(box.at(f"{FUNCTION}/virtio0/status"))
    box.at(f"{FUNCTION}/virtio0/features").unlink()
    box.at(f"{FUNCTION}/virtio0/features").mkdir()
    _, device = box.one()
    assert k.STATUS not in device.facts
    assert k.FEATURES not in device.facts


def test_what_may_not_be_read_is_said_once(tmp_path: Path) -> None:
    class Denied(LiveTree):
        def read(self, path: str, limit: int = 0) -> bytes | None:
            if path.endswith(("product_uuid", "/DMAR", "/features", "/status", "/FACP", "/IVRS")):
                self.problems.append(f"{path}: Permission denied")
                return None
            return super().read(path, limit)

    box = disk(tmp_path)
    box.file(f"{TABLES}/DMAR", dmar())
    view = linux.collect(Denied(str(tmp_path), "box"))
    assert len(view.problems) == 1, view.problems
    assert view.problems[0].endswith(": Permission denied")
    assert view.devices[0].facts.get(k.ACCEPTED) is None
    # It is known to be there all the same.
    assert (view.machine.get(k.IOMMU), view.machine.get(k.IOMMU_UNITS)) == ("intel", None)


def test_one_denied_file_is_left_as_it_is() -> None:
    assert folded(["/a: Permission denied", "/b: 'x' is no number"]) == [
        "/a: Permission denied",
        "/b: 'x' is no number",
    ]
    many = [f"/{number}: Permission denied" for number in range(6)]
    assert folded([*many, "/b: x"]) == ["/0, /1, /2, /3 and 2 more: Permission denied", "/b: x"]


def test_nothing_at_all(tmp_path: Path) -> None:
    view = linux.collect(LiveTree(str(tmp_path / "gone"), "gone"))
    assert (view.empty, view.devices, view.problems) == (True, [], [])


def test_many_devices_are_bounded(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for number in range(4200):
        box.at(f"/sys/bus/virtio/devices/virtio{number}").mkdir()
    view = box.view()
    assert len(view.devices) == 4096
    assert view.problems == ["/sys/bus/virtio/devices: more than 4096 entries; the rest was not looked at"]


def test_many_problems_are_bounded(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for number in range(300):
        box.file(f"/sys/bus/virtio/devices/virtio{number}/status", "x")
    assert len(box.view().problems) == 100


# -- tables of the firmware --------------------------------------------------------------------------------------------

IVRS = acpi_table(
    "IVRS", bytes(12) + b"".join(bytes([kind, 0, 24, 0, 2, 0]) + bytes(18) for kind in (0x10, 0x11, 0x40))
)
VIOT = acpi_table(
    "VIOT", b"\x02\x00\x30\x00" + bytes(8) + b"\x01\x00\x18\x00" + bytes(20) + b"\x03\x00\x10\x00" + bytes(12)
)
IORT = acpi_table(
    "IORT", b"\x02\0\0\0" + b"\x30\0\0\0" + bytes(4) + b"\x00\x14\x00" + bytes(17) + b"\x04\x44\x00" + bytes(65)
)
IORT_ITS_ONLY = acpi_table("IORT", b"\x01\0\0\0" + b"\x30\0\0\0" + bytes(4) + b"\x00\x14\x00" + bytes(17))


@pytest.mark.parametrize(
    ("name", "table", "units"),
    [
        ("DMAR", dmar(1), 1),
        ("DMAR", dmar(3), 3),
        ("IVRS", IVRS, 1),
        ("VIOT", VIOT, 1),
        ("IORT", IORT, 1),
        ("IORT", IORT_ITS_ONLY, 0),
    ],
)
def test_units_are_counted(name: str, table: bytes, units: int, tmp_path: Path) -> None:
    assert acpi.units(name, table) == units
    box = Box(tmp_path)
    box.file(f"{TABLES}/{name}", table)
    view = box.view()
    assert view.machine.get(k.IOMMU_UNITS) == units
    kinds = {"DMAR": "intel", "IVRS": "amd", "VIOT": "virtio", "IORT": "smmuv3"}
    assert view.machine.get(k.IOMMU) == (kinds[name] if units else "none")


@pytest.mark.parametrize("table", [dmar(2), IVRS, VIOT, IORT])
def test_a_table_that_is_cut_or_wrong_is_a_problem(table: bytes) -> None:
    name = table[:4].decode()
    for length in range(len(table)):
        with pytest.raises(ProtocolError):
            acpi.units(name, table[:length])
    chance = random.Random(33)
    for _ in range(2000):
        broken = bytearray(table)
        broken[chance.randrange(len(table))] = chance.randrange(256)
        try:
            found = acpi.units(name, bytes(broken))
        except ProtocolError:
            continue
        assert found is not None
        assert 0 <= found <= 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["DMAR", "IVRS", "IORT", "VIOT", "RIMT"]), st.binary(max_size=200))
def test_any_bytes_as_a_table(name: str, body: bytes) -> None:
    try:
        found = acpi.units(name, acpi_table(name, body))
    except ProtocolError:
        return
    assert found is None or 0 <= found <= len(body)


def test_a_bad_table_is_said_by_its_name(tmp_path: Path) -> None:
    box = disk(tmp_path)
    box.file(f"{TABLES}/DMAR", dmar()[:50])
    view = box.view()
    assert view.problems == [f"{TABLES}/DMAR: DMAR is said to have 72 bytes, of which 50 are there"]
