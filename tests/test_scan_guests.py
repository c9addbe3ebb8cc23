# SPDX-License-Identifier: Apache-2.0
"""Real guests, gathered from inside by the script, and watched from outside in the same boot: the two must agree.

What a scan says of a guest's disks, of what the guest itself could tell, is held against where QEMU says that the
disks' rings are and what its IOMMU translated.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Final

import pytest

from gather_kit import Recording
from virtiova.collect import keys as k
from virtiova.collect import linux, logs
from virtiova.collect.box import read_box
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.collect.gather_script import script
from virtiova.collect.gathered import tree_of, views
from virtiova.errors import NotPossibleError
from virtiova.guest.boot import Boot, assets
from virtiova.guest.platforms import PLATFORMS, Platform, find
from virtiova.guest.run import disks_for, judge_boot, look_at
from virtiova.packages.store import Store
from virtiova.policy import Front
from virtiova.result import Cell, Path
from virtiova.result.scan import Place, Scan, ScannedDevice
from virtiova.scan import scan_views
from virtiova.scan.front import in_front
from virtiova.scan.join import join

pytestmark = pytest.mark.qemu

NOT_TOLD: Final = frozenset({"xen-pv-vtd"})
"""Where a guest cannot know: Xen has the IOMMU, and does not tell its domains what it does. Its console does."""


def gathered(platform: Platform, path: FilePath, seconds: float) -> dict[bool, Cell]:
    """Boot it; its box at ``path``, and what was seen from outside, by whether a disk has the bit."""
    try:
        files = assets(platform, Store(), gather=script().encode())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    said, console = bytearray(), path.with_suffix(".console")
    with Boot(platform, files, disks_for([True, False])) as boot:
        feed = boot.console.feed

        def noted(data: bytes) -> None:
            said.extend(data)
            feed(data)

        boot.console.feed = noted  # type: ignore[method-assign]
        assert boot.run(seconds), boot.words()
        cells = judge_boot(boot, look_at(boot))
        console.write_bytes(said)
        path.write_bytes(boot.console.box())
    return cells


def row_of(cell: Cell, scan: Scan) -> ScannedDevice:
    """The scan's row of a disk: the guest said under which name it has it."""
    found = [row for row in scan.devices if row.address == cell.evidence.inside["dev"]]
    assert len(found) == 1, [row.address for row in scan.devices]
    return found[0]


def agree(cell: Cell, row: ScannedDevice, *, told: bool = True) -> None:
    """Declared, predicted and verdict of the scan against declared and observed from outside."""
    assert cell.observed is not Path.UNKNOWN, cell.evidence.note
    assert row.type == "blk"
    assert row.accepted == cell.accepted
    # A guest sees what it took; what it did not take it may not have been offered.
    assert row.offered in (cell.offered, None)
    assert row.observed is None, "nobody looked from inside"
    assert cell.observed in row.predicted
    if not told:
        assert (row.verdict, row.why != "") == (Path.UNKNOWN, True)
    else:
        assert row.verdict is cell.observed
        assert row.dma.startswith(f"{cell.address} > ")


def check(name: str, folder: FilePath, seconds: float) -> Scan:
    platform, path = find(name), folder / "box.tar.gz"
    cells = gathered(platform, path, seconds)
    asked = Recording(tree_of(read_box(str(path))))
    linux.collect(asked)
    assert asked.not_gathered() == [], "what is looked for on this platform is in the list"
    scan = scan_views(views(str(path)))
    assert [machine.view for machine in scan.machines] == ["guest"]
    assert scan.machines[0].problems == []
    for cell in cells.values():
        agree(cell, row_of(cell, scan), told=name not in NOT_TOLD)
    if name in NOT_TOLD:
        scan = scan_views([*views(str(path)), logs.collect(path.with_suffix(".console").read_bytes(), "console")])
        for cell in cells.values():
            agree(cell, row_of(cell, scan))
    around = {row.name for row in scan.devices if row.verdict is Path.BYPASS}
    assert {found.device for found in scan.findings if found.id == "VA101"} == around
    return scan


@pytest.mark.timeout(400)
def test_a_pc_with_vtd(tmp_path: FilePath) -> None:
    scan = check("x86-vtd", tmp_path, 300)
    assert [row.verdict for row in scan.devices] == [Path.TRANSLATED, Path.BYPASS]
    assert scan.machines[0].platform["iommu"] == "intel"


@pytest.mark.sweep
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [name for name in PLATFORMS if name != "x86-vtd"])
def test_every_platform(name: str, tmp_path: FilePath) -> None:
    check(name, tmp_path, 600)


@pytest.mark.parametrize(
    ("said", "front", "iommu"),
    [
        ("I/O virtualisation enabled\n(XEN)  - Dom0 mode: Relaxed", Front.TRANSLATING, "intel"),
        ("I/O virtualisation enabled\n(XEN)  - Dom0 mode: Strict", Front.TRANSLATING, "intel"),
        ("I/O virtualisation enabled\n(XEN)  - Dom0 mode: Passthrough", Front.PASSTHROUGH, "intel"),
        ("I/O virtualisation enabled", None, ""),
        ("I/O virtualisation disabled", Front.NONE, ""),
        ("Booting", None, ""),
    ],
)
def test_what_xen_says_of_its_iommu(said: str, front: Front | None, iommu: str) -> None:
    """Its console, beside a domain 0 that cannot know."""
    where = Place("log", "xl dmesg", 1)
    guest = View(ViewKind.GUEST, "dom0", "box")
    guest.machine.put(k.XEN_DOMAIN, True, where)
    guest.machine.put(k.FIRMWARE_TABLES, ("RMAD",), where)
    guest.devices.append(Device("virtio0"))
    (view,) = join([guest, logs.collect(f"(XEN) {said}\n".encode(), "xl dmesg")])
    found = in_front(view, view.devices[0])
    assert (found.front, found.iommu) == (front, iommu)
