# SPDX-License-Identifier: Apache-2.0
"""One thread's turns around a `Host`: wait for anything at all, take it in, look at the rings, say what is to be said.

What the front end is - a vhost-user socket, a VDUSE device - is for a subclass to know. ``poll`` is asked anew each
time, from what is there: a descriptor that was closed while the front end has its other half would stay in an epoll
set for ever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import selectors
import time
from collections.abc import Callable, Iterable
from typing import Final

from virtiova import _core
from virtiova.device.base import Device, Source
from virtiova.serve.crew import Crew
from virtiova.serve.host import Host

LOOKOUT_SECONDS: Final = 0.002
"""How long rings may be looked at and nothing else, as long as there is something in them."""
_POLL_SECONDS: Final = 0.001
READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR

Watch = tuple[int, int, Callable[[int], None]]
"""A descriptor, what to wait for there, and what to do then."""
_Watched = tuple[list[tuple[int, int]], dict[int, Callable[[int], None]]]


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


class Turns:
    """What serves `host` until its front end goes. A subclass sets `host` and says what a front end is."""

    host: Host

    def __init__(self, device: Device, crew: Crew | None) -> None:
        self._device = device
        self._crew = crew
        self._pump = _core.Pump()
        self._watched_key: object = None
        self._watching: _Watched = ([], {})

    # -- what a subclass says

    def _front(self) -> Iterable[Watch]:
        """What is waited for of the front end, the most important first."""
        raise NotImplementedError

    def _key(self) -> object:
        """Something that is another one whenever `_front` says something else."""
        return None

    def _send(self) -> bool:
        """Tell the front end what there is to tell it after a look at the rings; whether it has given an answer to it
        already, so that there is more to do."""
        raise NotImplementedError

    def _pumped(self, fds: list[tuple[int, int]], milliseconds: int) -> list[tuple[int, int]]:
        """Wait for one of ``fds``; which of them, and what happened there."""
        return self._pump.wait(fds, milliseconds)

    def _deadlines(self) -> list[float]:
        """When to look again at the latest, though nothing came."""
        return []

    # -- turns

    def _turn(self, wake: int, *, more: bool) -> bool:
        """One turn; ``more``: there is something to do that need not be waited for. Whether there is after it."""
        if not more and self.host.rounds.awake:
            more = self._look_out(wake)
        self._wait(0.0 if more else None, wake)
        more = self.host.rounds.work(arm=False)
        return self._send() or more

    def _look_out(self, wake: int) -> bool:
        """Serve what comes soon, without sleeping in between; whether there is more. Then all kicks are asked for."""
        end = time.monotonic() + LOOKOUT_SECONDS
        fds = [fd for fd, _ in self._watched(wake)[0]]
        while self.host.rounds.look_out(fds):
            more = self.host.rounds.work(arm=False)
            more = self._send() or more
            if more or self._device.sources or time.monotonic() >= end:
                # Others have waited for long enough.
                return True
        more = self.host.rounds.work()
        # What came just before kicks were asked for may have something to ask: the wait that follows is for its answer.
        return self._send() or more

    def _wait(self, seconds: float | None, wake: int) -> None:
        """Wait for anything at all, and take it in."""
        fds, todo = self._watched(wake)
        for fd, happened in self._pumped(fds, self._milliseconds(seconds)):
            todo[fd](happened)
        self.host.expire()

    def _milliseconds(self, seconds: float | None) -> int:
        if seconds is None and self.host.rounds.polls:
            seconds = _POLL_SECONDS
        if seconds is None:
            deadlines = self._deadlines()
            if self.host.misses is not None and self.host.misses.deadline is not None:
                deadlines.append(self.host.misses.deadline)
            if deadlines:
                seconds = max(0.0, min(deadlines) - time.monotonic())
        return -1 if seconds is None else int(seconds * 1000 + 0.999)

    def _watched(self, wake: int) -> _Watched:
        """What to wait for, the front end first, and what to do then. Made anew only if it has changed."""
        kicks = [ring.kick if ring.started and not ring.lent else None for ring in self.host.rings]
        key = (wake, self._key(), kicks)
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
        for each in self._front():
            watch(*each)
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

    def _help(self, _: int) -> None:
        if self._crew is not None:
            self._crew.heard()

    def _kick(self, index: int, _: int) -> None:
        ring = self.host.rings[index]
        if ring.kick is None:
            return
        try:
            data = read_now(ring.kick)
        except BlockingIOError:
            return
        except OSError as error:
            self.host.rounds.no_kicks(ring, error.strerror or "")
            return
        if data:
            self.host.rounds.kicked(index)
        else:
            self.host.rounds.no_kicks(ring)


def _drain(wake: int, _: int) -> None:
    """Whoever has woken us has said why."""
    with contextlib.suppress(BlockingIOError):
        os.read(wake, 4096)


def _ready(source: Source, happened: int) -> None:
    events = (selectors.EVENT_READ if happened & READABLE else 0) | (
        selectors.EVENT_WRITE if happened & select.POLLOUT else 0
    )
    source.ready(events)
