# SPDX-License-Identifier: Apache-2.0
"""A running QEMU from outside: what its monitor says of the machine and its virtio devices. Nothing is changed.

Asking and judging what was said are two steps: a transcript that was taken elsewhere comes to the same view.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from typing import Any, Final

from virtiova.collect import qmp_device, qmp_machine
from virtiova.collect.asked import SCHEMA, Ask, Live, Replay, word
from virtiova.collect.facts import View, ViewKind
from virtiova.collect.monitor import Monitor
from virtiova.collect.monitor_words import printable
from virtiova.errors import MachineError, ProtocolError

_SECONDS: Final = 5.0
"""For each answer. QEMU gives them in milliseconds, later if the machine is busy."""
_BYTES: Final = 128 << 20
_PROBLEMS: Final = 20


def collect(socket_path: str) -> View:
    """Ask the monitor at a socket, and what that comes to."""
    return view(transcript(socket_path), socket_path)


def transcript(socket_path: str) -> dict[str, Any]:
    """All that is asked of a monitor, with the answers, as a document. What went wrong is in its ``problems``.

    ``{"schema": "virtiova/qmp/1", "time", "problems": [...], "asked": [{"command", "arguments", "answer" | "error"}]}``
    """
    document: dict[str, Any] = {"schema": SCHEMA, "time": int(time.time()), "problems": [], "asked": []}
    try:
        with _connect(socket_path) as end, _greeted(end) as monitor:
            live = Live(monitor)
            document["asked"] = live.asked
            _walk(live, socket_path)
    except MachineError as error:
        document["problems"].append(str(error))
    return document


def read(data: bytes, name: str) -> View:
    """The view of a transcript in a file. Raises `ProtocolError` if it is none."""
    if len(data) > _BYTES:
        raise ProtocolError(f"{name}: larger than {_BYTES >> 20} MiB")
    try:
        return view(json.loads(data), name)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{name}: no JSON: {error}") from error


def view(transcript: object, name: str) -> View:
    """What a transcript comes to. It may be anybody's. Raises `ProtocolError` if it is none at all."""
    replay = Replay(transcript)
    found = _walk(replay, name)
    said = transcript.get("problems") if isinstance(transcript, dict) else None
    problems = [word(each, 400) for each in said[:_PROBLEMS] if word(each)] if isinstance(said, list) else []
    found.problems[:0] = [f"{name}: {each}" for each in problems]
    found.empty = not found.devices and not list(found.machine)
    if found.empty and not found.problems:
        found.problems.append(f"{name}: nothing was answered")
    return found


def _walk(ask: Ask, name: str) -> View:
    """Ask for everything. A question that no answer comes to ends it: what came before is kept."""
    found = View(ViewKind.HOST, "", name)
    try:
        tree, mtree = qmp_machine.collect(ask, found)
        qmp_device.collect(ask, found, tree, mtree)
    except MachineError as error:
        if isinstance(ask, Live):
            raise
        found.problems.append(f"{name}: {error}")
    return found


# -- the socket ------------------------------------------------------------------------------------------------------


def _connect(path: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.settimeout(_SECONDS)
    try:
        end.connect(path)
    except TimeoutError as error:
        end.close()
        raise MachineError(f"nobody takes the connection within {_SECONDS:.0f} s") from error
    except OSError as error:
        end.close()
        raise MachineError(_why(path, error)) from error
    return end


def _why(path: str, error: OSError) -> str:
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return error.strerror or str(error)
    if not is_socket:
        return "is no socket"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there: the machine has ended"
    return error.strerror or str(error)


def _greeted(end: socket.socket) -> Monitor:
    """A monitor that has said who it is. QEMU serves one at a time, and lets all others wait without a word."""
    end.settimeout(_SECONDS)
    try:
        first = end.recv(512, socket.MSG_PEEK)
    except TimeoutError as error:
        raise MachineError(
            f"no greeting within {_SECONDS:.0f} s: either somebody else holds this monitor, which serves one at a time "
            "(libvirt does: give it a second one, or scan the domain's XML), or it is no monitor"
        ) from error
    except OSError as error:
        raise MachineError(f"no greeting: {error.strerror}") from error
    if not first:
        raise MachineError("it hung up without a greeting")
    if b"(qemu)" in first or first.startswith(b"QEMU "):
        raise MachineError("this is QEMU's monitor for people; the one for programs is needed: -qmp, or mode=control")
    if not first.lstrip().startswith(b"{"):
        raise MachineError(f"it does not speak QMP: it begins with {printable(first[:40].decode('latin-1'))!r}")
    return Monitor(end, _SECONDS)
