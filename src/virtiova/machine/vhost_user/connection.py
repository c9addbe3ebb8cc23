# SPDX-License-Identifier: Apache-2.0
"""A back end that is served somewhere, or is ours to start; and what is on its device's other side."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
from typing import Final, Literal, Self

from virtiova.driver.fs import FILE
from virtiova.errors import MachineError, NotPossibleError
from virtiova.machine.backend import PATH, SHARE, START_SECONDS, BackEnd, BackEndProcess, Spawned, image_file
from virtiova.machine.image import IMAGE_SECTORS, disk_image

MAX_FRAME: Final = 65536
BUSY_SECONDS: Final = 3.0
"""How long a back end may take to let go of a front end that has hung up."""


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


class Running:
    """A back end that runs: ours, started here with a disk image and a network, or somebody's. Connect to it as often
    as it lets you. Use as a context manager."""

    def __init__(self, backend: BackEnd) -> None:
        backend.check()
        self.backend = backend
        self._cleanup = contextlib.ExitStack()
        self._spawned: Spawned | None = None
        self._image = self._shared = -1
        self._share = ""
        self.single = False
        """It is known to end with its connection, and in order."""
        self._net: socket.socket | None = None
        try:
            if backend.spawn:
                self._spawn()
        except BaseException:
            self.close()
            raise

    @property
    def process(self) -> BackEndProcess | None:
        """The back end, if we started it."""
        return None if self._spawned is None else self._spawned.process

    @property
    def alive(self) -> bool:
        """Whether it runs, as far as that can be known: of somebody's, always."""
        return self._spawned is None or self._spawned.alive

    @property
    def again(self) -> bool:
        """Whether a second connection can be made: not to one that was given its only one, or ends with its first."""
        if self._spawned is None:
            return True
        return not self.single and PATH in self.backend.spawn

    def connect(self) -> socket.socket:
        """A connection, the caller's. `MachineError` if there is none to be had."""
        spawned = self._spawned
        if spawned is not None and spawned.connected is not None:
            sock, spawned.connected = spawned.connected, None
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(START_SECONDS)
            _connect(sock, self.backend.socket if spawned is None else spawned.path)
        except OSError as error:
            sock.close()
            raise self.gone(f"cannot connect: {error.strerror or 'it does not accept'}") from error
        return sock

    def peer(self, kind: str) -> BackEndPeer:
        """The other side of a device of that type, as far as it is in our hands."""
        backend = self.backend
        if backend.owns(kind):
            return BackEndPeer("own", self._shared if kind == "fs" else self._image, self._net)
        seen = (kind == "blk" and backend.write) or (kind == "net" and backend.echo)
        return BackEndPeer("echo" if seen else "none")

    def _spawn(self) -> None:
        self._image = image_file()
        self._cleanup.callback(os.close, self._image)
        self._net, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._cleanup.callback(self._net.close)
        if SHARE in self.backend.spawn:
            self._share = tempfile.mkdtemp(prefix="virtiova-share-")
            self._cleanup.callback(shutil.rmtree, self._share, ignore_errors=True)
            self._shared = os.open(f"{self._share}/{FILE}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._cleanup.callback(os.close, self._shared)
            os.write(self._shared, disk_image(IMAGE_SECTORS))
        with theirs:
            self._spawned = Spawned(self.backend, self._image, theirs.fileno(), self._share)
        self._cleanup.callback(self._spawned.close)

    def restart(self) -> None:
        """Kill the back end that we started, at once, and start another, with the same disk and the same network."""
        spawned, net = self._spawned, self._net
        if spawned is None or spawned.process is None or net is None:
            raise MachineError("somebody's back end is not ours to kill")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(spawned.process.pid, signal.SIGKILL)
        spawned.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            ours.setblocking(False)
            # The same number: whoever holds our end goes on with it.
            os.dup2(ours.fileno(), net.fileno(), inheritable=False)
            self._spawned = Spawned(self.backend, self._image, theirs.fileno(), self._share)
        self._cleanup.callback(self._spawned.close)

    def gone(self, message: str) -> MachineError:
        """An error with the back end's own last words, where we can hear them."""
        if self._spawned is None:
            return MachineError(f"{self.backend.socket}: {message}")
        return self._spawned.gone(message)

    def words(self) -> list[str]:
        """What the back end printed, where we can hear it."""
        return [] if self._spawned is None else self._spawned.words()

    def program(self, sock: socket.socket) -> str:
        """The program at the other end of ``sock``, as far as it can be known; empty if it cannot."""
        return _program_of(sock) if self._spawned is None else self._spawned.program

    def close(self) -> None:
        """End what was started, and remove what it needed. May be called more than once."""
        # One step that fails, or is interrupted, does not cost the others.
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(sock: socket.socket, path: str) -> None:
    """Connect, also to one that has not got round yet to those who came before: the kernel says so at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.002)


def _program_of(sock: socket.socket) -> str:
    """The program that listens, as far as the kernel says; empty if it does not."""
    try:
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except (OSError, AttributeError):
        return ""
