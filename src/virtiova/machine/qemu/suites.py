# SPDX-License-Identifier: Apache-2.0
"""QEMU out of another suite of Debian, fetched into the cache and run in place, beside the machine's own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu.ask import ask
from virtiova.machine.qemu.board import Board
from virtiova.machine.qemu.installation import Installation
from virtiova.packages.apt import Progress
from virtiova.packages.tree import SUITE, Part, Tree, own_architecture

_MODULES: Final = ("usr/lib/*/qemu/*",)
_SHARED: Final = (
    Part("qemu-system-common", _MODULES),
    Part("qemu-system-data", ("usr/share/qemu/**/*",)),
    # For a module that it does not find beside itself, QEMU turns to those of the machine's own QEMU, which are of
    # another build, and aborts. These two packages have all the modules that devices are in.
    Part("qemu-system-modules-opengl", _MODULES),
    Part("qemu-system-modules-spice", _MODULES),
)


def named(
    name: str,
    boards: Iterable[Board],
    *,
    root: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Installation:
    """The installation that a user named: a directory, or a suite of Debian such as ``bookworm-backports``.

    Of a suite, what the ``boards`` need is fetched unless it is in the cache; what cannot be had is said when it is
    asked for. `UsageError` if ``name`` is neither.
    """
    if os.path.isdir(name):
        return Installation.at(name)
    if not SUITE.fullmatch(name):
        raise UsageError(f"{name}: no such directory, with qemu-system-* in it, and no suite of Debian")
    tree = Tree(name, own_architecture(), root=root, offline=offline, progress=progress)
    emulators = {board.package: set[str]() for board in boards}
    for board in boards:
        emulators[board.package].add(f"usr/bin/{board.binary}")
    parts = [Part(package, tuple(sorted(binaries))) for package, binaries in emulators.items()]
    failed = tree.get([*_SHARED, *parts])
    # Without what they share, none of them runs.
    common = next((why for part in _SHARED if (why := failed.get(part.package))), "")
    missing = {part.package: common or failed[part.package] for part in parts if common or part.package in failed}
    found = Installation(str(tree.folder), suite=name, missing=tuple(missing.items()))
    broken = {board.package: why for board in boards if (why := _refusal(found, board))}
    return replace(found, missing=tuple((missing | broken).items()))


def _refusal(installation: Installation, board: Board) -> str:
    """Why a binary that is there does not start here: libraries that are of another age. Empty if it does."""
    if board.package in dict(installation.missing):
        return ""
    try:
        answer = ask([installation.binary(board), "--version"])
    except NotPossibleError as error:
        return str(error)
    return "" if answer.status == 0 else f"it does not start here: {answer.why}"
