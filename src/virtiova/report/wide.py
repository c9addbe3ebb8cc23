# SPDX-License-Identifier: Apache-2.0
"""Text measured in a terminal's columns: cut, padded and wrapped, with wide and combining characters counted right."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final

ELLIPSIS: Final = "…"
_COMBINING: Final = frozenset({"Mn", "Me", "Cf"})


def width(text: str) -> int:
    """How many columns ``text`` takes: two for what is wide in East Asia, none for what combines."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(char: str) -> int:
    if unicodedata.category(char) in _COMBINING:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """At most so many columns of it; what was longer ends in an ellipsis."""
    if width(text) <= columns:
        return text
    return _head(text, columns - 1) + ELLIPSIS if columns > 0 else ""


def cut_middle(text: str, columns: int) -> str:
    """The same with both ends kept: what tells names and addresses apart is mostly at their ends."""
    if width(text) <= columns:
        return text
    last = (columns - 1) // 2
    tail = _head(text[::-1], last)[::-1]
    return f"{_head(text, columns - 1 - width(tail))}{ELLIPSIS}{tail}" if columns > 2 else cut(text, columns)


def _head(text: str, columns: int) -> str:
    taken = 0
    for number, char in enumerate(text):
        taken += _columns(char)
        if taken > columns:
            return text[:number]
    return text


def pad(text: str, columns: int) -> str:
    """Filled with blanks."""
    return text + " " * (columns - width(text))


def wrap(text: str, columns: int, *, first: str = "", rest: str = "") -> Iterator[str]:
    """Lines of at most so many columns, the first after ``first``, all others after ``rest``. Words that fit on no line
    are broken."""
    line, taken, empty = first, width(first), True
    room = max(4, columns - width(rest))
    for word in text.split():
        needed = width(word)
        if not empty and taken + 1 + needed > columns:
            yield line
            line, taken, empty = rest, width(rest), True
        for part in _broken(word, columns - taken, room) if empty and taken + needed > columns else (word,):
            if not empty and part is not word:
                yield line
                line, taken, empty = rest, width(rest), True
            line += part if empty else f" {part}"
            taken += width(part) + (not empty)
            empty = False
    if not empty or line.strip():
        yield line


def _broken(word: str, first: int, rest: int) -> Sequence[str]:
    parts = []
    room = max(4, first)
    while word:
        # One character at least: a wide one may be wider than the room.
        part = _head(word, room) or word[0]
        parts.append(part)
        word = word[len(part) :]
        room = rest
    return parts
