# SPDX-License-Identifier: Apache-2.0
"""A file that holds a QEMU command line, as words: shell text, ``/proc/PID/cmdline``, or a log of libvirt's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.errors import ProtocolError, UsageError

LIMIT: Final = 4 << 20
"""Bytes of a command line. Linux takes less of a new process, unless it is told to."""
_MOST: Final = 1 << 17
"""Words of it."""
_QEMU: Final = re.compile(r"qemu-system-[\w.-]+|qemu-kvm", re.ASCII)
_SHORT: Final = ("kvm", "qemu")
"""Names that are words of other texts, too: they count where a command begins, or with their folder."""
_BEFORE: Final = re.compile(r"\w+=.*|exec|sudo|nohup|setsid|time", re.ASCII | re.DOTALL)
"""What may stand before a command, and is none of its words."""
_WRAPPED: Final = re.compile(r"\.(.+)-wrapped")
_LIBVIRT: Final = re.compile(r"^\S{1,40} \S{1,40}: starting up libvirt version.*\n", re.MULTILINE)
_CONTINUED: Final = re.compile(r"(?:.*\\\r?\n)*+.*")

_BLANK: Final = re.compile(r"[ \t\r]+|\\\r?\n|#[^\n]*")
_END: Final = re.compile(r"\n|&&|\|\||[;|&]")
_REDIRECT: Final = re.compile(r"\d*(?:>>|>|<)&?")
# One piece of a word; the alternatives differ in their first character, so that nothing is tried twice.
_PIECE: Final = re.compile(r"""[^\s\\'"|&;<>]+|\\\r?\n|\\.|'[^']*'|"(?:[^"\\]+|\\.)*+\"""", re.DOTALL)
_IN_DOUBLE: Final = re.compile(r'\\(\n|["\\$`])')


class Word(str):
    """A word, and the line on which it begins (1-based; 0: not known)."""

    __slots__ = ("line",)
    line: int

    def __new__(cls, text: str, line: int = 0) -> Word:
        word = super().__new__(cls, text)
        word.line = line
        return word


def line_of(word: str) -> int:
    """The line of a word; 0 for one that is no `Word`."""
    return word.line if isinstance(word, Word) else 0


def is_qemu(word: str, *, first: bool = False) -> bool:
    """Does a program's name say that it is a QEMU? ``first``: it is the first word of a command."""
    folder, _, name = word.rpartition("/")
    if name in _SHORT:
        return first or bool(folder)
    wrapped = _WRAPPED.fullmatch(name)
    return _QEMU.fullmatch(wrapped[1] if wrapped else name.removesuffix(".exe")) is not None


def command_of(words: Sequence[str]) -> Sequence[str]:
    """The words from QEMU's name on, without what is said before it (variables, ``sudo``, ``exec``); all of them where
    they begin with an option. `UsageError` if there is no QEMU among them."""
    if words and words[0].startswith("-"):
        return words
    at = _qemu_in(words)
    if at is not None:
        return words[at:]
    shown = words[0].rpartition("/")[2][:60] if words else ""
    raise UsageError(f"no QEMU command line: {shown!r} is no qemu-system-*, and none follows" if words else "no words")


def words_of(data: bytes) -> list[str]:
    """The words of the QEMU command that a file holds; each knows its line (`Word`).

    ``data`` is shell text (quotes, backslashes, comments, several commands), a log that libvirt keeps (the last start
    counts), or words with a NUL after each. `ProtocolError` where that cannot be, `UsageError` where there is no QEMU
    command, or more than one.
    """
    if len(data) > LIMIT:
        raise ProtocolError(f"{len(data)} bytes are no command line; {LIMIT} are the most that is read")
    if b"\0" in data:
        words = [Word(word, 1) for word in data.decode("utf-8", "replace").removesuffix("\0").split("\0")]
        _bounded(len(words))
        return [*command_of(words)]
    text, line = data.decode("utf-8", "replace"), 1
    if logged := _LIBVIRT.search(text):
        text, line = _last_start(text, logged)
    found = [
        command for command in _commands(text, line) if command[0].startswith("-") or _qemu_in(command) is not None
    ]
    if not found:
        raise UsageError("no QEMU command in it: none of its words is qemu-system-*, and it begins with no option")
    if len(found) > 1:
        lines = ", ".join(str(line_of(command[0])) for command in found[:4])
        raise UsageError(f"{len(found)} QEMU commands in it (lines {lines}); one is needed")
    return [*command_of(found[-1])]


def _last_start(text: str, logged: re.Match[str]) -> tuple[str, int]:
    """The command that follows the last such line of a log, and the line that it begins on. What QEMU itself says
    after it is no shell text."""
    for each in _LIBVIRT.finditer(text, logged.start()):
        logged = each
    command = _CONTINUED.match(text, logged.end())
    assert command is not None  # it matches the empty string
    return command.group(), text.count("\n", 0, logged.end()) + 1


def _qemu_in(words: Sequence[str]) -> int | None:
    """Where QEMU's name is among the words of a command."""
    first = True
    for number, word in enumerate(words):
        if is_qemu(word, first=first):
            return number
        first = first and _BEFORE.fullmatch(word) is not None
    return None


def _bounded(count: int) -> None:
    if count > _MOST:
        raise ProtocolError(f"more than {_MOST} words are no command line")


def _commands(text: str, line: int) -> Iterator[list[str]]:
    """The commands of shell text, one list of words each. Nothing is expanded: ``$HOME`` stays."""
    at, count = 0, 0
    words: list[str] = []
    skip = False
    while at < len(text):
        if blank := _BLANK.match(text, at):
            line += text.count("\n", at, blank.end())
            at = blank.end()
        elif end := _END.match(text, at):
            if words:
                yield words
                words = []
            line += text.count("\n", at, end.end())
            at = end.end()
        elif redirect := _REDIRECT.match(text, at):
            skip, at = True, redirect.end()
        else:
            begun = at
            word, at = _word(text, at, line)
            line += text.count("\n", begun, at)
            if not skip:
                words.append(word)
                count += 1
                _bounded(count)
            skip = False
    if words:
        yield words


def _word(text: str, at: int, line: int) -> tuple[Word, int]:
    """The word that begins at ``at``, without quotes, and where it ends."""
    pieces: list[str] = []
    begun = at
    while piece := _PIECE.match(text, at):
        raw = piece.group()
        at = piece.end()
        if raw.startswith("'"):
            pieces.append(raw[1:-1])
        elif raw.startswith('"'):
            pieces.append(_IN_DOUBLE.sub(lambda found: found[1].strip("\n"), raw[1:-1]))
        elif raw.startswith("\\"):
            pieces.append(raw[1:].strip("\r\n"))
        else:
            pieces.append(raw)
    if at < len(text) and text[at] in "'\"\\":
        raise ProtocolError(f"line {line}: a {text[at]} that nothing closes, after {''.join(pieces)[-40:]!r}")
    if at == begun:
        # Some other blank of Unicode's: part of a word to a shell.
        return Word(text[at], line), at + 1
    return Word("".join(pieces), line), at
