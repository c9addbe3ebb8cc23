# SPDX-License-Identifier: Apache-2.0
"""Values out of a system's files. What is there and means nothing is a problem in words, never an exception."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect.tree import Tree, text
from virtiova.result.scan import Place

SHORT: Final = 4096
"""Bytes read of a file that holds one value: sysfs has no longer ones."""
_PROBLEMS: Final = 100
_SHOWN: Final = 40
_DENIED: Final = ": Permission denied"
_SOURCES: Final = (
    ("/sys/kernel/debug", "debugfs"),
    ("/sys/firmware", "firmware"),
    ("/sys/class/dmi", "firmware"),
    ("/proc", "proc"),
)
_NUMBER: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,16}")


def place(path: str) -> Place:
    """Where something was read, by its path."""
    source = next((source for prefix, source in _SOURCES if path.startswith(prefix)), "sysfs")
    return Place("pci" if source == "sysfs" and path.endswith("/config") else source, path)


def say(tree: Tree, path: str, words: str) -> None:
    """A problem, once each, as many as anybody reads."""
    problem = f"{path}: {words}"
    if problem not in tree.problems and len(tree.problems) < _PROBLEMS:
        tree.problems.append(problem)


def quoted(value: str) -> str:
    """What somebody else wrote, as it can be shown: no control characters, not much of it."""
    shown = ascii(value[: _SHOWN + 1])
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def word(tree: Tree, path: str) -> str | None:
    """A file of one line; None if it is not there or empty."""
    found = text(tree, path, SHORT)
    return found.partition("\n")[0].strip() or None if found else None


def number(tree: Tree, path: str, base: int = 16) -> int | None:
    """A number; None if it is not there, or is none."""
    found = word(tree, path)
    if found is None:
        return None
    if not _NUMBER.fullmatch(found) or (base == 10 and not found.isdecimal()):
        say(tree, path, f"{quoted(found)} is no number")
        return None
    return int(found, base)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """To sort by: ``virtio10`` after ``virtio9``."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,9})", name))


def folded(problems: list[str]) -> list[str]:
    """Many files that may not be read for the same reason become one problem: who is not root knows it after one."""
    denied = [problem.removesuffix(_DENIED) for problem in problems if problem.endswith(_DENIED)]
    if len(denied) < 2:
        return list(problems)
    rest = [problem for problem in problems if not problem.endswith(_DENIED)]
    shown = ", ".join(denied[:_SOME]) + (f" and {len(denied) - _SOME} more" if len(denied) > _SOME else "")
    return [f"{shown}{_DENIED}", *rest]


_SOME: Final = 4
