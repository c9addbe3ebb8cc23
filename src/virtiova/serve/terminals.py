# SPDX-License-Identifier: Apache-2.0
"""Where a console's output goes to, and its input comes from: a pseudo-terminal, this process's own, or a socket."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import tty
from collections.abc import Callable
from typing import Final

from virtiova.device.console import Console
from virtiova.serve import sockets

MAX_OUTPUT: Final = 1 << 16
"""Bytes of output that wait for somebody to take them, before the device is told to stop."""
_STEP: Final = 1 << 14


class _Way:
    """One direction of one descriptor, as a ``Source``."""

    def __init__(self, wanted: Callable[[], int], ready: Callable[[], None]) -> None:
        self.fd = -1
        self._wanted = wanted
        self._ready = ready

    def fileno(self) -> int:
        return self.fd

    def events(self) -> int:
        return self._wanted() if self.fd >= 0 else 0

    def ready(self, events: int) -> None:
        if self.fd >= 0:
            self._ready()


class Stream:
    """A terminal behind two descriptors, which may be one and the same; owns them.

    Output that nobody takes is kept up to `MAX_OUTPUT`; then the driver's stays in its ring. If the other side
    closes, output is thrown away, and no input comes.
    """

    def __init__(self, read_fd: int = -1, write_fd: int = -1) -> None:
        self._console: Console | None = None
        self._output = bytearray()
        self._in = _Way(self._want_input, self._take)
        self._out = _Way(lambda: selectors.EVENT_WRITE if self._output else 0, self._pass_on)
        if read_fd >= 0:
            self._open(read_fd, write_fd)

    def connect(self, console: Console) -> Console:
        """Let ``console`` hear from this terminal; returns it."""
        self._console = console
        console.sources = (self._in, self._out)
        return console

    def send(self, data: bytes, /) -> None:
        """Take output; what can go on at once does."""
        self._output += data
        self._pass_on()

    def full(self) -> bool:
        """Whether so much waits that no more is wanted."""
        return len(self._output) >= MAX_OUTPUT

    def close(self) -> None:
        """Let go of both descriptors. May be called more than once."""
        for way in (self._in, self._out):
            fd, way.fd = way.fd, -1
            if fd >= 0:
                os.close(fd)
        self._output.clear()

    def _open(self, read_fd: int, write_fd: int) -> None:
        # One number is waited for in one way only.
        self._in.fd, self._out.fd = read_fd, os.dup(write_fd) if write_fd == read_fd else write_fd
        for fd in (self._in.fd, self._out.fd):
            os.set_blocking(fd, False)

    def _want_input(self) -> int:
        return selectors.EVENT_READ if self._console is not None and self._console.room > 0 else 0

    def _take(self) -> None:
        if self._console is None or self._console.room <= 0:
            return
        try:
            data = os.read(self._in.fd, min(_STEP, self._console.room))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._console.deliver(data)
        else:
            self._ended()

    def _pass_on(self) -> None:
        if self._out.fd < 0:
            self._output.clear()
            return
        try:
            while self._output:
                del self._output[: os.write(self._out.fd, self._output[:_STEP])]
        except BlockingIOError:
            return
        except OSError:
            self._ended()

    def _ended(self) -> None:
        self.close()


def stdio() -> Stream:
    """This process's own input and output. Both become non-blocking, for whoever shares them as well."""
    return Stream(os.dup(0), os.dup(1))


class Pty(Stream):
    """A pseudo-terminal; ``path`` is what a terminal program opens. It stays when such a program goes."""

    def __init__(self) -> None:
        ours, self._theirs = os.openpty()
        tty.setraw(self._theirs)
        self.path = os.ttyname(self._theirs)
        super().__init__(ours, ours)

    def close(self) -> None:
        """Let go of both sides."""
        super().close()
        fd, self._theirs = self._theirs, -1
        if fd >= 0:
            os.close(fd)


class SocketTerminal(Stream):
    """Whoever connects to the Unix socket ``path``, one at a time; output without anybody there is thrown away."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sockets.bind(self._listener, path)
            self._listener.listen(1)
        except BaseException:
            self._listener.close()
            raise
        self._door = _Way(lambda: selectors.EVENT_READ if self._in.fd < 0 else 0, self._accept)
        self._door.fd = self._listener.fileno()

    def connect(self, console: Console) -> Console:
        """Let ``console`` hear from whoever connects; returns it."""
        super().connect(console)
        console.sources = (self._in, self._out, self._door)
        return console

    def close(self) -> None:
        """Hang up, and take the name away."""
        super().close()
        if self._listener.fileno() >= 0:
            self._door.fd = -1
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        fd = peer.detach()
        self._open(fd, fd)

    def _ended(self) -> None:
        Stream.close(self)
