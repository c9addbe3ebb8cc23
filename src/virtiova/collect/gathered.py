# SPDX-License-Identifier: Apache-2.0
"""What was gathered on another machine, as that machine's files and as views: gather there, judge here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.box import Box, read_box
from virtiova.collect.facts import Certainty, View, ViewKind
from virtiova.collect.tree import ENTRIES, LIMIT
from virtiova.errors import ProtocolError, VirtiovaError
from virtiova.result.scan import Place

TREE: Final = "tree/"
LINKS: Final = "links"
DMESG: Final = "log/dmesg"
_STEPS: Final = 256
"""Parts of a path that are walked, links and all; more is a circle, or meant to take long."""
_LINKS: Final = 1 << 16
_LENGTH: Final = 1024
_PROBLEMS: Final = 1000


class GatheredTree:
    """Files as they were read elsewhere: `collect.tree.Tree`. Links are data, resolved here, and lead nowhere else.

    A file may have been gathered under any of its paths: each is put where its links lead to.
    """

    live = False

    def __init__(
        self, files: Mapping[str, bytes], folders: Iterable[str], links: Mapping[str, str], source: str
    ) -> None:
        self.source = source
        self.problems: list[str] = []
        self._links: dict[str, str] = {}
        self._memo: dict[str, str | None] = {}
        self._files: dict[str, bytes] = {}
        self._unreadable: set[str] = set()
        self._folders: dict[str, set[str]] = {"": set()}
        depth = 0
        for path in sorted(links, key=lambda path: path.count("/")):
            if path.count("/") > depth:
                # What leads on from here may have been noted by now.
                depth = path.count("/")
                self._memo.clear()
            folder, _, name = path.rpartition("/")
            at = self._known(folder)
            if at is not None:
                self._links[f"{at}/{name}"] = links[path]
        self._memo.clear()
        for path in folders:
            self._add_folder(self._known(path))
        for path, data in files.items():
            folder, _, name = path.rpartition("/")
            at = self._known(folder)
            if at is not None:
                self._add_folder(at)
                self._folders[at].add(name)
                self._files.setdefault(f"{at}/{name}", data)
        for path in self._links:
            folder, _, name = path.rpartition("/")
            self._add_folder(folder)
            self._folders[folder].add(name)
            # What a link led to was there, though nothing in it may have been read.
            target = self._resolve(path)
            if target not in self._files:
                self._add_folder(target)

    def add_unreadable(self, path: str) -> None:
        """It was there, and could not be read."""
        folder, _, name = path.rpartition("/")
        at = self._known(folder)
        if path.startswith("/") and at in self._folders:
            self._folders[at].add(name)
            self._unreadable.add(f"{at}/{name}")

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        found = self._files.get(self._known(path) or "")
        return None if found is None else found[:limit]

    def names(self, path: str) -> list[str]:
        at = self._known(path)
        names = [] if at is None else sorted(self._folders.get(at, ()))
        if len(names) > ENTRIES:
            problem = f"{path}: more than {ENTRIES} entries; the rest was not looked at"
            self.problems += [] if problem in self.problems else [problem]
        return names[:ENTRIES]

    def link(self, path: str) -> str | None:
        folder, _, name = path.rstrip("/").rpartition("/")
        at = self._known(folder)
        return None if at is None else self._links.get(f"{at}/{name}")

    def real(self, path: str) -> str | None:
        at = self._known(path)
        there = at in self._files or at in self._folders or at in self._unreadable
        return (at or "/") if at is not None and there else None

    def exists(self, path: str) -> bool:
        return self.real(path) is not None

    def _known(self, path: str) -> str | None:
        """`_resolve`, once for each path, and by what is known of the folder that it is in."""
        try:
            return self._memo[path]
        except KeyError:
            pass
        folder, _, name = path.rpartition("/")
        at = self._memo.get(folder) if name not in ("", ".", "..") else None
        found = self._resolve(path) if at is None or f"{at}/{name}" in self._links else f"{at}/{name}"
        self._memo[path] = found
        return found

    def _resolve(self, path: str) -> str | None:
        """Where a path leads, link by link, as the kernel walks; ``""`` is the root. None: in a circle."""
        todo, at = path.split("/")[::-1], ""
        for _ in range(_STEPS):
            if not todo:
                return at
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                at = at.rpartition("/")[0]
                continue
            target = self._links.get(f"{at}/{part}")
            if target is None:
                at = f"{at}/{part}"
                continue
            at = "" if target.startswith("/") else at
            todo += target.split("/")[::-1]
        return None

    def _add_folder(self, path: str | None) -> None:
        name = ""
        while path is not None:
            there = path in self._folders
            names = self._folders.setdefault(path, set())
            if name:
                names.add(name)
            if there or not path:
                return
            path, _, name = path.rpartition("/")


def tree_of(box: Box) -> GatheredTree:
    """The system's files in a box."""
    cut = len(TREE) - 1
    files = {name[cut:]: data for name, data in box.files.items() if name.startswith(TREE)}
    folders = [name[cut:] for name in box.folders if name.startswith(TREE)]
    tree = GatheredTree(files, folders, _links(box), box.source)
    told = box.header.get("problems")
    if isinstance(told, list):
        tree.problems += [_plain(each) for each in told[:_PROBLEMS] if isinstance(each, str)]
    for problem in tree.problems:
        tree.add_unreadable(problem.partition(": ")[0])
    return tree


