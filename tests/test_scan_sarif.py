# SPDX-License-Identifier: Apache-2.0
"""A scan as SARIF: what a code-scanning page makes of it."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest
from sarif_pydantic import Sarif

import scan_kit as kit
from virtiova.report import scan_sarif
from virtiova.result.scan import Place, Scan, Seen
from virtiova.scan.rules import RULES

SCANS = {"one": kit.scan(), "hostile": kit.hostile(), "fleet": kit.fleet(3), "none": Scan()}


def made(scan: Scan, folder: str = "/work") -> dict[str, Any]:
    """The one run of the log, which keeps to the format."""
    text = scan_sarif.document(scan, RULES, version="1.2.3", folder=folder)
    Sarif.model_validate_json(text)
    document = json.loads(text)
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    found: dict[str, Any] = run
    return found


@pytest.mark.parametrize("name", SCANS)
def test_every_finding_is_a_result_at_a_line_of_a_file(name: str) -> None:
    run = made(SCANS[name])
    assert len(run["results"]) == len(SCANS[name].findings)
    for result in run["results"]:
        (location,) = result["locations"]
        where = location["physicalLocation"]
        assert where["region"]["startLine"] >= 1
        assert where["artifactLocation"]["uri"].isascii()
        assert " " not in where["artifactLocation"]["uri"]
        if "ruleIndex" in result:
            assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    prints = [each["partialFingerprints"]["finding/v1"] for each in run["results"]]
    assert len(set(prints)) == len({(each.machine, each.device, each.id) for each in SCANS[name].findings})


def test_it_is_where_it_was_read() -> None:
    (result,) = [
        each for each in made(kit.scan())["results"] if each["partialFingerprints"]["finding/v1"] == "vm/virtio1/VA101"
    ]
    (location,) = result["locations"]
    assert location["physicalLocation"] == {"artifactLocation": {"uri": "vm.xml"}, "region": {"startLine": 12}}
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "vm/virtio1"
    assert [each["physicalLocation"]["region"]["startLine"] for each in result["relatedLocations"]] == [40]
    assert (result["level"], result["kind"]) == ("warning", "fail")
    assert result["message"]["text"].startswith("virtio1: goes around the IOMMU: bit 33 is not offered\n\nSeen: ")
    assert "Fix, QEMU: add iommu_platform=on to virtio1" in result["message"]["text"]


def test_what_is_ignored_is_suppressed_with_its_reason() -> None:
    suppressed = [each["suppressions"] for each in made(kit.scan())["results"] if "suppressions" in each]
    justified = {"kind": "external", "status": "accepted", "justification": "known, and in the window of maintenance"}
    assert suppressed == [[justified]]


def test_what_is_no_finding_is_a_notification() -> None:
    (invocation,) = made(kit.scan())["invocations"]
    said = {each["message"]["text"]: each["level"] for each in invocation["toolExecutionNotifications"]}
    assert said["vm: could not read /sys/x: not permitted"] == "warning"
    assert len(said) == 3
    assert sorted(said.values()) == ["note", "note", "warning"]


def test_every_rule_has_help() -> None:
    rules = made(Scan())["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in RULES]
    for rule, row in zip(rules, RULES, strict=True):
        assert row.why in rule["help"]["markdown"]
        assert all(f"**{product}**: `" in rule["help"]["markdown"] for product in row.fix)
        assert "{" not in rule["help"]["text"]
        assert rule["help"]["markdown"].count("`") == 2 * len(row.fix)


@pytest.mark.parametrize(
    ("name", "folder", "uri"),
    [
        ("vm.xml", "/work", "vm.xml"),
        ("./a/../vm.xml", "/work", "vm.xml"),
        ("/srv/a b/vm#1.xml", "/srv", "a%20b/vm%231.xml"),
        ("/etc/libvirt/vm.xml", "/work", "file:///etc/libvirt/vm.xml"),
        ("../vm.xml", "/srv/a", "file:///srv/vm.xml"),
        ("..vm.xml", "/work", "..vm.xml"),
        ("javascript:x", "/work", "javascript%3Ax"),
        ("n\u00fc\ud800\x00", "/work", "n%C3%BC%3F%EF%BF%BD"),
    ],
)
def test_files_are_relative_to_where_they_are_looked_for(name: str, folder: str, uri: str) -> None:
    assert scan_sarif.uri(name, folder) == uri


def test_what_is_in_no_file_is_shown_where_the_scan_began() -> None:
    found = Scan("guest", kit.scan().machines, [], [kit.finding("virtio1", seen=[Seen("not offered", kit.SYSFS)])])
    found.findings.append(kit.finding("virtio2", seen=[Seen("x", Place("log", "a.log"))]))
    for result in made(found)["results"]:
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "vm.xml"
        assert result["relatedLocations"] == []


def test_hostile_words_stay_words() -> None:
    run = made(kit.hostile())
    text = json.dumps(run)
    assert "\\u0000" not in text
    assert "\\u001b" not in text
    assert {each["locations"][0]["physicalLocation"]["region"]["startLine"] for each in run["results"]} == {3}
    assert "alert(1)" in unquote(run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])
