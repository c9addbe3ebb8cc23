# SPDX-License-Identifier: Apache-2.0
"""A QEMU installation: the machine's own, or one that was unpacked somewhere and is run in place."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu.ask import ask
from virtiova.machine.qemu.board import Board
from virtiova.machine.qemu.options import OptionSpec

_BINARIES: Final = (".", "usr/bin", "bin", "usr/local/bin")
_FIRMWARE: Final = "/usr/share/qemu"
"""Where the machine's own QEMU has its firmware: a package that was unpacked may lack what others bring."""
_VERSION: Final = re.compile(r"version (\d[\w.+~-]{0,60})", re.ASCII)
_TYPE: Final = re.compile(r'^name "((?:virtio|vhost)-[\w-]{1,60})", bus PCI', re.ASCII | re.MULTILINE)
_MOST_TYPES: Final = 500


@dataclass(frozen=True, slots=True)
class Installation:
    """``directory`` holds the binaries, or ``usr/bin`` with them; empty: what is on the PATH.

    ``suite`` is the suite of Debian that it was fetched from, and ``missing`` says which of its packages could not be
    had, and why.
    """

    directory: str = ""
    suite: str = ""
    missing: tuple[tuple[str, str], ...] = ()

    @classmethod
    def at(cls, directory: str) -> Installation:
        """A directory that a user named; `UsageError` if there is no QEMU in it."""
        found = cls(str(Path(directory).absolute()))
        if not found._bin():
            raise UsageError(f"{directory}: no qemu-system-* in it, nor in its usr/bin")
        return found

    def _bin(self) -> Path | None:
        for part in _BINARIES:
            place = Path(self.directory, part)
            if any(os.access(path, os.X_OK) for path in place.glob("qemu-system-*")):
                return place
        return None

    def binary(self, board: Board) -> str:
        """The path of a board's QEMU; `NotPossibleError` says what to install."""
        if not self.directory:
            path = shutil.which(board.binary)
            if path is None:
                raise NotPossibleError(f"{board.binary} is not installed (Debian: {how_to_get(board)})")
            return path
        if reason := dict(self.missing).get(board.package):
            raise NotPossibleError(f"no {board.package} of {self.suite}: {reason}")
        place = self._bin()
        if place is None or not os.access(place / board.binary, os.X_OK):
            raise NotPossibleError(f"{self.directory} has no {board.binary} (Debian package {board.package})")
        return str(place / board.binary)

    def check(self, board: Board, iommu: OptionSpec) -> None:
        """Raise `NotPossibleError` if the board's QEMU has no such IOMMU: it is of an older version."""
        binary = self.binary(board)
        for option, needs in board.iommus[iommu.name].needs.items():
            key, _, value = option.partition("=")
            if option and iommu.options.get(key) != value:
                continue
            if needs.word not in _help(self, binary, needs.asked):
                what = f"{' '.join(needs.asked).removesuffix(',help')} has no {needs.word.rstrip('=')}"
                newer = f"in Debian 12 a newer one is in {needs.suite}, which '--qemu {needs.suite}' fetches"
                raise NotPossibleError(f"{board.binary} {qemu_version(binary)} is too old: {what} ({newer})")

    def _beside(self, pattern: str) -> list[str]:
        place = self._bin() if self.directory else None
        return [] if place is None else sorted(str(path) for path in place.parent.glob(pattern) if path.is_dir())

    @property
    def arguments(self) -> list[str]:
        """Where its firmware is, as arguments."""
        if not self.directory:
            return []
        return [word for path in (*self._beside("share/qemu"), _FIRMWARE) for word in ("-L", path)]

    @property
    def environment(self) -> dict[str, str] | None:
        """Where its modules are: those of another build would be refused. None: nothing to say."""
        modules = [*self._beside("lib/*/qemu"), *self._beside("lib/qemu")]
        return os.environ | {"QEMU_MODULE_DIR": modules[0]} if modules else None


def how_to_get(board: Board) -> str:
    """How one comes by the board's QEMU on Debian."""
    if not board.suite:
        return f"apt-get install {board.package}"
    return f"{board.package}, in Debian 12 only in {board.suite}, which '--qemu {board.suite}' fetches"


@functools.cache
def qemu_version(binary: str) -> str:
    """``7.2.22``, or ``unknown``."""
    try:
        match = _VERSION.search(ask([binary, "--version"]).out)
    except NotPossibleError:
        return "unknown"
    return match.group(1) if match else "unknown"


@functools.cache
def _help(installation: Installation, binary: str, asked: tuple[str, ...]) -> str:
    """What QEMU answers to a question for help; empty if it does not answer."""
    try:
        return ask([binary, *installation.arguments, *asked], installation.environment).out
    except NotPossibleError:
        return ""


def device_types(installation: Installation, board: Board) -> tuple[str, ...]:
    """The virtio device types on PCI that a board's QEMU itself lists, each once, without its flavours.

    Raises `NotPossibleError` if there is no such QEMU, or it does not answer.
    """
    return _types(installation, installation.binary(board))


@functools.cache
def _types(installation: Installation, binary: str) -> tuple[str, ...]:
    argv = [binary, *installation.arguments, "-M", "none", "-nodefaults", "-display", "none", "-device", "help"]
    try:
        answer = ask(argv, installation.environment)
    except NotPossibleError as error:
        raise NotPossibleError(f"{binary} does not list its devices: {error}") from error
    if answer.status != 0:
        raise NotPossibleError(f"{binary} does not list its devices: {answer.why}")
    names = dict.fromkeys(name for name in _TYPE.findall(answer.out) if not name.endswith("-transitional"))
    if len(names) > _MOST_TYPES:
        raise NotPossibleError(f"{binary} lists {len(names)} virtio device types, which no QEMU has")
    return tuple(names)