def _links(box: Box) -> dict[str, str]:
    found: dict[str, str] = {}
    lines = box.files.get(LINKS, b"").decode("utf-8", "replace").split("\n")
    if len(lines) > _LINKS:
        raise ProtocolError(f"{box.source}: {LINKS!r} has more than {_LINKS} lines")
    for number, line in enumerate(lines, 1):
        path, tab, target = line.partition("\t")
        if not line:
            continue
        right = tab and path.startswith("/") and target and len(line) <= _LENGTH
        if not right or not path.isprintable() or not target.isprintable():
            raise ProtocolError(f"{box.source}: {LINKS!r} line {number} is no path and target: {line[:_LENGTH]!r}")
        found[path] = target
    return found


def _plain(words: str) -> str:
    return "".join(char if char.isprintable() else " " for char in words[:_LENGTH])


# -- views -----------------------------------------------------------------------------------------------------------


def views(path: str, name: str = "") -> list[View]:
    """All that a box says: of its system, and of the machines that run there. ``name``: what the user calls it, if that
    is not its path.

    Raises `ProtocolError` for what is not ours, or hostile.
    """
    name = name or path
    box = read_box(path, name)
    found = [*_system(box), *_others(box)]
    return found or [View(ViewKind.GUEST, name, name, problems=[f"{name}: nothing was gathered in it"], empty=True)]


def _system(box: Box) -> Iterator[View]:
    from virtiova.collect import linux

    if not any(name.startswith(TREE) for name in box.files):
        return
    view = linux.collect(tree_of(box))
    view.name = view.name or _plain(str(box.header.get("host", "")))
    _offers(view, box)
    if DMESG in box.files:
        _kernel_log(view, box)
    yield view


def _offers(view: View, box: Box) -> None:
    """What devices offer, where that was read off their registers on the spot."""
    told = box.header.get("offered")
    for device in view.devices:
        offered = told.get(device.name) if isinstance(told, dict) else None
        if isinstance(offered, bool):
            device.facts.put(k.OFFERED, offered, Place("pci", f"{box.source}: {device.name}"))


def _kernel_log(view: View, box: Box) -> None:
    """The kernel's own log is about the same machine."""
    from virtiova.collect import logs

    log = logs.collect(box.files[DMESG], f"{box.source}: {DMESG}")
    view.log += log.log
    view.machine.take(log.machine)


def _others(box: Box) -> Iterator[View]:
    """A view for each file that is about a machine of its own."""
    for name in sorted(box.files):
        kind, _, rest = name.partition("/")
        collect = _COLLECTORS.get(kind)
        if collect is not None and rest and name != DMESG:
            where = f"{box.source}: {name}"
            try:
                view = collect(box.files[name], where)
            except VirtiovaError as error:
                # One that says nothing does not take the others with it.
                view = View(ViewKind.CONFIGURATION, where, where, problems=[f"{where}: {error}"], empty=True)
            if view is not None:
                view.source = where
                if kind != "log" and not view.empty:
                    view.machine.put(k.RUNS_ON, box.source, Place("gathered", where), Certainty.INFERRED)
                yield view


def _command(data: bytes, name: str) -> View:
    from virtiova.collect import commands

    return commands.of_file(data, name)


def _libvirt(data: bytes, name: str) -> View:
    from virtiova.collect import libvirt

    return libvirt.collect(data, name)


def _backend(data: bytes, name: str) -> View | None:
    from virtiova.collect import backends

    view = backends.collect(backends.words_of(data), Place("command line", name))
    # A program that nobody knows, or that does not say what it serves, is nothing to look at.
    return view if view.devices else None


def _qmp(data: bytes, name: str) -> View:
    from virtiova.collect import qmp

    return qmp.read(data, name)


def _log(data: bytes, name: str) -> View:
    from virtiova.collect import logs

    return logs.collect(data, name)


_COLLECTORS: Final[dict[str, Callable[[bytes, str], View | None]]] = {
    "qemu": _command,
    "backend": _backend,
    "libvirt": _libvirt,
    "qmp": _qmp,
    "log": _log,
}
"""By the first part of a member's name."""
