# SPDX-License-Identifier: Apache-2.0
"""The words of the glossary, for ``virtiova explain WORD``: the document itself, installed with the package."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

_ENTRY = re.compile(r"^\*\*(?P<words>[^*]+)\*\*(?P<rest>.*)", re.DOTALL)
_ROW = re.compile(r"^\| `(?P<word>[^`]+)` \| (?P<meaning>.*) \|$", re.MULTILINE)
_INSIDE = re.compile(r"(?:^|(?<=\s))\*\*(?P<word>[^*]+)\*\*(?P<rest>[^*]*)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@functools.cache
def entries() -> dict[str, str]:
    """Every word with its entry as text, without marks of emphasis and links. Words of one entry share it."""
    text = files("virtiova.cli").joinpath("glossary.md").read_text("utf-8")
    found: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        for row in _ROW.finditer(paragraph):
            found.setdefault(row["word"], _plain(f"{row['word']}: {row['meaning']}"))
        if _ENTRY.match(paragraph):
            for part in _INSIDE.finditer(paragraph):
                for word in part["word"].split(", "):
                    found.setdefault(word, _plain(paragraph))
    return found


def explain(word: str) -> str | None:
    """The entry of a word, however it is capitalised; None if it is not in the glossary."""
    known = {name.casefold(): text for name, text in entries().items()}
    return known.get(word.casefold())


def _plain(text: str) -> str:
    return _LINK.sub(r"\1", text).replace("**", "").strip()
