# SPDX-License-Identifier: Apache-2.0
"""The back end's half of a VDUSE device: what the kernel says, and what it can be asked, as a host's events.

The kernel sends three kinds of messages and waits for the answer to each: the driver's status, a ring's state, memory
that has changed. All else - features, rings, memory - it only tells when asked, through `Kernel`. So the session asks
at the moments when there is something new, and makes of it the events that a vhost-user front end would have sent.

Memory is handed out as ranges of IOVAs with a file for each. Such a range becomes a region of RAM at an address that is
ours alone, and a translation to it: IOVAs never equal what they lead to. The kernel does not say when it takes a range
of its own driver's back, but it does so only after a reset: so nothing is kept over one.

A driver under vhost-vdpa is a process without privileges. What it set is checked as a vhost-user front end's messages
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.regions import MAX_REGIONS
from virtiova.dma.shared import Terms
from virtiova.errors import ProtocolError
from virtiova.features import Feature, Status, has
from virtiova.serve import events
from virtiova.serve.events import Event, Refused
from virtiova.serve.misses import Want
from virtiova.serve.session import MAX_RING
from virtiova.wire import vduse as wire
from virtiova.wire.vduse import IotlbEntry, QueueInfo, Request, RequestKind
from virtiova.wire.vhost_user import (
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    MemoryRegion,
    ProtocolFeature,
    VringAddr,
    VringState,
)

_FIRST_GPA: Final = 1 << 44
_UVA_ABOVE: Final = 1 << 60
"""Where regions are in our books: no address of a driver's is one of these, and none of these is another."""
_LAST: Final = (1 << 64) - 1
_FLUSHING: Final = (events.MemoryTable, events.RegionRemoved)


class Kernel(Protocol):
    """What a VDUSE device can be asked. ``OSError`` if it is broken."""

    def features(self) -> int:
        """What the driver wrote as accepted features."""

    def ring(self, index: int, *, packed: bool) -> QueueInfo:
        """What the driver set of a ring."""

    def region(self, start: int, last: int) -> tuple[IotlbEntry, int] | None:
        """The first region that has one of these addresses, and a descriptor of its file, the caller's; None: none."""

    def kicks(self, index: int) -> int:
        """An eventfd, the caller's, by which the kernel tells of kicks from here on."""

    def call(self, index: int) -> int:
        """A descriptor, the caller's, to signal when the driver is to be told."""


class Lender(Protocol):
    """Who has the file in which requests that were begun are noted."""

    def lend(self, *, fresh: bool) -> tuple[InflightDescription, int]:
        """Where, with a descriptor, the caller's. ``fresh``: none has been so far."""


@dataclass(slots=True)
class _Range:
    """A range of IOVAs that has become a region of RAM; ``token``: of the event that makes it one."""

    entry: IotlbEntry
    region: MemoryRegion
    token: int
    usable: bool = True
    """Not if its file is not what the kernel says of it: whoever set it up could cut it short."""

    def overlaps(self, start: int, last: int) -> bool:
        return self.entry.start <= last and start <= self.entry.last

    def update(self) -> IotlbMessage:
        entry = self.entry
        inside = entry.offset - self.region.offset
        size = entry.last - entry.start + 1
        return IotlbMessage(IOVA(entry.start), size, UVA(self.region.uva + inside), entry.access, IotlbKind.UPDATE)


@dataclass(slots=True)
class _Open:
    """A message that the kernel waits for an answer to: how many of its events are not done, and what comes back."""

    left: int
    before: int
    """The status to go back to if one of them fails."""
    failed: bool = False
    state: bytes = b""


