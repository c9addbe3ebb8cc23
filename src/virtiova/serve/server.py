# SPDX-License-Identifier: Apache-2.0
"""A server: a socket to listen on, one front end after the other, signals, a clean end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Final

from virtiova.device.base import Device
from virtiova.errors import NotPossibleError, UsageError
from virtiova.serve.counters import Counters
from virtiova.serve.loop import Connection

_LONGEST_PATH: Final = 107


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Who may connect: the file's mode, and its owner and group by number (-1: ours)."""

    mode: int = 0o600
    owner: int = -1
    group: int = -1


def log(line: str) -> None:
    """A line on standard error."""
    print(f"virtiova: {line}", file=sys.stderr, flush=True)


class Server:
    """Serves ``device`` to one front end at a time; others wait until it goes.

    ``path`` is where the socket is made, or ``fd`` an open one: listening, or connected already, and then there is
    one connection and no other. ``behaviour`` is the address space (`dma.wrong.SPACES`). Use as a context manager.
    """

    def __init__(
        self,
        device: Device,
        path: str = "",
        *,
        fd: int = -1,
        options: SocketOptions | None = None,
        say: Callable[[str], None] = log,
        behaviour: str = "honest",
        access_platform: bool = True,
    ) -> None:
        self.counters = Counters()
        self._device = device
        self._say = say
        self._behaviour = behaviour
        self._access_platform = access_platform
        self._stopping = False
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._tell = False
        try:
            self._socket = _listen(path, options or SocketOptions()) if path else _adopt(fd)
            if path:
                info = os.stat(path)
                self._identity = (info.st_dev, info.st_ino)
        except BaseException:
            os.close(self._wake)
            os.close(self._waker)
            raise

    def stop(self) -> None:
        """End the serving, from any thread or signal handler."""
        self._stopping = True
        self._nudge()

    def tell(self) -> None:
        """Write the counters to the log soon, from any thread or signal handler."""
        self._tell = True
        self._nudge()

    def _nudge(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def run(self) -> None:
        """Serve until `stop`, or until the one front end of a connected socket has gone."""
        if not self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._serve(self._socket.dup())
            return
        self._socket.setblocking(False)
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._ended():
            poll.poll()
            try:
                connected, _ = self._socket.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._say(f"a front end was turned away: {error.strerror}")
                    # It is still in the queue: asking again at once would be a loop.
                    poll_wake = select.poll()
                    poll_wake.register(self._wake, select.POLLIN)
                    poll_wake.poll(1000)
                    continue
                raise
            self._serve(connected)

    def _serve(self, connected: socket.socket) -> None:
        self.counters.connections += 1
        self._say("a front end has connected")
        connection = Connection(
            self._device,
            connected,
            say=self._say,
            counters=self.counters,
            behaviour=self._behaviour,
            access_platform=self._access_platform,
        )
        connection.run(self._ended, self._wake)

    def _ended(self) -> bool:
        """Whether to stop; what else a signal wanted is done here, where nothing is under way."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        if self._tell:
            self._tell = False
            self._say(self.counters.text())
            self._say(self.counters.json())
        return self._stopping

    def close(self) -> None:
        """Close the socket, and remove it if it is still the one that was made here."""
        if self._identity is not None:
            with contextlib.suppress(OSError):
                info = os.stat(self._path)
                if (info.st_dev, info.st_ino) == self._identity:
                    os.unlink(self._path)
            self._identity = None
        self._socket.close()
        for fd in (self._wake, self._waker):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._wake = self._waker = -1

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _listen(path: str, options: SocketOptions) -> socket.socket:
    """A listening socket at ``path``, which nobody else can connect to before mode and owner are set."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(f"{path}: longer than the {_LONGEST_PATH} bytes that the path of a socket may have")
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listening.bind(path)
    except OSError as error:
        listening.close()
        raise UsageError(f"{path}: {error.strerror}") from error
    finally:
        os.umask(old)
    try:
        if (options.owner, options.group) != (-1, -1):
            os.chown(path, options.owner, options.group, follow_symlinks=False)
        os.chmod(path, options.mode)
        listening.listen(8)
    except OSError as error:
        listening.close()
        os.unlink(path)
        raise NotPossibleError(f"{path}: {error.strerror}") from error
    return listening


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on any more is what a server leaves that was killed outright."""
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(kind):
        raise UsageError(f"{path}: there is something else already")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.settimeout(1.0)
        try:
            other.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        else:
            raise NotPossibleError(f"{path}: somebody is serving there")


def _adopt(fd: int) -> socket.socket:
    """An open socket that somebody handed over."""
    try:
        adopted = socket.socket(fileno=fd)
        if adopted.family != socket.AF_UNIX or adopted.type != socket.SOCK_STREAM:
            adopted.detach()
            raise UsageError(f"descriptor {fd} is no Unix stream socket")
    except OSError as error:
        raise UsageError(f"descriptor {fd}: {error.strerror}") from error
    os.set_inheritable(fd, False)
    return adopted


@contextlib.contextmanager
def signals(server: Server) -> Iterator[None]:
    """SIGTERM and SIGINT end the server, SIGUSR1 makes it tell its counters. Only in the main thread, else nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signum: int, _frame: FrameType | None) -> None:
        server.stop()

    def tell(_signum: int, _frame: FrameType | None) -> None:
        server.tell()

    wanted = {signal.SIGTERM: end, signal.SIGINT: end, signal.SIGHUP: end, signal.SIGUSR1: tell}
    before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def serve(device: Device, path: str, *, options: SocketOptions | None = None) -> Counters:
    """Serve ``device`` on a socket at ``path`` until SIGTERM or SIGINT; what was counted.

    A user of the library needs no more than this and a `Device`::

        serve(Rng(), "/run/rng.sock")
    """
    with Server(device, path, options=options) as server, signals(server):
        server.run()
    return server.counters
