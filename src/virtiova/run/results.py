# SPDX-License-Identifier: Apache-2.0
"""Results on disk: a JSON Lines file that grows as they come, and from which a second run goes on.

The first line says which plan it belongs to; every other line is the result of one task of it::

    {"schema": "virtiova/results/1", "plan": "<sha256>", "count": 120, "version": "0.1.0"}
    {"n": 17, "result": {...}}

Nothing but an offset for each task is kept in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from virtiova import __version__
from virtiova.errors import UsageError

SCHEMA: Final = "virtiova/results/1"
_NONE: Final = -1
_LONGEST: Final = 16 << 20

R = TypeVar("R")


class _Header(msgspec.Struct, frozen=True):
    schema: str
    plan: str
    count: int
    version: str


class _Line(msgspec.Struct, frozen=True):
    n: int
    result: msgspec.Raw


def fingerprint(tasks: Iterable[object]) -> str:
    """Names a plan: every task in its order, and who runs them."""
    digest = hashlib.sha256(__version__.encode())
    for task in tasks:
        digest.update(b"\n" + msgspec.json.encode(task))
    return digest.hexdigest()


class Results(Generic[R]):
    """The results of one plan of ``count`` tasks, each a value of ``kind``. Use it as a context manager.

    Without a ``path`` they go to a file without a name that ends with this process. A half-written last line, as a
    crash leaves it, is cut off. Raises `UsageError` for a file of another plan, one that is no results file, and
    one that another run has open.
    """

    def __init__(self, path: Path | None, kind: type[R], plan: str, count: int) -> None:
        self.path = path
        self.repaired = False
        """Was there a half-written last line?"""
        self._header = _Header(SCHEMA, plan, count, __version__)
        self._decode = msgspec.json.Decoder(kind).decode
        self._line = msgspec.json.Decoder(_Line).decode
        self._encode = msgspec.json.Encoder().encode
        self._offsets = array("q", [_NONE]) * count
        self._lengths = array("l", [0]) * count
        self._done = 0
        self._end = 0
        self._lines = 1
        if path is None:
            self._file = tempfile.TemporaryFile(prefix="virtiova-")  # noqa: SIM115 - closed by `close`
        else:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results[R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what was written stays."""
        self._file.close()

    def __len__(self) -> int:
        """How many tasks have a result."""
        return self._done

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != _NONE

    def __getitem__(self, number: int) -> R:
        """The result of a task, read anew."""
        if number not in self:
            raise KeyError(number)
        return self._decode(os.pread(self._file.fileno(), self._lengths[number], self._offsets[number]))

    def __iter__(self) -> Iterator[R]:
        """All results that there are, in the order of the plan, each read as it is wanted."""
        return (self[number] for number in range(len(self._offsets)) if number in self)

    def add(self, number: int, value: R) -> None:
        """Append a result. A second one for the same task is an error of ours: nothing may count twice."""
        if number in self:
            raise ValueError(f"task {number} has a result already")
        encoded = self._encode(value)
        prefix = b'{"n":%d,"result":' % number
        self._append(prefix + encoded + b"}\n")
        self._note(number, self._end - len(encoded) - 2, len(encoded))

    # -- the file ------------------------------------------------------------------------------------------------

    def _append(self, line: bytes) -> None:
        # One write a line, at a place of our own: a crash leaves at most one half of a line, at the end.
        view = memoryview(line)
        while view:
            written = os.pwrite(self._file.fileno(), view, self._end)
            self._end += written
            view = view[written:]

    def _note(self, number: int, offset: int, length: int) -> None:
        self._offsets[number] = offset
        self._lengths[number] = length
        self._done += 1

    def _open(self) -> None:
        if self.path is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"{self.path}: another run is writing to it") from error
        header = self._encode(self._header) + b"\n"
        first = self._file.readline(_LONGEST)
        if not first.endswith(b"\n") and header.startswith(first):
            # New, or killed before the first line was out.
            self.repaired = bool(first)
            self._file.truncate(0)
            self._append(header)
            return
        self._check(first)
        self._end = len(first)
        while line := self._file.readline(_LONGEST):
            if not self._read(line):
                self._cut()
                return
            self._end += len(line)
            self._lines += 1

    def _check(self, first: bytes) -> None:
        try:
            found = msgspec.json.decode(first, type=_Header)
        except msgspec.MsgspecError:
            found = None
        if found is None or found.schema != SCHEMA:
            raise UsageError(f"{self.path}: is no results file of virtiova ({SCHEMA}); nothing was changed")
        if found.version != __version__:
            raise UsageError(f"{self.path}: was written by virtiova {found.version}, this is {__version__}")
        if found != self._header:
            raise UsageError(
                f"{self.path}: belongs to another plan ({found.count} cells, this one has {self._header.count}); "
                "give the options that it was made with, or another file"
            )

    def _read(self, line: bytes) -> bool:
        """Take a line in; False if it is none."""
        try:
            found = self._line(line)
            self._decode(found.result)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return False
        if not line.endswith(b"}\n") or not 0 <= found.n < len(self._offsets):
            return False
        if found.n not in self:
            length = len(memoryview(found.result))
            self._note(found.n, self._end + line.rindex(b"}") - length, length)
        return True

    def _cut(self) -> None:
        """Cut off a bad line if it is the last one; else the file is not ours to judge."""
        if self._file.readline(1):
            raise UsageError(
                f"{self.path}: line {self._lines + 1} is damaged, and not the last one; nothing was changed"
            )
        self.repaired = True
        self._file.truncate(self._end)
