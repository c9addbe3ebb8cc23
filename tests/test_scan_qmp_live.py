# SPDX-License-Identifier: Apache-2.0
"""Real guests, looked at from outside by QEMU's monitor and from inside by what is gathered there: one machine."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from served_guest import CLOUD, NONE, VTD, Assets, Guest, Server, assets, values
from virtiova.collect import gather_script, gathered, linux, qmp
from virtiova.collect import keys as k
from virtiova.collect.facts import View, ViewKind
from virtiova.collect.tree import LiveTree
from virtiova.errors import NotPossibleError
from virtiova.guest import boot
from virtiova.guest.platforms import PLATFORMS
from virtiova.guest.run import disks_for
from virtiova.packages.store import Store
from virtiova.result import Path
from virtiova.result.scan import Scan, ScannedDevice
from virtiova.scan import scan_views
from virtiova.scan.join import join, place_of

DISK = 1 << 20


@pytest.fixture(scope="session")
def cloud() -> Assets:
    return assets(CLOUD)


def monitor(socket: FilePath) -> list[str]:
    """QEMU's options for a second monitor."""
    return ["-qmp", f"unix:{socket},server=on,wait=off"]


def row(scan: Scan, place: str, view: View) -> ScannedDevice:
    """The row of the device at that place."""
    (name,) = [each.name for each in view.devices if place_of(each) == place]
    (found,) = [each for each in scan.devices if each.name == name]
    return found


def gathered_inside(guest: Guest, folder: FilePath) -> View:
    """What the guest gathers of itself, by the script that is made for it; it is on the guest's disk."""
    guest.do(f"await /dev/vda; dd if=/dev/vda of=/tmp/g bs=4096 count={DISK // 4096} 2>/dev/null")
    guest.do("tr -d '\\000' </tmp/g >/tmp/g.sh; sh /tmp/g.sh /tmp/box.tar.gz 2>/dev/null")
    lines = values(guest.do("base64 -w 1024 /tmp/box.tar.gz | while read -r l; do say box $l; done"), "box")
    box = folder / "box.tar.gz"
    box.write_bytes(base64.b64decode("".join(lines)))
    (found,) = gathered.views(str(box))
    return found


TELL = (
    "for d in /sys/bus/virtio/devices/*; do p=$(realpath $d); u=$(dirname $p); say dir $p; say link $d $p; "
    "for f in device features status; do say file $p/$f $(cat $p/$f); done; "
    "g=$(realpath $u/iommu_group); [ -e $g/type ] && say file $g/type $(cat $g/type) && say link $u/iommu_group $g; "
    "done; for d in /sys/class/iommu/*; do say dir $d; done; "
    "say file /proc/sys/kernel/osrelease $(uname -r); say file /proc/sys/kernel/hostname guest"
)


def told_inside(guest: Guest, folder: FilePath) -> View:
    """The few files of sysfs that say where its devices are, in folders as they are in the guest."""
    root = folder / "root"
    for line in guest.do(TELL):
        kind, _, rest = line.partition(" ")
        name, _, value = rest.partition(" ")
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "dir":
            path.mkdir(parents=True, exist_ok=True)
        elif kind == "link":
            path.symlink_to(root / value.lstrip("/"))
        else:
            path.write_text(f"{value}\n")
    return linux.collect(LiveTree(str(root), "guest"))


PLACES = {
    "pci:00:01.0/00.0": "blk",  # behind a root port
    "pci:00:02.0/00.0/00.0/00.0": "rng",  # behind a root port and a switch
    "pci:40:00.0/00.0": "rng",  # on a second root bus, which is led around the IOMMU
    "pci:00:08.0": "rng",  # on the root bus
}


def placed(blk: Server) -> list[str]:
    """Devices at all `PLACES`: the disk and the one behind the switch with bit 33."""
    rng = "virtio-rng-pci,disable-legacy=on,rng=r"
    return [
        *("-object", "rng-builtin,id=r"),
        *("-chardev", f"socket,id=c0,path={blk.path}"),
        *("-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=1,chassis=1"),
        *("-device", "vhost-user-blk-pci,id=disk,bus=rp0,chardev=c0,iommu_platform=on,ats=on"),
        *("-device", "pcie-root-port,id=rp1,bus=pcie.0,addr=2,chassis=2"),
        *("-device", "x3130-upstream,id=up,bus=rp1"),
        *("-device", "xio3130-downstream,id=down,bus=up,chassis=3,addr=0"),
        *("-device", f"{rng},id=deep,bus=down,iommu_platform=on"),
        *("-device", "pxb-pcie,id=px,bus=pcie.0,addr=5,bus_nr=0x40,bypass_iommu=on"),
        *("-device", "pcie-root-port,id=rp2,bus=px,addr=0,chassis=4"),
        *("-device", f"{rng},id=around,bus=rp2"),
        *("-device", f"{rng},id=plain,bus=pcie.0,addr=8"),
    ]


