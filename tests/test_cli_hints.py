# SPDX-License-Identifier: Apache-2.0
"""What the command line answers to what cannot be: the nearest thing that can, in words to be typed."""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path as File

import pytest

from virtiova.addr import AddressKind
from virtiova.cli import exits, hints
from virtiova.cli.main import main
from virtiova.probe.plan import BEHAVIOURS
from virtiova.report.words import evidence_text
from virtiova.result import Cell, Evidence, Path


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("blk", "unknown command 'blk'; did you mean 'virtiova serve blk'?"),
        ("leaky img", "unknown command 'leaky'; did you mean 'virtiova serve leaky'?"),
        ("qemu", "unknown command 'qemu'; did you mean 'virtiova probe qemu'?"),
        ("list", "unknown command 'list'; valid: bench, explain, fuzz, gather, guest, matrix, probe, scan, serve"),
        ("matrx", "unknown command 'matrx'; did you mean 'matrix'?"),
        ("guest foo", "unknown verb 'foo'; valid: list, run"),
        ("serve nett", "unknown device 'nett'; did you mean 'net'?"),
        ("probe --device X", "--device goes with 'virtiova probe qemu'"),
        ("probe --spawn X", "--spawn goes with a target: vhost-user"),
        ("probe --experiment ring", "--experiment goes with a target: qemu, model, vhost-user, vfio, vhost or vdpa"),
        (
            "probe virtio-blk-pci",
            "unknown target 'virtio-blk-pci'; did you mean 'virtiova probe qemu --device virtio-blk-pci'?",
        ),
        ("probe edu", "unknown target 'edu'; did you mean 'virtiova probe qemu --device edu'?"),
        ("probe ./a.sock", "unknown target './a.sock'; did you mean 'virtiova probe vhost-user ./a.sock'?"),
        ("probe honest", "unknown target 'honest'; did you mean 'virtiova probe model honest'?"),
        ("probe vhost-usr", "unknown target 'vhost-usr'; did you mean 'vhost-user'?"),
        ("probe --fail-on x", "unknown value of --fail-on 'x'; valid: bypass, mismatch, never, unknown"),
        ("probe --color alwys", "unknown value of --color 'alwys'; did you mean 'always'?"),
        ("probe --jobs many", "--jobs takes a number, not 'many'"),
        ("explain foo", "unknown thing to explain 'foo'; 'virtiova explain' lists what there is"),
        (
            "probe qemu --device virtio-scsi-pci",
            "virtio-scsi-pci: there is no driver for it here; 'virtiova matrix --only types' asks its negotiation; "
            "with a driver: virtio-blk-pci, virtio-net-pci, virtio-rng-pci, virtio-balloon-pci, virtio-gpu-pci, "
            "virtio-mem-pci, virtio-pmem-pci, vhost-user-blk-pci, vhost-user-rng-pci",
        ),
    ],
)
def test_what_was_probably_meant(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(typed)) == exits.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"virtiova: {said}"


def test_a_device_that_another_board_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "qemu", "--machine", "sun4u", "--device", "virtio-mem-pci"]) == exits.USAGE
    assert "sun4u has no virtio-mem-pci; valid there: virtio-blk-pci, " in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "usage"), [("help", "virtiova [-h]"), ("help serve net", "virtiova serve net [-h]")])
def test_help_is_a_command_too(typed: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(typed.split())
    assert capsys.readouterr().out.startswith(f"usage: {usage}")


def test_all_that_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == exits.OK
    lines = capsys.readouterr().out.splitlines()
    names = [re.split(r"  +", line.strip())[0] for line in lines if line.startswith("  ")]
    assert len(names) == len(set(names))
    assert {"rule", "ring", "at-once", "control", "QEMU-BUS-MASTER", "bypass", "twin page", "negotiate"} <= {*names}
    for name in names:
        assert main(["explain", name]) == exits.OK
    assert main(["explain", "--offered", "yes"]) == exits.USAGE


def test_the_behaviours_are_those_of_the_model() -> None:
    assert hints.BEHAVIOURS == BEHAVIOURS


@pytest.mark.qemu
def test_a_matrix_that_is_interrupted_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: File
) -> None:
    def ended(*_: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr("virtiova.cli.matrix.collect", ended)
    words = ["matrix", "--only", "q35", "--only", "intel", "--only", "iommu"]
    assert main(words) == exits.TERMINATED
    said = "virtiova: ended by SIGTERM after 0 of N cells; "
    found = re.sub("of [0-9]+", "of N", capsys.readouterr().err)
    assert found == f"{said}--results FILE keeps what is done\n"
    kept = str(tmp_path / "a.jsonl")
    assert main([*words, "--results", kept]) == exits.TERMINATED
    assert re.sub("of [0-9]+", "of N", capsys.readouterr().err) == f"{said}{kept} has what is done\n"


def test_last_words_are_said_once_and_only_by_who_said_them() -> None:
    words = [
        "SET_FEATURES 0x0, 0 MISS, 0 UPDATE",
        "one",
        "two",
        "back end: three",
        "back end: does not say what it offers",
    ]
    cell = Cell("m", "i", "d", "ring", None, None, AddressKind.UNKNOWN, [], Path.UNKNOWN, None, Evidence(note="gone"))
    said = replace(cell, evidence=Evidence(note="gone", words=words))
    assert evidence_text(said) == "gone; it said: one; two; back end: three"
    assert evidence_text(replace(cell, evidence=Evidence(note="gone: one; two; three", words=words))) == (
        "gone: one; two; three"
    )
    silent = Evidence(note="gone", words=[words[0], words[-1], "back end: offers bit 33"])
    assert evidence_text(replace(cell, evidence=silent)) == "gone"
