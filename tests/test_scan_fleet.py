# SPDX-License-Identifier: Apache-2.0
"""Many gathered machines at a time: summaries, files, machines that are in two boxes, bad boxes, a cluster, Ansible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet_kit import box
from virtiova.cli import exits, fleet
from virtiova.cli.main import main
from virtiova.result import Path as Way
from virtiova.result.scan import Scan
from virtiova.run.processes import Processes

UUID = "11111111-2222-3333-4444-555555555555"
PLAYBOOK = Path(__file__).resolve().parent.parent / "contrib" / "ansible" / "gather.yml"
HOST = (
    f"qemu-system-x86_64 -M q35,kernel-irqchip=split -name beta -uuid {UUID} -nodefaults -device intel-iommu "
    "-device virtio-blk-pci,id=d0,drive=x,addr=2,iommu_platform=on,disable-legacy=on "
    "-device virtio-blk-pci,id=d1,drive=y,addr=3"
)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve machines, three of which have a disk without the bit; one of them is also seen by its host; a bad file."""
    folder = tmp_path_factory.mktemp("boxes")
    for number in range(11):
        box(folder / f"m{number:02}.tar.gz", f"m{number:02}", bits="10" if number < 2 else "11")
    box(folder / "beta.tar.gz", "beta", bits="10", uuid=UUID)
    box(folder / "host.tar.gz", "host", bits="", qemu=HOST)
    (folder / "cut.tar.gz").write_bytes((folder / "m00.tar.gz").read_bytes()[:200])
    (folder / "notes.txt").write_text("no box\n")
    return folder


def scans(paths: Sequence[str]) -> list[Scan]:
    with fleet.Fleet(paths) as found:
        found.run(Processes(2, preload=fleet.PRELOAD))
        return list(found)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["scan", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_summary(boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, str(boxes))
    assert code == exits.FOUND
    assert "VA101    warning   3         3      goes around the IOMMU" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("m0", "beta"))]
    assert sorted(rows) == [["beta", "2", "1", "VA101"], ["m00", "2", "1", "VA101"], ["m01", "2", "1", "VA101"]]
    assert "could not read" in out
    assert "cut.tar.gz" in out
    assert "notes" not in out