@pytest.mark.parametrize("inside", [told_inside, pytest.param(gathered_inside, marks=pytest.mark.sweep)])
def test_both_sides_of_one_guest(cloud: Assets, tmp_path: FilePath, inside: Callable[[Guest, FilePath], View]) -> None:
    """Root port, switch, second root bus: from both sides each device is at the same place, and the two are one."""
    disk, socket = tmp_path / "disk", tmp_path / "qmp"
    disk.write_bytes(gather_script.script().encode().ljust(DISK, b"\0"))
    with Server(tmp_path, "blk", "blk", "--blk-file", str(disk)) as blk:
        with Guest(cloud, [*placed(blk), *monitor(socket)]) as guest:
            guest.booted()
            guest_view, view = inside(guest, tmp_path), qmp.collect(str(socket))
        blk.stop()
    assert not view.problems
    assert {place_of(each): each.facts.get(k.TYPE) for each in view.devices} == PLACES
    assert {place_of(each): each.facts.get(k.TYPE) for each in guest_view.devices} == PLACES
    addresses = {place_of(each): each.facts.get(k.ADDRESS) for each in view.devices}
    assert addresses == {place_of(each): each.facts.get(k.ADDRESS) for each in guest_view.devices}

    outside = scan_views([view])
    found = row(outside, "pci:00:01.0/00.0", view)
    assert (found.offered, found.accepted, found.observed, found.verdict) == (True, True, *[Path.TRANSLATED] * 2)
    assert (found.backend, found.backend_offered, found.backend_accepted) == ("vhost-user", True, True)
    found = row(outside, "pci:00:02.0/00.0/00.0/00.0", view)
    assert (found.accepted, found.observed) == (True, Path.TRANSLATED)
    found = row(outside, "pci:00:08.0", view)
    assert (found.offered, found.observed, found.findings) == (False, Path.BYPASS, ["VA101"])
    found = row(outside, "pci:40:00.0/00.0", view)
    assert (found.observed, found.findings) == (Path.DIRECT, []), "nothing is in front of it"

    (both,) = join([guest_view, view])
    assert both.kind is ViewKind.JOINED
    assert both.source.split("\n") == [view.source, guest_view.source]
    assert {place_of(each): each.facts.get(k.TYPE) for each in both.devices} == PLACES
    joined = scan_views([guest_view, view])
    for place in PLACES:
        seen, alone = row(joined, place, both), row(outside, place, view)
        assert (seen.offered, seen.accepted, seen.verdict) == (alone.offered, alone.accepted, alone.verdict)
        assert seen.name.startswith("virtio"), "as the guest calls it"
        assert "VA901" not in seen.findings
    assert row(joined, "pci:00:01.0/00.0", both).group, "of the guest"


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("iommu", "append", "bit", "path"),
    [
        (VTD, "", True, Path.TRANSLATED),
        (VTD, "iommu=pt", True, Path.DIRECT),
        (VTD, "intel_iommu=off", True, Path.DIRECT),
        (NONE, "", True, Path.DIRECT),
        (VTD, "", False, Path.BYPASS),
    ],
    ids=["on", "on-pt", "on-off", "on-none", "off"],
)
def test_the_states_of_a_vhost_user_disk(
    cloud: Assets, tmp_path: FilePath, iommu: Sequence[str], append: str, bit: bool, path: Path
) -> None:
    """Each row of the matrix: no one field of QEMU's says where the bytes go, all of them together do."""
    disk, socket = tmp_path / "disk", tmp_path / "qmp"
    disk.write_bytes(b"\0" * DISK)
    told = f"iommu_platform={'on' if bit else 'off'}"
    with Server(tmp_path, "blk", "blk", "--blk-file", str(disk)) as blk:
        devices = ["-chardev", f"socket,id=c0,path={blk.path}"]
        devices += [
            "-device",
            "pcie-root-port,id=rp0,chassis=1",
            "-device",
            f"vhost-user-blk-pci,bus=rp0,chardev=c0,{told}",
        ]
        with Guest(cloud, [*devices, *monitor(socket)], iommu=iommu, append=append) as guest:
            guest.booted()
            guest.do("md5")
            view = qmp.collect(str(socket))
        log = blk.stop()
    (found,) = scan_views([view]).devices
    assert (found.offered, found.accepted) == (bit, bit)
    assert (found.observed, found.verdict, found.predicted) == (path, path, [path])
    fact = view.devices[0].facts.fact(k.BACKEND_ACCEPTED)
    assert fact is not None
    assert fact.certainty.name == "INFERRED"
    assert fact.value is bit, "QEMU says it also where it did not send it"
    if iommu is NONE:
        assert "guest-physical, around any IOMMU" in log, "which the back end knows better"


WANTED: dict[str, tuple[Path | None, ...]] = {
    "x86": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    "x86-vtd": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
    "x86-vtd-off": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    "x86-vtd-pt": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    "aarch64-smmuv3": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
    # From outside, an SMMU that lets all through looks like one whose tables map all to itself.
    "aarch64-smmuv3-pt": (None, Path.UNKNOWN, None, Path.UNKNOWN),
    "aarch64-mmio": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    "ppc64le-pseries": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
    "ppc64le-pseries-ddw": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
    "ppc64le-powernv9": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
    "xen-pv": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    # Xen maps dom0 to itself: that the rings are where their addresses are is no bypass.
    "xen-pv-vtd": (None, Path.TRANSLATED, *[Path.BYPASS] * 2),
    "s390x-ccw": (*[Path.DIRECT] * 2, *[Path.DIRECT] * 2),
    "s390x-zpci": (*[Path.TRANSLATED] * 2, *[Path.BYPASS] * 2),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", WANTED)
def test_every_platform_from_outside(name: str, tmp_path: FilePath) -> None:
    socket = tmp_path / "qmp"
    platform = PLATFORMS[name]
    platform = replace(platform, arguments=(*platform.arguments, *monitor(socket)))
    try:
        files = boot.assets(platform, Store())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    with boot.Boot(platform, files, disks_for([True, False])) as guest:
        assert guest.run(), guest.words()
        view = qmp.collect(str(socket))
    assert not view.problems
    rows = {each.name: each for each in scan_views([view]).devices}
    on, off = rows["bit-on"], rows["bit-off"]
    assert (on.offered, on.accepted, off.offered, off.accepted) == (True, True, False, False)
    assert (on.observed, on.verdict, off.observed, off.verdict) == WANTED[name]
