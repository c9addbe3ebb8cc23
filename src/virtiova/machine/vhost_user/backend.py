# SPDX-License-Identifier: Apache-2.0
"""A back end as the user names it: a socket that somebody serves, or a command that we start ourselves."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.features import DeviceId
from virtiova.machine.model_peer import disk_image
from virtiova.machine.qemu.process import QemuProcess, memory_file

START_SECONDS: Final = 10.0
"""How long a back end may take from its start until it listens."""
_GRACE: Final = 0.5
"""Seconds between being asked to end and being made to."""
SECTOR: Final = 512
IMAGE_SECTORS: Final = 2048
MAX_FRAME: Final = 65536

KINDS: Final = {
    "blk": DeviceId.BLOCK,
    "console": DeviceId.CONSOLE,
    "net": DeviceId.NET,
    "rng": DeviceId.ENTROPY,
}
"""Device types that there is a driver for here, by the name that ``--type`` takes."""
PLACES: Final = ("{socket}", "{fd}", "{image}", "{net}")


@dataclass(frozen=True, slots=True)
class BackEnd:
    """What to probe. Either ``socket``, a path to connect to, or ``spawn``, a command in which these are put in:
    ``{socket}`` a path to listen on, ``{fd}`` the number of a connected socket, ``{image}`` the path of a disk image
    of ours, ``{net}`` the number of a datagram socket with one network frame (or piece of text) a datagram.

    ``kind`` is the device type (`KINDS`); empty: to be guessed. ``guess`` says what it was guessed from. ``write``
    allows requests that change the disk, ``echo`` says that the network device sends back each frame that it is given.
    """

    socket: str = ""
    spawn: str = ""
    kind: str = ""
    guess: str = ""
    write: bool = False
    echo: bool = False

    def check(self) -> None:
        """Raise `UsageError` for what makes no sense."""
        if bool(self.socket) == bool(self.spawn):
            raise UsageError("a vhost-user back end is a socket, or --spawn and a command: one of the two")
        if self.kind and self.kind not in KINDS:
            raise UsageError.unknown("device type", self.kind, KINDS)
        if self.socket and not os.path.exists(self.socket):
            raise UsageError(f"{self.socket}: there is no such socket")
        if self.spawn:
            words = self.words()
            if sum(place in self.spawn for place in ("{socket}", "{fd}")) != 1:
                raise UsageError("--spawn: the command names its socket, as {socket} (a path) or {fd} (a number)")
            if shutil.which(words[0]) is None:
                raise UsageError(f"--spawn: there is no program {words[0]!r}")

    def words(self) -> list[str]:
        """The command, cut as a shell would."""
        try:
            words = shlex.split(self.spawn)
        except ValueError as error:
            raise UsageError(f"--spawn: {error}") from None
        if not words:
            raise UsageError("--spawn: an empty command")
        return words


class BackEndProcess(QemuProcess):
    """A back end that we started, and whatever it started itself: it leads a process group, which ends with it."""

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """How it ended, waiting up to ``seconds``; None while it runs. It is left to be reaped by `close`, so that
        its number stays its own until then."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return self._process.returncode
            if seen is not None:
                return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.002)

    def close(self) -> None:
        """Ask the group to end, then make it."""
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            self.exit_code(_GRACE)
            self._signal(signal.SIGKILL)
        super().close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class BackEndPeer:
    """The other side of the back end's device (`ports.Peer`): ours where the command has {image} or {net}."""

    def __init__(
        self, reach: Literal["own", "echo", "none"], image: int = -1, net: socket.socket | None = None
    ) -> None:
        self.reach: Literal["own", "echo", "none"] = reach
        self.kept: dict[int, bytes] = {}
        self._image = image
        self._net = net
        if net is not None:
            net.setblocking(False)

    def send(self, data: bytes) -> None:
        """Hand the device a frame; nobody does where its network is not ours."""
        if self._net is not None:
            try:
                self._net.send(data)
            except OSError as error:
                raise MachineError(f"the back end does not take frames ({error.strerror})") from error

    def received(self) -> list[bytes]:
        """Frames that came from the device, at most 1024 at a time."""
        frames: list[bytes] = []
        while self._net is not None and len(frames) < 1024:
            try:
                frames.append(self._net.recv(MAX_FRAME))
            except OSError:
                break
        return frames

    def stored(self, offset: int, length: int) -> bytes:
        """Bytes of our disk image, as many as it has there."""
        return os.pread(self._image, length, offset) if self._image >= 0 else b""

    def shown(self) -> bytes:
        """No back end shows us its screen."""
        raise NotPossibleError("a back end's screen is not ours to see")


