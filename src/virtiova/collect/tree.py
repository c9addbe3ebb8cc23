# SPDX-License-Identifier: Apache-2.0
"""A machine's files as a collector sees them: of this machine, or out of what was gathered elsewhere. Read only.

Paths are absolute and as the looked-at machine has them. Nothing here raises for a file that is missing or may not be
read: that is an answer (None), and why is kept in ``problems``.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import posixpath
import stat
from typing import Final, Protocol

LIMIT: Final = 256 << 10
"""Bytes read of a file unless the collector says otherwise. Logs and registers alike are far below."""
ENTRIES: Final = 4096
"""Names taken of a folder."""


class Tree(Protocol):
    """Files by absolute path."""

    source: str
    """What the user calls it: ``this machine``, ``box.tar.gz``."""
    live: bool
    """The files are those of this machine, now."""
    problems: list[str]
    """What is there and could not be read, and why; once each."""

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        """Up to ``limit`` bytes from the start of a file; None if it is not there or cannot be read."""

    def names(self, path: str) -> list[str]:
        """What a folder holds, sorted; empty if it is not there."""

    def link(self, path: str) -> str | None:
        """Where a link leads, as it is written; None if ``path`` is no link."""

    def real(self, path: str) -> str | None:
        """The path with all links resolved; None if it leads nowhere."""

    def exists(self, path: str) -> bool:
        """Is it there, a file, folder, or link that leads somewhere?"""


class LiveTree:
    """The files below ``root``: ``/``, or a folder that was unpacked."""

    def __init__(self, root: str = "/", source: str = "this machine") -> None:
        self.source = source
        self.live = root == "/"
        self.problems: list[str] = []
        self._root = root.rstrip("/")

    def at(self, path: str) -> str:
        """Where that file really is, for who wants a part of it."""
        return self._root + path

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        try:
            # What is no plain file (a pipe, a device) may block for ever.
            fd = os.open(self.at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._cannot(path, error)
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            pieces, left = [], limit
            while left > 0 and (piece := os.read(fd, min(left, 1 << 16))):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)
        except OSError as error:
            self._cannot(path, error)
            return None
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str]:
        try:
            with os.scandir(self.at(path)) as found:
                names = []
                for entry in found:
                    names.append(entry.name)
                    if len(names) >= ENTRIES:
                        self._say(f"{path}: more than {ENTRIES} entries; the rest was not looked at")
                        break
        except OSError as error:
            self._cannot(path, error)
            return []
        return sorted(names)

    def link(self, path: str) -> str | None:
        try:
            return os.readlink(self.at(path))
        except OSError:
            return None

    def real(self, path: str) -> str | None:
        try:
            found = os.path.realpath(self.at(path), strict=True)
        except OSError:
            return None
        if not self._root:
            return found
        inside = os.path.realpath(self._root)
        return found[len(inside) :] if found.startswith(inside + "/") else None

    def exists(self, path: str) -> bool:
        return os.path.exists(self.at(path))

    def _cannot(self, path: str, error: OSError) -> None:
        # That it is not there is no problem: most of what is looked for is not.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            self._say(f"{path}: {error.strerror}")

    def _say(self, words: str) -> None:
        if words not in self.problems:
            self.problems.append(words)


def text(tree: Tree, path: str, limit: int = LIMIT) -> str | None:
    """A file as text without what surrounds it; None if it is not there. Bytes that are no text are replaced."""
    found = tree.read(path, limit)
    return None if found is None else found.decode("utf-8", "replace").strip("\0 \t\r\n")


def matching(tree: Tree, pattern: str) -> list[str]:
    """The paths that match ``pattern``, with ``*``, ``?`` and ``[...]`` in any part, sorted."""
    found = [""]
    for part in pattern.strip("/").split("/"):
        wild = any(char in part for char in "*?[")
        step: list[str] = []
        for base in found:
            if wild:
                step += [f"{base}/{name}" for name in tree.names(base or "/") if fnmatch.fnmatchcase(name, part)]
            else:
                step.append(f"{base}/{part}")
        found = step
    return [path for path in found if tree.exists(path) or tree.link(path) is not None]


def base(path: str | None) -> str:
    """The last part of a path; empty for None."""
    return posixpath.basename(path) if path else ""
