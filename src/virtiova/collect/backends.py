# SPDX-License-Identifier: Apache-2.0
"""Back ends of vhost-user, and of VDUSE, by their command lines: of running processes, or of what was given."""

from __future__ import annotations

import fnmatch
import json
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View, ViewKind
from virtiova.collect.opened import VDUSE, called, links
from virtiova.collect.products import DPDK_ABI, PRODUCTS, Product
from virtiova.collect.tree import Tree
from virtiova.result.scan import Place

_WORDS: Final = 4096
"""Words of a command line that are looked at."""
_TYPES: Final = frozenset({"blk", "console", "net", "rng"})
_LISTENS: Final = 0x10000
_ON: Final = frozenset({"1", "on", "true", "yes"})
_VHOST_LIBRARY: Final = re.compile(rb"/librte_(?:vhost|eal)\.so\.(\d+(?:\.\d+){1,2})\s")


@dataclass(slots=True)
class Served:
    """A back end: its program, its command line, and its sockets, each with whether bit 33 is offered there."""

    product: Product
    words: list[str]
    sockets: dict[str, bool | None] = field(default_factory=dict)
    version: str = ""

    @property
    def type(self) -> str:
        """What it serves, if its product or command line says that."""
        if self.product.name == "virtiova" and "serve" in self.words[:-1]:
            word = self.words[self.words.index("serve") + 1]
            return word if word in _TYPES else ""
        return self.product.type

    @property
    def name(self) -> str:
        """What the program is called; of a family of programs, its command."""
        return self.product.name if "*" not in self.product.name else posixpath.basename(self.words[0])


def words_of(data: bytes) -> list[str]:
    """What ``/proc/PID/cmdline`` holds."""
    return [word.decode("utf-8", "replace") for word in data.rstrip(b"\0").split(b"\0")][:_WORDS]


def recognise(words: Sequence[str]) -> Served | None:
    """The back end that has this command line; None: none that is known."""
    words = [word for word in words[:_WORDS] if word]
    if not words:
        return None
    name = posixpath.basename(words[0])
    if fnmatch.fnmatchcase(name, "python*"):
        # A script or module is known by its own name, not its interpreter's.
        name = next((posixpath.basename(word) for word in words[1:4] if not word.startswith("-")), "")
    for product in PRODUCTS:
        named = any(fnmatch.fnmatchcase(name, each) for each in product.commands)
        if named and (not product.needs or any(each in words[1:] for each in product.needs)):
            return Served(product, list(words), dict(_sockets(product, words)))
    return None


def collect(words: Sequence[str], place: Place, served: Served | None = None, version: str = "") -> View:
    """A back end as a view: one device for each of its sockets, with what is known of the program."""
    served = served or recognise(words)
    view = View(ViewKind.BACKEND, place.name, place.name)
    if served is None:
        view.problems.append(f"{place.name}: no back end that is known")
        view.empty = True
        return view
    for path, offers in served.sockets.items():
        device = Device(posixpath.basename(path))
        put = device.facts.put
        put(k.BACKEND, "vdpa" if _is_vduse(path) else "vhost-user", place, Certainty.SAID)
        put(k.BACKEND_SOCKET, path, place, Certainty.SAID)
        name = f"{served.name} {served.version or version}".strip()
        put(k.BACKEND_PRODUCT, name, place, Certainty.SAID)
        put(k.BACKEND_OPTIONS, tuple(served.words), place, Certainty.SAID)
        if served.type:
            put(k.TYPE, served.type, place, Certainty.INFERRED)
        if offers is not None:
            put(k.BACKEND_OFFERED, offers, place, Certainty.INFERRED)
        view.devices.append(device)
    return view


def processes(tree: Tree, sockets: Collection[str]) -> list[View]:
    """The back ends that run and serve one of ``sockets``: they say so, listen on it, or have the device open."""
    wanted = set(sockets)
    views: list[View] = []
    if not wanted:
        return views
    pids = [name for name in tree.names("/proc") if name.isdigit()]
    unsure: list[tuple[str, Served]] = []
    for pid in pids:
        served = recognise(words_of(tree.read(f"/proc/{pid}/cmdline") or b""))
        if served is None:
            served = _stranger(tree, pid, wanted)
        if served is None:
            continue
        cwd = tree.link(f"/proc/{pid}/cwd") or ""
        served.sockets = {posixpath.normpath(posixpath.join(cwd, path)): said for path, said in served.sockets.items()}
        mine = wanted & set(served.sockets)
        if mine:
            wanted -= mine
            views.append(_process(tree, pid, served))
        elif not served.sockets:
            unsure.append((pid, served))
    inodes = _listeners(tree, wanted) if unsure else {}
    for pid, served in unsure:
        found = {inodes[inode] for inode in _inodes(tree, pid) if inode in inodes} | wanted & set(links(tree, pid))
        if found:
            served.sockets = dict.fromkeys(sorted(found), served.product.offers)
            views.append(_process(tree, pid, served))
    return views


