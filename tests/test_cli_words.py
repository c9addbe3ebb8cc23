# SPDX-License-Identifier: Apache-2.0
"""What the command line says in words: why it ends as it does, what was seen, and what its words mean."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File

import pytest

from virtiova import probe
from virtiova.addr import AddressKind
from virtiova.cli import exits, glossary
from virtiova.cli.main import main
from virtiova.cli.probe import status
from virtiova.report.text import in_words
from virtiova.result import Cell, Evidence, Path

FINE = Cell(
    "q35", "intel", "d", "ring", True, True, AddressKind.IOVA, [Path.TRANSLATED], Path.TRANSLATED, None, Evidence()
)
AROUND = replace(FINE, offered=False, accepted=False, predicted=[Path.BYPASS], observed=Path.BYPASS)
LYING = replace(FINE, observed=Path.BYPASS)
DIRECT = replace(FINE, predicted=[Path.DIRECT], observed=Path.DIRECT)
SILENT = replace(FINE, observed=Path.UNKNOWN)


# -- exit statuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "fail_on", "code", "said"),
    [
        ([FINE, AROUND, AROUND], "bypass", 1, "exit status 1: 2 cells observed as bypass (--fail-on bypass)"),
        ([FINE, SILENT], "unknown", 1, "exit status 1: 1 cell observed as unknown (--fail-on unknown)"),
        # The table shows in capitals what is wrong.
        ([AROUND, LYING], "bypass", 1, ""),
        ([FINE, LYING], "mismatch", 1, ""),
        ([FINE, AROUND], "mismatch", 0, ""),
        ([FINE, SILENT], "bypass", 3, ""),
    ],
)
def test_why_it_is_1_is_said_where_the_table_does_not(
    cells: list[Cell], fail_on: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(cells, fail_on) == code
    assert capsys.readouterr() == ("", f"virtiova: {said}\n" if said else "")


def test_a_signal_is_in_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for signum, code, word in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ):

        def ended(_: object, signum: int = signum) -> int:
            raise KeyboardInterrupt(signum)

        monkeypatch.setattr("virtiova.cli.explain.run", ended)
        assert main(["explain", "rule"]) == code
        assert capsys.readouterr().err == f"virtiova: {word}\n"


@pytest.mark.parametrize(
    "words",
    [
        "probe --jobs 1 --jobs 2",
        "probe --jobs 1 qemu --device a --jobs 2",
        "probe --fail-on bypass model honest --fail-on never",
        "matrix --jobs 1 --jobs 1",
        "matrix --results a --results b",
        "matrix --scheduler a --scheduler b",
        "matrix --fail-on never --fail-on bypass",
        "matrix --color always --color never",
        "guest run x86-vtd --bit on --bit off",
        "guest run x86-vtd --seconds 1 --seconds 2",
        "guest run x86-vtd --jobs 1 --jobs 2",
        "explain rule --offered yes --offered no",
    ],
)
def test_an_option_with_one_value_is_given_once(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == exits.USAGE
    assert "is given twice" in capsys.readouterr().err


def test_the_next_command_line_starts_afresh(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["explain", "rule", "--offered", "yes"]) == exits.OK
    assert "twice" not in capsys.readouterr().err


def test_the_script_writes_the_same_files(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "model", "honest", "--experiment", "ring", "-q"]
    files = [tmp_path / name for name in ("a.json", "a.txt")]
    outputs = [word for file in files for word in ("-o", str(file))]
    assert main([*words, *outputs]) == exits.OK
    written = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    capsys.readouterr()
    assert main([*words, *outputs, "--script"]) == exits.OK
    program = capsys.readouterr().out
    assert not any(file.exists() for file in files)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (exits.OK, "", "")
    assert [file.read_text() for file in files] == written


@pytest.mark.parametrize(
    "words",
    [
        ("vfio", "0000:03:00.0", "--write", "--echo", "--i-know"),
        ("vhost", "/dev/vhost-net"),
        ("vdpa", "/dev/vhost-vdpa-0", "--write", "--echo"),
        ("vhost-user", "--spawn", "true {socket}", "--type", "net", "--echo"),
        ("qemu", "--device", "virtio-rng-pci,iommu_platform=on,disable-legacy=on"),
        ("model", "honest"),
    ],
)
def test_the_script_gives_each_argument_to_who_has_it(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = words[0].replace("-", "_")
    signature = inspect.signature(getattr(probe, name))
    given: list[inspect.BoundArguments] = []

    def called(*positional: object, **named: object) -> list[Cell]:
        given.append(signature.bind(*positional, **named))
        return []

    monkeypatch.setattr(probe, name, called)
    for jobs in (1, 3):
        command = ["probe", *words, "--ring", "packed", "--experiment", "ring", "--jobs", str(jobs), "--script"]
        assert main(command) == exits.OK
        with pytest.raises(SystemExit):
            exec(compile(capsys.readouterr().out, "script", "exec"), {})
        bound = given[-1].arguments
        assert bound.get("jobs", jobs) == jobs
        assert (bound.get("ring", ""), bound["experiments"]) in [("packed", ["ring"]), ("", ["ring"])]
    assert len(given) == 2


# -- what was seen -------------------------------------------------------------------------------------------------


def test_what_was_seen_in_words() -> None:
    assert in_words([FINE, FINE, AROUND, DIRECT, DIRECT, SILENT]) == [
        "With bit 33 the bytes went through the IOMMU (2 of 2 cells).",
        "Without bit 33 the bytes went around the IOMMU (1 of 1 cells).",
        "Where nothing translates they went straight to memory (2 cells).",
        "The other 1 cell: 1 unknown.",
    ]
    assert in_words([FINE, LYING]) == [
        "With bit 33 the bytes went through the IOMMU (1 of 2 cells), around the IOMMU (1 of 2 cells)."
    ]
    assert in_words([SILENT]) == []


# -- words ---------------------------------------------------------------------------------------------------------


def test_the_glossary_that_is_installed_is_the_document() -> None:
    document = File(__file__).parents[1] / "docs" / "glossary.md"
    installed = File(glossary.__file__).with_name("glossary.md")
    assert installed.read_text() == document.read_text(), "copy docs/glossary.md to src/virtiova/cli/glossary.md"


def test_every_path_and_every_bold_word_has_its_entry() -> None:
    words = glossary.entries()
    assert {str(path) for path in Path} <= words.keys()
    text = File(glossary.__file__).with_name("glossary.md").read_text()
    heads = [line.split("**")[1] for line in text.splitlines() if line.startswith("**")]
    assert {word for head in heads for word in head.split(", ")} <= words.keys()
    assert not [entry for entry in words.values() if "**" in entry or "](" in entry]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bypass", "bypass: an IOMMU is in front and was gone around (page B)\n"),
        ("BYPASS", "bypass: an IOMMU"),
        ("Page B", "twin page. A page with one address and two homes."),
        ("back end", "front end, back end. The two ends of vhost-user"),
        ("experiment", "experiment. One question to a device, written once against the ports. All of them."),
    ],
)
def test_a_word_is_explained(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", word]) == exits.OK
    assert capsys.readouterr().out.startswith(said)


def test_a_word_that_is_none_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "bypas"]) == exits.USAGE
    assert "did you mean 'bypass'" in capsys.readouterr().err
