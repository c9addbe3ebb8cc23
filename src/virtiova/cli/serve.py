# SPDX-License-Identifier: Apache-2.0
"""``virtiova serve``: a device behind a vhost-user socket, or this machine's own by VDUSE, until it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import gc
import grp
import json
import os
import pwd
import re
import socket
import sysconfig
import time
from collections.abc import Callable
from typing import Final

from virtiova.cli import exits
from virtiova.cli.serve_options import DISKS
from virtiova.device.base import Device
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.console import Console
from virtiova.device.net import Net
from virtiova.device.rng import Rng
from virtiova.device.store import FileStore, MappedStore, MemoryStore, Store, Uring
from virtiova.errors import UsageError
from virtiova.serve import sandbox
from virtiova.serve.crew import MOST_SECONDS, Spin
from virtiova.serve.journal import log
from virtiova.serve.neighbour import Neighbour
from virtiova.serve.server import Server, Service, signals
from virtiova.serve.sockets import SocketOptions
from virtiova.serve.terminals import Pty, SocketTerminal, Stream, stdio
from virtiova.serve.vduse.server import VduseServer
from virtiova.serve.wires import DatagramWire, Discard, FrameWire, Tap, between

CAPABILITIES: Final[dict[str, dict[str, object]]] = {
    "blk": {"type": "block", "features": ["blk-file", "read-only"]},
    "rng": {"type": "rng", "features": []},
    "net": {"type": "net", "features": []},
    "console": {"type": "console", "features": []},
}
"""What ``--print-capabilities`` says (QEMU, ``docs/interop/vhost-user.json``)."""

WRONG: Final = ("leaky", "stale")
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_LARGEST: Final = 1 << 40
_URING: Final[dict[str, Uring]] = {"auto": "waiting", "uring": "all"}
_SERIAL: Final = b"virtiova"
_MAC: Final = "52:54:00:76:69:6f"


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.print_capabilities:
        print(json.dumps(CAPABILITIES["blk" if options.kind in DISKS else options.kind], indent=2))
        return exits.OK
    if options.print_descriptor:
        print(json.dumps(descriptor("blk" if options.kind in DISKS else options.kind), indent=2))
        return exits.OK
    _one_way(options)
    say = _silent if options.quiet else log
    with contextlib.ExitStack() as stack:
        device = _device(options, stack, say)
        server = stack.enter_context(_server(options, device, say))
        if isinstance(device, Blk):
            say(f"disk: {device.how}")
        with signals(server):
            say(
                sandbox.enter(
                    options.sandbox,
                    device.queues,
                    descriptors=options.kind in DISKS and options.vduse is None,
                    addresses=getattr(options, "datagram", None) is not None,
                    uring=isinstance(device, Blk) and device.uring,
                    controls=server.controls,
                )
            )
            say(f"serving {options.kind} at {server.where}")
            # What is there now stays: nobody has to look through it again whenever a connection ends.
            gc.freeze()
            server.run()
        say(server.counters.text())
        if options.json:
            print(server.counters.json())
        else:
            say(server.counters.json())
    return exits.OK


def _one_way(options: argparse.Namespace) -> None:
    """`UsageError` unless it is said in one way where the device is to be."""
    if sum(way is not None for way in (options.socket_path, options.fd, options.vduse)) != 1:
        raise UsageError("one of --socket-path, --fd and --vduse, please")
    if options.socket_path is None and (options.socket_mode or options.socket_owner):
        raise UsageError("--socket-mode and --socket-owner are for --socket-path")
    if options.vduse is not None and options.kind in WRONG:
        raise UsageError(f"{options.kind} is over vhost-user only: a VDUSE device has no bare addresses, and no choice")


def _server(options: argparse.Namespace, device: Device, say: Callable[[str], None]) -> Service:
    spin = _spin(options.spin)
    if options.vduse is not None:
        return VduseServer(device, options.vduse, medium=_medium(options), say=say, spin=spin)
    behaviour = options.kind if options.kind in WRONG else "honest"
    fd = -1 if options.fd is None else options.fd
    path = options.socket_path or ""
    return Server(device, path, fd=fd, options=_socket_options(options), say=say, behaviour=behaviour, spin=spin)


def _medium(options: argparse.Namespace) -> str:
    """What a device's bytes are, so that another process that says the same goes on with them. Memory of a process is
    gone with it."""
    if options.kind not in DISKS:
        return ""
    path = options.image or options.blk_file
    if path is None:
        return f"memory of process {os.getpid()}, {time.monotonic_ns()}"
    info = os.stat(path)
    return f"file {info.st_dev}:{info.st_ino}:{info.st_rdev} {options.serial or ''} {'ro' if options.read_only else ''}"


def descriptor(kind: str) -> dict[str, str]:
    """What management software wants to know of the back end for ``kind`` (QEMU, ``docs/interop/vhost-user.json``).

    Raises `UsageError` if its program is not installed where this one is.
    """
    name = f"vhost-user-{kind}-virtiova"
    program = os.path.join(sysconfig.get_path("scripts"), name)
    if not os.access(program, os.X_OK):
        raise UsageError(f"there is no program {name} beside this one, and a descriptor is about a program")
    description = f"virtiova {name.removesuffix('-virtiova')}, which honours the IOMMU"
    return {"description": description, "type": str(CAPABILITIES[kind]["type"]), "binary": program}


def _silent(_: str) -> None:
    pass


def _socket_options(options: argparse.Namespace) -> SocketOptions:
    mode = options.socket_mode or "600"
    if not re.fullmatch("0?[0-7]{3}", mode):
        raise UsageError(f"--socket-mode {mode}: wanted three octal digits, such as 660")
    owner, _, group = (options.socket_owner or "").partition(":")
    uid = _number("user", owner, lambda name: pwd.getpwnam(name).pw_uid)
    gid = _number("group", group, lambda name: grp.getgrnam(name).gr_gid)
    return SocketOptions(int(mode, 8), uid, gid)


def _number(what: str, name: str, find: Callable[[str], int]) -> int:
    """A user or group by name or number; -1 for none."""
    if not name:
        return -1
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return find(name)
    except KeyError:
        raise UsageError(f"there is no {what} {name!r} here") from None


def _device(options: argparse.Namespace, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Device:
    """The device; ``stack`` closes what is behind it."""
    if options.kind == "rng":
        return Rng()
    if options.kind == "net":
        return _net(options, stack, say)
    if options.kind == "console":
        return _console(options, stack, say)
    serial = _SERIAL if options.serial is None else options.serial.encode()
    return Blk(_store(options), serial, queues=options.num_queues, native=options.io != "python")


def _net(options: argparse.Namespace, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Net:
    wires = (options.tap, options.datagram, options.datagram_fd, options.neighbour, options.discard or None)
    if sum(option is not None for option in wires) != 1:
        raise UsageError("a network device is on one wire: --tap, --datagram, --datagram-fd, --neighbour or --discard")
    mac = options.mac or _MAC
    if not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac.lower()):
        raise UsageError(f"--mac {mac}: wanted six bytes such as {_MAC}")
    wire: FrameWire | Neighbour | Discard
    if options.neighbour is not None:
        wire = Neighbour(options.neighbour)
    elif options.discard:
        wire = nowhere = Discard()
        stack.callback(lambda: say(f"discarded: {nowhere.frames} frames, {nowhere.bytes} bytes"))
    else:
        if options.datagram_fd is not None:
            wire = DatagramWire(_adopted(options.datagram_fd))
        else:
            wire = Tap(options.tap) if options.tap is not None else between(*options.datagram)
        stack.callback(wire.close)
    net = wire.connect(Net(wire, bytes.fromhex(mac.replace(":", ""))))
    net.native = net.native and options.io != "python"
    return net


def _adopted(fd: int) -> socket.socket:
    """A socket that whoever started us has opened."""
    try:
        adopted = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"descriptor {fd}: {getattr(error, 'strerror', None) or error}") from error
    os.set_inheritable(fd, False)
    return adopted


def _console(options: argparse.Namespace, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Console:
    if sum((options.stdio, options.pty, options.terminal is not None, options.terminal_fd is not None)) != 1:
        raise UsageError("a console has one terminal: --stdio, --pty, --terminal or --terminal-fd")
    if options.stdio and options.json:
        raise UsageError("--json and the console of --stdio cannot share standard output")
    size = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", options.size or "0x0", re.ASCII)
    if size is None:
        raise UsageError(f"--size {options.size}: wanted columns and rows, such as 80x25")
    terminal: Stream
    if options.stdio:
        terminal = stdio()
    elif options.pty:
        terminal = Pty()
        say(f"the console is at {terminal.path}")
    elif options.terminal is not None:
        terminal = SocketTerminal(options.terminal)
    else:
        fd = _adopted(options.terminal_fd).detach()
        terminal = Stream(fd, fd)
    stack.callback(terminal.close)
    return terminal.connect(Console(terminal, columns=int(size[1]), rows=int(size[2])))


def _store(options: argparse.Namespace) -> Store:
    sources = [source for source in (options.image, options.blk_file, options.memory) if source is not None]
    if len(sources) != 1:
        raise UsageError("a disk is made of one thing: IMAGE, --blk-file or --memory")
    if options.memory is not None:
        if options.io in ("mapped", "uring"):
            raise UsageError(f"--io {options.io} is for a file")
        return MemoryStore.empty(parse_size(options.memory), read_only=options.read_only)
    kind = MappedStore if options.io == "mapped" else FileStore
    return kind(sources[0], read_only=options.read_only, uring=_URING.get(options.io, "nothing"))


def _spin(text: str) -> Spin:
    """``auto``, ``off``, or microseconds."""
    if text == "auto":
        return Spin()
    if text == "off":
        return Spin(0.0)
    most = round(MOST_SECONDS * 1e6)
    if not re.fullmatch("[0-9]{1,5}", text, re.ASCII) or int(text) > most:
        raise UsageError(f"--spin {text}: wanted auto, off, or microseconds up to {most}")
    return Spin(int(text) / 1e6, fixed=True)


def parse_size(text: str) -> int:
    """``64M`` in bytes: whole sectors."""
    found = re.fullmatch(r"([0-9]{1,13})([kmg]?)i?b?", text.lower(), re.ASCII)
    size = int(found.group(1)) * _UNITS[found.group(2)] if found else 0
    if not 0 < size <= _LARGEST or size % SECTOR:
        raise UsageError(f"a size of {text!r}, wanted a multiple of {SECTOR} such as 64M")
    return size
