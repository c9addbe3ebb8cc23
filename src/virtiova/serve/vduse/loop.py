# SPDX-License-Identifier: Apache-2.0
"""A VDUSE device file around a `Host`: its messages, pages that are missing, kicks, and interrupts.

Whoever serves a ring, a worker or Python, tells the driver itself, by a system call with the ring's number. Where that
fails, as the kernel refuses it until a DRIVER_OK has arrived, it signals the ring's eventfd, which is ours: whoever
waits here tries again until it succeeds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.dma.regions import MAX_REGIONS
from virtiova.errors import MachineError, ProtocolError
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.events import Event, Refused
from virtiova.serve.host import Host
from virtiova.serve.misses import Want
from virtiova.serve.turns import Turns, Watch
from virtiova.serve.vduse.bus import SECONDS, Remover
from virtiova.serve.vduse.lookups import Lookups
from virtiova.serve.vduse.node import Node
from virtiova.serve.vduse.notes import Notes
from virtiova.serve.vduse.session import VduseSession

MESSAGES: Final = 64
"""Messages that are taken before rings are looked at again."""
EAGER: Final = 1 << 15
"""Leaves of the native table that a range is entered in at once: twice the memory that the kernel's driver copies by,
which is one range."""
AT_ONCE: Final = MAX_REGIONS - 16
"""Pages that are brought at once at most, so that there is room for those of the rings themselves."""
FRUITLESS: Final = 8
"""How often all regions go to make room for others, and no request is done by it, before there is no more room."""
_GIVEN_UP: Final = "the kernel has given the device up: a message of its was not answered in time"
_AGAIN_SECONDS: Final = 0.001
"""A driver whose DRIVER_OK is on its way cannot be told anything yet: when to try again."""


class VduseConnection(Turns):
    """One VDUSE device: its file, its rings, until `stop` or the kernel gives it up."""

    def __init__(
        self,
        device: Device,
        node: Node,
        session: VduseSession,
        notes: Notes,
        remover: Remover,
        *,
        say: Callable[[str], None],
        counters: Counters,
        crew: Crew | None = None,
        lookout: _core.Lookout | None = None,
    ) -> None:
        super().__init__(device, crew)
        self._node = node
        self._session = session
        self._notes = notes
        self._remover = remover
        self._broken = False
        self._deadline: float | None = None
        """Until when it has to be off the bus."""
        self._lookups = Lookups()
        self._crowded = 0
        """How often in a row all regions went."""
        self._done_before = -1
        """Requests that were done when they went last."""
        self._untold: set[int] = set()
        """Rings of which the driver could not be told yet."""
        self.host = Host(
            device,
            session,
            clock=time.monotonic,
            say=say,
            counters=counters,
            crew=crew,
            lookout=lookout,
            asks=self._lookups,
            slots=MAX_REGIONS,
            eager=EAGER,
            bell=node.bell,
        )

    def resume(self) -> None:
        """Go on with what another process served until it was killed. `MachineError` if that is not possible."""
        try:
            self._handle(self._session.resume(self._notes.status))
        except (ProtocolError, OSError) as problem:
            raise MachineError(f"its driver is not as it was: {getattr(problem, 'strerror', problem)}") from problem

    def run(self, stop: Callable[[], bool], wake: int) -> None:
        """Serve until ``stop`` says so; ``wake`` is readable when that may have changed. `MachineError` if the kernel
        has given the device up."""
        # What was gone on with is looked at without being asked to.
        more = self.host.rounds.runnable
        try:
            while not stop():
                more = self._turn(wake, more=more)
        except PermissionError as refused:
            self._broken = True
            raise MachineError(_GIVEN_UP) from refused

    def leave(self, wake: int) -> str:
        """Serve until the device is off the bus; why it is not, or ""."""
        if self._broken:
            # Its driver needs no answer of ours to let go, and gets none.
            return self._remover.wait()
        self._deadline = time.monotonic() + SECONDS
        self._remover.begin()
        self.run(lambda: self._remover.answer is not None or time.monotonic() > (self._deadline or 0.0), wake)
        answer = self._remover.answer
        return f"its driver has not let go of it in {SECONDS:g} s" if answer is None else answer

    def close(self) -> None:
        """Let go of everything but the device itself."""
        self.host.close()
        self._close_orphans()

    # -- waiting

    def _front(self) -> Iterable[Watch]:
        """The device file, what is to become interrupts, and kicks of rings that were not ready."""
        yield self._node.fd, select.POLLIN, self._messages
        for index, fd in enumerate(self._node.calls):
            yield fd, select.POLLIN, functools.partial(self._call, index)
        for index, fd in self._session.unready.items():
            yield fd, select.POLLIN, functools.partial(self._ready, index)
        if self._deadline is not None:
            yield self._remover.fileno(), select.POLLIN, lambda _: self._remover.heard()

    def _key(self) -> object:
        """Something that is another one whenever `_front` says something else."""
        return list(self._session.unready.items()), self._deadline

    def _deadlines(self) -> list[float]:
        """When to try again to tell a driver, or to wait no longer for it."""
        soon = [time.monotonic() + _AGAIN_SECONDS] if self._untold else []
        return soon if self._deadline is None else [*soon, self._deadline]

    # -- what has come

    def _messages(self, happened: int) -> None:
        if happened & (select.POLLERR | select.POLLHUP):
            self._broken = True
            raise MachineError(_GIVEN_UP)
        for _ in range(MESSAGES):
            try:
                data = self._node.read()
            except BlockingIOError:
                return
            self._handle(self._session.receive(data))
            # Before the answer: who comes after us hears of it again if there was none.
            self._notes.status = self._session.status
            for response in self._session.replies():
                self._node.write(response)

    def _handle(self, found: Sequence[Event | Refused]) -> None:
        """All of it, while no worker is at work."""
        with self.host.quiet():
            for event in found:
                self.host.handle(event)
        self._close_orphans()

    def _close_orphans(self) -> None:
        for fd in self._session.orphans():
            with contextlib.suppress(OSError):
                os.close(fd)

    def _ready(self, index: int, _: int) -> None:
        """A kick for a ring that was not ready when the driver said that it was: now it may be."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._session.unready[index])
        found: Sequence[Event | Refused]
        try:
            found = self._session.look(index)
        except ProtocolError as problem:
            found = [Refused(-1, str(problem))]
        self._handle(found)

    def _call(self, index: int, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._node.calls[index])
        self._tell(index)

    def _tell(self, index: int) -> None:
        if self._node.inject(index):
            self._untold.discard(index)
        elif self.host.rings[index].started:
            self._untold.add(index)

    # -- after each look

    def _send(self) -> bool:
        """Tell drivers what they could not be told before, and answer what the rings miss; whether there was any."""
        for index in list(self._untold):
            self._untold.discard(index)
            self._tell(index)
        if not (due := self._lookups.due()):
            return False
        self._find(due)
        return True

    def _find(self, due: Sequence[Want]) -> None:
        """Bring pages that are missing, as many as there is room for. Those of the request that is next come first."""
        # An answer to another one may have brought some.
        wants = [want for want in due if self._lookups.open(want)]
        now, later = wants[:AT_ONCE], wants[AT_ONCE:]
        self._lookups.drop(later)
        if len(now) > self._session.room and not self._make_room():
            # It goes round and round: one request in more regions than there may be.
            room = self._session.room
            self.host.refused(now[room:])
            now = now[:room]
        self._handle(self._session.find(now))
        if left := [want for want in now if self._lookups.open(want)]:
            self.host.refused(left)

    def _make_room(self) -> bool:
        """Let all regions go; whether that is of any use."""
        done = self.host.counters.requests
        self._crowded = self._crowded + 1 if done == self._done_before else 0
        self._done_before = done
        if self._crowded >= FRUITLESS:
            return False
        self._handle(self._session.make_room())
        # Who waits for what went is told to look again; who waits for what comes, not before it has come.
        return True
