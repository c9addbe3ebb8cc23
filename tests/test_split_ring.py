# SPDX-License-Identifier: Apache-2.0
"""The driver end of the split ring against the device end, and against device ends that lie."""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from virtiova.addr import GPA, PAGE_SIZE, DmaAddr
from virtiova.dma.ops import DirectOps, DmaOps, PlatformOps, RamRegion
from virtiova.dma.ram import ByteOrder, MappedRam, PageAllocator, Ram, RamBlock, VerbRam
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace
from virtiova.errors import ProtocolError
from virtiova.iommu.soft import SoftIommu
from virtiova.ring.chain import Chain
from virtiova.ring.layout import Desc, SplitLayout, need_event
from virtiova.ring.split_device import SplitDevice
from virtiova.ring.split_driver import Segment, SplitDriver

Reach = Literal["mapped", "verbs"]
Way = Literal["direct", "platform"]

BASE = 0x10_0000
"""Guest-physical start of RAM: no address of it is also an offset into the buffer behind it."""
SLOT = PAGE_SIZE
"""Bytes of buffer for each request that can be under way."""
EMPTY = b"\xee"


@dataclass
class World:
    """RAM that the driver end reaches its way, and the device end through an address space."""

    reach: Reach
    way: Way
    pages: int = 200
    verbs: int = 0
    ram: Ram = field(init=False)
    ops: DmaOps = field(init=False)
    space: AddressSpace = field(init=False)

    def __post_init__(self) -> None:
        self.memory = bytearray(self.pages * PAGE_SIZE)
        block = RamBlock(GPA(BASE), len(self.memory), 0)
        mapped = MappedRam(self.memory, [block])
        # Verbs have addresses of the machine, not of the buffer behind it.
        self.ram = mapped if self.reach == "mapped" else VerbRam(self._read, self._write, [block])
        allocator = PageAllocator(self.ram, GPA(BASE), GPA(BASE + len(self.memory)))
        if self.way == "direct":
            self.ops, self.space = DirectOps(self.ram, allocator), FlatSpace(mapped)
        else:
            iommu = SoftIommu(mapped)
            iommu.enable()
            self.ops, self.space = PlatformOps(self.ram, allocator, iommu), MediatedSpace(mapped, iommu)

    def _read(self, gpa: int, length: int) -> bytes:
        self.verbs += 1
        return bytes(self.memory[gpa - BASE : gpa - BASE + length])

    def _write(self, gpa: int, data: bytes) -> None:
        self.verbs += 1
        self.memory[gpa - BASE : gpa - BASE + len(data)] = data

    def alloc(self, size: int) -> RamRegion:
        region = self.ops.alloc(size)
        assert isinstance(region, RamRegion)
        if self.way == "platform":
            steps = [after - before for before, after in itertools.pairwise(region.gpas)]
            assert PAGE_SIZE not in steps, "pages of a region are meant to be apart here"
            assert region.addr not in range(BASE, BASE + len(self.memory))
        return region


@dataclass
class Sent:
    """A request as the model knows it."""

    head: int
    slot: int
    at: int
    """Where in the slots the payload lies."""
    payload: bytes
    room: list[tuple[int, int]]
    """Where in the slots the device may write: offset and length."""
    answer: bytes = b""


