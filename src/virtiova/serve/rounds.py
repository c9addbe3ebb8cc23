# SPDX-License-Identifier: Apache-2.0
"""The rings of one host: what is set of them, and the rounds that are made of them, by us and by workers.

Requests that Python serves are done whole for `TURN_SECONDS`, then the front end is listened to. What workers serve
they serve inside of a gate, which the host closes while messages are handled.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from virtiova import _core
from virtiova.device.base import Device
from virtiova.errors import ProtocolError
from virtiova.features import Feature, Status, has
from virtiova.serve import events
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.descriptors import Bell, check_notifier, close, present, replace, signal
from virtiova.serve.front import Front
from virtiova.serve.misses import Wanted
from virtiova.serve.platform import Platform
from virtiova.serve.rings import BATCH, FRUITLESS, Ring
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import VringState

TURN_SECONDS: Final = 0.002
"""How long requests are begun before the front end is listened to again. The one that is under way ends later."""


class Ground(Protocol):
    """What the rings stand on: their host."""

    session: Front
    misses: Wanted | None

    @property
    def settled(self) -> bool:
        """Whether what `platform` said last is still so."""

    def platform(self) -> Platform:
        """What the rings work on, as negotiated."""

    def shrunk(self) -> str:
        """What the front end shortened under us, if anything."""

    def forget_translations(self) -> None:
        """Nothing is known of any address any more."""


class Rounds:
    """The rings of ``device``, served for as long as ``ground`` carries them.

    ``say`` takes lines for the log, ``clock`` gives seconds; ``crew`` are the workers, ``lookout`` who looks out for
    requests without being told, ``bell`` by what the driver is told instead of by calls.
    """

    def __init__(
        self,
        device: Device,
        ground: Ground,
        *,
        clock: Callable[[], float],
        say: Callable[[str], None],
        counters: Counters,
        crew: Crew | None,
        lookout: _core.Lookout | None,
        bell: Bell | None = None,
    ) -> None:
        self.rings = [Ring(device, index) for index in range(device.queues)]
        self.clock = clock
        self.counters = counters
        self._device = device
        self._ground = ground
        self._say = say
        self._crew = crew
        self._lookout = lookout
        self._bell = bell
        self._said: set[str] = set()
        self._turn = 0
        """The ring that is looked at first, so that none of them waits for ever."""

    # -- what is set

    def event(self, event: events.RingEvent) -> bool:
        ring = self.rings[event.index]
        if isinstance(event, events.RingKick | events.RingCall | events.RingErr) and event.fd is not None:
            check_notifier(event.fd)
        match event:
            case events.RingStopped():
                base = self.stop(ring)
                self._ground.session.answer(event.token, self._stands(event.index, base))
                self._ground.forget_translations()
                return True
            case events.RingKick():
                replace(ring.kick)
                ring.kick = event.fd
                ring.polled = event.fd is None
                ring.rebuild()
                ring.started = True
                ring.broken = ""
                ring.tell_again()
                if not has(self._ground.session.features, wire.F_PROTOCOL_FEATURES):
                    ring.enabled = True
            case events.RingCall():
                replace(ring.call)
                ring.call = event.fd
                ring.tell_again()
            case events.RingErr():
                replace(ring.err)
                ring.err = event.fd
            case events.RingEnabled():
                ring.enabled = event.enabled
                ring.kicked = True
            case events.RingSize() | events.RingBase() if ring.started:
                raise ProtocolError(f"ring {ring.index} is running: its size and base cannot change")
            case events.RingSize():
                ring.size = event.size
            case events.RingBase():
                ring.base = event.base
            case events.RingAsked():
                if ring.begun:
                    self._finish(ring, (), lambda: False)
                ring.rebuild()
                self._ground.session.answer(event.token, self._stands(event.index, ring.base))
                return True
            case events.RingAddress():
                ring.address = event.address
                ring.rebuild()
        return False

    def _stands(self, index: int, base: int) -> bytes:
        # Of a packed ring the upper half says what is used: all that was taken.
        value = base << 16 | base if self._device.has(Feature.RING_PACKED) else base
        return VringState(index, value).encode()

    def stop(self, ring: Ring) -> int:
        if ring.begun:
            # Not only as many as there is time for.
            self._finish(ring, (), lambda: False)
        base = ring.stop()
        if ring.lost:
            # Others behind them are done, and there is no file to say so: done again they would be given back twice.
            self._say(f"ring {ring.index}: {ring.lost} requests were begun that it stopped without")
            self._ground.session.status |= Status.DEVICE_NEEDS_RESET
        return base

    def start_over(self) -> None:
        """Let go of all descriptors: of a front end from which new ones come."""
        for ring in self.rings:
            close(*present(ring.kick, ring.call, ring.err))
            ring.kick = ring.call = ring.err = None

    def rebuild(self) -> None:
        """What the rings are in has changed."""
        for ring in self.rings:
            ring.rebuild()

    def again(self) -> None:
        """Something has come, or will not come any more: whoever waits for nothing else looks again."""
        misses = self._ground.misses
        for ring in self.rings:
            if ring.parked and (misses is None or not misses.awaited(ring.awaited)):
                ring.again()

    def close(self) -> None:
        """Stop all, and let go of their descriptors."""
        with contextlib.ExitStack() as stack:
            for ring in self.rings:
                ring.stop()
                ring.inflight = None
                stack.callback(functools.partial(close, *present(ring.kick, ring.call, ring.err)))
                ring.kick = ring.call = ring.err = None

    # -- rounds

    def kicked(self, index: int) -> None:
        """A kick has come for ring ``index``."""
        self.counters.kicks += 1
        ring = self.rings[index]
        ring.kicked = True
        ring.shy = False
        if ring.stuck and self._ground.misses is not None:
            # The driver may have mapped since what was refused.
            self._ground.misses.forgive(ring.stuck)
            ring.stuck = set()
            ring.again()

    @property
    def runnable(self) -> bool:
        """Whether there is a ring of which a look would be of use."""
        return any(ring.runnable for ring in self.rings)

    def look_out(self, fds: list[int]) -> bool:
        """Look out for requests, as long as it seems to be worth it; whether there are some. False also if there is
        something at ``fds``. After it, unless there are, kicks are asked for by `work`."""
        if self._lookout is None:
            return False
        awake = [ring for ring in self.rings if ring.awake is not None and ring.live]
        for ring in awake:
            # Before it sleeps each is looked at once more.
            ring.kicked = True
        return self._lookout.look([ring.awake for ring in awake if ring.awake is not None], fds)

    @property
    def awake(self) -> bool:
        """Whether there is a ring of which the driver was not asked for kicks."""
        return any(ring.awake is not None for ring in self.rings)

    def work(self, *, arm: bool = True) -> bool:
        """One look at each ring that has something to do, as far as `TURN_SECONDS` go; whether there is more.

        Unless it is to ``arm``, rings that have no more may be left awake: for `look_out`.
        """
        end = self.clock() + TURN_SECONDS

        def late() -> bool:
            return self.clock() >= end

        first = self._turn
        self._answer_workers()
        for ring in (*self.rings[first:], *self.rings[:first]):
            if ring.polled and ring.live:
                ring.kicked = True
            if ring.runnable:
                self._look(ring, late, arm=arm or self._lookout is None)
                self._turn = (ring.index + 1) % len(self.rings)
                if late():
                    break
        self._lend()
        return any(ring.runnable and not ring.polled for ring in self.rings)

    @property
    def polls(self) -> bool:
        """Whether there is a ring that has to be looked at without being asked to."""
        return any(ring.polled and ring.live and not ring.lent for ring in self.rings)

    def no_kicks(self, ring: Ring, problem: str = "") -> None:
        """Nothing will ever come from there again."""
        if problem:
            self._say(f"ring {ring.index}: its kicks: {problem}")
        close(*present(ring.kick))
        ring.kick = None
        self._say(f"ring {ring.index}: no kicks come any more")

    def _untold(self, ring: Ring) -> None:
        self._once(f"ring {ring.index}: the driver cannot be told of what was done")

    def _look(self, ring: Ring, late: Callable[[], bool], *, arm: bool) -> None:
        call = False
        try:
            try:
                # Where there is a worker it gets the ring back as soon as what it could not do is done.
                worker = self._worker(ring)
                done = ring.serve_at_home(self._ground.platform())
                if done is None:
                    most = BATCH if worker is None else 1
                    done = ring.look(self._ground.platform(), late, most, arm=arm or worker is not None)
                ring.shy = ring.shy and not done
                if done and self._lookout is not None:
                    self._lookout.came()
            finally:
                call = ring.wants_call()
            if shrunk := self._ground.shrunk():
                raise ProtocolError(shrunk)
        except ProtocolError as problem:
            self._break(ring, str(problem))
        if call:
            self.counters.calls += 1
            rung = self._bell is not None and self._bell.ring(ring.index)
            if not rung and not signal(ring.call):
                self._untold(ring)

    def _break(self, ring: Ring, problem: str) -> None:
        """Serve it no more until it is set up again."""
        shrunk = self._ground.shrunk()
        ring.broken = shrunk or problem
        self.counters.broken += 1
        why = shrunk or f"it makes no sense: {problem}"
        self._say(f"ring {ring.index} is stopped, {why}")
        self._ground.session.status |= Status.DEVICE_NEEDS_RESET
        signal(ring.err)

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    # -- workers

    def _worker(self, ring: Ring) -> _core.Worker | None:
        workers = self._crew.workers if self._crew is not None else ()
        return workers[ring.index] if ring.index < len(workers) else None

    def _answer_workers(self) -> None:
        """Take back the rings of which a worker does not know how to go on."""
        for ring in self.rings:
            worker = self._worker(ring)
            if worker is None or not ring.lent or not (why := worker.asks):
                continue
            problem = worker.problem
            left = self._take(ring, worker)
            if why == _core.WHY_CHAIN:
                ring.shy = not left
                if worker.tally["requests"] - ring.lent_at < FRUITLESS:
                    ring.stay_home(self._device.engine(ring.index))
            elif why == _core.WHY_KICK:
                self.no_kicks(ring, os.strerror(problem) if problem else "")
            elif why == _core.WHY_CALL:
                self._untold(ring)

    def _lend(self) -> None:
        """Let workers go on with the rings with which Python is done."""
        if self._crew is None or not self._ground.settled or self._ground.shrunk():
            return
        for ring in self.rings:
            worker = self._worker(ring)
            if worker is None or ring.lent or (drain := ring.lend()) is None:
                continue
            engine = self._device.engine(ring.index)
            if engine is None:
                ring.take_back()
                continue
            kick, call = (-1 if fd is None else fd for fd in (ring.kick, ring.call))
            ring.lent_at = worker.tally["requests"]
            if (bell := self._bell) is None:
                worker.run(drain, engine, kick, call, ring.polled)
            else:
                by = {"bell": bell.fd, "request": bell.request, "ring": ring.index}
                worker.run(drain, engine, kick, call, ring.polled, **by)

    def recall(self) -> None:
        """Take all rings back, with what workers have done of them."""
        if self._crew is None:
            return
        for ring in self.rings:
            if ring.lent and (worker := self._worker(ring)) is not None:
                self._take(ring, worker)
        self._crew.collect(self.counters)

    def _take(self, ring: Ring, worker: _core.Worker) -> bool:
        """The ring is ours again, and nothing of it is under way; whether the worker has left something to be done."""
        worker.take()
        ring.take_back()
        end = self.clock() + TURN_SECONDS
        if left := worker.left():
            self._finish(ring, left, lambda: self.clock() >= end)
        return bool(left)

    def _finish(self, ring: Ring, left: Sequence[tuple[int, bytes | None]], late: Callable[[], bool]) -> None:
        try:
            ring.finish(left, self._ground.platform(), late)
        except ProtocolError as problem:
            self._break(ring, str(problem))
