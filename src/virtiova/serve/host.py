# SPDX-License-Identifier: Apache-2.0
"""A device behind one front end: does what the session's events ask for, and serves the rings. No sockets.

One thread handles messages, one at a time, and what requests Python serves. Those are done whole for `TURN_SECONDS`,
then the front end is listened to; nothing of guest memory is held on to, and every access translates anew. What
workers serve they serve inside of a gate, which is closed while messages are handled. So when an INVALIDATE is
acknowledged there is nobody who could still use the old mapping: that is how the promise is kept, and a turn and its
last request, or a worker's last batch, are how long an acknowledgement may take.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Collection, Sequence
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.dma.cached import CachedFlatSpace, CachedSpace
from virtiova.dma.iotlb import EAGER, Iotlb
from virtiova.dma.space import AddressSpace, FlatSpace
from virtiova.dma.wrong import SPACES
from virtiova.errors import ProtocolError
from virtiova.features import DeviceId, Feature, Status, has, mask, names
from virtiova.serve import events
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.dirty import DirtyLog, LoggedRam
from virtiova.serve.events import Event, Refused
from virtiova.serve.front import Front
from virtiova.serve.inflight import InflightFile, ring_bytes
from virtiova.serve.misses import Misses, Want, Wanted
from virtiova.serve.platform import Platform
from virtiova.serve.rings import BATCH, FRUITLESS, Ring
from virtiova.serve.session import Offer
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ConfigSpace, InflightDescription, IotlbMessage, ProtocolFeature, VringState

SLOTS: Final = 64
"""Regions of memory at a time, where they come one by one."""

TURN_SECONDS: Final = 0.002
"""How long requests are begun before the front end is listened to again. The one that is under way ends later."""

_WITH_WORKERS: Final = (
    events.IotlbUpdated,
    events.IotlbInvalidated,
    events.ProtocolFeaturesSet,
    events.BackendChannel,
    events.ConfigRead,
    events.RingErr,
    events.LogNotice,
)
"""What is no reason to take rings back from their workers: they have nothing to do with it, or only by the gate."""

RING_FEATURES: Final = mask(
    [
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.RING_EVENT_IDX,
        Feature.RING_INDIRECT_DESC,
        Feature.RING_PACKED,
        Feature.IN_ORDER,
    ]
)
"""IN_ORDER: whoever serves a ring, its requests are begun, done and given back in the order in which they came."""

_VHOST_FEATURES: Final = 1 << wire.F_PROTOCOL_FEATURES | 1 << wire.F_LOG_ALL
_PROTOCOL: Final = mask(
    [
        ProtocolFeature.MQ,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
    ]
)


def offer_of(device: Device, *, access_platform: bool = True) -> Offer:
    """What is offered for a device: CONFIG if it has a configuration, INFLIGHT_SHMFD for a disk."""
    protocol = _PROTOCOL
    if device.config():
        protocol |= 1 << ProtocolFeature.CONFIG
    if device.device_id == DeviceId.BLOCK:
        protocol |= 1 << ProtocolFeature.INFLIGHT_SHMFD
    features = device.features | RING_FEATURES | _VHOST_FEATURES
    if not access_platform:
        features &= ~(1 << Feature.ACCESS_PLATFORM)
    return Offer(features, protocol, device.queues, SLOTS)


class Host:
    """``device`` on one connection. Owns the descriptors in the events it is given; `close` lets go of all.

    ``behaviour`` names the address space that the device is given once bit 33 was accepted (`dma.wrong.SPACES`);
    ``say`` takes lines for the log, ``clock`` gives seconds. ``asks`` is how a front end is asked for pages that has no
    back-end channel; ``slots`` how many regions of memory there may be at a time, where they come one by one,
    and ``eager`` how much of a translation is entered in the native table before it is used.
    """

    def __init__(
        self,
        device: Device,
        session: Front,
        *,
        clock: Callable[[], float],
        say: Callable[[str], None],
        counters: Counters | None = None,
        behaviour: str = "honest",
        crew: Crew | None = None,
        lookout: _core.Lookout | None = None,
        asks: Wanted | None = None,
        slots: int = SLOTS,
        eager: int = EAGER,
    ) -> None:
        self.session = session
        self.counters = counters or Counters()
        self.channel: int | None = None
        """The back-end channel's descriptor."""
        self.misses: Wanted | None = asks
        self.outbox: list[bytes] = []
        """What is to be sent on the back-end channel."""
        self.rings = [Ring(device, index) for index in range(device.queues)]
        self.ram = LoggedRam()
        self.iotlb = Iotlb(self.ram, eager)
        self._device = device
        self._slots = slots
        self._clock = clock
        self._say = say
        self._behaviour = behaviour
        self._platform: Platform | None = None
        self._log: DirtyLog | None = None
        self._inflight: InflightFile | None = None
        self._said: set[str] = set()
        self._lookout = lookout
        self._crew = crew
        if crew is not None:
            self.iotlb.radix.behind(crew.gate)
        self._turn = 0
        """The ring that is looked at first, so that none of them waits for ever."""

    # -- events

    def handle(self, event: Event | Refused) -> None:
        """Do what an event asks for, and acknowledge it. `ProtocolError`: the connection is to be closed."""
        if isinstance(event, Refused):
            _close(*event.fds)
            self.counters.refusals += 1
            self._say(f"refused: {event.reason}")
            return
        try:
            answered = self._perform(event)
        except ProtocolError as problem:
            self.counters.refusals += 1
            self._say(f"refused: {problem}")
            self.session.acknowledge(event.token, str(problem))
        else:
            if not answered:
                self.session.acknowledge(event.token)

    def take(self, messages: bytes | bytearray | memoryview) -> tuple[int, int]:
        """Do the leading messages of a run as far as they are plain ones of the IOTLB, with which `handle` has no work.

        Returns how many bytes they take, and how many invalidations are among them. The same comes of it as of one
        message after the other, but that what rings wait for is looked at once.
        """
        count, updates, invalidates, replies = self.iotlb.take(messages)
        taken = count * wire.IOTLB_MESSAGE_SIZE
        if count:
            self.counters.updates += updates
            self.counters.invalidates += invalidates
            if self.misses is not None and self.misses.waiting:
                for iova, size in wire.iotlb_ranges(messages[:taken]):
                    self.misses.changed(iova, size)
            self.session.took(replies)
            self._again()
        return taken, invalidates

    def heard(self, messages: bytes) -> bool:
        """A run was done by `Iotlb.answers`; whether a ring waits for nothing any more. `done` is told later."""
        if self.misses is None:
            return False
        for iova, size in wire.iotlb_ranges(messages):
            self.misses.changed(iova, size)
        self._again()
        return self.runnable

    @property
    def runnable(self) -> bool:
        """Whether there is a ring of which a look would be of use."""
        return any(ring.runnable for ring in self.rings)

    def done(self, updates: int, invalidates: int) -> None:
        """So much was done by `Iotlb.answers`, and acknowledged."""
        self.iotlb.took(updates, invalidates)
        self.counters.updates += updates
        self.counters.invalidates += invalidates
        self.session.took(0)

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """While messages are handled no worker is at work."""
        return contextlib.nullcontext() if self._crew is None else self._crew.gate

    def _perform(self, event: Event) -> bool:
        """Whether the event was answered with a value."""
        if not isinstance(event, _WITH_WORKERS):
            self._recall()
        match event:
            case events.RingEvent():
                return self._ring_event(event)
            case events.FeaturesSet():
                self._set_features(event.features)
            case events.ProtocolFeaturesSet():
                agreed = wire.protocol_feature_names(event.features)
                self._say(f"protocol features 0x{event.features:x}: {', '.join(agreed) or 'none'}")
            case events.BackendChannel():
                self._open_channel(event.fd)
            case events.StatusSet():
                if event.status == 0:
                    self._halt()
            case events.DeviceReset():
                self._reset()
            case events.RingsDisabled():
                for ring in self.rings:
                    ring.enabled = False
            case events.NewOwner():
                self._start_over()
            case events.MemoryTable() | events.RegionAdded() | events.RegionRemoved():
                self._memory(event)
            case events.IotlbUpdated(message=update):
                self.counters.updates += 1
                self._changed(update)
                self.iotlb.update(update.iova, update.size, update.uaddr, update.perm)
            case events.IotlbInvalidated(message=gone):
                self.counters.invalidates += 1
                self._changed(gone)
                self.iotlb.invalidate(gone.iova, gone.size)
            case _:
                return self._other_event(event)
        return False

    def _other_event(self, event: Event) -> bool:
        match event:
            case events.ConfigRead():
                config = self._device.config()
                end = event.offset + event.size
                # Front ends ask for all the fields that they know of. What the device has not reads as zero.
                data = config.ljust(end, b"\0")[event.offset : end] if end <= wire.MAX_CONFIG else b""
                self.session.answer(event.token, ConfigSpace(event.offset, event.flags, data).encode())
                return True
            case events.ConfigWritten():
                if event.offset + len(event.data) > len(self._device.config()):
                    raise ProtocolError(f"configuration 0x{event.offset:x}+0x{len(event.data):x} does not exist")
                self._device.configure(event.offset, event.data)
            case events.InflightWanted():
                self._make_inflight(event)
                return True
            case events.InflightSet():
                self._take_inflight(event)
            case events.LogSet():
                self._take_log(event)
                self.session.answer(event.token, wire.u64(0))
                return True
            case events.LogNotice():
                # Nobody is told: the front end looks by itself, as QEMU does.
                _close(*_present(event.fd))
        return False

    # -- negotiation

    def _set_features(self, features: int) -> None:
        known = 1 << wire.F_LOG_ALL
        changed = (features ^ self._device.accepted) & ~known
        if changed and any(ring.started for ring in self.rings) and self._device.accepted:
            self._say("features changed while rings run: they are looked for anew")
        self._device.accepted = features & ~known
        offered = sorted(
            names(features & ~known, {**self._device.bit_names, wire.F_PROTOCOL_FEATURES: "PROTOCOL_FEATURES"})
        )
        self._say(f"features 0x{features:x}: {', '.join(offered)}")
        self._note_in(self._log if has(features, wire.F_LOG_ALL) else None)
        if changed:
            # Features mean a new start, and an entry from before may be of another driver.
            self._forget_translations()
            self._platform = None
            if self._inflight is not None and self._inflight.packed is not self._device.has(Feature.RING_PACKED):
                # Notes of the other kind of ring.
                self._use_inflight(None)
            for ring in self.rings:
                ring.rebuild(anew=True)

    def _open_channel(self, fd: int) -> None:
        if self.channel is not None:
            _close(self.channel)
        self._forget_channel()
        self.channel = fd
        self.misses = Misses(replies=self.session.agreed(ProtocolFeature.REPLY_ACK))
        self._platform = None
        self._again()

    def channel_lost(self, why: str) -> None:
        """The back-end channel is of no use any more: what is not mapped stays so."""
        self._say(f"back-end channel: {why}")
        if self.channel is not None:
            _close(self.channel)
        self._forget_channel()
        self._again()

    def _forget_channel(self) -> None:
        if self.misses is not None:
            _close(*self.misses.abandon())
        self.channel, self.misses, self._platform = None, None, None
        self.outbox.clear()

    def platform(self) -> Platform:
        """What the rings work on, as negotiated: who translates is decided here and nowhere else."""
        if self._platform is None:
            behind = self._device.has(Feature.ACCESS_PLATFORM)
            iotlb = self.iotlb if behind else None
            misses = self.misses if behind else None
            space, radix = self._space(behind)
            self._platform = Platform(self.ram, space, iotlb, misses, self._ask, self._tell, self.counters, radix)
            where = "IOVAs, through the IOTLB" if behind else "guest-physical, around any IOMMU"
            self._say(f"addresses in rings: {where}")
        return self._platform

    def _space(self, behind: bool) -> tuple[AddressSpace, _core.Radix | None]:
        """The address space, and the native table that says the same, if there may be one."""
        if self.ram.log is not None or (behind and self._behaviour != "honest"):
            # Who goes by a table writes to memory around `ram`, which notes what was written; or is to be wrong.
            return SPACES[self._behaviour](self.ram, self.iotlb) if behind else FlatSpace(self.ram), None
        if behind:
            return CachedSpace(self.ram, self.iotlb), self.iotlb.radix
        return CachedFlatSpace(self.ram), self.ram.radix

    def _halt(self) -> None:
        """Status 0. It may be a pause: QEMU writes it before it asks where the rings stand, when a machine stops or
        migrates, and goes on with the same driver. So what only a reset would take away stays; a new driver finds
        what it needs in the configuration, and its rings begin where the front end says."""
        for ring in self.rings:
            self._stop(ring)
        self._device.accepted = 0
        # The rings to come may have nothing to do with these; if they have, the file is brought again.
        self._use_inflight(None)
        self._forget_translations()

    def _reset(self) -> None:
        self._halt()
        for ring in self.rings:
            ring.reset()
        self.session.reset()
        self._device.reset()

    def _start_over(self) -> None:
        """As a connection that has just been made, but for what is agreed upon before SET_OWNER: the protocol."""
        self._reset()
        self.session.features &= ~(1 << wire.F_LOG_ALL)
        self._note_in(None)
        log, self._log = self._log, None
        if log is not None:
            log.close()
        for ring in self.rings:
            _close(*_present(ring.kick, ring.call, ring.err))
            ring.kick = ring.call = ring.err = None
        self.ram.clear()
        self._say("another device of the front end's: it starts from nothing")

    # -- memory

    def _memory(self, event: events.MemoryTable | events.RegionAdded | events.RegionRemoved) -> None:
        try:
            if isinstance(event, events.MemoryTable):
                self.ram.clear()
                for region, fd in zip(event.regions, event.fds, strict=True):
                    self.ram.add(region.gpa, region.size, region.uva, region.offset, fd)
            elif isinstance(event, events.RegionAdded):
                region = event.region
                if len(self.ram.blocks) >= self._slots:
                    raise ProtocolError(f"there are {self._slots} regions already")
                self.ram.add(region.gpa, region.size, region.uva, region.offset, event.fd, event.terms)
            else:
                self.ram.remove(event.region.gpa, event.region.size, event.region.uva)
        except ProtocolError:
            if isinstance(event, events.MemoryTable):
                self.ram.clear()
            raise
        finally:
            # Mapped memory needs its file no more, and a descriptor that is kept is one that leaks.
            _close(*([event.fd] if isinstance(event, events.RegionAdded) else event.fds))
            self._forget_translations()
            self._rebuild()

    def _forget_translations(self) -> None:
        self.iotlb.flush()
        if self.misses is not None:
            self.misses.forget()
        # A space may have kept translations of its own.
        self._platform = None
        # What was asked for will not be heard of, so whoever waits for it has to ask anew.
        self._again()

    def _changed(self, said: IotlbMessage) -> None:
        """The front end says something of these addresses. Whoever waits looks again, also if it makes no sense: what
        was asked for of them is not waited for any more."""
        if self.misses is not None:
            self.misses.changed(said.iova, said.size)
        self._again()

    def _rebuild(self) -> None:
        for ring in self.rings:
            ring.rebuild()

    def _again(self) -> None:
        """Something has come, or will not come any more: whoever waits for nothing else looks again."""
        for ring in self.rings:
            if ring.parked and (self.misses is None or not self.misses.awaited(ring.awaited)):
                ring.again()

    def _ask(self, wants: Sequence[Want]) -> None:
        if self.misses is not None:
            before = self.misses.questions
            self.outbox += self.misses.ask(wants, self._clock())
            self.counters.misses += self.misses.questions - before

    def _tell(self, wants: Collection[Want]) -> None:
        """A request has failed. What we have no mapping of, the front end knows best: it was its answer to the MISS. An
        access that a mapping does not allow is what ACCESS_FAIL is for; one of a request will do."""
        wrong = [want for want in wants if self.iotlb.knows(want[0])]
        if wrong and self.misses is not None:
            messages = self.misses.fail(min(wrong, key=lambda want: want[0]))
            self.counters.access_fails += len(messages)
            self.outbox += messages

    # -- answers on the back-end channel

    def answered(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Bytes have come on the back-end channel. `ProtocolError`: it is to be closed."""
        if isinstance(self.misses, Misses) and self.misses.receive(data, fds):
            self._again()

    def refused(self, wants: Collection[Want]) -> None:
        """These pages were asked for, and there are none."""
        if self.misses is not None:
            self.misses.refuse(wants)
            self._again()

    def expire(self) -> None:
        """Time has passed."""
        if self.misses is not None and (silent := self.misses.expire(self._clock())):
            self._say(f"{silent} MISS messages were never answered: taken for refused")
            self._again()

    # -- rings

    def _ring_event(self, event: events.RingEvent) -> bool:
        ring = self.rings[event.index]
        if isinstance(event, events.RingKick | events.RingCall | events.RingErr) and event.fd is not None:
            _notifier(event.fd)
        match event:
            case events.RingStopped():
                base = self._stop(ring)
                self.session.answer(event.token, self._stands(event.index, base))
                self._forget_translations()
                return True
            case events.RingKick():
                _replace(ring.kick)
                ring.kick = event.fd
                ring.polled = event.fd is None
                ring.rebuild()
                ring.started = True
                ring.broken = ""
                ring.tell_again()
                if not has(self.session.features, wire.F_PROTOCOL_FEATURES):
                    ring.enabled = True
            case events.RingCall():
                _replace(ring.call)
                ring.call = event.fd
                ring.tell_again()
            case events.RingErr():
                _replace(ring.err)
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
                self.session.answer(event.token, self._stands(event.index, ring.base))
                return True
            case events.RingAddress():
                ring.address = event.address
                ring.rebuild()
        return False

    def _stands(self, index: int, base: int) -> bytes:
        # Of a packed ring the upper half says what is used: all that was taken.
        value = base << 16 | base if self._device.has(Feature.RING_PACKED) else base
        return VringState(index, value).encode()

    def _stop(self, ring: Ring) -> int:
        if ring.begun:
            # Not only as many as there is time for.
            self._finish(ring, (), lambda: False)
        base = ring.stop()
        if ring.lost:
            # Others behind them are done, and there is no file to say so: done again they would be given back twice.
            self._say(f"ring {ring.index}: {ring.lost} requests were begun that it stopped without")
            self.session.status |= Status.DEVICE_NEEDS_RESET
        return base

    def kicked(self, index: int) -> None:
        """A kick has come for ring ``index``."""
        self.counters.kicks += 1
        ring = self.rings[index]
        ring.kicked = True
        ring.shy = False
        if ring.stuck and self.misses is not None:
            # The driver may have mapped since what was refused.
            self.misses.forgive(ring.stuck)
            ring.stuck = set()
            ring.again()

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
        end = self._clock() + TURN_SECONDS

        def late() -> bool:
            return self._clock() >= end

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
        if self._crew is None or self._platform is None or self._shrunk():
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
            worker.run(drain, engine, kick, call, ring.polled)

    def _recall(self) -> None:
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
        end = self._clock() + TURN_SECONDS
        if left := worker.left():
            self._finish(ring, left, lambda: self._clock() >= end)
        return bool(left)

    def _finish(self, ring: Ring, left: Sequence[tuple[int, bytes | None]], late: Callable[[], bool]) -> None:
        try:
            ring.finish(left, self.platform(), late)
        except ProtocolError as problem:
            self._break(ring, str(problem))

    def no_kicks(self, ring: Ring, problem: str = "") -> None:
        """Nothing will ever come from there again."""
        if problem:
            self._say(f"ring {ring.index}: its kicks: {problem}")
        _close(*_present(ring.kick))
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
                done = ring.serve_at_home(self.platform())
                if done is None:
                    most = BATCH if worker is None else 1
                    done = ring.look(self.platform(), late, most, arm=arm or worker is not None)
                ring.shy = ring.shy and not done
                if done and self._lookout is not None:
                    self._lookout.came()
            finally:
                call = ring.wants_call()
            if shrunk := self._shrunk():
                raise ProtocolError(shrunk)
        except ProtocolError as problem:
            self._break(ring, str(problem))
        if call:
            self.counters.calls += 1
            if not _signal(ring.call):
                self._untold(ring)

    def _break(self, ring: Ring, problem: str) -> None:
        """Serve it no more until it is set up again."""
        shrunk = self._shrunk()
        ring.broken = shrunk or problem
        self.counters.broken += 1
        why = shrunk or f"it makes no sense: {problem}"
        self._say(f"ring {ring.index} is stopped, {why}")
        self.session.status |= Status.DEVICE_NEEDS_RESET
        _signal(ring.err)

    def _shrunk(self) -> str:
        """What the front end shortened under us, if anything: bytes that we write there would reach nobody."""
        if self.ram.damaged:
            return f"the front end shortened its memory at 0x{self.ram.damaged[0]:x}"
        if self._log is not None and self._log.damaged:
            return "the front end shortened its dirty log"
        if self._inflight is not None and self._inflight.damaged:
            return "the front end shortened the file of what is in flight"
        return ""

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    # -- in flight, dirty log

    def _make_inflight(self, event: events.InflightWanted) -> None:
        wanted = event.wanted
        packed = self._device.has(Feature.RING_PACKED)
        size = wanted.queues * ring_bytes(wanted.queue_size, packed=packed)
        fd = os.memfd_create("virtiova-inflight", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            description = InflightDescription(size, 0, wanted.queues, wanted.queue_size)
            self._use_inflight(InflightFile(description, fd, packed=packed, fresh=True))
        except BaseException:
            _close(fd)
            raise
        # It is closed once it was sent.
        self.session.answer(event.token, description.encode(), (fd,))

    def _take_inflight(self, event: events.InflightSet) -> None:
        try:
            self._use_inflight(InflightFile(event.description, event.fd, packed=self._device.has(Feature.RING_PACKED)))
        finally:
            _close(event.fd)

    def _use_inflight(self, file: InflightFile | None) -> None:
        old, self._inflight = self._inflight, file
        for ring in self.rings:
            ring.inflight = file.ring(ring.index) if file is not None and ring.index < file.queues else None
            ring.rebuild()
        if old is not None:
            old.close()

    def _take_log(self, event: events.LogSet) -> None:
        try:
            fresh = DirtyLog(event.description, event.fd)
        finally:
            _close(event.fd)
        old, self._log = self._log, fresh
        self._note_in(fresh if has(self.session.features, wire.F_LOG_ALL) else None)
        if old is not None:
            old.close()

    def _note_in(self, log: DirtyLog | None) -> None:
        """Note in ``log`` what is written from now on; None: nowhere. Nobody goes on by a space that goes around it."""
        turned = (log is None) != (self.ram.log is None)
        self.ram.log = log
        if turned:
            self._platform = None
            self._rebuild()

    # -- the end

    def close(self) -> None:
        """The connection is over: nothing of it is kept, and the device is as after power-on."""
        self._recall()
        with contextlib.ExitStack() as stack:
            stack.callback(self._device.reset)
            stack.callback(setattr, self._device, "accepted", 0)
            stack.callback(self.ram.clear)
            for closable in (self._log, self._inflight):
                if closable is not None:
                    stack.callback(closable.close)
            self.ram.log = self._log = self._inflight = None
            for ring in self.rings:
                ring.stop()
                ring.inflight = None
                stack.callback(functools.partial(_close, *_present(ring.kick, ring.call, ring.err)))
                ring.kick = ring.call = ring.err = None
            stack.callback(functools.partial(_close, *_present(self.channel), *self.session.abandon()))
            stack.callback(self._forget_channel)


def _present(*fds: int | None) -> list[int]:
    return [fd for fd in fds if fd is not None]


def _close(*fds: int) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _notifier(fd: int) -> None:
    """See to it that a kick, call or error descriptor is one that can be, and never makes us wait.

    An eventfd has a file of no type; a pipe is what front ends take that have no eventfd. Anything else could wait
    for ever, or mean something else by what we write. Closes it and raises `ProtocolError` then.
    """
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (0, stat.S_IFIFO):
            raise ProtocolError(f"a notification by a file of type 0o{kind:o}, wanted an eventfd or a pipe")
        os.set_blocking(fd, False)
    except OSError as error:
        _close(fd)
        raise ProtocolError(f"a notification by a descriptor that cannot be used: {error.strerror}") from error
    except ProtocolError:
        _close(fd)
        raise


def _replace(old: int | None) -> None:
    """Let go of an earlier descriptor."""
    if old is not None:
        _close(old)


def _signal(fd: int | None) -> bool:
    """Tell whoever waits there; a counter that is full tells him already."""
    return fd is None or _core.tell(fd)
