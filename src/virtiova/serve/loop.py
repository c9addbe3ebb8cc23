# SPDX-License-Identifier: Apache-2.0
"""Sockets and descriptors around a `Host`: one connection after the other, one thread, nothing waited for alone.

``poll`` is asked anew each time, from what is there: a descriptor that was closed while the front end has
its other half would stay in an epoll set for ever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import selectors
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from virtiova import _core
from virtiova.device.base import Device, Source
from virtiova.dma.iotlb import MAX_MAPPINGS
from virtiova.errors import ProtocolError
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.events import Event, IotlbInvalidated, Refused
from virtiova.serve.host import Host, offer_of
from virtiova.serve.session import Session
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
LOOKOUT_SECONDS: Final = 0.002
"""How long rings may be looked at and nothing else, as long as there is something in them."""
_POLL_SECONDS: Final = 0.001
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR
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


def read_now(fd: int) -> bytes:
    """8 bytes at most, without waiting even if whoever shares ``fd`` wants it to. Raises as ``os.read``."""
    buffer = bytearray(8)
    try:
        return bytes(buffer[: os.preadv(fd, [buffer], -1, os.RWF_NOWAIT)])
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    kicks = _core.hear(fd)
    if not kicks:
        raise BlockingIOError
    return bytes(8) if kicks > 0 else b""


_Watched = tuple[list[tuple[int, int]], dict[int, Callable[[int], None]]]


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


class Connection:
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
        sock.setblocking(False)
        self._sock = sock
        self._say = say
        self._device = device
        self._counters = counters
        self._session = Session(offer_of(device, access_platform=access_platform))
        self._crew = crew
        self._pump = _core.Pump()
        self._watched_key: object = None
        self._watching: _Watched = ([], {})
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
                if not more and self.host.awake:
                    more = self._look_out(wake)
                self._wait(0.0 if more else None, wake)
                more = self.host.work(arm=False)
                self._send()
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

    def _look_out(self, wake: int) -> bool:
        """Serve what comes soon, without sleeping in between; whether there is more. Then all kicks are asked for."""
        end = time.monotonic() + LOOKOUT_SECONDS
        fds = [fd for fd, _ in self._watched(wake)[0]]
        while self.host.look_out(fds):
            more = self.host.work(arm=False)
            self._send()
            if more or self._device.sources or time.monotonic() >= end:
                # Others have waited for long enough.
                return True
        more = self.host.work()
        # What came just before kicks were asked for may have something to ask: the wait that follows is for its answer.
        self._send()
        return more

    def _wait(self, seconds: float | None, wake: int) -> None:
        """Wait for anything at all, and take it in."""
        fds, todo = self._watched(wake)
        for fd, happened in self._pumped(fds, self._milliseconds(seconds)):
            todo[fd](happened)
        self.host.expire()
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

    def _milliseconds(self, seconds: float | None) -> int:
        if seconds is None and self.host.polls:
            seconds = _POLL_SECONDS
        if seconds is None:
            deadlines = [] if self._begun is None else [self._begun + MESSAGE_SECONDS]
            if self.host.misses is not None and self.host.misses.deadline is not None:
                deadlines.append(self.host.misses.deadline)
            if deadlines:
                seconds = max(0.0, min(deadlines) - time.monotonic())
        return -1 if seconds is None else int(seconds * 1000 + 0.999)

    def _answered(self, data: bytes) -> bool:
        """Answers have come on the back-end channel; whether there is something to do."""
        try:
            self.host.answered(data)
        except ProtocolError as problem:
            self._lose_channel(str(problem))
            return True
        return self.host.runnable

    def _watched(self, wake: int) -> _Watched:
        """What to wait for, the front end's socket first, and what to do then. Made anew only if it has changed."""
        kicks = [ring.kick if ring.started and not ring.lent else None for ring in self.host.rings]
        key = (wake, bool(self._out), bool(self._channel_out), self._channel, kicks)
        if key != self._watched_key or self._device.sources:
            self._watched_key, self._watching = key, self._watch(wake)
        return self._watching

    def _watch(self, wake: int) -> _Watched:
        fds: list[tuple[int, int]] = []
        todo: dict[int, Callable[[int], None]] = {}

        def watch(fd: int, wanted: int, then: Callable[[int], None]) -> None:
            fds.append((fd, wanted))
            todo[fd] = then

        # In this order what they say is taken in: the front end first.
        watch(self._sock.fileno(), select.POLLIN | (select.POLLOUT if self._out else 0), self._main)
        if self._channel is not None:
            watch(
                self._channel.fileno(), select.POLLIN | (select.POLLOUT if self._channel_out else 0), self._back_channel
            )
        if self._crew is not None:
            watch(self._crew.help, select.POLLIN, self._help)
        for ring in self.host.rings:
            if ring.kick is not None and ring.started and not ring.lent:
                watch(ring.kick, select.POLLIN, functools.partial(self._kick, ring.index))
        watch(wake, select.POLLIN, functools.partial(_drain, wake))
        for source in self._device.sources:
            if wanted := source.events():
                flags = (select.POLLIN if wanted & selectors.EVENT_READ else 0) | (
                    select.POLLOUT if wanted & selectors.EVENT_WRITE else 0
                )
                watch(source.fileno(), flags, functools.partial(_ready, source))
        return fds, todo

    # -- what has come

    def _main(self, happened: int) -> None:
        if happened & select.POLLOUT:
            self._out.send(self._sock)
        if not happened & _READABLE:
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

    def _help(self, _: int) -> None:
        if self._crew is not None:
            self._crew.heard()

    def _reply(self) -> None:
        last, data = None, b""
        for message in self._session.replies():
            if message is not last:
                last, data = message, message.encode()
            self._out.add(data, message.fds)
        self._out.send(self._sock)

    def _send(self) -> None:
        """What the rings want to ask; and what the session has to say besides."""
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

    def _back_channel(self, happened: int) -> None:
        sock = self._channel
        if sock is None or self.host.misses is None or not happened & _READABLE:
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

    def _kick(self, index: int, _: int) -> None:
        ring = self.host.rings[index]
        if ring.kick is None:
            return
        try:
            data = read_now(ring.kick)
        except BlockingIOError:
            return
        except OSError as error:
            self.host.no_kicks(ring, error.strerror or "")
            return
        if data:
            self.host.kicked(index)
        else:
            self.host.no_kicks(ring)


def _drain(wake: int, _: int) -> None:
    """Whoever has woken us has said why."""
    with contextlib.suppress(BlockingIOError):
        os.read(wake, 4096)


def _ready(source: Source, happened: int) -> None:
    events = (selectors.EVENT_READ if happened & _READABLE else 0) | (
        selectors.EVENT_WRITE if happened & select.POLLOUT else 0
    )
    source.ready(events)
