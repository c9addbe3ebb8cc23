# SPDX-License-Identifier: Apache-2.0
"""JUnit XML: what a CI system reads out of it."""

from __future__ import annotations

from xml.etree import ElementTree

import report_kit as kit
from virtiova.report import junit
from virtiova.result import Path, Row


def parsed(rows: kit.Rows) -> ElementTree.Element:
    return ElementTree.fromstring("".join(junit.suites(rows, kit.SYSTEMS)))


def test_suites_and_their_counts() -> None:
    root = parsed(kit.rows())
    assert [(s.get("id"), s.get("name"), s.get("tests")) for s in root] == [
        ("plain", "Plain & simple", "1"),
        ("real", "A device behind a real IOMMU", "10"),
    ]
    wanted = {"tests": "11", "failures": "1", "errors": "1", "skipped": "1"}
    assert {key: root.get(key) for key in wanted} == wanted
    for suite in root:
        for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(kind) == str(len(suite.findall(f"testcase/{tag}")))
        assert suite.get("tests") == str(len(suite.findall("testcase")))


def test_a_failure_says_what_and_why() -> None:
    (failure,) = parsed(kit.rows()).iter("failure")
    assert failure.get("message") == (
        "predicted translated, observed bypass: page B 0x00800000 written, page A untouched, no fault"
    )
    assert failure.text is not None
    assert "yes bit-taken: the driver took bit 33 [virtio 1.4, 6.2]" in failure.text


def test_a_known_departure_passes_and_says_so() -> None:
    said = [element.text or "" for element in parsed(kit.rows()).iter("system-out")]
    assert [text for text in said if "explained by QEMU-BUS-MASTER" in text]


def test_a_case_is_known_by_its_class_and_name() -> None:
    first = next(parsed(kit.rows()).iter("testcase"))
    assert (first.get("classname"), first.get("name")) == (
        "QEMU-7.2.22.q35.none",
        "virtio-blk-pci on device-writes",
    )


def test_hostile_words_stay_words() -> None:
    root = parsed(kit.Rows(Row("real", kit.HOSTILE, kit.hostile()), Row("real", "", kit.cell(Path.BLOCKED))))
    assert {element.tag for element in root.iter()} == {
        "testsuites",
        "testsuite",
        "testcase",
        "error",
        "system-out",
    }
    (error,) = root.iter("error")
    assert "</script><script>alert(1)</script>" in (error.get("message") or "")
