# SPDX-License-Identifier: Apache-2.0
"""The driver end of the split ring against the device end, and against device ends that lie."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from split_kit import Pair, Reach, Way, World
from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Segment
from virtiova.ring.layout import SplitLayout, need_event
from virtiova.ring.split_driver import SplitDriver

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

    @precondition(lambda self: self.pair.popped)
    @rule(count=st.integers(1, 12))
    def put_back(self, count: int) -> None:
        self.pair.put_back(count)

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
