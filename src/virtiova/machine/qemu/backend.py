# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back end for a device of QEMU: started from a command, asked what it offers, ended with the machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from typing import Final, Literal

from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.features import Feature, has
from virtiova.machine.qemu.process import QemuProcess, memory_file
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Framer, Message, Request

LISTEN_SECONDS: Final = 10.0
"""How long a back end may take until it listens."""
ANSWER_SECONDS: Final = 5.0
_GRACE: Final = 0.5
"""Seconds between being asked to end and being made to."""
_ACCEPTING: Final = 0x10000
"""Flag of a listening socket in ``/proc/net/unix``."""
_LINES: Final = 20
_IMAGE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class BackEndCommand:
    """A command as the user typed it: ``{socket}`` stands for where it is to listen, ``{image}`` for a disk of ours,
    ``{net}`` for the number of a datagram socket of ours with one frame in each datagram."""

    text: str

    def words(self) -> list[str]:
        """The command, cut as a shell would. `UsageError` for one that cannot work."""
        try:
            words = shlex.split(self.text)
        except ValueError as error:
            raise UsageError(f"--backend: {error}") from None
        if not words or "{socket}" not in self.text:
            raise UsageError("--backend: the command has to name its socket, as {socket}")
        if shutil.which(words[0]) is None:
            raise UsageError(f"--backend: there is no program {words[0]!r}")
        return words

    def reach(self, kind: str) -> Literal["own", "none"]:
        """Whether the other side of its device, of type ``kind``, is ours (`ports.Peer`)."""
        place = {"blk": "{image}", "net": "{net}"}.get(kind, "")
        return "own" if place in self.text else "none"


class BackEnd:
    """A running back end that listens at `path`. It leads a process group, which ends with it; so does its folder."""

    def __init__(self, command: BackEndCommand, image: int, net: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="virtiova-")
        self._process: QemuProcess | None = None
        self.path = f"{self._folder}/socket"
        # A path without a name in a file system: it is there for the one who inherits the number.
        values = {"{socket}": self.path, "{image}": f"/proc/self/fd/{image}", "{net}": str(net)}
        argv = []
        for word in command.words():
            for place, value in values.items():
                word = word.replace(place, value)  # noqa: PLW2901 - one place after the other
            argv.append(word)
        try:
            self._process = QemuProcess(argv, (image, net))
            self._wait_until_itlistens()
        except BaseException:
            self.close()
            raise

    def _wait_until_itlistens(self) -> None:
        # Not by connecting: there are back ends that serve one connection and end.
        deadline = time.monotonic() + LISTEN_SECONDS
        while not listens(self.path):
            if self._process is not None and self._process.exit_code() is not None:
                raise MachineError("the back end ended before it listened", "\n".join(self.words()))
            if time.monotonic() > deadline:
                raise MachineError(f"the back end did not listen within {LISTEN_SECONDS:g} s", "\n".join(self.words()))
            time.sleep(0.005)

    def words(self) -> list[str]:
        """What it said, the last lines."""
        said = "" if self._process is None else self._process.stderr()
        return [f"back end: {line[:300]}" for line in said.splitlines() if line.strip()][-_LINES:]

    def features(self) -> int:
        """The virtio features that it offers. It sees one connection for this, and may end after it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_SECONDS)
            framer = Framer()
            try:
                sock.connect(self.path)
                sock.sendall(Message(Request.GET_FEATURES).encode())
                while True:
                    data = sock.recv(framer.wanted)
                    if not data:
                        raise MachineError("the back end closed the connection", "\n".join(self.words()))
                    for message in framer.feed(data):
                        if message.request == Request.GET_FEATURES and message.reply:
                            return wire.u64_of(message.payload)
                        raise MachineError(f"the back end answered with message {message.request}")
            except (OSError, ProtocolError) as error:
                raise MachineError(f"the back end does not say what it offers: {error}") from error

    def close(self) -> None:
        """Ask it to end, make it, and remove its folder."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Not reaped before `QemuProcess.close`, so the number is still its own.
                os.killpg(self._process.pid, signal.SIGTERM)
                _wait_unreaped(self._process.pid, _GRACE)
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.close()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _wait_unreaped(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
        except ChildProcessError:
            return
        time.sleep(0.005)


def listens(path: str) -> bool:
    """Whether somebody listens there, as the kernel says."""
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            for line in table:
                fields = line.split()
                if len(fields) >= 8 and fields[7] == path and fields[3].isalnum():
                    return bool(int(fields[3], 16) & _ACCEPTING)
    except OSError:
        return os.path.exists(path)
    return False


def offers(command: BackEndCommand) -> bool:
    """Does a back end of that command offer bit 33? It is started for the question, and ended."""
    image = memory_file("virtiova-image", _IMAGE_BYTES)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        backend = BackEnd(command, image, theirs.fileno())
        try:
            return has(backend.features(), Feature.ACCESS_PLATFORM)
        finally:
            backend.close()
    finally:
        os.close(image)
        ours.close()
        theirs.close()
