# SPDX-License-Identifier: Apache-2.0
"""What was named on the command line of ``scan``, turned into views: the kind of a file is told by its content."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

from virtiova.collect.facts import View, ViewKind
from virtiova.errors import ProtocolError, UsageError, VirtiovaError
from virtiova.result.scan import Place

_LIMIT: Final = 16 << 20
"""Bytes of a file that is read whole: XML, a command line."""
_CONFIG_LIMIT: Final = 1 << 20
_LOG_LIMIT: Final = 64 << 20
Look: TypeAlias = Callable[[], list[View]]


def views(options: argparse.Namespace, words: list[str]) -> list[View]:
    """A view, or several, for each input; of this machine if none is named. ``words``: what followed ``--``."""
    looks = list(_looks(options, words))
    if not looks:
        return _here()
    return [view for name, look in looks for view in _guarded(name, look)]


def _here() -> list[View]:
    """This machine, and the programs of its own that serve it devices, if there can be any."""
    from virtiova.collect import keys as k
    from virtiova.collect import linux
    from virtiova.collect.tree import LiveTree

    tree = LiveTree()
    here = linux.collect(tree)
    if not any(k.BACKEND_SOCKET in device.facts for device in here.devices):
        return [here]
    from virtiova.collect import backends

    return [here, *backends.processes(tree, backends.sockets_of([here]))]


def look_at(path: str, name: str = "") -> list[View]:
    """The views of one file or folder; one that says why, if it cannot be looked at. ``name``: what the user calls it,
    if that is not its path."""
    return _guarded(name or path, partial(_file, path, name or path))


def _looks(options: argparse.Namespace, words: list[str]) -> Iterator[tuple[str, Look]]:
    """What to look at, each by its name."""
    for name in options.inputs:
        yield name, partial(_file, name, name)
    for socket in options.qmp:
        yield socket, partial(_qmp, socket)
    for name in options.cmdline:
        yield name, partial(_command_line, name, name)
    for pid in options.pid:
        yield f"process {pid}", partial(_process, pid)
    if words:
        yield "command line", partial(_words, words)
    for name in options.log:
        yield name, partial(_log, name)


def _guarded(name: str, look: Look) -> list[View]:
    """What could not be looked at is a view of its own that says so: the other inputs are scanned all the same."""
    try:
        return look()
    except UsageError:
        raise
    except VirtiovaError as error:
        words = str(error)
    except OSError as error:
        words = error.strerror or str(error)
    said = words if words.startswith(name) else f"{name}: {words}"
    return [View(ViewKind.CONFIGURATION, name, name, problems=[said], empty=True)]


def _file(path: str, name: str) -> list[View]:
    if not os.path.isdir(path):
        start = _start(path, name)
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            from virtiova.collect import libvirt

            return [libvirt.collect(_bytes(path, _LIMIT), name)]
        if name.endswith(".toml"):
            from virtiova.collect import kata

            return [kata.collect(_bytes(path, _LIMIT), name)]
    from virtiova.collect import gathered

    return gathered.views(path, name)


def _start(path: str, name: str) -> bytes:
    """How a file begins. What is none (a pipe, a device) is not read: nobody may ever write to it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError(f"{name}: neither a file nor a folder")
        return os.read(fd, 512)
    finally:
        os.close(fd)


def _qmp(socket: str) -> list[View]:
    from virtiova.collect import qmp

    return [qmp.collect(socket)]


def _words(words: list[str]) -> list[View]:
    from virtiova.collect import commands

    return [commands.collect(words, Place("command line", "command line"), partial(_config, ""))]


def _command_line(path: str, name: str, root: str | None = None) -> list[View]:
    """``root``: where the files that it names are; None: not here."""
    from virtiova.collect import commands

    return [commands.of_file(_bytes(path, _LIMIT), name, None if root is None else partial(_config, root))]


def _config(root: str, path: str) -> bytes | None:
    """A file that a command line names (-readconfig), below ``root``; None if it is none, or cannot be read."""
    from virtiova.collect.tree import LiveTree

    return LiveTree(root or "/").read(path if root else os.path.abspath(path), _CONFIG_LIMIT + 1)


def _process(pid: str) -> list[View]:
    if not pid.isascii() or not pid.isdigit():
        raise UsageError(f"--pid takes the number of a process, not {pid!r}")
    path = f"/proc/{int(pid)}/cmdline"
    try:
        found = _command_line(path, path, f"/proc/{int(pid)}/root")
    except FileNotFoundError as error:
        raise UsageError(f"there is no process {pid}") from error
    from virtiova.collect import backends
    from virtiova.collect.tree import LiveTree

    return found + backends.processes(LiveTree(), backends.sockets_of(found))


def _log(name: str) -> list[View]:
    from virtiova.collect import logs

    return [logs.collect(_bytes(name, _LOG_LIMIT), name)]


def _bytes(name: str, limit: int) -> bytes:
    with open(name, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UsageError(f"{name}: larger than {limit >> 20} MiB")
    return data
