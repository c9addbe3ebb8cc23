# SPDX-License-Identifier: Apache-2.0
"""What kernels hand over, in the matrix: rows that are asked inside of guests, and what of them is believed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from virtiova.errors import NotPossibleError, ProtocolError
from virtiova.guest.inside import files
from virtiova.matrix import SYSTEMS, Extent, Planned, Selection, boots, driven, plan, run_planned
from virtiova.matrix.handed import BY_NAME, HANDINGS, Handing
from virtiova.matrix.work import run_with
from virtiova.packages.store import Store
from virtiova.policy import RULES
from virtiova.probe.plan import Runner, Task
from virtiova.report.matrix import text
from virtiova.result import NO_ANSWER, Cell, Path, Row


def planned(name: str) -> Planned:
    (found,) = (p for p in plan(extent=Extent(guests=True)).tasks if p.guest == name)
    return found


@functools.cache
def rows(name: str) -> Mapping[tuple[str, str, str], Row]:
    """A boot, by machine, device with its bit, and experiment."""
    asked = planned(name)
    try:
        files(BY_NAME[name].setting, Store())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    found = zip(asked.rows, run_planned(asked), strict=True)
    return MappingProxyType({(task.machine, task.device, task.experiment): row for task, row in found})


# -- in guests ---------------------------------------------------------------------------------------------------

MIX = {
    ("vfio", "virtio-rng,iommu_platform=on", "device-writes"): "translated",
    ("vfio", "virtio-rng,iommu_platform=on", "ring"): "translated",
    ("vfio", "virtio-rng,iommu_platform=on", "unmapped"): "blocked",
    ("vfio", "virtio-rng,iommu_platform=on", "unmap"): "blocked",
    ("vfio", "virtio-rng", "device-writes"): "bypass",
    ("vfio", "virtio-rng", "ring"): "bypass",
    ("vfio", "virtio-rng", "unmapped"): "bypass",
    ("q35", "virtio-blk-pci,iommu_platform=on", "guest-driver"): "translated",
    ("q35", "virtio-blk-pci", "guest-driver"): "bypass",
}
"""One machine, one IOMMU: what is handed over and what the kernel drives, with the bit and without."""


@pytest.mark.qemu
def test_a_mix_of_what_is_handed_over_and_what_the_kernel_drives() -> None:
    found = rows("x86-mix")
    assert {key: row.cell.observed.value for key, row in found.items()} == MIX
    assert not [row.cell for row in found.values() if row.cell.mismatch]
    assert {row.product.partition(" with ")[0] for row in found.values()} == {boots.product()}
    assert all("with Linux 6." in row.product for row in found.values())
    assert [row.cell.number for row in found.values()] == [1, 1, 1, 1, 2, 2, 2, 3, 4]
    assert all(len(row.cell.beside) == 3 for row in found.values())
    on, off = (found["q35", f"virtio-blk-pci{bit}", "guest-driver"].cell.evidence for bit in (",iommu_platform=on", ""))
    assert int(on.inside["dma_map"]) > 0 == int(off.inside["dma_map"])


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(400)
def test_all_that_vfio_hands_over() -> None:
    found = rows("x86-vfio")
    wrong = {key: (row.cell.observed, row.cell.explained) for key, row in found.items() if row.cell.mismatch}
    assert wrong == {("vfio", "virtio-rng", "bus-master-off"): (Path.BYPASS, "QEMU-BUS-MASTER")}
    assert not [key for key, row in found.items() if row.cell.observed in NO_ANSWER]
    both = {(row.cell.offered, row.cell.observed) for row in found.values() if row.cell.experiment == "unmapped"}
    assert both == {(True, Path.BLOCKED), (False, Path.BYPASS)}


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", ["vhost-net", "vhost-vsock"])
def test_the_kernels_own_back_ends_ask_and_obey(device: str) -> None:
    found = {
        experiment: row.cell for (_, name, experiment), row in rows("x86-vhost").items() if name.startswith(device)
    }
    assert not [cell for cell in found.values() if cell.mismatch or cell.observed in NO_ANSWER]
    seen = {name: found[name].observed.value for name in ("device-writes", "unmapped", "unmap", "not-taken")}
    assert seen == {
        "device-writes": "translated",
        "unmapped": "blocked",
        "unmap": "blocked",
        "not-taken": "bypass",
    }


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(400)
def test_devices_in_user_space() -> None:
    found = rows("x86-vduse")
    assert not [row.cell for row in found.values() if row.cell.mismatch or row.cell.observed in NO_ANSWER]
    assert {row.product.rpartition(" with ")[2][:10] for row in found.values()} == {"Linux 6.12"}
    seen: dict[str, dict[str, str]] = {}
    for row in found.values():
        seen.setdefault(row.cell.device_options, {})[row.cell.experiment] = row.cell.observed.value
    ours, theirs = seen["by=serve-blk"], seen["by=storage-daemon"]
    assert (ours["unmap"], theirs["unmap"]) == ("blocked", "blocked")
    assert (ours["not-taken"], theirs["not-taken"]) == ("refused", "translated")
    assert (ours["guest-driver"], "guest-driver" in theirs) == ("translated", False)
    (driven_cell,) = (row.cell for row in found.values() if row.cell.experiment == "guest-driver")
    assert int(driven_cell.evidence.inside["dma_map"]) > 100


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(400)
def test_rules_are_inverted_in_the_guest_too() -> None:
    asked = planned("x86-mix")
    few = replace(asked, rows=(asked.rows[0], *asked.rows[-2:]))
    found = run_with(Runner(jobs=1), RULES.inverted("device-uses-platform"), few)
    if found[0].cell.observed is Path.NOT_APPLICABLE:
        pytest.skip(found[0].cell.evidence.note)
    assert [row.cell.observed.value for row in found] == ["translated", "translated", "bypass"]
    assert [row.cell.mismatch for row in found] == [True, True, True]


# -- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handing", HANDINGS, ids=lambda handing: str(handing.name))
def test_no_two_questions_are_alike(handing: Handing) -> None:
    assert len(set(handing.tasks)) == len(handing.tasks) > 1
    assert handing.system in {system.id for system in SYSTEMS}


def test_one_boot_gives_all_of_its_cells_or_those_that_are_chosen() -> None:
    whole = planned("x86-mix")
    assert whole.span == len(MIX)
    (part,) = plan(Selection(only=("mixes", "vfio")), extent=Extent(guests=True)).tasks
    assert part.rows == whole.rows[:-2]
    (none,) = plan(Selection(only=("mixes", "vfio"))).tasks
    assert none.missing == "only a real kernel shows it: --guests boots one"


def test_a_guest_that_cannot_be_had_is_said_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (asked,) = plan(Selection(only=("physical",)), extent=Extent(guests=True, offline=True)).tasks
    found = run_planned(asked)
    assert len(found) == asked.span > 30
    assert {row.cell.observed for row in found} == {Path.NOT_APPLICABLE}
    assert [row.cell.experiment for row in found] == [task.experiment for task in asked.rows]
    lines = list(text(found, SYSTEMS))
    assert any(line.strip().startswith("vfio with vfio: ") for line in lines)


# -- what of a guest's words is believed -------------------------------------------------------------------------

HANDING = BY_NAME["x86-mix"]
TASK = HANDING.tasks[0]


def said(**changes: object) -> dict[str, Any]:
    """A cell as a guest sends it, from the model's machine."""
    cell = Runner(jobs=1).run_one(Task("model", "soft", "honest:rng", "device-writes"))
    named = replace(cell, machine="vfio", iommu="vfio", device="virtio-rng", device_options="")
    return {**msgspec.to_builtins(named), **changes}


