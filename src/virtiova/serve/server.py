# SPDX-License-Identifier: Apache-2.0
"""A server: a socket to listen on, one front end after the other, signals, a clean end."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Final, Self

from virtiova import _core
from virtiova.device.base import Device
from virtiova.serve import sockets
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew, Spin
from virtiova.serve.journal import Throttle, log
from virtiova.serve.loop import Connection
from virtiova.serve.sockets import SocketOptions

_OUT_OF: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Service:
    """What is served until it is told to stop, from any thread or signal handler; and tells its counters."""

    where: str
    """Where it is, for the log."""
    controls: Sequence[int] = ()
    """Numbers of ``ioctl`` that it needs, for the sandbox."""

    def __init__(self, say: Callable[[str], None], report: Callable[[str], None]) -> None:
        self.counters = Counters()
        self._report = report
        self._chatter = Throttle(say)
        self._stopping = False
        self._tell = False
        self._crew: Crew | None = None
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def stop(self) -> None:
        """End the serving, from any thread or signal handler."""
        self._stopping = True
        self._nudge()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def tell(self) -> None:
        """Write the counters to the log soon, from any thread or signal handler."""
        self._tell = True
        self._nudge()

    def _nudge(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def run(self) -> None:
        """Serve until `stop`."""
        raise NotImplementedError

    def _told(self) -> bool:
        """Whether to stop; what else a signal wanted is done here, where nothing is under way."""
        if self._tell:
            self._tell = False
            if self._crew is not None:
                self._crew.collect(self.counters)
            # Whoever sends a signal asks: however quiet it is otherwise.
            self._report(self.counters.text())
            self._report(self.counters.json())
        return self._stopping

    def close(self) -> None:
        """End the threads, and let go of what belongs to it."""
        if self._crew is not None:
            self._crew.collect(self.counters)
            self._crew.close()
            self._crew = None
        for fd in (self._wake, self._waker):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._wake = self._waker = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Service):
    """Serves ``device`` to one front end at a time; others wait until it goes.

    ``path`` is where the socket is made, or ``fd`` an open one: listening, or connected already, and then there is
    one connection and no other. ``say`` gets the log, ``report`` the counters when somebody asks for them.
    ``behaviour`` is the address space (`dma.wrong.SPACES`). Use as a context manager.
    """

    def __init__(
        self,
        device: Device,
        path: str = "",
        *,
        fd: int = -1,
        options: SocketOptions | None = None,
        say: Callable[[str], None] = log,
        report: Callable[[str], None] = log,
        behaviour: str = "honest",
        access_platform: bool = True,
        spin: Spin | None = None,
    ) -> None:
        super().__init__(say, report)
        self._device = device
        self._behaviour = behaviour
        self._access_platform = access_platform
        self._path = path
        self.where = path or f"descriptor {fd}"
        self._identity: sockets.Identity | None = None
        try:
            if path:
                self._socket, self._identity = sockets.listen(path, options or SocketOptions())
            else:
                self._socket = sockets.adopt(fd)
        except BaseException:
            os.close(self._wake)
            os.close(self._waker)
            raise
        spin = spin or Spin()
        # Those that go around the IOMMU do so in Python.
        self._crew = Crew.of(device, spin, say) if behaviour == "honest" else None
        self._lookout = _core.Lookout(int(spin.seconds * 1e9), spin.fixed) if spin.seconds else None

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
                if error.errno in _OUT_OF:
                    self._chatter(f"a front end was turned away: {error.strerror}")
                    # It is still in the queue: asking again at once would be a loop.
                    poll_wake = select.poll()
                    poll_wake.register(self._wake, select.POLLIN)
                    poll_wake.poll(1000)
                    continue
                raise
            self._serve(connected)

    def _serve(self, connected: socket.socket) -> None:
        self.counters.connections += 1
        self._chatter("a front end has connected")
        connection = Connection(
            self._device,
            connected,
            say=self._chatter,
            counters=self.counters,
            behaviour=self._behaviour,
            access_platform=self._access_platform,
            crew=self._crew,
            lookout=self._lookout,
        )
        connection.run(self._told, self._wake)
        # Host, rings and what they call refer to one another: with many front ends in a row that adds up before Python
        # looks for it by itself.
        del connection
        gc.collect()

    def _ended(self) -> bool:
        """As `_told`, by whom nobody else has woken up."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        return self._told()

    def close(self) -> None:
        """Close the socket, and remove it if it is still the one that was made here. End the threads."""
        if self._identity is not None:
            sockets.remove(self._path, self._identity)
            self._identity = None
        self._socket.close()
        super().close()


@contextlib.contextmanager
def signals(server: Service) -> Iterator[None]:
    """SIGTERM and SIGINT end the server (a second one at once), SIGUSR1 makes it tell its counters.

    Only in the main thread, else nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, _frame: FrameType | None) -> None:
        if server.stopping:
            # It was told before, and did not: a system call that does not return, say.
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
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
