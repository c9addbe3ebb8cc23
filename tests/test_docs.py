# SPDX-License-Identifier: Apache-2.0
"""The documentation against the code: links, commands, sessions, tables, the order of layers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from doc_kit import PAGES, ROOT, Block, anchors, blocks, commands, links, pattern, session
from test_layers import ORDER
from virtiova import probe
from virtiova.cli import main
from virtiova.conformance.cases import CASES
from virtiova.errors import UsageError
from virtiova.policy import DEPARTURES
from virtiova.probe.experiment import EXPERIMENTS, find
from virtiova.scan.rules import BY_ID, RULES

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SESSIONS = [block for page in PAGES for block in blocks(page) if block.language == "console"]
COMMANDS = [pytest.param(text, id=f"{page.name}:{line}") for page in PAGES for line, text in commands(page)]


# -- links -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_resolve(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_the_index_links_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in links(index)}
    assert {*PAGES} - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_place_of_one_machine(page: Path) -> None:
    assert not re.search(r"/(work|root|home|tmp)\b", page.read_text())


# -- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_parse_and_name_what_exists(text: str) -> None:
    words = shlex.split(text, comments=True)[1:]
    if {"--help", "--version"} & set(words):
        with pytest.raises(SystemExit, match=r"^0$"):
            main.parser().parse_args(words)
        return
    options = main.parser().parse_args(words)
    for name in getattr(options, "experiment", None) or []:
        find(name)
    what = getattr(options, "what", "rule")
    assert {*(getattr(options, "case", None) or [])} <= CASES.keys()
    assert what in {"ID", "CASE", *CASES, *BY_ID, "rule", *EXPERIMENTS, *(row.id for row in DEPARTURES)}


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(UsageError):
        main.parser().parse_args(["probe", "--no-such-option"])


def _marked(block: Block) -> object:
    real = any(re.match(r"virtiova (matrix|probe(?! model)(?!.* --script))", step.command) for step in session(block))
    return pytest.param(block, id=str(block), marks=[pytest.mark.qemu] if real else [])


@pytest.mark.parametrize("block", [_marked(block) for block in SESSIONS])
def test_console_sessions_are_real(block: Block) -> None:
    steps = session(block)
    assert steps
    for step in steps:
        program, *words = shlex.split(step.command)
        assert program == "virtiova", step.command
        done = subprocess.run(
            [sys.executable, "-m", "virtiova", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        printed = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
        if not pattern(step.output).fullmatch(printed):
            pytest.fail(f"$ {step.command}\n{printed}", pytrace=False)
        assert step.status in {None, done.returncode}, step.command


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a\n...\nd", "a\nd\n", True),
        ("a\nd", "a\nb\nd\n", False),
        ("a (b)", "a (b)\n", True),
        ("", "", True),
        ("", "a\n", False),
    ],
)
def test_sessions_are_compared_line_by_line(shown: str, printed: str, same: bool) -> None:
    assert bool(pattern(shown).fullmatch(printed)) is same


# -- tables that are made from the code ----------------------------------------------------------------------------


def experiment_table() -> str:
    """What each experiment asks, and what is predicted in four settings."""
    settings = {
        "off, IOMMU": ("quirky", "soft"),
        "on, IOMMU": ("honest", "soft"),
        "off, none": ("quirky", "none"),
        "on, none": ("honest", "none"),
    }
    predicted = {
        title: {
            cell.experiment: "n/a" if cell.observed == "n/a" else ", ".join(cell.predicted)
            for cell in probe.model(behaviour, iommu=iommu)
        }
        for title, (behaviour, iommu) in settings.items()
    }
    rows = [("experiment", "question", *settings, "rests on"), ("---",) * (len(settings) + 3)]
    for row in EXPERIMENTS.values():
        if row.kinds:
            # About addresses inside requests: docs/payloads.md.
            continue
        rows.append((f"`{row.id}`", row.title, *(predicted[t][row.id] for t in settings), str(row.citation)))
    return _table(rows)


def departure_table() -> str:
    """The known departures."""
    rows = [("id", "product", "what it does", "how that is known"), ("---",) * 4]
    rows += [(f"`{row.id}`", f"{row.product} {row.versions}", row.title, row.source) for row in DEPARTURES]
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def case_table() -> str:
    """The conformance cases."""
    rows = [("case", "what ought to be", "rests on"), ("---",) * 3]
    for case in CASES.values():
        only = f" ({', '.join(case.kinds)} only)" if case.kinds else ""
        rows.append((f"`{case.id}`", case.title + only, str(case.citation)))
    return _table(rows)


def finding_table() -> str:
    """The findings of a scan."""
    rows = [("id", "what is found", "how bad", "products that can be changed"), ("---",) * 4]
    rows += [(f"`{row.id}`", row.title, row.severity.value, ", ".join(row.fix)) for row in RULES]
    return _table(rows)


@pytest.mark.parametrize(
    ("table", "page"),
    [
        (experiment_table, "experiments"),
        (departure_table, "experiments"),
        (case_table, "conformance"),
        (finding_table, "scan"),
    ],
)
def test_tables_are_those_of_the_code(table: Callable[[], str], page: str) -> None:
    expected = table()
    assert expected in (ROOT / "docs" / f"{page}.md").read_text(), f"it should be:\n{expected}"


def test_the_order_of_layers_is_the_one_that_is_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    (line,) = re.findall(r"^    (addr .* < .*)$", text, re.MULTILINE)
    assert [set(layer.split()) for layer in line.split(" < ")] == ORDER


if __name__ == "__main__":
    print(experiment_table(), departure_table(), case_table(), finding_table(), sep="\n\n")
