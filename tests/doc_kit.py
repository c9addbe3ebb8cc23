# SPDX-License-Identifier: Apache-2.0
"""Reading the project's Markdown: code blocks, links, and the commands that it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```([\w-]*)")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"^(?:\$ )?(virtiova(?: .*)?)$")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block: fenced, or ``language`` empty and indented by four."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    fence = re.compile("")
    kept: list[str] = []
    language = ""
    start = 0
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        found = _FENCE.match(line)
        if start:
            if fence.match(line):
                yield Block(page, start, language, "\n".join(kept))
                start, kept = 0, []
            else:
                kept.append(line)
        elif found:
            fence = re.compile(f"^{found[1]}```$")
            start, language = number, found[2]
        elif line.startswith("    "):
            yield Block(page, number, "", line[4:])
    if start:
        raise AssertionError(f"{page}:{start}: a code block without an end")


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Targets of all links in the text of a page."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page can be linked to."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every command line of ours in the code blocks of a page."""
    for block in blocks(page):
        if block.language == "python":
            continue
        for offset, line in enumerate(block.text.splitlines()):
            found = _COMMAND.match(line)
            if found:
                yield block.line + offset, found[1]


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a console session, what it prints, and the exit status if it is asked for."""

    command: str
    output: str
    status: int | None


def session(block: Block) -> list[Step]:
    """The commands of a ``console`` block. ``$ echo $?`` after one shows its status."""
    steps: list[Step] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        if command == "echo $?":
            last = steps.pop()
            steps.append(Step(last.command, last.output, int(output)))
        else:
            steps.append(Step(command, output, None))
    return steps


def pattern(output: str) -> re.Pattern[str]:
    """What matches an output of which a page shows some lines: a line ``...`` stands for any number of others."""
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in output.rstrip("\n").split("\n")]
    return re.compile("".join(lines) if output.strip() else "")
