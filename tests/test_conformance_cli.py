# SPDX-License-Identifier: Apache-2.0
"""``probe vhost-user --conformance``, its formats, and ``explain`` of a case."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from sarif_pydantic import Sarif

from virtiova.cli import main
from virtiova.conformance.cases import CASES
from virtiova.result import Verdict

SERVE = f"{sys.executable} -m virtiova serve"
DISK = f"{SERVE} blk {{image}} --socket-path {{socket}}"
LEAKY = f"{SERVE} leaky {{image}} --socket-path {{socket}}"
FEW = [word for name in ("bit33-offered", "translate", "bit33-declined") for word in ("--case", name)]


def conformance(*words: str) -> int:
    """The command, and its exit status."""
    return main.main(["probe", "vhost-user", "--conformance", *words])


def test_an_honest_back_end_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("--spawn", DISK, "--type", "blk", *FEW) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["pass", name] for name in FEW[1::2]]
    for line, name in zip(lines, FEW[1::2], strict=False):
        assert CASES[name].title in line
        assert str(CASES[name].citation) in line
    assert lines[-2:] == ["3 cases: 3 pass", "With bit 33 its bytes go where the IOMMU's mappings lead."]


def test_a_leaky_one_fails_with_evidence_of_where_its_bytes_went(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [word for suffix in ("json", "xml", "sarif", "txt") for word in ("-o", str(tmp_path / f"c.{suffix}"))]
    assert conformance("--spawn", LEAKY, "--type", "blk", *FEW, *out) == 1
    assert "FAIL     translate" in capsys.readouterr().out
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["schema"] == "virtiova/probe/1"
    results = {cell["case"]: cell for cell in document["cells"]}
    assert {name: cell["result"] for name, cell in results.items()} == {
        "bit33-offered": "pass",
        "translate": "fail",
        "bit33-declined": "pass",
    }
    leak = results["translate"]
    assert leak["citation"] == str(CASES["translate"].citation)
    touched = {w["page"] for w in leak["evidence"]["witnesses"] if w["role"] == "data" and w["before"] != w["after"]}
    assert touched == {"B"}
    suite = ET.parse(tmp_path / "c.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    (failure,) = suite.iter("failure")
    assert "wanted A" in (failure.get("message") or "")
    sarif = Sarif.model_validate_json((tmp_path / "c.sarif").read_text())
    (run,) = sarif.runs
    assert run.tool.driver.rules is not None
    assert [rule.id for rule in run.tool.driver.rules] == [result.rule_id for result in run.results or []]
    kinds = [json.loads(result.model_dump_json(by_alias=True))["kind"] for result in run.results or []]
    assert kinds == ["pass", "fail", "pass"]
    assert "FAIL     translate" in (tmp_path / "c.txt").read_text()


def test_what_is_asked_of_one_type_only_does_not_apply_to_others(capsys: pytest.CaptureFixture[str]) -> None:
    spawn = f"{SERVE} rng --socket-path {{socket}}"
    only = [case.id for case in CASES.values() if case.kinds and "rng" not in case.kinds]
    words = [word for name in ("translate", *only) for word in ("--case", name)]
    assert conformance("-j", "--spawn", spawn, "--type", "rng", *words) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["case"]: cell["result"] for cell in cells} == {"translate": "pass", **dict.fromkeys(only, "n/a")}


def test_the_type_is_guessed_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("--spawn", DISK, "--case", "bit33-offered") == 0
    assert "of type blk is a guess" in capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", name]) == 0
    said = capsys.readouterr().out
    case = CASES[name]
    for text in (case.title, case.does, case.why, case.fix, str(case.citation)):
        assert len(text) > 10
        assert text in said


def test_at_least_one_case_has_each_thing_that_is_written_of_it() -> None:
    assert len({case.title for case in CASES.values()}) == len(CASES)
    for case in CASES.values():
        assert case.title[-1] not in ".!"
        assert case.why.endswith(".")
        assert case.fix.endswith(".")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--case", "translat"], "translate"),
        (["--experiment", "ring"], "--experiment does not go with --conformance"),
        (["--script"], "--script does not go with --conformance"),
        (["--ring", "packed"], "--ring does not go with --conformance"),
        (["--fail-on", "bypass"], "--fail-on takes mismatch, unknown or never"),
        (["--jobs", "0"], "--jobs"),
        (["-o", "c.csv"], ".sarif"),
    ],
)
def test_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance("--spawn", DISK, "--type", "blk", *words) == 2
    assert said in capsys.readouterr().err


def test_the_exit_status_of_what_has_no_answer() -> None:
    from virtiova.cli.conformance import status
    from virtiova.result import CaseEvidence, CaseResult

    def of(*verdicts: Verdict, readings: int = 2) -> list[CaseResult]:
        evidence = CaseEvidence("", readings=["so"] * readings)
        return [CaseResult("", "", "", "", "", verdict, "", evidence) for verdict in verdicts]

    assert status(of(Verdict.UNKNOWN, Verdict.PASS, readings=0)) == 3
    assert status(of(Verdict.UNKNOWN, Verdict.PASS, Verdict.FAIL, readings=0)) == 1
    assert status(of(Verdict.UNKNOWN, Verdict.NOT_APPLICABLE)) == 3
    assert status(of(Verdict.UNKNOWN, Verdict.PASS)) == 0
    assert status(of(Verdict.UNKNOWN, Verdict.PASS), "unknown") == 1
    assert status(of(Verdict.FAIL, Verdict.PASS)) == 1
    assert status(of(Verdict.FAIL), "never") == 0
