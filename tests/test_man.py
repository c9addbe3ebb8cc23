# SPDX-License-Identifier: Apache-2.0
"""The manual page, in both of its forms, against the parser: all that exists is in it, and nothing else."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from doc_kit import ROOT
from virtiova.cli import exits, explain, main
from virtiova.features import Generation
from virtiova.machine.qemu.boards import BOARDS
from virtiova.probe.plan import BEHAVIOURS, MODEL_DEVICES
from virtiova.transport.pci import INTERFACES

ROFF = ROOT / "docs" / "man" / "virtiova.1"
MARKDOWN = ROFF.with_suffix(".1.md")


def of_roff(text: str) -> str:
    """What a reader of the roff page sees, with its headings as in Markdown."""
    text = re.sub(r'^\.\\".*\n', "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.SH ", "## ", text, flags=re.MULTILINE)
    text = re.sub(r"^\.SS ", "### ", text, flags=re.MULTILINE)
    text = re.sub(r"\\f.|\\\|", "", text).replace("\\-", "-")
    # A macro of two fonts sets its arguments without the blanks between them; a quote keeps its own.
    text = re.sub(r"^\.[A-Z]{2} (.+)$", lambda found: "".join(shlex.split(found[1])), text, flags=re.MULTILINE)
    return re.sub(r"^\.\w+ ?", "", text, flags=re.MULTILINE)


PAGES = {"roff": of_roff(ROFF.read_text()), "markdown": MARKDOWN.read_text()}


def sections(page: str) -> dict[str, str]:
    """The sections of a page by heading."""
    _, *parts = re.split(r"^## (.+)\n", PAGES[page], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of every command, by name; the name of the first is empty."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from parsers(sub, f"{name} {word}".strip())


ALL = dict(parsers(main.parser()))
OPTIONS = {option for parser in ALL.values() for action in parser._actions for option in action.option_strings}
STATUSES = {value for name, value in vars(exits).items() if name.isupper()}


@pytest.fixture(params=sorted(PAGES))
def page(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sections_and_their_order(page: str) -> None:
    assert list(sections(page)) == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "OPTIONS",
        "EXIT STATUS",
        "ENVIRONMENT",
        "EXAMPLES",
        "SEE ALSO",
    ]


def test_every_option_and_no_other(page: str) -> None:
    assert {"--help", "--device", "--fail-on", "-j", "--offered"} <= OPTIONS
    described = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?![\w])", sections(page)["OPTIONS"]))
    assert described == OPTIONS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[page]))
    assert named <= OPTIONS


def test_every_command_and_no_other(page: str) -> None:
    assert set(re.findall(r"^### (.+)$", sections(page)["COMMANDS"], re.MULTILINE)) == set(ALL) - {""}


def test_every_exit_status_and_no_other(page: str) -> None:
    text = sections(page)["EXIT STATUS"]
    assert {int(number) for number in re.findall(r"^(?:\| )?(\d+)(?: \||$)", text, re.MULTILINE)} == STATUSES


@pytest.mark.parametrize(
    "words",
    [
        set(explain.PLATFORMS),
        set(Generation),
        {
            *BOARDS,
            *(name for board in BOARDS.values() for name in board.iommus),
            *BEHAVIOURS,
            *MODEL_DEVICES,
            *INTERFACES,
        },
        {choice for parser in ALL.values() for a in parser._actions if not a.nargs for choice in a.choices or ()},
    ],
)
def test_every_word_that_an_option_takes(page: str, words: set[str]) -> None:
    for word in words:
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", PAGES[page]), word


def test_examples_are_the_same_and_parse() -> None:
    examples = [re.findall(r"^ *(virtiova .*)$", sections(page)["EXAMPLES"], re.MULTILINE) for page in PAGES]
    assert examples[0] == examples[1]
    for line in examples[0]:
        main.parser().parse_args(shlex.split(line)[1:])


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_complain_of() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", str(ROFF)], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    assert "virtiova" in done.stdout