class Pair:
    """Both ends of one ring, and a model of every request that is under way."""

    def __init__(
        self,
        size: int,
        order: ByteOrder,
        reach: Reach,
        way: Way,
        *,
        event_idx: bool,
        used_align: int = 4,
    ) -> None:
        self.world = World(reach, way, pages=2 * size + 80)
        self.event_idx = event_idx
        self.layout = SplitLayout(size, used_align)
        self.region = self.world.alloc(self.layout.total)
        self.driver = SplitDriver(self.region, self.layout, order, event_idx=event_idx)
        self.device = SplitDevice(
            self.world.space,
            self.driver.desc,
            self.driver.avail,
            self.driver.used,
            self.layout,
            order,
            event_idx=event_idx,
            indirect=True,
        )
        # A slot for every descriptor, and room for the last one to reach into the next page.
        self.slots = self.world.alloc((size + 1) * SLOT)
        self.tables = self.world.alloc(size * 16 * 16)
        self.free_slots = list(range(size))
        self.free_descs = size
        self.costs: dict[int, int] = {}
        self.serial = 0
        self.added: list[Sent] = []
        self.published: list[Sent] = []
        self.popped: list[tuple[Sent, Chain]] = []
        self.used: list[Sent] = []
        # Free-running counters of what was published, pushed, polled; and the last wish of either side.
        self.n_published = 0
        self.n_pushed = 0
        self.n_signalled = 0
        self.n_polled = 0
        self.n_popped = 0
        self.wish = 0
        self.wants_kick = True

    # -- the driver end

    def add(self, parts: list[int], room: list[int], *, indirect: bool) -> bool:
        """A request of readable parts and writable parts of these lengths; False if there is no room for it."""
        count = len(parts) + len(room)
        cost = 1 if indirect else count
        if cost > self.free_descs or count > self.layout.size or not self.free_slots:
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
            head = self.driver.add_indirect(segments, self.tables, slot * 16 * 16)
        else:
            head = self.driver.add(segments)
        assert head not in self.costs, "a head that is still in use"
        self.costs[head] = cost
        self.free_descs -= cost
        self.added.append(Sent(head, slot, payload_at, payload, places))
        return True

    def publish(self) -> bool:
        old = self.n_published
        self.n_published += len(self.added)
        self.published += self.added
        self.added = []
        kick = self.driver.publish()
        if self.n_published != old:
            # The wish is a number of requests: the one after it is to be told.
            wanted = old <= self.wish < self.n_published if self.event_idx else self.wants_kick
            assert kick is wanted, "a notification lost, or one too many"
        elif self.event_idx:
            assert not kick
        return kick

    def poll(self) -> bool:
        moved = self.driver.used_moved()
        assert moved is bool(self.used)
        used = self.driver.poll()
        if not self.used:
            assert used is None
            return False
        sent = self.used.pop(0)
        assert used is not None
        assert (used.head, used.length) == (sent.head, len(sent.answer))
        self.n_polled += 1
        seen, expected, left = b"", b"", sent.answer
        for at, length in sent.room:
            seen += self.slots.read(at, length + 1)
            here, left = left[:length], left[length:]
            expected += here.ljust(length + 1, EMPTY)
        assert seen == expected
        assert self.slots.read(sent.at, len(sent.payload)) == sent.payload
        self.free_slots.append(sent.slot)
        self.free_descs += self.costs.pop(sent.head)
        return True

    # -- the device end

    def pop(self) -> bool:
        chain = self.device.pop()
        if not self.published:
            assert chain is None
            return False
        assert chain is not None
        sent = self.published.pop(0)
        self.n_popped += 1
        assert chain.head == sent.head
        assert chain.writable == sum(length for _, length in sent.room)
        assert chain.read() == sent.payload
        self.popped.append((sent, chain))
        return True

    def push(self, which: int, fill: int) -> bool:
        """Complete one of the requests at hand, in any order, with ``fill`` bytes or as many as fit."""
        if not self.popped:
            return False
        sent, chain = self.popped.pop(which % len(self.popped))
        sent.answer = (b"answer to %08d " % self.serial * SLOT)[: min(fill, chain.writable)]
        chain.write(sent.answer)
        assert chain.written == len(sent.answer)
        self.device.push(chain, chain.written)
        self.n_pushed += 1
        self.used.append(sent)
        return True

    def interrupt(self) -> bool:
        """Does the device interrupt now? The driver wants to hear of the first element that it has not polled."""
        old, self.n_signalled = self.n_signalled, self.n_pushed
        told = self.device.needs_interrupt()
        if self.event_idx:
            assert told is (old <= self.n_polled < self.n_pushed), "an interrupt lost, or one too many"
        else:
            assert told is (old != self.n_pushed)
        return told

    def sleep(self) -> bool:
        """The device asks to be kicked; False if there was more to do, so that it must not sleep."""
        more = self.device.enable_notify()
        self.wish, self.wants_kick = self.n_popped, True
        assert more is bool(self.published)
        return not more

    def stay_awake(self) -> None:
        self.device.disable_notify()
        if not self.event_idx:
            self.wants_kick = False

    # -- what holds at all times

    def check(self) -> None:
        under_way = [*self.added, *self.published, *(sent for sent, _ in self.popped), *self.used]
        assert sorted(sent.head for sent in under_way) == sorted(self.costs)
        assert self.free_descs == self.layout.size - sum(self.costs.values())

    def drain(self) -> None:
        """Let everything that is under way come to its end: nothing lost, nothing doubled."""
        self.publish()
        while self.pop():
            pass
        while self.push(0, SLOT):
            pass
        while self.poll():
            pass
        assert not self.costs
        assert self.free_descs == self.layout.size
        assert self.device.pop() is None
        assert self.driver.poll() is None
        # All descriptors are there again.
        assert self.add([1] * min(self.layout.size, 16), [], indirect=False)


