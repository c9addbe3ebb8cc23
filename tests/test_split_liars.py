# SPDX-License-Identifier: Apache-2.0
"""Device ends of a split ring that lie: the driver end believes nothing and loses nothing."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import DmaAddr
from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Segment
from virtiova.ring.layout import Desc, SplitLayout
from virtiova.testing import Begin, RingPlay
from virtiova.testing.ring_world import BASE

# -- device ends that lie ------------------------------------------------------------------------------------------


class Liar:
    """A used ring written by hand, against an honest driver end with some requests under way."""

    def __init__(
        self, size: int = 4, order: ByteOrder = "little", *, requests: int = 2, event_idx: bool = False
    ) -> None:
        self.pair = RingPlay(Begin(size=size, order=order, event_idx=event_idx))
        assert isinstance(self.pair.layout, SplitLayout)
        self.driver, self.order, self.layout = self.pair.driver, order, self.pair.layout
        for _ in range(requests):
            self.pair.add([4], [], indirect=False)
        self.heads = [sent.head for sent in self.pair.added]
        self.pair.publish()
        self.index = 0

    def put(self, offset: int, value: int, size: int) -> None:
        self.pair.place.region.write(self.layout.used + offset, value.to_bytes(size, self.order))

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
    liar.pair.place.region.write(liar.layout.used, used[: 4 + 8 * 4 + 2])
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
        liar.pair.place.region.write(at, b"\xff\xff")
    liar.use(sent.head, 1)
    used = liar.driver.poll()
    assert used is not None
    assert (used.head, used.length) == (sent.head, 1)
    assert sorted(liar.take_all()) == [0, 1, 2, 3]