class Connection:
    """A fresh connection to a back end, which is started for it if it is ours to start."""

    def __init__(self, backend: BackEnd) -> None:
        backend.check()
        self._backend = backend
        self._cleanup: list[Callable[[], object]] = []
        self.process: BackEndProcess | None = None
        self.program = ""
        try:
            self.socket = self._spawn() if backend.spawn else self._connect(backend.socket, START_SECONDS)
            if not self.program:
                self.program = _program_of(self.socket)
        except BaseException:
            self.close()
            raise

    def peer(self, kind: str) -> BackEndPeer:
        """The other side of a device of that type, as far as it is in our hands."""
        backend = self._backend
        if (kind == "blk" and self._image >= 0) or (kind in ("net", "console") and self._net is not None):
            return BackEndPeer("own", self._image, self._net)
        seen = (kind == "blk" and backend.write) or (kind == "net" and backend.echo)
        return BackEndPeer("echo" if seen else "none")

    _image = -1
    _net: socket.socket | None = None

    def _spawn(self) -> socket.socket:
        values: dict[str, str] = {}
        inherit: list[int] = []
        theirs: list[socket.socket] = []
        text = self._backend.spawn
        ours: socket.socket | None = None
        path = ""
        if "{socket}" in text:
            folder = tempfile.mkdtemp(prefix="virtiova-")
            self._cleanup.append(functools.partial(shutil.rmtree, folder, ignore_errors=True))
            path = values["{socket}"] = f"{folder}/socket"
        if "{fd}" in text:
            ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._cleanup.append(ours.close)
            theirs.append(end)
            values["{fd}"] = str(end.fileno())
        if "{net}" in text:
            self._net, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._cleanup.append(self._net.close)
            theirs.append(end)
            values["{net}"] = str(end.fileno())
        if "{image}" in text:
            self._image = memory_file("virtiova-image", IMAGE_SECTORS * SECTOR)
            self._cleanup.append(functools.partial(os.close, self._image))
            os.pwrite(self._image, bytes(disk_image(IMAGE_SECTORS)), 0)
            # A path without a name in a file system: it is there for the one who inherits the number.
            values["{image}"] = f"/proc/self/fd/{self._image}"
            inherit.append(self._image)
        try:
            argv = [_filled(word, values) for word in self._backend.words()]
            inherit += [end.fileno() for end in theirs]
            self.process = BackEndProcess(argv, inherit)
            self._cleanup.append(self.process.close)
        finally:
            for end in theirs:
                end.close()
        self.program = os.path.basename(argv[0])
        return ours if ours is not None else self._connect(path, START_SECONDS)

    def _connect(self, path: str, seconds: float) -> socket.socket:
        """Connect, waiting for a back end that we started to listen."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cleanup.append(sock.close)
        sock.settimeout(seconds)
        deadline = time.monotonic() + seconds
        while True:
            try:
                sock.connect(path)
                return sock
            except OSError as error:
                if self.process is None:
                    raise self.gone(f"cannot connect to {path}: {error.strerror or 'it does not accept'}") from error
                if self.process.exit_code() is not None:
                    raise self.gone("the back end ended before it listened") from error
                if time.monotonic() > deadline:
                    raise self.gone(f"the back end did not listen within {seconds:g} s") from error
            time.sleep(0.005)

    def gone(self, message: str) -> MachineError:
        """An error with the back end's own last words, where we can hear them."""
        if self.process is None:
            return MachineError(message)
        code = self.process.exit_code(0.2)
        how = "it is still running" if code is None else f"exit status {code}"
        stderr = self.process.stderr().strip()
        tail = f": {stderr.splitlines()[-1][:200]}" if stderr else ""
        return MachineError(f"{message} ({how}){tail}", stderr)

    def close(self) -> None:
        """Close, end, remove. May be called more than once."""
        try:
            while self._cleanup:
                self._cleanup.pop()()
        finally:
            # One step that fails, or is interrupted, must not cost the others.
            if self._cleanup:
                self.close()


def _filled(word: str, values: dict[str, str]) -> str:
    for place, value in values.items():
        word = word.replace(place, value)
    return word


def _program_of(sock: socket.socket) -> str:
    """The program that listens, as far as the kernel says; empty if it does not."""
    try:
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except (OSError, AttributeError):
        return ""