class VduseSession:
    """One device: hand messages to `receive`, pages that are missing to `find`, and write the `replies`."""

    def __init__(self, features: int, queues: int, kernel: Kernel, notes: Lender | None = None) -> None:
        self._offered = features
        self._queues = queues
        self._kernel = kernel
        self._notes = notes
        self._ranges: list[_Range] = []
        self._next_gpa = _FIRST_GPA
        self._next_token = 0
        self._tokens: dict[int, int] = {}
        """The number of the message that an event is of."""
        self._open: dict[int, _Open] = {}
        self._replies: list[bytes] = []
        self._orphans: list[int] = []
        self.unready: dict[int, int] = {}
        """Rings that their driver has not made ready yet, and where a kick would tell that it has: `look`."""
        self.features = 0
        """The virtio features that were accepted."""
        self.status = 0
        """The device status: as the driver wrote it; a host may add to it."""

    # -- in

    def receive(self, data: bytes) -> list[Event | Refused]:
        """What the kernel wants. `ProtocolError` for bytes that are no message."""
        try:
            request = Request.decode(data)
        except wire.UnknownRequest as problem:
            self._replies.append(wire.response(problem.number, ok=False))
            return [Refused(-1, str(problem))]
        before = self.status
        try:
            found = self._take(request)
        except ProtocolError as problem:
            self._replies.append(wire.response(request.number, ok=False))
            return [Refused(request.kind, str(problem))]
        if not found:
            self._replies.append(wire.response(request.number, ok=True))
            return []
        self._open[request.number] = _Open(len(found), before)
        self._tokens.update((event.token, request.number) for event in found)
        return list(found)

    def _take(self, request: Request) -> Sequence[Event]:
        match request.kind:
            case RequestKind.SET_STATUS:
                return self._set_status(request.status)
            case RequestKind.UPDATE_IOTLB:
                size = (request.last - request.start + 1) & _LAST
                changed = IotlbMessage(IOVA(request.start), size, UVA(0), Access.NONE, IotlbKind.INVALIDATE)
                gone = self._forget(request.start, request.last)
                return [*gone, events.IotlbInvalidated(self._token(), changed), *(self._tell() if gone else ())]
            case RequestKind.GET_VQ_STATE:
                if request.index >= self._queues:
                    raise ProtocolError(f"ring {request.index}, wanted less than {self._queues}")
                return [events.RingAsked(self._token(), request.index)]

    def _token(self) -> int:
        self._next_token += 1
        return self._next_token

    # -- status

    def _set_status(self, status: int) -> list[Event]:
        if status == 0:
            self.reset()
            # Memory goes too: a driver gives its rings back without a word once it has reset the device.
            return [events.DeviceReset(self._token()), *self._forget(0, _LAST)]
        if taken := self.status & ~status & ~Status.DEVICE_NEEDS_RESET:
            raise ProtocolError(f"status 0x{status:x} without 0x{taken:x}: only a reset takes bits of the status back")
        new = status & ~self.status
        if status & Status.DRIVER_OK and not status & Status.FEATURES_OK:
            raise ProtocolError("a driver without FEATURES_OK: one for legacy devices, which do not know bit 33")
        found: list[Event] = []
        if new & Status.FEATURES_OK:
            found.append(self._agree())
        if new & Status.DRIVER_OK:
            found += self._start(fresh=True)
        self.status = status | self.status & Status.DEVICE_NEEDS_RESET
        return [*found, events.StatusSet(self._token(), status)]

    def _agree(self) -> Event:
        features = self._kernel.features()
        if unknown := features & ~self._offered:
            raise ProtocolError(f"features 0x{unknown:x} were never offered")
        if not has(features, Feature.ACCESS_PLATFORM):
            raise ProtocolError(f"features 0x{features:x} without bit 33: addresses here are IOVAs, and nothing else")
        self.features = features
        return events.FeaturesSet(self._token(), features)

    # -- rings

    def resume(self, status: int) -> list[Event]:
        """Go on where another process stopped: with a driver that had written ``status``. `ProtocolError` if there is
        no such driver any more."""
        found: list[Event] = []
        if status & Status.FEATURES_OK:
            found.append(self._agree())
        if status & Status.DRIVER_OK:
            found += self._start(fresh=False)
        self.status = status & ~Status.DEVICE_NEEDS_RESET
        return found

    def _start(self, *, fresh: bool) -> list[Event]:
        """Begin with all rings that are ready, as a driver that writes DRIVER_OK wants."""
        found: list[Event] = []
        try:
            if self._notes is not None:
                found.append(events.InflightSet(self._token(), *self._notes.lend(fresh=fresh)))
            for index in range(self._queues):
                self._orphan(self.unready.pop(index, None))
                self.unready[index] = self._kernel.kicks(index)
                found += self.look(index)
        except BaseException:
            for event in found:
                if isinstance(event, events.RingCall | events.RingKick | events.InflightSet):
                    self._orphan(event.fd)
            # A driver that was not let begin makes no ring ready later on.
            self._drop_unready()
            raise
        return found

    def look(self, index: int) -> list[Event]:
        """A ring that was not ready, but may be by now: what to do then. `ProtocolError` if there is no such ring."""
        packed = has(self.features, Feature.RING_PACKED)
        info = self._kernel.ring(index, packed=packed)
        if not info.ready:
            return []
        size = info.size
        if not 1 <= size <= MAX_RING or (size & (size - 1) and not packed):
            raise ProtocolError(f"ring {index} of {size} entries, wanted a power of two of at most {MAX_RING}")
        where = VringAddr(index, 0, info.desc, info.device, info.driver, 0)
        return [
            events.RingSize(self._token(), index, size),
            events.RingBase(self._token(), index, info.base),
            events.RingAddress(self._token(), index, where),
            events.RingCall(self._token(), index, self._kernel.call(index)),
            events.RingKick(self._token(), index, self.unready.pop(index)),
        ]

    # -- memory

    @property
    def room(self) -> int:
        """Ranges that can come before others have to go."""
        return MAX_REGIONS - len(self._ranges)

    def make_room(self) -> list[Event]:
        """All ranges go. Those that are of use will be missing again."""
        return self._forget(0, _LAST)

    def find(self, wants: Iterable[Want]) -> list[Event | Refused]:
        """Pages that are missing: the events that bring what the kernel has there. A page of which that is nothing new
        is not among them, and to be taken for refused."""
        found: list[Event | Refused] = []
        fresh: list[_Range] = []
        for page, _ in wants:
            start, last = page, min(page + PAGE_SIZE - 1, _LAST)
            if any(each.entry.start <= start and last <= each.entry.last for each in fresh):
                continue
            try:
                self._find(start, last, found, fresh)
            except ProtocolError as problem:
                found.append(Refused(-1, str(problem)))
        if any(isinstance(event, _FLUSHING) for event in found):
            # Where a region goes, the host forgets what leads to the others, too.
            return [*found, *self._tell()]
        return [*found, *(events.IotlbUpdated(self._token(), each.update()) for each in fresh)]

    def _find(self, start: int, last: int, found: list[Event | Refused], fresh: list[_Range]) -> None:
        while start <= last and (region := self._kernel.region(start, last)) is not None:
            entry, fd = region
            if any(each.entry == entry for each in self._ranges):
                self._orphan(fd)
            else:
                found += self._enter(entry, fd)
                fresh.append(self._ranges[-1])
            start = max(start, entry.last) + 1

    def _enter(self, entry: IotlbEntry, fd: int) -> list[Event]:
        """A range that is new: a region of whole pages around it."""
        offset = entry.offset & ~PAGE_MASK
        size = (entry.offset + entry.last - entry.start - offset | PAGE_MASK) + 1
        found = self._forget(entry.start, entry.last)
        if not self.room or self._next_gpa + size > _UVA_ABOVE:
            found += self.make_room()
        gpa = self._next_gpa
        self._next_gpa += size + PAGE_SIZE
        region = MemoryRegion(GPA(gpa), size, UVA(gpa | _UVA_ABOVE), offset)
        token = self._token()
        self._ranges.append(_Range(entry, region, token))
        return [*found, events.RegionAdded(token, region, fd, Terms(entry.access, kernels=True))]

    def _tell(self) -> list[Event]:
        """The translations of all ranges."""
        return [events.IotlbUpdated(self._token(), each.update()) for each in self._ranges if each.usable]

    def _forget(self, start: int, last: int) -> list[Event]:
        """These addresses mean something else: what leads there goes, and what it led to."""
        gone = [each for each in self._ranges if each.overlaps(start, last)]
        if not gone and last - start < _LAST:
            return []
        self._ranges = [each for each in self._ranges if each not in gone]
        if not self._ranges:
            self._next_gpa = _FIRST_GPA
            return [events.MemoryTable(self._token(), (), ())]
        return [events.RegionRemoved(self._token(), each.region, ()) for each in gone if each.usable]

    # -- out

    def replies(self) -> list[bytes]:
        """What is to be written, in order."""
        out, self._replies = self._replies, []
        return out

    def agreed(self, feature: ProtocolFeature) -> bool:
        """Nothing of vhost-user's is."""
        return False

    def acknowledge(self, token: int, problem: str = "") -> None:
        """What the event with ``token`` wants is done, or cannot be for a reason, of which the host says what it is."""
        if problem:
            for each in self._ranges:
                each.usable = each.usable and each.token != token
        self._done(token, failed=bool(problem))

    def answer(self, token: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Answer the event with ``token``, which asks where a ring stands."""
        stands = VringState.decode(payload)
        packed = has(self.features, Feature.RING_PACKED)
        self._done(token, state=wire.queue_state(stands.index, stands.value & 0xFFFF, packed=packed))

    def _done(self, token: int, *, failed: bool = False, state: bytes = b"") -> None:
        number = self._tokens.pop(token, None)
        if number is None:
            return
        message = self._open[number]
        message.left -= 1
        message.failed |= failed
        message.state = state or message.state
        if not message.left:
            del self._open[number]
            if message.failed:
                self.status = message.before | self.status & Status.DEVICE_NEEDS_RESET
            self._replies.append(wire.response(number, ok=not message.failed, state=message.state))

    def took(self, replies: int) -> None:
        """No IOTLB messages come around this session."""

    def reset(self) -> None:
        """The device is as before any driver."""
        self.status = self.features = 0
        self._drop_unready()

    def _drop_unready(self) -> None:
        for index in list(self.unready):
            self._orphan(self.unready.pop(index))

    def _orphan(self, fd: int | None) -> None:
        if fd is not None:
            self._orphans.append(fd)

    def abandon(self) -> tuple[int, ...]:
        """Forget all that is unfinished; the descriptors to close."""
        self.reset()
        return self.orphans()

    def orphans(self) -> tuple[int, ...]:
        """Descriptors that are of no use any more, to close."""
        orphans, self._orphans = tuple(self._orphans), []
        return orphans
