# SPDX-License-Identifier: Apache-2.0
"""A history played on both ends of a ring, and a model of every request that is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from virtiova.addr import Access, DmaAddr
from virtiova.errors import ProtocolError
from virtiova.ring import chain as ours
from virtiova.ring.ends import Segment, Used
from virtiova.ring.layout import PackedLayout
from virtiova.testing.checks import NotApplicable, Wrong
from virtiova.testing.ring_ends import (
    SLOT,
    Act,
    Add,
    Begin,
    Chain,
    MakeDevice,
    MakeDriver,
    Push,
    RingHistory,
    RingStep,
    Sent,
    Some,
    our_device,
    our_driver,
    place,
)
from virtiova.testing.ring_world import Watched, World

T = TypeVar("T")
EMPTY: Final = b"\xee"
MOST: Final = 20_000
"""Accesses to memory that a device end may make in one call."""


class RingPlay:
    """Both ends over one memory. ``driver`` and ``device`` make them: ours, where they are None."""

    def __init__(self, begin: Begin, driver: MakeDriver | None = None, device: MakeDevice | None = None) -> None:
        self.steps: list[str] = [str(begin)]
        self.begin = begin
        self.world = World(begin.reach, begin.way, pages=2 * begin.size + 80)
        self.place = place(begin, self.world, MOST)
        self.layout = self.place.layout
        self.driver: Any = self._call(lambda: (driver or our_driver)(self.place), "making the driver end")
        self.device: Any = self._call(lambda: (device or our_device)(self.place), "making the device end")
        self.strict_driver = driver is not None
        """Whether a kick too many is the driver's mistake: it may be the device's way to be simple."""
        self.known_driver = driver is None
        """Whether it is known what the driver wants to be told."""
        self.event_idx = begin.event_idx
        size = begin.size
        # A slot for every descriptor, and room for the last one to reach into the next page.
        self.slots = self.world.alloc((size + 1) * SLOT)
        self.tables = self.world.alloc(size * 16 * 16)
        self.free_slots = list(range(size))
        self.free_descs = size
        self.serial = 0
        self.added: list[Sent] = []
        self.published: list[Sent] = []
        self.popped: list[tuple[Sent, Chain]] = []
        self.used: list[Sent] = []
        # Counters of what was published, pushed, polled; and the last wish of either side.
        self.n_published = self.n_pushed = self.n_signalled = self.n_polled = self.n_popped = 0
        self.wish = 0
        self.wish_place = 0
        self.named = False
        """Whether the device's wish names a descriptor, which none of a packed ring does before its first one."""
        self.wants_kick = True
        self.descs = begin.start
        """Descriptors of a packed ring that were written so far."""
        self.taken = begin.start

    # -- words

    def want(self, holds: object, words: str) -> None:
        """Raise `Wrong` if it does not hold."""
        if not holds:
            raise Wrong(self.steps, words)

    def _call(self, call: Callable[[], T], what: str) -> T:
        try:
            return call()
        except (Wrong, NotApplicable):
            raise
        except Exception as error:
            raise Wrong(self.steps, f"{what} raised {type(error).__name__}: {error}") from error

    def _method(self, end: object, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(end, name, None)
        if method is None:
            raise NotApplicable(f"needs a method `{name}`")
        return method

    @property
    def packed(self) -> bool:
        """Whether the ring is."""
        return self.begin.packed

    def _untouched(self, call: Callable[[], T], offset: int, length: int, whose: str) -> T:
        """A call during which that part of the ring is not to change."""
        before = self.place.region.read(offset, length)
        given = call()
        self.want(self.place.region.read(offset, length) == before, f"wrote to what is the {whose}'s to write")
        return given

    def _by_device(self, call: Callable[[], T], what: str) -> T:
        layout, space = self.layout, self.place.space
        assert isinstance(space, Watched)
        space.ops.clear()
        if isinstance(layout, PackedLayout):
            return self._untouched(lambda: self._call(call, what), layout.driver, 4, "driver")
        return self._untouched(lambda: self._call(call, what), 0, layout.avail + 6 + 2 * layout.size, "driver")

    def _by_driver(self, call: Callable[[], T], what: str) -> T:
        layout = self.layout
        if isinstance(layout, PackedLayout):
            return self._untouched(lambda: self._call(call, what), layout.device, 4, "device")
        return self._untouched(lambda: self._call(call, what), layout.used, 6 + 8 * layout.size, "device")

    # -- the driver end

    def add(self, parts: Iterable[int], room: Iterable[int], *, indirect: bool = False) -> bool:
        """A request of readable parts and writable parts of these lengths; False if there is no room for it."""
        parts, room = list(parts), list(room)
        indirect = indirect and self.begin.indirect
        count = len(parts) + len(room)
        cost = 1 if indirect else count
        if not count or cost > self.free_descs or count > self.layout.size or not self.free_slots:
            return False
        slot = self.free_slots.pop(0)
        # In every other slot it is the payload that lies across the border of two pages, in the rest the room.
        payload_at = slot * SLOT + (1024 if slot % 2 else SLOT - 3)
        room_at = slot * SLOT + (SLOT - 3 if slot % 2 else 2048)
        self.slots.write(room_at, EMPTY * (sum(room) + len(room)))
        self.serial += 1
        payload = (b"%08d " % self.serial * (sum(parts) // 9 + 1))[: sum(parts)]
        self.slots.write(payload_at, payload)
        segments, at = [], payload_at
        for length in parts:
            segments.append(Segment(DmaAddr(self.slots.addr + at), length, False))
            at += length
        places, at = [], room_at
        for length in room:
            segments.append(Segment(DmaAddr(self.slots.addr + at), length, True))
            places.append((at, length))
            # One byte between the writable parts: whoever writes too much is seen.
            at += length + 1
        if indirect:
            add_indirect = self._method(self.driver, "add_indirect")
            head = self._by_driver(lambda: add_indirect(segments, self.tables, slot * 16 * 16), "add_indirect")
        else:
            head = self._by_driver(lambda: self.driver.add(segments), "add")
        self.want(head not in {sent.head for sent in self.under_way()}, f"head {head} is still in use")
        seen = [(int(each.addr), each.length, Access.WRITE if each.write else Access.READ) for each in segments]
        self.free_descs -= cost
        self.descs += cost
        self.added.append(Sent(head, slot, seen, payload_at, payload, places, cost))
        return True

    def fill(self) -> None:
        """Requests of one descriptor, as long as there is room."""
        while self.add((1,), ()):
            pass

    def overfill(self) -> None:
        """One descriptor too many is refused, and changes nothing."""
        if self.free_descs >= self.layout.size:
            return
        segment = Segment(DmaAddr(self.slots.addr), 1, False)
        try:
            head = self.driver.add([segment] * (self.free_descs + 1))
        except ProtocolError:
            return
        except Exception as error:
            raise Wrong(self.steps, f"raised {type(error).__name__}: {error}; wanted a ProtocolError") from error
        self.want(head is None, f"took it as {head}, wanted a ProtocolError")

    def publish(self) -> bool:
        """Make all that was added visible."""
        old = self.n_published
        new = bool(self.added)
        kick = self._by_driver(self.driver.publish, "publish")
        self.want(isinstance(kick, bool), f"gave {kick!r}, wanted whether to notify")
        self.n_published += len(self.added)
        self.published += self.added
        self.added = []
        if new:
            self.check_kick(kick, old)
        return bool(kick)

    def check_kick(self, kick: bool, old: int) -> None:
        """Is it right to kick, or not, for what was published after request ``old``?"""
        if not self.packed:
            # The wish is a number of requests: the one after it is to be told.
            wanted = old <= self.wish < self.n_published if self.event_idx else self.wants_kick
            self.want(kick or not wanted, "a notification lost: the device sleeps, and asked for it")
            self.want(wanted or not kick or not self.strict_driver, "a notification that the device did not ask for")
            return
        passed = old <= self.wish < self.n_published
        if self.wants_kick and (passed or not self.named):
            self.want(kick, "a notification lost: the device sleeps, and asked for it")
        elif kick and self.strict_driver:
            # A wish of long ago looks like one of this lap.
            late = self.wants_kick and self.descs - self.wish_place > self.layout.size
            self.want(late, "a notification that the device did not ask for")

    def poll(self) -> bool:
        """The driver looks for one that was used."""
        used: Used | None = self._by_driver(self.driver.poll, "poll")
        if not self.used:
            self.want(used is None, f"gave {used}, but nothing was used")
            return False
        sent = self.used.pop(0)
        self.want(used is not None, f"gave None, but head {sent.head} was used")
        assert used is not None
        self.want(
            (used.head, used.length) == (sent.head, len(sent.answer)),
            f"gave head {used.head} with {used.length} bytes, wanted {sent.head} with {len(sent.answer)}",
        )
        self.n_polled += 1
        seen, expected, left = b"", b"", sent.answer
        for at, length in sent.room:
            seen += self.slots.read(at, length + 1)
            here, left = left[:length], left[length:]
            expected += here.ljust(length + 1, EMPTY)
        self.want(seen == expected, "the buffers hold something else than what was written")
        self.want(self.slots.read(sent.at, len(sent.payload)) == sent.payload, "what is only to be read was changed")
        self.free_slots.append(sent.slot)
        self.free_descs += sent.cost
        return True

    # -- the device end

    def pop(self) -> bool:
        """The device looks for one."""
        chain = self._by_device(self.device.pop, "pop")
        if not self.published:
            self.want(chain is None, "gave a chain, but none is available")
            return False
        sent = self.published[0]
        self.want(chain is not None, f"gave None, but head {sent.head} is available")
        del self.published[0]
        self.n_popped += 1
        self.taken += sent.cost
        sent.order = self.n_popped
        self.want(chain.head == sent.head, f"gave head {chain.head}, wanted {sent.head}")
        buffers = [(int(at), length, access) for at, length, access in chain.buffers() if length]
        self.want(buffers == sent.segments, f"gave the buffers {_shown(buffers)}, wanted {_shown(sent.segments)}")
        if isinstance(chain, ours.Chain):
            data = self._call(chain.read, "read")
        else:
            data = b"".join(self.place.space.read(at, n) for at, n, access in buffers if access is Access.READ)
        self.want(data == sent.payload, "what is read is not what was sent")
        self.popped.append((sent, chain))
        return True

    def put_back(self, count: int) -> None:
        """The latest of those at hand are as if they had never been taken."""
        latest: list[tuple[Sent, Chain]] = []
        while self.popped and len(latest) < count and self.popped[-1][0].order == self.n_popped - len(latest):
            latest.insert(0, self.popped.pop())
        put_back = self._method(self.device, "put_back")
        self._by_device(lambda: put_back(len(latest)), "put_back")
        self.n_popped -= len(latest)
        self.taken -= sum(sent.cost for sent, _ in latest)
        self.published[:0] = [sent for sent, _ in latest]

    def push(self, which: int, fill: int) -> bool:
        """Complete one of the requests at hand, in any order, with ``fill`` bytes or as many as fit."""
        if not self.popped:
            return False
        sent, chain = self.popped.pop(0 if self.begin.in_order else which % len(self.popped))
        self._answer(sent, chain, fill)
        self._by_device(lambda: self.device.push(chain, len(sent.answer)), "push")
        return True

    def _answer(self, sent: Sent, chain: Chain, fill: int) -> None:
        room = sum(length for _, length in sent.room)
        sent.answer = (b"answer to %08d " % sent.order * SLOT)[: min(fill, room)]
        if isinstance(chain, ours.Chain):
            self._call(lambda: chain.write(sent.answer), "write")
            self.want(chain.written == len(sent.answer), f"says {chain.written} written, wanted {len(sent.answer)}")
        else:
            left = sent.answer
            for at, length, access in sent.segments:
                if access is Access.WRITE:
                    self.place.space.write(at, left[:length])
                    left = left[length:]
        self.n_pushed += 1
        self.used.append(sent)

    def push_together(self, count: int) -> bool:
        """Complete the oldest requests as a device does that keeps their order: all of them whole but the last, which
        is the only one that it names (bit 35). Only our device end does."""
        batch, self.popped = self.popped[:count], self.popped[count:]
        if not batch:
            return False
        for sent, chain in batch:
            self._answer(sent, chain, SLOT)
        whole = ours.Chain(self.place.space, batch[-1][1].head, [], [], sum(sent.cost for sent, _ in batch))
        written = len(batch[-1][0].answer)
        if self.packed:
            self._by_device(lambda: self.device.push(whole, written), "push")
        else:
            # Of a split ring the used index counts all of them, and the one element stands where the first would.
            avail, index, untold = self.device.state
            self.device.push(whole, written)
            more = (index + len(batch)) & 0xFFFF
            self.place.space.store16(self.place.parts[2] + 2, more, self.begin.order)
            self.device.state = avail, more, untold + len(batch)
        return True

    def interrupt(self) -> bool:
        """Does the device interrupt now? The driver wants to hear of the first element that it has not polled."""
        needs_interrupt = self._method(self.device, "needs_interrupt")
        old, self.n_signalled = self.n_signalled, self.n_pushed
        told = self._by_device(needs_interrupt, "needs_interrupt")
        wanted = old <= self.n_polled < self.n_pushed if self.event_idx else old != self.n_pushed
        if not self.known_driver:
            return bool(told)
        self.want(told or not wanted, "an interrupt lost: the driver sleeps, and asked for it")
        self.want(wanted or not told, "an interrupt that the driver did not ask for")
        return bool(told)

    def sleep(self) -> bool:
        """The device asks to be kicked; False if there was more to do, so that it must not sleep."""
        more = self._by_device(self._method(self.device, "enable_notify"), "enable_notify")
        self.wish, self.wants_kick, self.named = self.n_popped, True, self.event_idx
        self.wish_place = self.taken
        self.want(bool(more) is bool(self.published), f"says {more!r} to whether there is more, wanted the contrary")
        return not more

    def stay_awake(self) -> None:
        """The device asks not to be kicked."""
        self._by_device(self._method(self.device, "disable_notify"), "disable_notify")
        if self.packed or not self.event_idx:
            self.wants_kick = False

    # -- all of it

    def under_way(self) -> list[Sent]:
        """All requests that are."""
        return [*self.added, *self.published, *(sent for sent, _ in self.popped), *self.used]

    def step(self, step: RingStep) -> None:
        """One step of a history."""
        match step:
            case Begin():
                return
            case Add():
                self.add(step.parts, step.room, indirect=step.indirect)
            case Act():
                getattr(self, step.what)()
            case Push():
                self.push(step.which, step.fill)
            case Some(what="put_back" | "push_together"):
                getattr(self, step.what)(step.count)
            case Some():
                for _ in range(step.count):
                    if not getattr(self, step.what)():
                        break

    def drain(self) -> None:
        """Let all that is under way come to its end: nothing lost, nothing doubled, nothing beside it changed."""
        self.publish()
        while self.pop():
            pass
        while self.push(0, SLOT):
            pass
        while self.poll():
            pass
        stray = self.world.stray()
        self.want(stray is None, f"RAM at 0x{stray or 0:x} was changed, which belongs to nobody here")


def play(history: RingHistory, driver: MakeDriver | None, device: MakeDevice | None) -> None:
    """All of a history, and then until nothing is under way. Raises `Wrong`."""
    begin = history[0] if history and isinstance(history[0], Begin) else Begin()
    ring = RingPlay(begin, driver, device)
    for step in history:
        if not isinstance(step, Begin):
            ring.steps.append(str(step))
            ring.step(step)
    ring.steps.append("# then all that is under way comes to its end")
    ring.drain()


def _shown(buffers: list[tuple[int, int, Access]]) -> str:
    return "[" + ", ".join(f"0x{at:x}+{length} {access.name}" for at, length, access in buffers) + "]"
