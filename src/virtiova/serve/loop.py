# SPDX-License-Identifier: Apache-2.0
"""A vhost-user connection around a `Host`: its socket and its back-end channel, nothing waited for alone."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.dma.iotlb import MAX_MAPPINGS
from virtiova.errors import ProtocolError
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.events import Event, IotlbInvalidated, Refused
from virtiova.serve.host import Host
from virtiova.serve.offer import offer_of
from virtiova.serve.session import Session
from virtiova.serve.turns import READABLE, Turns, Watch
from virtiova.wire.vhost_user import IOTLB_MESSAGE_SIZE, MAX_FDS

MAX_UNSENT: Final = 1 << 16
"""Bytes that a front end may leave unread."""
MESSAGE_SECONDS: Final = 5.0
"""How long a message may take from its first byte to its last. What comes with the first may be what keeps our
connection open: the other end of it."""
MESSAGES: Final = 64
"""Messages that are taken before rings are looked at again."""
RUN_BYTES: Final = 1 << 16
"""What is taken at once of a run of IOTLB messages: 1489 of them, for which a millisecond is enough."""
RUNS: Final = 16
"""As many messages a run of that length counts for."""
ANSWERS_BYTES: Final = 4096
"""What is taken at once of answers to MISS messages."""
_FD: Final = array("i").itemsize


def receive(sock: socket.socket, size: int) -> tuple[bytes, tuple[int, ...]]:
    """Up to ``size`` bytes, and the descriptors that came with the first of them. `EOFError` at the end.

    Never waits, whatever the other side makes of a socket that it shares with us.
    """
    room = socket.CMSG_SPACE(_FD * (MAX_FDS + 1))
    data, control, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    fds = array("i")
    for level, kind, body in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % _FD])
    if flags & socket.MSG_CTRUNC or (fds and not data):
        _close(fds)
        raise ProtocolError(f"more than {MAX_FDS} file descriptors at a time, or more than this process may have")
    if not data:
        raise EOFError
    return data, tuple(fds)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class _Outgoing:
    """What is to be sent on a socket that must not make us wait. Descriptors go with the first byte, and are closed."""

    def __init__(self) -> None:
        self._parts: list[tuple[bytes, tuple[int, ...]]] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        self._parts.append((data, fds))

    def _join(self) -> None:
        """One part of all that nothing goes with, up to what does."""
        count = next((at for at, (_, fds) in enumerate(self._parts) if fds), len(self._parts))
        if count > 1:
            self._parts[:count] = [(b"".join(data for data, _ in self._parts[:count]), ())]

    def send(self, sock: socket.socket) -> None:
        """As much as goes. `ProtocolError` if the other side reads nothing."""
        while self._parts:
            self._join()
            data, fds = self._parts[0]
            flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
            try:
                if fds:
                    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
                    sent = sock.sendmsg([data], control, flags)
                else:
                    # No address: the sandbox of a device that sends no descriptors lets nothing else pass.
                    sent = sock.send(data, flags)
            except BlockingIOError:
                if sum(len(part) for part, _ in self._parts) > MAX_UNSENT:
                    raise ProtocolError("the front end does not read what it asked for") from None
                return
            _close(fds)
            self._parts[0] = (data[sent:], ())
            if sent == len(data):
                del self._parts[0]

    def drop(self) -> None:
        for _, fds in self._parts:
            _close(fds)
        self._parts.clear()


class Connection(Turns):
    """One front end: its socket, its back-end channel, its rings, until it goes."""

    def __init__(
        self,
        device: Device,
        sock: socket.socket,
        *,
        say: Callable[[str], None],
        counters: Counters,
        behaviour: str = "honest",
        access_platform: bool = True,
        crew: Crew | None = None,
        lookout: _core.Lookout | None = None,
    ) -> None:
        super().__init__(device, crew)
        sock.setblocking(False)
        self._sock = sock
        self._say = say
        self._counters = counters
        self._session = Session(offer_of(device, access_platform=access_platform))
        self.host = Host(
            device,
            self._session,
            clock=time.monotonic,
            say=say,
            counters=counters,
            behaviour=behaviour,
            crew=crew,
            lookout=lookout,
        )
        self._out = _Outgoing()
        self._channel_out = _Outgoing()
        self._channel: socket.socket | None = None
        self._channel_of: int | None = None
        """The host's descriptor that `_channel` was made from."""
        self._peeked = memoryview(bytearray(RUN_BYTES))
        self._begun: float | None = None
        """When the message began that is not complete yet."""

    def run(self, stop: Callable[[], bool], wake: int) -> None:
        """Serve until the front end goes or ``stop`` says so; ``wake`` is readable when that may have changed."""
        more = False
        try:
            while not stop():
                more = self._turn(wake, more=more)
        except EOFError:
            self._say("the front end has gone")
        except ProtocolError as problem:
            self._say(f"connection closed: {problem}")
        except ConnectionError as error:
            self._say(f"the front end has gone: {error.strerror}")
        except OSError as error:
            self._say(f"connection closed: {error.strerror}")
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything that belongs to this connection."""
        self._out.drop()
        self._channel_out.drop()
        self._drop_channel()
        self.host.close()
        self._sock.close()

    # -- waiting

    def _wait(self, seconds: float | None, wake: int) -> None:
        """Wait for anything at all, and take it in."""
        super()._wait(seconds, wake)
        if self._begun is not None and time.monotonic() - self._begun > MESSAGE_SECONDS:
            raise ProtocolError(f"a message was begun, and not ended within {MESSAGE_SECONDS:g} s")

    def _pumped(self, fds: list[tuple[int, int]], milliseconds: int) -> list[tuple[int, int]]:
        """Wait for one of ``fds``, of which the first is the front end's; plain IOTLB messages are done meanwhile."""
        pump, host = self._pump, self.host
        if not self._session.takes_runs or self._out:
            return pump.wait(fds, milliseconds)
        # Nobody asks for anything meanwhile: who waits for no answer need not be told of any.
        heard = host.heard if host.misses is not None and host.misses.waiting else None
        channel = -1 if self._channel is None or self._channel_out else self._channel.fileno()
        came = pump.wait(fds, milliseconds, host.iotlb.answers(), MAX_MAPPINGS, heard, channel, self._answered)
        if pump.updates or pump.invalidates:
            host.done(pump.updates, pump.invalidates)
            self._counters.invalidate_us = max(self._counters.invalidate_us, pump.longest // 1000)
            if pump.unsent:
                self._out.add(pump.unsent)
        return came

    def _deadlines(self) -> list[float]:
        """When to look again at the latest, though nothing came."""
        return [] if self._begun is None else [self._begun + MESSAGE_SECONDS]

    def _answered(self, data: bytes) -> bool:
        """Answers have come on the back-end channel; whether there is something to do."""
        try:
            self.host.answered(data)
        except ProtocolError as problem:
            self._lose_channel(str(problem))
            return True
        return self.host.rounds.runnable

    def _key(self) -> object:
        """Something that is another one whenever `_front` says something else."""
        return bool(self._out), bool(self._channel_out), self._channel

    def _front(self) -> Iterable[Watch]:
        """The front end's socket, and the back-end channel."""
        yield self._sock.fileno(), select.POLLIN | (select.POLLOUT if self._out else 0), self._main
        if self._channel is not None:
            wanted = select.POLLIN | (select.POLLOUT if self._channel_out else 0)
            yield self._channel.fileno(), wanted, self._back_channel

    # -- what has come

    def _main(self, happened: int) -> None:
        if happened & select.POLLOUT:
            self._out.send(self._sock)
        if not happened & READABLE:
            return
        # One message a turn is enough for order, but a front end that sends many must not be slowed down by rings.
        left = MESSAGES
        try:
            while left > 0:
                left -= self._run() or self._one()
        except BlockingIOError:
            return

    def _run(self) -> int:
        """Take what has come of plain IOTLB messages, all at once; how many messages' work that was, or 0.

        They are looked at before they are taken out of the socket, so that a descriptor can come with none of them, and
        the first that is not plain stays there.
        """
        if not self._session.takes_runs:
            return 0
        size, _, flags, _ = self._sock.recvmsg_into([self._peeked], 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if flags & socket.MSG_CTRUNC or size < IOTLB_MESSAGE_SIZE:
            return 0
        arrived = time.monotonic()
        taken, invalidates = self.host.take(self._peeked[:size])
        if not taken:
            return 0
        size, _, flags, _ = self._sock.recvmsg_into([self._peeked[:taken]], 0, socket.MSG_DONTWAIT)
        if size != taken or flags & socket.MSG_CTRUNC:
            raise ProtocolError("what was in the socket is not there any more")
        self._reply()
        if invalidates:
            self._invalidated(arrived)
        return 1 + taken // (len(self._peeked) // RUNS)

    def _one(self) -> int:
        """Take one message, or what has come of it."""
        data, fds = receive(self._sock, self._session.wanted)
        arrived = time.monotonic()
        found = self._session.receive(data, fds)
        if self._session.idle:
            self._begun = None
        elif self._begun is None:
            self._begun = arrived
        if found:
            self._handle(found)
        self._reply()
        if any(isinstance(event, IotlbInvalidated) for event in found):
            self._invalidated(arrived)
        return 1

    def _invalidated(self, arrived: float) -> None:
        took = int((time.monotonic() - arrived) * 1e6)
        self._counters.invalidate_us = max(self._counters.invalidate_us, took)

    def _handle(self, found: Sequence[Event | Refused]) -> None:
        """All that came in one go, while no worker is at work; what is done of it is answered in any case."""
        try:
            with self.host.quiet():
                for event in found:
                    self.host.handle(event)
                    self._follow_channel()
        except ProtocolError:
            self._reply()
            raise

    def _reply(self) -> None:
        last, data = None, b""
        for message in self._session.replies():
            if message is not last:
                last, data = message, message.encode()
            self._out.add(data, message.fds)
        self._out.send(self._sock)

    def _send(self) -> bool:
        """What the rings want to ask; and what the session has to say besides. Answers come later."""
        self._reply()
        if self.host.outbox and self._channel is not None:
            # One write for all that one look misses.
            self._channel_out.add(b"".join(self.host.outbox))
        self.host.outbox.clear()
        if self._channel is not None and self._channel_out:
            try:
                self._channel_out.send(self._channel)
            except (ProtocolError, OSError) as error:
                self._lose_channel(str(error))
        return False

    def _back_channel(self, happened: int) -> None:
        sock = self._channel
        if sock is None or self.host.misses is None or not happened & READABLE:
            return
        try:
            for _ in range(64):
                try:
                    # A descriptor is an error, whichever answer it comes with.
                    data, fds = receive(sock, ANSWERS_BYTES)
                except BlockingIOError:
                    return
                self.host.answered(data, fds)
                if len(data) < ANSWERS_BYTES:
                    return
        except EOFError:
            self._lose_channel("closed by the front end")
        except (ProtocolError, OSError) as problem:
            self._lose_channel(str(problem))

    def _follow_channel(self) -> None:
        """The host has the number; a socket object of our own goes with it."""
        channel = self.host.channel
        have = self._channel_of
        if channel == have:
            return
        self._drop_channel()
        if channel is None:
            return
        try:
            self._channel = self._channel_socket(channel)
            self._channel_of = channel
        except OSError as error:
            self.host.channel_lost(f"no socket: {error.strerror}")
        except ProtocolError as problem:
            self.host.channel_lost(str(problem))

    def _channel_socket(self, fd: int) -> socket.socket:
        """A socket object for a duplicate of ``fd``."""
        copy = os.dup(fd)
        try:
            sock = socket.socket(fileno=copy)
        except BaseException:
            os.close(copy)
            raise
        try:
            if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
                raise ProtocolError("no Unix stream socket")
            ours = self._sock.getsockname()
            if ours and sock.getpeername() == ours:
                # We would hold the other end of our own connection, and never hear that the front end has gone.
                raise ProtocolError("it leads back to this server")
        except BaseException:
            sock.close()
            raise
        return sock

    def _lose_channel(self, why: str) -> None:
        self._drop_channel()
        self.host.channel_lost(why)

    def _drop_channel(self) -> None:
        self._channel_of = None
        self._channel_out.drop()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