lengths = st.integers(1, 120)


class RingMachine(RuleBasedStateMachine):
    """Driver end and device end take turns in any order."""

    pair: Pair

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 256]),
        order=st.sampled_from(["little", "big"]),
        reach=st.sampled_from(["mapped", "verbs"]),
        way=st.sampled_from(["direct", "platform"]),
        event_idx=st.booleans(),
        used_align=st.sampled_from([4, PAGE_SIZE]),
    )
    def start(self, size: int, order: ByteOrder, reach: Reach, way: Way, event_idx: bool, used_align: int) -> None:
        self.pair = Pair(size, order, reach, way, event_idx=event_idx, used_align=used_align)

    @rule(parts=st.lists(lengths, max_size=4), room=st.lists(lengths, max_size=4), indirect=st.booleans())
    def add(self, parts: list[int], room: list[int], indirect: bool) -> None:
        if parts or room:
            self.pair.add(parts, room, indirect=indirect)

    @rule(count=st.integers(1, 12))
    def add_many(self, count: int) -> None:
        for _ in range(count):
            self.pair.add([3], [5], indirect=False)

    @rule()
    def publish(self) -> None:
        self.pair.publish()

    @precondition(lambda self: self.pair.published)
    @rule(count=st.integers(1, 12))
    def pop(self, count: int) -> None:
        for _ in range(count):
            self.pair.pop()

    @rule()
    def pop_when_there_may_be_nothing(self) -> None:
        self.pair.pop()

    @precondition(lambda self: self.pair.popped)
    @rule(which=st.integers(0, 300), fill=st.integers(0, 500))
    def push(self, which: int, fill: int) -> None:
        self.pair.push(which, fill)

    @rule()
    def poll(self) -> None:
        self.pair.poll()

    @rule()
    def interrupt(self) -> None:
        self.pair.interrupt()

    @rule()
    def sleep(self) -> None:
        self.pair.sleep()

    @rule()
    def stay_awake(self) -> None:
        self.pair.stay_awake()

    @rule()
    def drain(self) -> None:
        self.pair.drain()

    @rule(extra=st.integers(1, 3))
    def too_many_descriptors(self, extra: int) -> None:
        wanted = self.pair.free_descs + extra
        segment = Segment(DmaAddr(self.pair.slots.addr), 1, False)
        with pytest.raises(ProtocolError, match="free"):
            self.pair.driver.add([segment] * wanted)

    @precondition(lambda self: self.pair.free_descs == 0)
    @rule()
    def full(self) -> None:
        segment = Segment(DmaAddr(self.pair.slots.addr), 1, False)
        with pytest.raises(ProtocolError, match="free"):
            self.pair.driver.add_indirect([segment], self.pair.tables)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.drain()


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=120, stateful_step_count=40)


@pytest.mark.parametrize(("size", "event_idx"), [(1, True), (8, True), (8, False)])
def test_indices_wrap_around_and_nobody_misses_a_notification(size: int, event_idx: bool) -> None:
    """Past 65535, in bursts, by two ends that sleep whenever they may."""
    pair = Pair(size, "little", "mapped", "direct", event_idx=event_idx)
    dice = random.Random(size)
    asleep = pair.sleep()
    while pair.n_polled < 0x10000 + 4 * size:
        for _ in range(dice.randint(1, size)):
            pair.add([], [1], indirect=False)
        kicked = pair.publish()
        assert kicked or not asleep, "the device sleeps, and was not kicked"
        pair.stay_awake()
        for _ in range(dice.randint(1, size)):
            pair.pop()
        interrupted = False
        while pair.push(dice.randrange(size), 1):
            interrupted = pair.interrupt() or interrupted
        assert interrupted or not pair.used, "the driver sleeps, and was not interrupted"
        asleep = pair.sleep()
        while pair.poll():
            pass
    pair.drain()


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 40))
def test_need_event_counts_the_way_from_old_to_new(event: int, old: int, step: int) -> None:
    passed = {(old + at) & 0xFFFF for at in range(step)}
    assert need_event(event, (old + step) & 0xFFFF, old) is (event in passed)


def test_verbs_are_the_only_way_to_a_verb_ram() -> None:
    pair = Pair(4, "big", "verbs", "direct", event_idx=True)
    before = pair.world.verbs
    assert before
    pair.add([16], [16], indirect=False)
    assert pair.world.verbs > before


