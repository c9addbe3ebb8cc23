# SPDX-License-Identifier: Apache-2.0
"""Back ends in processes of their own, in the matrix: all there are here, each judged, and two that are found out."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest

from virtiova.cli import exits, main
from virtiova.matrix import SYSTEMS, Selection, plan, run_planned
from virtiova.matrix.backends import PROGRAMS, here
from virtiova.matrix.systems import BACKENDS
from virtiova.report.matrix import text
from virtiova.result import Path, Row

OURS = Selection(only=(BACKENDS, "vhost-user"))


@functools.cache
def ours() -> Mapping[tuple[str, str], Row]:
    """Our own back ends over our own front end: nothing else is needed for these."""
    tasks = [planned for planned in plan(OURS).tasks if planned.backend.startswith("serve-")]
    return MappingProxyType({(planned.backend, planned.task.experiment): run_planned(planned)[0] for planned in tasks})


def test_those_that_are_wrong_on_purpose_are_found_out_and_said_to_be_so() -> None:
    wrong = {key: (row.cell.observed, row.cell.explained) for key, row in ours().items() if row.cell.mismatch}
    assert wrong == {
        ("serve-leaky", "device-writes"): (Path.BYPASS, "LEAKY-ON-PURPOSE"),
        ("serve-leaky", "unmap"): (Path.BYPASS, "LEAKY-ON-PURPOSE"),
        ("serve-stale", "unmap"): (Path.STALE, "STALE-ON-PURPOSE"),
        ("serve-stale", "remap"): (Path.STALE, "STALE-ON-PURPOSE"),
    }
    assert len(ours()) == 13
    assert {row.cell.device_options for row in ours().values()} == {f"by={label}" for label, _ in ours()}
    assert {row.product.rpartition(" ")[0] for row in ours().values()} == {
        f"virtiova-{kind}" for kind in ("blk", "leaky", "stale")
    }


def test_a_row_names_the_process() -> None:
    lines = list(text([ours()["serve-leaky", "unmap"]], SYSTEMS))
    assert any("vhost-user-blk,by=serve-leaky" in line and "explained by LEAKY-ON-PURPOSE" in line for line in lines)


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    missing = {planned.backend: planned for planned in plan(OURS).tasks if planned.missing}
    assert set(missing) == {"storage-daemon", "testpmd"}
    assert "apt-get install qemu-system-common" in missing["storage-daemon"].missing
    (row,) = run_planned(missing["testpmd"])
    assert (row.cell.observed, row.cell.device_options) == (Path.NOT_APPLICABLE, "by=testpmd")
    assert "apt-get install dpdk-dev" in row.cell.evidence.note


def test_a_plan_is_for_any_machine_and_a_task_for_this_one() -> None:
    """A plan goes to workers elsewhere, and is what a file of results belongs to: no path of ours is in it."""
    tasks = plan(OURS).tasks
    assert sys.executable.encode() not in pickle.dumps(tasks)
    first = tasks[0].task.backend
    assert first is not None
    assert here(first).spawn.endswith(" -m virtiova serve blk {image} --socket-path {socket}")
    other = replace(first, spawn="qemu-storage-daemon virtiova")
    assert here(other) == other


@pytest.mark.parametrize("label", [p.label for p in PROGRAMS if p.label in ("storage-daemon", "testpmd")])
def test_others_over_our_own_front_end(label: str) -> None:
    tasks = [planned for planned in plan(OURS).tasks if planned.backend == label]
    if tasks[0].missing:
        pytest.skip(f"n/a: {tasks[0].missing}")
    for planned in tasks:
        (row,) = run_planned(planned)
        assert not row.cell.mismatch, row.cell
        assert row.cell.offered is (label == "testpmd")
        assert row.cell.observed is (Path.TRANSLATED if label == "testpmd" else Path.BYPASS)


@pytest.mark.qemu
def test_behind_qemu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "--only", BACKENDS, "--only", "q35", "-j"]) == exits.OK
    cells = json.loads(capsys.readouterr().out)["cells"]
    seen = {(cell["device_options"], cell["offered"], cell["experiment"]): cell["observed"] for cell in cells}
    assert {option for option, _, _ in seen} == {"by=serve-blk", "by=storage-daemon"}
    assert all(cell["iommu_options"] == "device-iotlb=on" for cell in cells)
    assert seen["by=serve-blk", True, "ring"] == "translated"
    assert seen["by=serve-blk", True, "unmap"] == "blocked"
    assert seen["by=serve-blk", False, "device-writes"] == "bypass"
    if shutil.which("qemu-storage-daemon"):
        assert seen["by=storage-daemon", None, "device-writes"] == "refused"
        assert seen["by=storage-daemon", False, "device-writes"] == "bypass"
        (refused,) = (cell for cell in cells if cell["observed"] == "refused")
        assert refused["predicted"] == ["refused"], "by what the back end says it offers"
