# SPDX-License-Identifier: Apache-2.0
"""vDPA devices in a scan: VDUSE's, hardware's, given to user space or not, and who serves them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sysfs_kit import BIT_33, VERSION_1, Box
from virtiova.collect import backends, linux
from virtiova.collect import keys as k
from virtiova.collect.facts import View
from virtiova.collect.tree import LiveTree
from virtiova.policy import Front
from virtiova.result import Path as Way
from virtiova.result.scan import Place, ScannedDevice
from virtiova.scan import scan_views
from virtiova.scan.front import in_front

ON = BIT_33 | VERSION_1
MADE = "/sys/devices/virtual/vduse/disk/disk"
QSD = ("qemu-storage-daemon", "--blockdev", "file,node-name=n", "--export", "type=vduse-blk,id=e,node-name=n,name=disk")
OURS = ("/usr/bin/python3", "/usr/bin/virtiova", "serve", "blk", "d.img", "--vduse", "disk")


def box(tmp_path: Path, *, driver: str = "", at: str = MADE) -> Box:
    """A system with one vDPA device."""
    made = Box(tmp_path)
    made.file(f"{at}/uevent", "")
    made.link(f"/sys/bus/vdpa/devices/{at.rpartition('/')[2]}", at)
    made.link(f"{at}/subsystem", "/sys/bus/vdpa")
    if driver:
        made.at(f"/sys/bus/vdpa/drivers/{driver}").mkdir(parents=True)
        made.link(f"{at}/driver", f"/sys/bus/vdpa/drivers/{driver}")
    return made


def process(made: Box, pid: int, words: tuple[str, ...], *, opened: str = "", name: str = "") -> None:
    """A process by its command line and one open file."""
    made.file(f"/proc/{pid}/cmdline", "".join(f"{word}\0" for word in words))
    made.file(f"/proc/{pid}/comm", f"{name or words[0]}\n")
    made.at(f"/proc/{pid}/fd").mkdir(parents=True)
    if opened:
        os.symlink(opened, made.at(f"/proc/{pid}/fd/7"))


def views(made: Box, *, live: bool = False) -> list[View]:
    tree = LiveTree(str(made.root), "box")
    tree.live = live
    here = linux.collect(tree)
    return [here, *backends.processes(tree, backends.sockets_of([here]))]


def row(made: Box, *, live: bool = False) -> ScannedDevice:
    rows = scan_views(views(made, live=live)).devices
    assert len(rows) == 1, rows
    return rows[0]


def test_a_device_of_vduse_has_tables_of_its_own(tmp_path: Path) -> None:
    made = box(tmp_path, driver="virtio_vdpa")
    made.virtio(MADE, word=ON)
    found = row(made)
    assert (found.verdict, found.dma, found.iommu, found.backend) == (
        Way.TRANSLATED,
        "iova > vduse > ram",
        "vduse",
        "vdpa",
    )
    assert (found.name, found.address, found.offered, found.accepted) == ("virtio0", "disk", True, True)
    assert any("bounce pages" in seen.text for seen in found.basis)
    assert found.assumes == []


@pytest.mark.parametrize("words", [QSD, OURS])
def test_who_serves_it_by_its_command_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    made = box(tmp_path, driver="vhost_vdpa")
    process(made, 40, words)
    found = row(made)
    assert (found.name, found.type, found.backend, found.backend_offered) == ("disk", "blk", "vdpa", True)
    assert any(seen.text.startswith("served by ") for seen in found.basis)


def test_who_serves_it_by_what_it_has_open(tmp_path: Path) -> None:
    made = box(tmp_path, driver="vhost_vdpa")
    process(made, 40, ("own-server", "-x"), opened="/dev/vduse/disk", name="own-server")
    process(made, 41, ("other",), opened="/dev/vduse/another")
    process(made, 42, ("ovs-vswitchd",), opened="/dev/null")
    assert any(seen.text == "served by own-server" for seen in row(made).basis)


def test_a_known_program_whose_command_line_does_not_say_it(tmp_path: Path) -> None:
    made = box(tmp_path, driver="virtio_vdpa")
    made.virtio(MADE, word=ON, kind=1)
    process(made, 40, ("ovs-vswitchd",), opened="/dev/vduse/disk")
    made.file("/proc/40/maps", "7f00-7f01 r-xp 0 00:01 2 /usr/lib/librte_vhost.so.25.2 \n")
    found = scan_views(views(made))
    assert any(seen.text == "served by ovs-vswitchd 25.07" for seen in found.devices[0].basis)


def test_given_to_user_space(tmp_path: Path) -> None:
    made = box(tmp_path, driver="vhost_vdpa")
    made.file(f"{MADE}/vhost-vdpa-3/dev", "244:3\n")
    process(made, 50, ("qemu-system-x86_64",), opened="/dev/vhost-vdpa-3", name="qemu\x1b[31m")
    found = row(made, live=True)
    assert (found.verdict, found.driver, found.accepted) == (Way.TRANSLATED, "vhost_vdpa", None)
    said = [seen.text for seen in found.basis]
    assert "vhost-vdpa hands it to user space, which fills its tables" in said
    assert "has it open: qemu?[31m (process 50)" in said
    assert found.assumes == ["the driver accepts bit 33"]
    # What was gathered elsewhere says nothing about who had it open.
    assert not any("has it open" in seen.text for seen in row(made).basis)


def test_nobody_drives_it(tmp_path: Path) -> None:
    found = row(box(tmp_path))
    assert (found.driver, found.verdict, found.findings) == ("", Way.TRANSLATED, [])


@pytest.mark.parametrize(("group", "front"), [("identity", Front.PASSTHROUGH), ("DMA", Front.TRANSLATING)])
def test_hardware_that_the_kernel_drives_is_behind_the_platforms_iommu(
    tmp_path: Path, group: str, front: Front
) -> None:
    made = Box(tmp_path)
    function = made.function("/sys/devices/pci0000:00/0000:00:02.0", driver="mlx5_core")
    at = f"{function}/vdpa0"
    made.link("/sys/bus/vdpa/devices/vdpa0", at)
    made.link(f"{at}/subsystem", "/sys/bus/vdpa")
    made.virtio(at, word=ON)
    made.unit("dmar0", function)
    made.group(1, group, [function])
    view = made.view()
    device = next(each for each in view.devices if each.name == "virtio0")
    assert in_front(view, device).front is front
    assert k.BACKEND not in device.facts


def test_a_product_of_the_machine_is_no_product_of_its_own_vdpa_device(tmp_path: Path) -> None:
    made = box(tmp_path, driver="virtio_vdpa")
    made.virtio(MADE, word=VERSION_1, status="0x0000000f\n")
    view = made.view()
    view.machine.put(k.VMM, "qemu", Place("", ""))
    view.machine.put(k.VMM_VERSION, "7.2.22", Place("", ""))
    scan = scan_views([view])
    # It goes around nothing: what it was not given it does not reach, and so it does not work.
    assert [each.id for each in scan.findings] == ["VA307"]


@pytest.mark.parametrize(
    "name", ["disk", "d\n", "\x1b[2J", "a" * 300, "..", "-", "vhost-vdpa-0", "virtio0", "0000:00:01.0"]
)
def test_names_that_somebody_else_chose(tmp_path: Path, name: str) -> None:
    at = f"/sys/devices/virtual/vduse/x/{name}" if name != ".." and len(name) < 255 else MADE
    made = box(tmp_path, driver="vhost_vdpa", at=at)
    assert row(made).iommu == "vduse"


@pytest.mark.parametrize(
    "words",
    [
        ("qemu-storage-daemon", "--export", "type=vduse-blk"),
        ("qemu-storage-daemon", "--export", "type=vduse-blk,id="),
        ("qemu-storage-daemon", "--export"),
        ("virtiova", "serve", "--vduse"),
        ("virtiova", "serve", "--vduse="),
        ("python3", "/x/virtiova", "serve"),
    ],
)
def test_command_lines_that_name_no_device(words: tuple[str, ...]) -> None:
    served = backends.recognise(words)
    assert served is not None
    assert not set(served.sockets) - {"/dev/vduse/"}
