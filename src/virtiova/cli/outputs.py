# SPDX-License-Identifier: Apache-2.0
"""``-o FILE``: files that are there when the run has ended, and only then.

What is written goes to a file beside the one that was named, which it replaces at the end: that it can be written is
known before the run, and an interrupted run leaves what was there before.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Final, TextIO

from virtiova.errors import UsageError

_MODE: Final = 0o666
_PRIVATE: Final = 0o600
Render = Callable[[str], Iterable[str | bytes]]
"""From the format to the text, or the bytes, in pieces."""


class Outputs:
    """The files that were named, ready to be written."""

    def __init__(self) -> None:
        self._open: list[tuple[str, str, str, TextIO]] = []

    def add(self, name: str, kind: str) -> None:
        """One more. Raises `UsageError` if it cannot be written."""
        # A link stays a link: what it leads to is replaced.
        target = os.path.realpath(name)
        try:
            fd, beside = _beside(name, target)
        except OSError as error:
            raise UsageError(f"{name}: cannot be written: {error.strerror}") from error
        self._open.append((target, kind, beside, os.fdopen(fd, "w", encoding="utf-8")))

    def write(self, render: Render) -> None:
        """Write all of them, and put each in its place as soon as it is whole."""
        for target, kind, beside, file in self._open:
            for piece in render(kind):
                if isinstance(piece, bytes):
                    file.flush()
                    file.buffer.write(piece)
                else:
                    file.write(piece)
            file.flush()
            if beside:
                os.replace(beside, target)

    def close(self) -> None:
        """Remove what was not put in its place."""
        for _, _, beside, file in self._open:
            with contextlib.suppress(OSError):
                file.close()
            if beside:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)


@contextlib.contextmanager
def private(name: str) -> Iterator[BinaryIO]:
    """A file of bytes that only its owner may read, there when the block has ended well, and only then.

    Raises `UsageError` if it cannot be written.
    """
    target = os.path.realpath(name)
    try:
        fd, beside = _beside(name, target)
    except OSError as error:
        raise UsageError(f"{name}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            if beside:
                os.fchmod(fd, _PRIVATE)
            yield file
        if beside:
            os.replace(beside, target)
            beside = ""
    finally:
        if beside:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)


def _beside(name: str, target: str) -> tuple[int, str]:
    """A new file in the target's folder: its descriptor and name. What is no file (a pipe) is opened as it is: no
    name."""
    mode = _MODE
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name)
        # Whoever may not write the old one must not replace it, though the folder would let them.
        flags = os.O_WRONLY | os.O_CLOEXEC
        if not stat.S_ISREG(found.st_mode):
            return os.open(name, flags), ""
        os.close(os.open(name, flags))
        mode = stat.S_IMODE(found.st_mode)
    import secrets

    beside = f"{target}.{secrets.token_hex(4)}.part"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    if mode != _MODE:
        with contextlib.suppress(OSError):
            os.fchmod(fd, mode)
    return fd, beside


@contextlib.contextmanager
def opened(named: Sequence[tuple[str, str]]) -> Iterator[Outputs]:
    """The files of these names and formats. Whatever happens, nothing half-written stays."""
    outputs = Outputs()
    try:
        for name, kind in named:
            outputs.add(name, kind)
        yield outputs
    finally:
        outputs.close()


def made(typed: Sequence[str]) -> str:
    """When and by which command a report is made. Whose cluster it was is nobody else's business."""
    words = list(typed)
    for number, word in enumerate(words):
        if word.startswith("--sch"):
            if "=" in word:
                words[number] = f"{word.partition('=')[0]}=ADDRESS"
            else:
                words[number + 1 : number + 2] = ["ADDRESS"]
    return f"{datetime.date.today().isoformat()} · {shlex.join(['virtiova', *words])}"