def _stranger(tree: Tree, pid: str, wanted: Collection[str]) -> Served | None:
    """A program that nobody knows here, and that has one of the wanted devices of VDUSE's open: it serves it."""
    if not any(map(_is_vduse, wanted)):
        return None
    found = sorted(path for path in set(links(tree, pid)) & set(wanted) if _is_vduse(path))
    if not found:
        return None
    name = called(tree, pid)
    return Served(Product(name, (name,), None, "it has the device open"), [name], dict.fromkeys(found, True))


def sockets_of(views: Iterable[View]) -> set[str]:
    """The paths at which the devices of these machines are served."""
    return {path for view in views for each in view.devices if (path := each.facts.get(k.BACKEND_SOCKET))}


def _process(tree: Tree, pid: str, served: Served) -> View:
    served.version = version_of(tree.read(f"/proc/{pid}/maps", 1 << 20) or b"")
    view = collect(served.words, Place("proc", f"/proc/{pid}/cmdline"), served)
    view.source = f"process {pid}"
    return view


def version_of(maps: bytes) -> str:
    """The release of DPDK, by the libraries that ``/proc/PID/maps`` names; empty: it cannot be told."""
    found = _VHOST_LIBRARY.search(maps + b"\n")
    return DPDK_ABI.get(found[1].decode(), "") if found else ""


def _listeners(tree: Tree, sockets: Collection[str]) -> dict[str, str]:
    """Of the sockets that somebody listens on, the path by inode."""
    found: dict[str, str] = {}
    for line in (tree.read("/proc/net/unix", 4 << 20) or b"").decode("utf-8", "replace").splitlines()[1:]:
        parts = line.split(None, 7)
        if len(parts) == 8 and parts[7] in sockets and parts[3].isalnum() and int(parts[3], 16) & _LISTENS:
            found[parts[6]] = parts[7]
    return found


def _inodes(tree: Tree, pid: str) -> Iterator[str]:
    for link in links(tree, pid):
        if link.startswith("socket:["):
            yield link[8:-1]


def _sockets(product: Product, words: Sequence[str]) -> Iterator[tuple[str, bool | None]]:
    """Its sockets, and what it offers there."""
    yield from ((path, True) for path in _devices(product, words))
    for index, word in enumerate(words[1:], 1):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[index + 1] if index + 1 < len(words) else ""
        if option in product.nested:
            told = _told(value)
            path = next((told[key] for key in product.keys if told.get(key)), "")
            offers = product.offers
            if product.switch:
                offers = told.get(product.switch, "") in _ON
            if path and (option != "--export" or told.get("type", "").startswith("vhost-user")):
                yield path, True if _is_vduse(path) else offers
        elif option in product.sockets and value:
            yield value, product.offers


def _devices(product: Product, words: Sequence[str]) -> Iterator[str]:
    """The devices of VDUSE's that it makes. They all offer bit 33: the kernel makes no others."""
    for index, word in enumerate(words[1:], 1):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[index + 1] if index + 1 < len(words) else ""
        if option in product.vduse and value:
            yield f"{VDUSE}/{value}"
        elif option == "--export" and option in product.nested and (told := _told(value)).get("type") == "vduse-blk":
            yield f"{VDUSE}/{told.get('name') or told.get('id', '')}"


def _is_vduse(path: str) -> bool:
    return path.startswith(f"{VDUSE}/")


def _told(value: str) -> dict[str, str]:
    """The sub-options of an option, also of one in JSON, with its inner names joined by dots."""
    if value.lstrip().startswith("{"):
        try:
            return dict(_flat(json.loads(value)))
        except (ValueError, RecursionError):
            return {}
    first, *rest = value.split(",")
    told = {"": first} if "=" not in first else dict([_pair(first)])
    return told | dict(_pair(part) for part in rest)


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


def _flat(held: object, before: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(held, dict):
        for key, value in held.items():
            yield from _flat(value, f"{before}.{key}" if before else str(key))
    elif isinstance(held, bool):
        yield before, "on" if held else "off"
    elif isinstance(held, str | int):
        yield before, str(held)