def test_a_cell_of_the_right_form_is_taken() -> None:
    heard = boots.Heard(HANDING, HANDING.tasks)
    heard.take({"n": 0, "cell": said()})
    cells = heard.cells(Path.UNKNOWN, "it ended")
    assert (cells[0].observed, cells[0].number, cells[0].beside[0]) == (Path.TRANSLATED, 1, "virtio-rng")
    assert {cell.evidence.note for cell in cells[1:]} == {"it ended"}


def test_what_a_cell_says_must_follow_from_its_evidence() -> None:
    cell = boots.checked(said(observed="blocked"), TASK)
    assert (cell.observed, cell.evidence.note) == (
        Path.UNKNOWN,
        "the guest says blocked, and its evidence translated",
    )


@pytest.mark.parametrize(
    "line",
    [
        {"n": 99, "cell": {}},
        {"n": -1, "cell": {}},
        {"n": True, "cell": {}},
        {"n": "0", "cell": {}},
        {"n": [0], "cell": {}},
        {"n": 0, "cell": None},
        {"n": 0, "cell": []},
        {"n": 0, "cell": {}},
        {"n": 0, "cell": said(device="virtio-blk")},
        {"n": 0, "cell": said(machine="q35")},
        {"n": 0, "cell": said(experiment="unmap")},
        {"n": 0, "cell": said(observed="fine")},
        {"n": 0, "cell": said(offered="yes")},
        {"n": 0, "cell": said(evidence={"witnesses": [{"role": "data"}]})},
        {"n": 0, "cell": said(disagreements=["x" * (1 << 20)])},
    ],
)
def test_what_is_no_such_cell(line: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        boots.Heard(HANDING, HANDING.tasks).take(line)


def test_no_cell_is_told_of_twice_and_none_that_was_not_asked_for() -> None:
    heard = boots.Heard(HANDING, HANDING.tasks[:2])
    heard.take({"n": 0, "lost": "gone"})
    assert heard.numbers == [0, 1]
    for number in (0, 2):
        with pytest.raises(ProtocolError, match=f"tells of cell {number}"):
            heard.take({"n": number, "lost": "gone"})
    assert heard.cells(Path.UNKNOWN, "")[0].evidence.note == "gone"


# -- a disk that a guest's own kernel drives ---------------------------------------------------------------------


def use(**changes: Any) -> dict[str, Any]:
    """What a guest says of a disk in use."""
    return {
        "negotiated": {"bit-33": True, "status": 15, "driver": "virtio_vdpa"},
        "use": {"files": 4, "wrong": [], "changed": []},
        "image": {"files": 4, "wrong": []},
        "whole": {"disk": "ab", "image": "ab"},
        "dma_map": 7,
        "said": "",
    } | changes


def became(**changes: Any) -> Cell:
    names = Runner(jobs=1).run_one(Task("model", "soft", "honest:blk", "device-writes"))
    return driven.judged(names, driven.used(use(**changes)))


def test_a_disk_whose_files_are_right_on_both_sides_is_translated() -> None:
    cell = became()
    assert (cell.observed, cell.predicted, cell.accepted, cell.mismatch) == (
        Path.TRANSLATED,
        [Path.TRANSLATED],
        True,
        False,
    )
    assert cell.evidence.outside["seen"] == "4 files on ext4, all right on both sides, 7 DMA API calls"


@pytest.mark.parametrize(
    "changes",
    [
        {"dma_map": 0},
        {"use": {"files": 4, "wrong": ["file1"], "changed": []}},
        {"use": {"files": 4, "wrong": [], "changed": ["file1"]}},
        {"image": {"files": 4, "wrong": ["file1"]}},
        {"image": {"files": 3, "wrong": []}},
        {"use": {"files": 0, "wrong": [], "changed": []}, "image": {"files": 0, "wrong": []}},
        {"whole": {"disk": "ab", "image": "cd"}},
        {"whole": {"disk": "", "image": ""}},
    ],
)
def test_a_disk_of_which_not_all_is_right_has_no_answer(changes: dict[str, Any]) -> None:
    cell = became(**changes)
    assert cell.observed is Path.UNKNOWN
    assert cell.evidence.note


def test_a_disk_without_the_bit_whose_driver_calls_the_dma_api_is_a_mismatch() -> None:
    cell = became(negotiated={"bit-33": False, "status": 15, "driver": "virtio_vdpa"})
    assert cell.mismatch
    assert cell.disagreements


@pytest.mark.parametrize(
    "said", [None, [], {}, use(dma_map="7"), use(use={"files": 4}), use(negotiated={"bit-33": 1, "status": 15})]
)
def test_what_is_no_use_of_a_disk(said: object) -> None:
    with pytest.raises(ProtocolError):
        driven.used(said)


def test_a_name_of_a_system_and_of_a_machine_is_that_of_the_system() -> None:
    chosen = Selection(only=("vhost", "vduse"))
    assert chosen.takes("vhost", "vhost", "iotlb")
    assert chosen.takes("vduse", "vdpa", "vdpa")
    assert not chosen.takes("physical", "vfio", "vfio")
    assert Selection(only=("mixes", "vfio")).takes("mixes", "vfio", "vfio")
    assert not Selection(skip=("vhost",)).takes("vhost", "vhost", "iotlb")
    Selection(only=("vdpa", "iotlb")).check()
