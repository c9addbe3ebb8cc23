# SPDX-License-Identifier: Apache-2.0
"""Programs by the devices that they have open: who serves a VDUSE device, who uses the kernel's vhost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.collect.tree import Tree, text

VDUSE: Final = "/dev/vduse"
VHOST: Final = "/dev/vhost-"
_FDS: Final = 1024
"""Descriptors of one process that are looked at."""
_NAME: Final = 64


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, and what the kernel calls it."""

    pid: str
    name: str


def links(tree: Tree, pid: str) -> Iterator[str]:
    """Where its descriptors lead, each once."""
    found = (tree.link(f"/proc/{pid}/fd/{name}") for name in tree.names(f"/proc/{pid}/fd")[:_FDS])
    return iter(dict.fromkeys(link for link in found if link))


def holders(tree: Tree, path: str) -> list[Holder]:
    """The processes that have ``path`` open, as far as we may look."""
    pids = [name for name in tree.names("/proc") if name.isdigit()]
    return [Holder(pid, called(tree, pid)) for pid in pids if path in links(tree, pid)]


def called(tree: Tree, pid: str) -> str:
    """A process's name as the kernel has it, without what a terminal would take for its own."""
    name = text(tree, f"/proc/{pid}/comm", _NAME) or ""
    return "".join(char if char.isprintable() else "?" for char in name) or "a program"