def test_nothing_is_visible_before_it_is_published() -> None:
    pair = Pair(4, "little", "mapped", "direct", event_idx=False)
    pair.add([16], [16], indirect=False)
    assert pair.device.pop() is None
    pair.publish()
    assert pair.pop()


@pytest.mark.parametrize("size", [0, 3, 12, 65536, -1])
def test_sizes_that_are_no_ring(size: int) -> None:
    with pytest.raises(ProtocolError, match="power of two"):
        SplitLayout(size)


@pytest.mark.parametrize("size", [1, 2, 8, 256, 32768])
def test_the_parts_of_a_ring(size: int) -> None:
    layout = SplitLayout(size)
    assert layout.avail == 16 * size
    assert layout.used % 4 == 0
    assert 0 <= layout.used - (layout.avail + 6 + 2 * size) < 4
    assert layout.total == layout.used + 6 + 8 * size
    legacy = SplitLayout(size, PAGE_SIZE)
    assert legacy.used % PAGE_SIZE == 0
    assert 0 <= legacy.used - (legacy.avail + 6 + 2 * size) < PAGE_SIZE


def test_a_ring_does_not_fit_a_region_that_is_too_small() -> None:
    world = World("mapped", "direct")
    with pytest.raises(ProtocolError, match="does not fit"):
        SplitDriver(world.alloc(PAGE_SIZE), SplitLayout(256))


@pytest.mark.parametrize("size", [1, 4])
def test_an_indirect_chain_is_no_longer_than_the_queue(size: int) -> None:
    """The driver must not make such a chain, through a table either (virtio 1.4, 2.7.5.3.1)."""
    pair = Pair(size, "little", "mapped", "direct", event_idx=False)
    segment = Segment(DmaAddr(pair.slots.addr), 1, True)
    with pytest.raises(ProtocolError):
        pair.driver.add_indirect([segment] * (size + 1), pair.tables)
    pair.driver.add_indirect([segment] * size, pair.tables)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert chain.writable == size


def test_what_a_driver_must_not_ask_for() -> None:
    pair = Pair(4, "little", "mapped", "direct", event_idx=False)
    readable = Segment(DmaAddr(pair.slots.addr), 1, False)
    writable = Segment(DmaAddr(pair.slots.addr), 1, True)
    for add in (pair.driver.add, lambda segments: pair.driver.add_indirect(segments, pair.tables)):
        with pytest.raises(ProtocolError, match="at least one"):
            add([])
        with pytest.raises(ProtocolError, match="before"):
            add([writable, readable])
    pair.drain()


# -- device ends that lie ------------------------------------------------------------------------------------------


class Liar:
    """A used ring written by hand, against an honest driver end with some requests under way."""

    def __init__(
        self, size: int = 4, order: ByteOrder = "little", *, requests: int = 2, event_idx: bool = False
    ) -> None:
        self.pair = Pair(size, order, "mapped", "direct", event_idx=event_idx)
        self.driver, self.order, self.layout = self.pair.driver, order, self.pair.layout
        for _ in range(requests):
            self.pair.add([4], [], indirect=False)
        self.heads = [sent.head for sent in self.pair.added]
        self.pair.publish()
        self.index = 0

    def put(self, offset: int, value: int, size: int) -> None:
        self.pair.region.write(self.layout.used + offset, value.to_bytes(size, self.order))

    def use(self, head: int, length: int = 0) -> None:
        self.put(self.layout.used_entry(self.index), head, 4)
        self.put(self.layout.used_entry(self.index) + 4, length, 4)
        self.index += 1
        self.put(2, self.index & 0xFFFF, 2)

    def jump(self, index: int) -> None:
        self.put(2, index & 0xFFFF, 2)

    def check_refused(self, match: str) -> None:
        """Refused, again when asked again, and no descriptor is given out that may still be in use."""
        for _ in range(3):
            with pytest.raises(ProtocolError, match=match):
                self.driver.poll()

    def take_all(self) -> list[int]:
        """All descriptors that the driver end takes for free."""
        segment = Segment(DmaAddr(self.pair.slots.addr), 1, False)
        taken = []
        try:
            while True:
                taken.append(self.driver.add([segment]))
        except ProtocolError:
            return taken


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("jump", [5, 6, 0x100, 0x7FFF, 0x8000, 0xFFFF, -4])
def test_the_used_index_jumps(jump: int, order: ByteOrder) -> None:
    liar = Liar(order=order)
    liar.jump(jump)
    assert liar.driver.used_moved()
    liar.check_refused("used index jumped")
    assert set(liar.take_all()).isdisjoint(liar.heads)


