# SPDX-License-Identifier: Apache-2.0
"""The command line: exit statuses, JSON, files, scripts, names that do not exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import pytest

from cli_kit import HONEST, LYING, QUIRKY, SECONDS, environment, virtiova_run
from probe_kit import EXPERIMENTS, GENERAL, ON
from virtiova.addr import AddressKind
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.cli.probe import status
from virtiova.machine.qemu.boards import BOARDS
from virtiova.machine.qemu.command import devices
from virtiova.result import Cell, Evidence, Path

KEYS = {
    *("machine", "iommu", "device", "experiment", "offered", "accepted", "address", "predicted", "observed"),
    *("explained", "evidence"),
}


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """The same without a process: exit status, standard output, standard error."""
    code = main(args)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: File) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


# -- exit statuses -------------------------------------------------------------------------------------------------


def cell(path: Path, *, predicted: Path = Path.TRANSLATED, explained: str | None = None) -> Cell:
    return Cell(
        "q35", "intel", "d", "device-writes", True, True, AddressKind.IOVA, [predicted], path, explained, Evidence()
    )


FINE, BYPASS = cell(Path.TRANSLATED), cell(Path.BYPASS, predicted=Path.BYPASS)
WRONG, EXPLAINED = cell(Path.BYPASS), cell(Path.BYPASS, explained="QEMU-BUS-MASTER")
UNKNOWN, NOT_APPLICABLE = cell(Path.UNKNOWN), cell(Path.NOT_APPLICABLE)


@pytest.mark.parametrize(
    ("cells", "mismatch", "bypass", "unknown"),
    [
        ([], 0, 0, 0),
        ([FINE], 0, 0, 0),
        ([FINE, NOT_APPLICABLE], 0, 0, 0),
        ([FINE, BYPASS], 0, 1, 0),
        ([FINE, WRONG], 1, 1, 1),
        ([FINE, EXPLAINED], 0, 1, 0),
        ([FINE, UNKNOWN], 3, 3, 1),
        ([WRONG, UNKNOWN], 1, 1, 1),
        ([BYPASS, UNKNOWN], 3, 1, 1),
    ],
)
def test_what_counts_as_found(cells: Sequence[Cell], mismatch: int, bypass: int, unknown: int) -> None:
    assert status(cells, "mismatch") == mismatch
    assert status(cells, "bypass") == bypass
    assert status(cells, "unknown") == unknown
    assert status(cells, "never") == 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (HONEST, exits.OK),
        (QUIRKY, exits.OK),
        (LYING, exits.FOUND),
        ((*LYING, "--fail-on", "never"), exits.OK),
        ((*QUIRKY, "--fail-on", "bypass"), exits.FOUND),
        ((*HONEST, "--fail-on", "bypass"), exits.OK),
        (("probe", "--fail-on", "bypass", "model", "quirky", "--experiment", "ring"), exits.FOUND),
        (("probe", "--fail-on", "never", "model", "lying", "--experiment", "ring"), exits.OK),
        (("--version",), exits.OK),
        (("--help",), exits.OK),
        (("--fail-on", "never"), exits.OK),
        (("scan", "--fail-on", "never"), exits.OK),
        ((), exits.OK),
        (("probe", "--list"), exits.OK),
    ],
)
def test_exit_status(args: Sequence[str], code: int) -> None:
    done = virtiova_run(*args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.qemu
def test_a_machine_that_dies_could_not_be_looked_at(tmp_path: File) -> None:
    fake = tmp_path / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho 'out of luck' >&2\nkill -9 $$\n")
    fake.chmod(0o755)
    args = ("probe", "qemu", "--device", "virtio-rng-pci", "--experiment", "device-writes")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = virtiova_run(*args, PATH=path)
    assert done.returncode == exits.COULD_NOT_LOOK
    assert "unknown" in done.stdout
    assert "out of luck" in done.stdout
    assert virtiova_run(*args, "--fail-on", "unknown", PATH=path).returncode == exits.FOUND


@pytest.mark.qemu
def test_qemu_refuses_the_command_line() -> None:
    device = f"virtio-blk-pci{ON},addr=4"
    done = virtiova_run("probe", "qemu", "--device", device, "--experiment", "ring")
    assert done.returncode == exits.OK, "as predicted"
    assert "refused" in done.stdout
    assert "VIRTIO_F_IOMMU_PLATFORM was supported by neither" in done.stdout


def test_our_own_bug_is_70() -> None:
    bug = "import virtiova.cli.probe as p, virtiova.cli.main as m, sys\np.run = lambda o: 1 // 0\nm.entry()"
    done = subprocess.run(
        [sys.executable, "-c", bug, "probe"], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == exits.INTERNAL
    assert "ZeroDivisionError" in done.stderr
    assert "please report" in done.stderr


# -- without QEMU --------------------------------------------------------------------------------------------------


def test_without_qemu_the_default_table_is_the_models_and_says_so(tmp_path: File) -> None:
    done = virtiova_run("probe", PATH=str(tmp_path))
    rows = [line.split() for line in done.stdout.splitlines()[1:] if line.startswith(("model", "q35"))]
    assert rows
    assert {row[0] for row in rows} == {"model"}
    assert "No real device was probed" in done.stdout
    assert "apt-get install qemu-system-x86" in done.stdout
    assert "in-process machine" in done.stderr
    assert done.returncode == exits.OK
    assert "NOT AS PREDICTED" not in done.stdout


def test_without_qemu_json_is_still_json(tmp_path: File) -> None:
    done = virtiova_run("probe", "-j", PATH=str(tmp_path))
    assert {c["machine"] for c in json.loads(done.stdout)["cells"]} == {"model"}
    assert "in-process machine" in done.stderr


@pytest.mark.usefixtures("no_qemu")
@pytest.mark.parametrize("device", ["virtio-blk-pci", f"virtio-net-pci{ON}", "edu"])
def test_without_qemu_a_device_of_qemu_is_not_possible(capsys: pytest.CaptureFixture[str], device: str) -> None:
    code, out, err = answer(capsys, "probe", "qemu", "--device", device)
    assert (code, out) == (exits.NOT_POSSIBLE, "")
    assert "qemu-system-x86_64 is not installed" in err


@pytest.mark.usefixtures("no_qemu")
def test_without_qemu_a_wrong_name_is_still_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "probe", "qemu", "--device", "virtio-blq-pci")[0] == exits.USAGE
    assert answer(capsys, *HONEST)[0] == exits.OK


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (("prob",), "probe"),
        (("probe", "qemo"), "qemu"),
        (("probe", "model", "onest"), "honest"),
        (("probe", "model", "liying"), "lying"),
        (("probe", "model", "honest", "--device", "bkl"), "blk"),
        (("probe", "model", "honest", "--iommu", "sotf"), "soft"),
        (("probe", "model", "honest", "--experiment", "device-write"), "device-writes"),
        (("probe", "model", "honest", "--experimnt", "ring"), "--experiment"),
        (("probe", "--fail-onn", "never"), "--fail-on"),
        (("probe", "qemu", "--device", "virtio-blk-pcl"), "virtio-blk-pci"),
        (("probe", "qemu", "--device", "virtio-blk-pci", "--iommu", "intl"), "intel"),
        (("probe", "qemu", "--device", "virtio-blk-pci", "--machine", "q53"), "q35"),
        (("probe", "qemu", "--device", "virtio-blk-pci", "--experiment", "rings"), "ring"),
        (("probe", "qemu", "--device", "virtio-blk-pci-transitional", "--interface", "legcy"), "legacy"),
        (("explain", "QEMU-BUS-MASTR"), "QEMU-BUS-MASTER"),
        (("explain", "rule", "--platform", "xenn"), "xen"),
    ],
)
def test_the_nearest_valid_name(capsys: pytest.CaptureFixture[str], args: Sequence[str], near: str) -> None:
    code, out, err = answer(capsys, *args)
    assert (code, out) == (exits.USAGE, "")
    assert re.search(rf"did you mean '{re.escape(near)}'|choose from .*\b{re.escape(near)}\b", err), err


@pytest.mark.qemu
def test_an_option_of_a_device_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    device = "virtio-blk-pci,iommu_platfrom=on"
    code, out, err = answer(capsys, "probe", "qemu", "--device", device, "--experiment", "ring")
    assert (code, out) == (exits.USAGE, "")
    assert "did you mean 'iommu_platform'" in err


@pytest.mark.parametrize(
    "args",
    [
        ("probe", "qemu"),
        ("probe", "qemu", "--device", ""),
        ("probe", "qemu", "--device", "virtio-blk-pci,,"),
        ("probe", "qemu", "--device", "virtio-blk-pci\n"),
        ("probe", "qemu", "--device", "virtio-blk-pci", "--iommu", "none,aw-bits=48"),
        ("probe", "qemu", "--device", "edu", "--experiment", "ring"),
        ("probe", "--jobs", "0"),
        ("probe", "--jobs", "many"),
        ("probe", "--fail-on", "sometimes"),
        ("probe", "--color", "red"),
        ("probe", "model"),
        ("explain", "rule", "--offered", "no", "--accepted", "yes"),
    ],
)
def test_other_misuse(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> None:
    code, out, err = answer(capsys, *args)
    assert (code, out) == (exits.USAGE, "")
    assert err.splitlines()[-1].startswith("virtiova: ")


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "probe", "--list")
    words = set(re.split(r"[\s,;()]+", out))
    named = {"q35", "model", "none", "intel", "soft", "virtio-blk-pci", "edu", "honest", "quirky", "lying"}
    named |= {*BOARDS, *(word for board in BOARDS.values() for word in (*board.iommus, *devices(board)))}
    assert code == exits.OK
    assert named | set(EXPERIMENTS) <= words
    assert max(map(len, out.splitlines())) <= 100


# -- JSON, files ----------------------------------------------------------------------------------------------------


def check_schema(text: str) -> list[dict[str, Any]]:
    document = json.loads(text)
    assert set(document) == {"schema", "cells"}
    assert document["schema"] == "virtiova/probe/1"
    cells: list[dict[str, Any]] = document["cells"]
    for one in cells:
        assert set(one) - {"iommu_options", "device_options"} == KEYS
        assert all(type(one[key]) is str for key in ("machine", "iommu", "device", "experiment", "address", "observed"))
        assert one["offered"] in (True, False, None)
        assert one["accepted"] in (True, False, None)
        assert one["observed"] in set(Path)
        assert set(one["predicted"]) <= set(Path)
        assert one["address"] in {"gpa", "iova", "machine", "other", "unknown"}
        assert one["explained"] is None or type(one["explained"]) is str
        assert set(one["evidence"]) == set(Evidence.__dataclass_fields__) - {"neighbours", "inside", "outside"}
        for witness in one["evidence"]["witnesses"]:
            assert set(witness) == {"role", "page", "gpa", "offset", "before", "after"}
            assert re.fullmatch(r"[0-9a-f]*", witness["before"] + witness["after"])
    return cells


@pytest.mark.parametrize("behaviour", ["honest", "quirky", "lying"])
def test_json(capsys: pytest.CaptureFixture[str], behaviour: str) -> None:
    code, out, err = answer(capsys, "probe", "-j", "model", behaviour)
    cells = check_schema(out)
    assert [one["experiment"] for one in cells] == GENERAL
    assert code == (exits.FOUND if behaviour == "lying" else exits.OK)
    assert err == ""


@pytest.mark.qemu
def test_json_of_qemu(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(
        capsys, "probe", "qemu", "--device", f"virtio-net-pci{ON}", "-j", "--experiment", "device-reads",
        "--experiment", "not-taken",
    )  # fmt: skip
    reads, not_taken = check_schema(out)
    assert (reads["offered"], reads["accepted"], reads["observed"]) == (True, True, "translated")
    assert (not_taken["offered"], not_taken["accepted"], not_taken["observed"]) == (True, False, "refused")
    assert code == exits.OK


def test_files_beside_the_table(capsys: pytest.CaptureFixture[str], tmp_path: File) -> None:
    as_json, as_text = tmp_path / "x.json", tmp_path / "x.txt"
    code, out, _ = answer(capsys, *LYING, "-o", str(as_json), "-o", str(as_text))
    assert code == exits.FOUND
    (one,) = check_schema(as_json.read_text())
    assert one["observed"] == "bypass"
    assert as_text.read_text().splitlines()[0].split() == out.splitlines()[0].split()
    assert "NOT AS PREDICTED" in as_text.read_text()
    code, out, err = answer(capsys, *LYING, "-q", "-o", str(as_json))
    assert (code, out, err) == (exits.FOUND, "", "")


@pytest.mark.parametrize("name", ["x.yaml", "x", "x.json.gz", ".json"])
def test_a_bad_suffix_is_seen_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: File, name: str
) -> None:
    from virtiova.probe import Runner

    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("something was run"))
    code, out, err = answer(capsys, *HONEST, "-o", str(tmp_path / name))
    assert (code, out) == (exits.USAGE, "")
    assert ".json" in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: File) -> None:
    code, out, err = answer(capsys, *HONEST, "-o", str(tmp_path / "nowhere" / "x.json"))
    assert (code, out) == (exits.USAGE, "")
    assert "nowhere" in err
    (tmp_path / "folder.json").mkdir()
    code, _, err = answer(capsys, *HONEST, "-o", str(tmp_path / "folder.json"))
    assert code in (exits.USAGE, exits.COULD_NOT_LOOK)
    assert "folder.json" in err


def test_verbose_gives_the_chain_of_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    _, brief, _ = answer(capsys, *HONEST)
    _, long, _ = answer(capsys, *HONEST, "-v")
    assert "device-uses-platform" not in brief
    assert "yes device-uses-platform" in long
    assert long.startswith(brief)


# -- scripts --------------------------------------------------------------------------------------------------------


def rows_of_json(text: str) -> list[list[str]]:
    names = ("machine", "iommu", "device", "experiment")
    return [[*(c[n] for n in names), *c["predicted"], "->", c["observed"]] for c in check_schema(text)]


def same_by_script(*args: str) -> int:
    program = virtiova_run(*args, "--script")
    assert program.returncode == exits.OK, program.stderr
    done = subprocess.run(
        [sys.executable, "-"], input=program.stdout, env=environment(), capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    asked = virtiova_run(*args, "-j")
    by_script = virtiova_run(*args, "-j", "--script")
    again = subprocess.run(
        [sys.executable, "-"], input=by_script.stdout, env=environment(), capture_output=True, text=True,
        timeout=SECONDS, check=False,
    )  # fmt: skip
    # What an entropy device gives is another thing each time.
    assert (rows_of_json(again.stdout), again.returncode) == (rows_of_json(asked.stdout), asked.returncode)
    assert [line.split() for line in done.stdout.splitlines()] == rows_of_json(asked.stdout)
    assert done.returncode == asked.returncode
    return done.returncode


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("probe", "model", "honest"), exits.OK),
        (("probe", "model", "lying", "--device", "rng", "--iommu", "soft"), exits.FOUND),
        (("probe", "model", "lying", "--device", "net", "--iommu", "none", "--jobs", "1"), exits.OK),
        ((*QUIRKY, "--experiment", "ring"), exits.OK),
    ],
)
def test_the_script_does_the_same(args: Sequence[str], code: int) -> None:
    assert same_by_script(*args) == code


@pytest.mark.qemu
def test_the_script_does_the_same_on_qemu() -> None:
    device = ("--device", "virtio-blk-pci-transitional", "--interface", "legacy", "--iommu", "intel,aw-bits=48")
    assert same_by_script("probe", "qemu", *device, "--experiment", "ring", "--experiment", "not-taken") == exits.OK


@pytest.mark.parametrize(
    ("machine", "device", "iommu"),
    [
        ("q35", "virtio-blk-pci", "intel"),
        ("virt", "virtio-blk-pci", "smmuv3"),
        ("virt-mmio", "virtio-blk-device", "smmuv3"),
        ("sun4u", "virtio-blk-pci", "sabre"),
        ("pseries", "virtio-blk-pci", "tce"),
    ],
)
def test_each_machine_has_an_iommu_of_its_own(
    capsys: pytest.CaptureFixture[str], machine: str, device: str, iommu: str
) -> None:
    code, out, err = answer(capsys, "probe", "qemu", "--machine", machine, "--device", device, "--script")
    assert (code, err) == (exits.OK, "")
    assert f"iommu='{iommu}'" in out


@pytest.mark.parametrize(
    ("machine", "device", "near"),
    [
        ("virt-mmio", "virtio-blk-devise", "virtio-blk-device"),
        ("sun4u", "rtl8193", "rtl8139"),
        ("virt", "virtio-blk-pci-transitonal", "virtio-blk-pci-transitional"),
    ],
)
def test_the_nearest_device_of_that_machine(
    capsys: pytest.CaptureFixture[str], machine: str, device: str, near: str
) -> None:
    code, out, err = answer(capsys, "probe", "qemu", "--machine", machine, "--device", device)
    assert (code, out) == (exits.USAGE, "")
    assert f"did you mean '{near}'" in err


def test_the_script_of_a_hostile_name_is_harmless() -> None:
    name = "x'); raise SystemExit(99)  #"
    assert virtiova_run("probe", "model", name, "--script").returncode == exits.USAGE
