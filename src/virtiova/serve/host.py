# SPDX-License-Identifier: Apache-2.0
"""A device behind one front end: does what the session's events ask for. No sockets.

One thread handles messages, one at a time, and what requests Python serves (`rounds`), a few at a time; nothing of
guest memory is held on to, and every access translates anew. What workers serve they serve inside of a gate, which is
closed while messages are handled. So when an INVALIDATE is acknowledged there is nobody who could still use the old
mapping: that is how the promise is kept, and a turn and its last request, or a worker's last batch, are how long an
acknowledgement may take.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.dma.cached import CachedFlatSpace, CachedSpace
from virtiova.dma.iotlb import EAGER, Iotlb
from virtiova.dma.space import AddressSpace, FlatSpace
from virtiova.dma.wrong import SPACES
from virtiova.errors import ProtocolError
from virtiova.features import Feature, has, names
from virtiova.serve import events
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew
from virtiova.serve.descriptors import Bell, close, present
from virtiova.serve.dirty import LoggedRam
from virtiova.serve.events import Event, Refused
from virtiova.serve.front import Front
from virtiova.serve.misses import Misses, Want, Wanted
from virtiova.serve.offer import SLOTS
from virtiova.serve.platform import Platform
from virtiova.serve.records import Records
from virtiova.serve.rounds import Rounds
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ConfigSpace, IotlbMessage, ProtocolFeature

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


class Host:
    """``device`` on one connection. Owns the descriptors in the events it is given; `close` lets go of all.

    ``behaviour`` names the address space that the device is given once bit 33 was accepted (`dma.wrong.SPACES`);
    ``say`` takes lines for the log, ``clock`` gives seconds. ``asks`` is how a front end is asked for pages that has no
    back-end channel; ``slots`` how many regions of memory there may be at a time, where they come one by one,
    ``eager`` how much of a translation is entered in the native table before it is used, ``bell`` by what the driver is
    told where it takes no calls.
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
        bell: Bell | None = None,
    ) -> None:
        self.session = session
        self.counters = counters or Counters()
        self.channel: int | None = None
        """The back-end channel's descriptor."""
        self.misses: Wanted | None = asks
        self.outbox: list[bytes] = []
        """What is to be sent on the back-end channel."""
        self.ram = LoggedRam()
        self.iotlb = Iotlb(self.ram, eager)
        self._device = device
        self._slots = slots
        self._say = say
        self._behaviour = behaviour
        self._platform: Platform | None = None
        self._crew = crew
        if crew is not None:
            self.iotlb.radix.behind(crew.gate)
        self.rounds = Rounds(
            device, self, clock=clock, say=say, counters=self.counters, crew=crew, lookout=lookout, bell=bell
        )
        self.rings = self.rounds.rings
        self._records = Records(device, self.ram, self.rings)

    # -- events

    def handle(self, event: Event | Refused) -> None:
        """Do what an event asks for, and acknowledge it. `ProtocolError`: the connection is to be closed."""
        if isinstance(event, Refused):
            close(*event.fds)
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
            self.rounds.again()
        return taken, invalidates

    def heard(self, messages: bytes) -> bool:
        """A run was done by `Iotlb.answers`; whether a ring waits for nothing any more. `done` is told later."""
        if self.misses is None:
            return False
        for iova, size in wire.iotlb_ranges(messages):
            self.misses.changed(iova, size)
        self.rounds.again()
        return self.rounds.runnable

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
            self.rounds.recall()
        match event:
            case events.RingEvent():
                return self.rounds.event(event)
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
                payload, fd = self._records.make_inflight(event.wanted)
                self.session.answer(event.token, payload, (fd,))
                return True
            case events.InflightSet():
                self._records.take_inflight(event.description, event.fd)
            case events.LogSet():
                on = has(self.session.features, wire.F_LOG_ALL)
                self._noted(self._records.take_log(event.description, event.fd, on=on))
                self.session.answer(event.token, wire.u64(0))
                return True
            case events.LogNotice():
                # Nobody is told: the front end looks by itself, as QEMU does.
                close(*present(event.fd))
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
        self._noted(self._records.note(on=has(features, wire.F_LOG_ALL)))
        if changed:
            # Features mean a new start, and an entry from before may be of another driver.
            self.forget_translations()
            self._platform = None
            self._records.drop_inflight(of_other_rings=True)
            for ring in self.rings:
                ring.rebuild(anew=True)

    def _open_channel(self, fd: int) -> None:
        if self.channel is not None:
            close(self.channel)
        self._forget_channel()
        self.channel = fd
        self.misses = Misses(replies=self.session.agreed(ProtocolFeature.REPLY_ACK))
        self._platform = None
        self.rounds.again()

    def channel_lost(self, why: str) -> None:
        """The back-end channel is of no use any more: what is not mapped stays so."""
        self._say(f"back-end channel: {why}")
        if self.channel is not None:
            close(self.channel)
        self._forget_channel()
        self.rounds.again()

    def _forget_channel(self) -> None:
        if self.misses is not None:
            close(*self.misses.abandon())
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

    @property
    def settled(self) -> bool:
        """Whether what `platform` said last is still so."""
        return self._platform is not None

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
            self.rounds.stop(ring)
        self._device.accepted = 0
        # The rings to come may have nothing to do with these; if they have, the file is brought again.
        self._records.drop_inflight()
        self.forget_translations()

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
        self._noted(self._records.drop_log())
        self.rounds.start_over()
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
            close(*([event.fd] if isinstance(event, events.RegionAdded) else event.fds))
            # A range of the kernel's comes beside the others: of no address that was known it says anything else.
            if not (isinstance(event, events.RegionAdded) and event.terms.kernels):
                self.forget_translations()
                self.rounds.rebuild()

    def forget_translations(self) -> None:
        """Nothing is known of any address any more."""
        self.iotlb.flush()
        if self.misses is not None:
            self.misses.forget()
        # A space may have kept translations of its own.
        self._platform = None
        # What was asked for will not be heard of, so whoever waits for it has to ask anew.
        self.rounds.again()

    def _changed(self, said: IotlbMessage) -> None:
        """The front end says something of these addresses. Whoever waits looks again, also if it makes no sense: what
        was asked for of them is not waited for any more."""
        if self.misses is not None:
            self.misses.changed(said.iova, said.size)
        self.rounds.again()

    def _ask(self, wants: Sequence[Want]) -> None:
        if self.misses is not None:
            before = self.misses.questions
            self.outbox += self.misses.ask(wants, self.rounds.clock())
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
            self.rounds.again()

    def refused(self, wants: Collection[Want]) -> None:
        """These pages were asked for, and there are none."""
        if self.misses is not None:
            self.misses.refuse(wants)
            self.rounds.again()

    def expire(self) -> None:
        """Time has passed."""
        if self.misses is not None and (silent := self.misses.expire(self.rounds.clock())):
            self._say(f"{silent} MISS messages were never answered: taken for refused")
            self.rounds.again()

    # -- memory that shrinks, files that are written in

    def shrunk(self) -> str:
        """What the front end shortened under us, if anything: bytes that we write there would reach nobody."""
        return self._records.shrunk()

    def _noted(self, turned: bool) -> None:
        """Whether writes are noted in a log has ``turned``: nobody goes on by a space that goes around it."""
        if turned:
            self._platform = None
            self.rounds.rebuild()

    # -- the end

    def close(self) -> None:
        """The connection is over: nothing of it is kept, and the device is as after power-on."""
        self.rounds.recall()
        with contextlib.ExitStack() as stack:
            stack.callback(self._device.reset)
            stack.callback(setattr, self._device, "accepted", 0)
            stack.callback(self.ram.clear)
            stack.callback(self._records.close)
            stack.callback(functools.partial(close, *present(self.channel), *self.session.abandon()))
            stack.callback(self._forget_channel)
            stack.callback(self.rounds.close)