def test_the_used_index_goes_back() -> None:
    liar = Liar()
    liar.use(liar.heads[0])
    assert liar.driver.poll() is not None
    liar.jump(0)
    liar.check_refused("used index jumped")


def test_the_used_index_runs_ahead_of_what_was_published() -> None:
    """Within the size of the ring, but there were not so many requests: the elements there are made up."""
    liar = Liar(size=8, requests=1)
    liar.use(liar.heads[0])
    liar.jump(4)
    # Whether the one honest element still counts is open, and nothing after it does.
    with contextlib.suppress(ProtocolError):
        liar.driver.poll()
    liar.check_refused("descriptor|used index")


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("head", [2, 3, 4, 0x10000, 0x01000000, 0xFFFF, 0xFFFFFFFF])
def test_a_head_that_was_never_given(head: int, order: ByteOrder) -> None:
    liar = Liar(order=order)
    liar.use(head)
    liar.check_refused(str(head))
    assert sorted(liar.take_all()) == [2, 3]


def test_a_descriptor_in_the_middle_of_a_chain_is_no_head() -> None:
    liar = Liar(requests=0)
    liar.pair.add([1, 1], [1], indirect=False)
    (sent,) = liar.pair.added
    liar.pair.publish()
    middle = liar.pair.world.memory
    desc = Desc.unpack(bytes(middle[liar.driver.desc - BASE :][16 * sent.head : 16 * sent.head + 16]))
    liar.use(desc.next)
    liar.check_refused(str(desc.next))


def test_the_same_head_twice() -> None:
    liar = Liar()
    liar.use(liar.heads[0])
    liar.use(liar.heads[0])
    assert liar.driver.poll() is not None
    liar.check_refused("descriptor")
    taken = liar.take_all()
    assert len(taken) == len(set(taken)) == 3
    assert liar.heads[1] not in taken


@pytest.mark.parametrize("published", [0, 1])
def test_a_request_that_was_not_published_cannot_be_done(published: int) -> None:
    """Its descriptors lie in memory, so that a device can guess its head; to use it is a lie all the same."""
    liar = Liar(requests=published)
    liar.pair.add([4], [], indirect=False)
    liar.use(liar.pair.added[0].head)
    liar.check_refused("descriptor|used index")


@given(
    used=st.binary(min_size=40, max_size=40),
    order=st.sampled_from(["little", "big"]),
    event_idx=st.booleans(),
    near=st.booleans(),
)
def test_any_used_ring_at_all(used: bytes, order: ByteOrder, event_idx: bool, near: bool) -> None:
    liar = Liar(4, order, requests=3, event_idx=event_idx)
    liar.pair.region.write(liar.layout.used, used[: 4 + 8 * 4 + 2])
    if near:
        liar.jump(used[3] % 6)
        for at in range(4):
            liar.put(liar.layout.used_entry(at), used[4 + at] % 5, 4)
    done: list[int] = []
    try:
        while len(done) <= 4 and (element := liar.driver.poll()) is not None:
            done.append(element.head)
    except ProtocolError:
        pass
    assert len(done) == len(set(done)) <= 3
    assert set(done) <= set(liar.heads)
    # What was not done is not given out again.
    taken = liar.take_all()
    assert sorted(taken) == sorted(set(range(4)) - (set(liar.heads) - set(done)))


@given(event=st.integers(0, 0xFFFF), flags=st.integers(0, 0xFFFF), event_idx=st.booleans())
def test_any_wish_of_the_device(event: int, flags: int, event_idx: bool) -> None:
    liar = Liar(requests=1, event_idx=event_idx)
    liar.put(liar.layout.avail_event, event, 2)
    liar.put(0, flags, 2)
    liar.pair.driver.add([Segment(DmaAddr(liar.pair.slots.addr), 1, False)])
    kick = liar.driver.publish()
    assert kick is (event == 1 if event_idx else not flags & 1)


def test_a_device_that_changes_the_descriptors_changes_nothing_for_the_driver() -> None:
    """The driver end keeps its own copy of what it wrote: the ring is the device's to scribble on."""
    liar = Liar(requests=0)
    liar.pair.add([1, 1], [1], indirect=False)
    (sent,) = liar.pair.added
    liar.pair.publish()
    for at in range(0, liar.layout.used, 2):
        liar.pair.region.write(at, b"\xff\xff")
    liar.use(sent.head, 1)
    used = liar.driver.poll()
    assert used is not None
    assert (used.head, used.length) == (sent.head, 1)
    assert sorted(liar.take_all()) == [0, 1, 2, 3]
