# SPDX-License-Identifier: Apache-2.0
"""Real back ends under all cases: our own, QEMU's storage daemon and file server, DPDK's test program.

What is seen of each is written down in docs/conformance.md; this holds it against them.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from vhost_user_kit import STORAGE_DAEMON, TESTPMD, VIRTIOFSD, commands, installed
from virtiova.cli import main
from virtiova.conformance.cases import CASES

SERVE = f"{sys.executable} -m virtiova serve"
Answers = dict[str, dict[str, Any]]

needs_daemon = pytest.mark.skipif(not installed("qemu-storage-daemon"), reason="n/a: no qemu-storage-daemon")
needs_testpmd = pytest.mark.skipif(not installed("dpdk-testpmd"), reason="n/a: no dpdk-testpmd (apt install dpdk-dev)")


def asked(capsys: pytest.CaptureFixture[str], spawn: str, kind: str, *words: str) -> Answers:
    """All cases, or those that are named, of a command; by id."""
    main.main(["probe", "vhost-user", "--conformance", "-j", "--spawn", spawn, "--type", kind, *words])
    cells = json.loads(capsys.readouterr().out)["cells"]
    return {cell["case"]: cell for cell in cells}


def those(answers: Answers, result: str) -> set[str]:
    """The ids of the cases with a result."""
    return {name for name, cell in answers.items() if cell["result"] == result}


def not_so_far(answers: Answers) -> Answers:
    """The cases that did not get as far as their question."""
    return {name: cell for name, cell in answers.items() if "did not get as far" in cell["evidence"]["seen"]}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of what was started for a test."""
    before = {line for line in commands(os.getpid()) if line}
    yield
    assert {line for line in commands(os.getpid()) if line} <= before


OWN = {
    "blk": f"{SERVE} blk {{image}} --num-queues 2 --socket-path {{socket}}",
    "net": f"{SERVE} net --datagram-fd {{net}} --socket-path {{socket}}",
    "rng": f"{SERVE} rng --socket-path {{socket}}",
    "console": f"{SERVE} console --terminal-fd {{net}} --socket-path {{socket}}",
}


@pytest.mark.parametrize("kind", OWN)
def test_our_own_pass(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = asked(capsys, OWN[kind], kind)
    assert answers.keys() == CASES.keys()
    wrong = {name: cell["evidence"]["seen"] for name, cell in answers.items() if cell["result"] in ("fail", "unknown")}
    assert not wrong


@needs_daemon
def test_the_storage_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    """7.2: without bit 33; it takes every piece of the configuration from its start."""
    answers = asked(capsys, STORAGE_DAEMON, "blk")
    assert "bit33-offered" in those(answers, "unknown")
    assert not not_so_far(answers)
    assert "config-read" in those(answers, "fail")
    assert {"bit33-declined", "ring-user-address"} <= those(answers, "pass")


@needs_daemon
def test_virtiofsd(capsys: pytest.CaptureFixture[str]) -> None:
    """7.2: without bit 33; it ends with its connection, and takes the first byte of a message for all of its header."""
    answers = asked(capsys, VIRTIOFSD, "fs")
    assert "bit33-offered" in those(answers, "unknown")
    assert not not_so_far(answers)
    assert those(answers, "pass").isdisjoint({"message-in-pieces"})
    assert {"bit33-declined", "ring-user-address"} <= those(answers, "pass")


def program(*, iommu: bool) -> str:
    """DPDK's test program, with a name of its own."""
    command = TESTPMD.replace("{prefix}", f"virtiova-{uuid.uuid4().hex[:8]}")
    return command if iommu else command.replace(",iommu-support=1", "")


@needs_testpmd
def test_testpmd_without_an_iommu(capsys: pytest.CaptureFixture[str]) -> None:
    few = [word for name in ("bit33-offered", "bit33-declined", "translate") for word in ("--case", name)]
    answers = asked(capsys, program(iommu=False), "net", "--echo", "--jobs", "1", *few)
    assert {name: cell["result"] for name, cell in answers.items()} == {
        "bit33-offered": "unknown",
        "bit33-declined": "pass",
        "translate": "n/a",
    }


@needs_testpmd
def test_testpmd_with_an_iommu(capsys: pytest.CaptureFixture[str]) -> None:
    """22.11: it translates what it is told of; a table that has to be asked for in two pieces it does not wait for."""
    few = [word for name in ("bit33-offered", "translate", "indirect-two-pages") for word in ("--case", name)]
    answers = asked(capsys, program(iommu=True), "net", "--echo", "--jobs", "1", *few)
    assert {name: cell["result"] for name, cell in answers.items()} == {
        "bit33-offered": "pass",
        "translate": "pass",
        "indirect-two-pages": "fail",
    }


@pytest.mark.sweep
@needs_testpmd
@pytest.mark.parametrize("iommu", [False, True])
def test_testpmd_under_all_cases(iommu: bool, capsys: pytest.CaptureFixture[str]) -> None:
    answers = asked(capsys, program(iommu=iommu), "net", "--echo", "--jobs", "1")
    assert answers.keys() == CASES.keys()
    assert "bit33-offered" in those(answers, "pass" if iommu else "unknown")
    assert not not_so_far(answers)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("behaviour", "found"), [("leaky", {"translate", "ring-iova"}), ("stale", {"ring-page-invalidated"})]
)
def test_the_wrong_ones_fail(behaviour: str, found: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers = asked(capsys, f"{SERVE} {behaviour} {{image}} --socket-path {{socket}}", "blk")
    assert found <= those(answers, "fail")
