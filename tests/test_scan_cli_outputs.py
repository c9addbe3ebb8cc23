# SPDX-License-Identifier: Apache-2.0
"""What becomes of a scan on the command line: files, formats, and findings that are not to count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import scan_kit as kit
from virtiova.cli import main, scan
from virtiova.errors import UsageError
from virtiova.report import scan_json
from virtiova.result.scan import Scan
from virtiova.scan.ignore import Ignore, apply, lines, option

IDS = ("VA101", "VA102", "VA105", "VA202")


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Scan:
    """What the scan finds, whatever it is given."""
    made = kit.scan()
    made.findings = [kit.finding("virtio1"), kit.finding("virtio3"), kit.finding("virtio3", "VA102")]
    monkeypatch.setattr(scan, "scan_views", lambda views: made)
    return made


def run(*words: str) -> int:
    """The command; its exit status."""
    return main.main(["scan", *words])


# -- what is ignored ---------------------------------------------------------------------------------------------


def test_an_option_ignores_a_finding_everywhere_or_of_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 1
    assert run("--ignore", "VA101@virtio1", "--ignore", "VA101@vm/virtio3") == 1
    assert capsys.readouterr().err == ""
    assert run("--ignore", "VA101", "--ignore", "VA102") == 0
    assert "no findings, 3 ignored" in " ".join(capsys.readouterr().out.split())


def test_a_file_gives_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ignore.txt"
    file.write_text("# of the test bench\n\nVA101@virtio1   it is a  test bench\nVA101@virtio3\n  VA102 later\n")
    assert run("--ignore-file", str(file), "-v") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "it is a test bench" in said.out
    assert f"{file}:4" in said.out.replace("\n  ", "")
    assert "VA101 virtio1: goes" in said.out.split("ignored: ", 1)[1]


def test_what_there_is_nothing_of_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--ignore", "VA101@virtio9") == 1
    assert capsys.readouterr().err == "virtiova: --ignore VA101@virtio9: nothing of it is found\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ignore", "VA1O1"], "--ignore VA1O1: unknown finding 'VA1O1'; did you mean 'VA101'?"),
        (["--ignore", ""], "'' is not of the form ID or ID@DEVICE"),
        (["--ignore", "VA101@"], "'VA101@' is not of the form"),
        (["--ignore-file", "/nonexistent"], "/nonexistent: cannot be read: No such file"),
        (["-o", "x.csv"], "x.csv: the suffix picks the format, and must be one of .txt, .json"),
        (["-j", "--format", "prom"], "-j is --format json"),
        (["-j", "--picture"], "--picture goes under the table"),
        (["-o", "/nonexistent/x.json"], "/nonexistent/x.json: cannot be written"),
    ],
)
def test_usage(words: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"VA101\nVA9999 why\n", "f:2: unknown finding 'VA9999'"),
        (b"@net0 why\n", "f:1: '@net0' is not of the form"),
        (b"\xff\xfe", r"f: not text in UTF-8 \(byte 0\)"),
        (b"#" * (1 << 20) + b"\n", "f: more than 1048576 bytes"),
    ],
)
def test_bad_files(data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(lines(data, "f", IDS))


def test_lines_and_options_are_the_same_things() -> None:
    first, second = lines(b"VA101@net0 because\r\nVA102\tof that\n", "f", IDS)
    assert first == Ignore("VA101", "net0", "because", "f:1")
    assert second == Ignore("VA102", "", "of that", "f:2")
    assert option("VA101@net0", IDS) == Ignore("VA101", "net0", "--ignore VA101@net0", "--ignore VA101@net0")


def test_the_first_that_covers_a_finding_gives_the_reason(found: Scan) -> None:
    named = [
        Ignore("VA101", "virtio1", "mine", ""),
        Ignore("VA101", "", "all", ""),
        Ignore("VA101", "x/virtio1", "", ""),
    ]
    assert apply(found, named) == named[2:]
    assert [each.ignored for each in found.findings] == ["mine", "all", ""]


# -- files and formats -------------------------------------------------------------------------------------------


def test_several_files_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [tmp_path / f"scan.{suffix}" for suffix in ("txt", "json", "jsonl", "prom")]
    assert run("-q", *(word for name in names for word in ("-o", str(name)))) == 1
    assert capsys.readouterr() == ("", "")
    assert sorted(tmp_path.iterdir()) == sorted(names), "nothing is left beside them"
    assert json.loads(names[1].read_text()) == json.loads(names[2].read_text())
    assert names[0].read_text().startswith("DEVICE")
    assert names[3].read_text().endswith('virtiova_scan_problems{machine="vm"} 1\n')


@pytest.mark.parametrize(
    ("format", "start"),
    [("text", "DEVICE"), ("json", '{\n  "schema"'), ("jsonl", '{"schema"'), ("prom", "# HELP virtiova_scan_info")],
)
def test_formats_on_standard_output(format: str, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--format", format) == 1
    assert capsys.readouterr().out.startswith(start)


def test_json_says_what_is_ignored(found: Scan, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-j", "--ignore", "VA102") == 1
    out = capsys.readouterr().out
    assert out == scan_json.document(found)
    assert [each["ignored"] for each in json.loads(out)["findings"]] == ["", "", "--ignore VA102"]


def test_an_old_file_stays_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "virtiova.prom"
    old.write_text("old")

    def fail(*_: object, **__: object) -> str:
        raise OSError("gone")

    monkeypatch.setattr("virtiova.report.scan_prometheus.document", fail)
    assert run("-o", str(old)) == 3
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_colour_is_asked_for_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert "\x1b" not in capsys.readouterr().out
    run("--color", "always")
    assert "\x1b[31m" in capsys.readouterr().out