def test_nothing_found_in_good_machines(boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [str(path) for path in sorted(boxes.glob("m*.tar.gz"))[2:]]
    code, out, _ = answer(capsys, *good)
    assert code == exits.OK
    assert out.startswith("9 machines, 18 devices: 18 translated\n")


def test_nothing_but_what_cannot_be_read(boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "--summary", str(boxes / "cut.tar.gz"))
    assert code == exits.COULD_NOT_LOOK
    assert "cut.tar.gz" in out


def test_a_machine_in_two_boxes_is_one(boxes: Path) -> None:
    """The host's side and its own are joined wherever they are among the files: the offer is known then."""
    found = scans(fleet.expand([str(boxes)]))
    (beta,) = [scan for scan in found if any(device.machine == "beta" for device in scan.devices)]
    machine = next(each for each in beta.machines if each.name == "beta")
    assert machine.view == "joined"
    rows = {row.name: (row.offered, row.accepted, row.verdict) for row in beta.devices}
    assert sorted(rows.values(), key=str) == [(False, False, Way.BYPASS), (True, True, Way.TRANSLATED)]
    assert len([machine for scan in found for machine in scan.machines if machine.name.startswith("beta")]) == 1


def test_json_lines_have_a_machine_each(boxes: Path, tmp_path: Path) -> None:
    out = tmp_path / "fleet.jsonl"
    main(["scan", str(boxes), "-q", "-o", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(line["schema"] == "virtiova/scan/1" and len(line["machines"]) == 1 for line in lines)
    names = sorted(line["machines"][0]["name"] for line in lines)
    assert [name for name in names if name.startswith("m")] == [f"m{number:02}" for number in range(11)]


def test_parquet_has_a_row_each_device(boxes: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'virtiova[fleet]'")
    out = tmp_path / "fleet.parquet"
    main(["scan", str(boxes), "-q", "-o", str(out)])
    rows = parquet.read_table(out).to_pylist()
    devices = [row for row in rows if row["device"] is not None]
    assert len(devices) == 24
    around = [row for row in devices if row["verdict"] == "bypass"]
    assert {row["machine"] for row in around} == {"m00", "m01", "beta"}
    assert all([each["id"] for each in row["findings"]] == ["VA101"] for row in around)
    whole = [row for row in rows if row["device"] is None and row["problems"]]
    assert any("cut.tar.gz" in problem for row in whole for problem in row["problems"])


def test_what_is_ignored_does_not_count(boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, str(boxes), "--ignore", "VA101", "--ignore", "VA602")
    assert code == exits.OK
    assert "0 (+3 ignored)" in out
    assert "VA602: nothing of it is found" in err
    assert "VA101" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--summary", "--log", "x", "BOXES"], "a fleet is files and folders only"),
        (["--summary", "--jobs", "0", "BOXES"], "--jobs takes a number from 1 on"),
        (["-o", "x.xls", "BOXES"], "the suffix picks the format"),
        (["--summary", "--scheduler", "tcp://127.0.0.1:1", "BOXES"], "no Dask scheduler answers"),
    ],
)
def test_what_makes_no_sense(
    words: list[str], said: str, boxes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtiova.run.cluster.CONNECT_SECONDS", 0.5)
    code, _, err = answer(capsys, *[str(boxes) if word == "BOXES" else word for word in words])
    assert code in {exits.USAGE, exits.COULD_NOT_LOOK}
    assert said in err


def test_two_machines_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        box(tmp_path / f"{number}.tar.gz", "same", bits="0")
    _, out, _ = answer(capsys, "--summary", str(tmp_path))
    assert len({line for line in out.splitlines() if line.startswith("same")}) == 3


@pytest.mark.parametrize(
    ("found", "groups"),
    [
        ([(0, ["a"]), (1, ["b"]), (2, [])], []),
        ([(0, ["a"]), (1, ["b"]), (2, ["a"])], [[0, 2]]),
        ([(0, ["a"]), (1, ["b"]), (2, ["b", "a"]), (3, ["c"]), (4, ["c"])], [[0, 1, 2], [3, 4]]),
    ],
)
def test_which_files_belong_together(found: list[tuple[int, list[str]]], groups: list[list[int]]) -> None:
    assert sorted(sorted(group) for group in fleet._together(found)) == groups


# -- a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'virtiova[cluster]'")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as local:
        yield local


def test_workers_of_a_cluster_need_not_have_the_files(boxes: Path, cluster: Any) -> None:
    """What they are sent is what is judged, and it is said to be of the file that it was sent from."""
    paths = fleet.expand([str(boxes)])
    task = next(fleet._sent([fleet.Task((paths[0],))]))[1]
    assert task.contents == (Path(paths[0]).read_bytes(),)
    moved = fleet.judge(fleet.Task(("/nowhere/else.tar.gz",), task.contents))
    assert moved.scan.machines[0].sources == ["/nowhere/else.tar.gz"]
    with fleet.executor_for(None, cluster.scheduler_address) as executor, fleet.Fleet(paths) as found:
        found.run(executor, send=True)
        there = [row for scan in found for row in scan.devices]
    assert there == [row for scan in scans(paths) for row in scan.devices]


# -- speed -------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_a_thousand_machines_in_ten_seconds(tmp_path: Path) -> None:
    for number in range(1000):
        box(tmp_path / f"m{number:04}.tar.gz", f"m{number:04}", bits="1110")
    started = time.monotonic()
    with fleet.Fleet(fleet.expand([str(tmp_path)])) as found:
        found.run(Processes(None, preload=fleet.PRELOAD))
        count = sum(len(scan.devices) for scan in found)
    assert count == 4000
    assert time.monotonic() - started < 10


# -- Ansible -----------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """A program of the environment that the tests run in."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}: pip install 'virtiova[test]'")
    return found


def environment(tmp_path: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_LOCALHOST_WARNING": "false", "LC_ALL": "C.UTF-8"}
    return {**os.environ, "PATH": path, **own}


def test_the_playbook_is_as_ansible_lint_wants_it(tmp_path: Path) -> None:
    command = [tool("ansible-lint"), "--offline", "--nocolor", "--profile", "production", str(PLAYBOOK)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_playbook_gathers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From two hosts that are both this machine: what comes is what a scan of this machine says."""
    (tmp_path / "inventory").write_text("one ansible_connection=local\ntwo ansible_connection=local\n")
    command = [tool("ansible-playbook"), "-i", "inventory", str(PLAYBOOK)]
    command += ["-e", "virtiova_become=false", "-e", f"virtiova_boxes={tmp_path}/boxes"]
    command += ["-e", f"virtiova_command={Path(sys.executable).parent}/virtiova"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "boxes")) == ["one.tar.gz", "two.tar.gz"]
    main(["scan", "--json"])
    here = {row["name"]: row["accepted"] for row in json.loads(capsys.readouterr().out)["devices"]}
    main(["scan", "--json", str(tmp_path / "boxes" / "one.tar.gz")])
    machines = json.loads(capsys.readouterr().out)
    guest = next(each["name"] for each in machines["machines"] if each["view"] == "guest")
    there = {row["name"]: row["accepted"] for row in machines["devices"] if row["machine"] == guest}
    assert there == here
