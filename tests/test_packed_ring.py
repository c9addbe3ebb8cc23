# SPDX-License-Identifier: Apache-2.0
"""The driver end of the packed ring: what `check_ring` does not ask (that it is asked: test_testing_rings.py)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_kit import make_ram
from virtiova.addr import GPA, PAGE_SIZE, DmaAddr
from virtiova.dma.ops import RamRegion
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Segment
from virtiova.ring.layout import EVENT_DESC, EVENT_DISABLE, PACKED_F_AVAIL, PACKED_F_USED, PackedDesc, PackedLayout
from virtiova.ring.packed_driver import PackedDriver
from virtiova.testing import Begin, RingPlay, World


def test_two_laps_between_two_looks_are_no_standstill() -> None:
    """The word that names where the ring stands is the same again; what happened in between is not forgotten."""
    pair = RingPlay(Begin(packed=True, size=4, event_idx=True))
    for _ in range(8):
        pair.add([], [1], indirect=False)
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain, 1)
        assert pair.driver.used_moved()
        assert pair.driver.poll() is not None
        pair.free_slots.append(pair.added.pop().slot)
        pair.free_descs = 4
    # The driver awaits the ninth, which is not there yet: nothing to tell of it.
    assert pair.device.next_used == 0x8000
    assert not pair.device.needs_interrupt()
    pair.device.tell_again()
    assert not pair.device.needs_interrupt()


@given(st.integers(1, 300), st.data())
def test_passed_counts_the_way_from_old_to_new(size: int, data: st.DataObject) -> None:
    layout = PackedLayout(size)
    old = data.draw(st.integers(0, 5 * size))
    new = old + data.draw(st.integers(0, size))
    word = data.draw(st.integers(0, 0xFFFF))
    passed = {layout.encode(place) for place in range(old, new)}
    if word & 0x7FFF < size:
        assert layout.passed(word, new, old) is (word in passed)
        assert layout.encode(layout.decode(word)) == word
    else:
        assert layout.passed(word, new, old) is (new != old)
        with pytest.raises(ProtocolError, match="wanted less than"):
            layout.decode(word)


@pytest.mark.parametrize("size", [0, 32769, -1])
def test_sizes_that_are_no_ring(size: int) -> None:
    with pytest.raises(ProtocolError, match="1 to 32768"):
        PackedLayout(size)


def test_a_ring_does_not_fit_a_region_that_is_too_small() -> None:
    world = World()
    with pytest.raises(ProtocolError, match="does not fit"):
        PackedDriver(world.alloc(PAGE_SIZE), PackedLayout(256))


def test_nothing_is_visible_before_it_is_published() -> None:
    pair = RingPlay(Begin(packed=True, size=4))
    pair.add([16], [16], indirect=False)
    pair.add([16], [16], indirect=False)
    assert pair.device.pop() is None
    pair.publish()
    assert pair.pop()
    assert pair.pop()


def test_what_a_driver_must_not_ask_for() -> None:
    pair = RingPlay(Begin(packed=True, size=4))
    readable = Segment(DmaAddr(pair.slots.addr), 1, False)
    writable = Segment(DmaAddr(pair.slots.addr), 1, True)
    for add in (pair.driver.add, lambda segments: pair.driver.add_indirect(segments, pair.tables)):
        with pytest.raises(ProtocolError, match="at least one"):
            add([])
        with pytest.raises(ProtocolError, match="before"):
            add([writable, readable])
    with pytest.raises(ProtocolError, match="a chain of 5 in a queue of 4"):
        pair.driver.add_indirect([readable] * 5, pair.tables)
    pair.drain()


class Liar:
    """A device end by hand: 4 descriptors, of which the driver has published two requests, of 2 and 1."""

    def __init__(self, *, in_order: bool = False) -> None:
        self.layout = PackedLayout(4)
        self.ram = make_ram(2 * PAGE_SIZE)
        region = RamRegion(self.ram, DmaAddr(0), [GPA(0)])
        self.driver = PackedDriver(region, self.layout, event_idx=True, in_order=in_order)
        segment = Segment(DmaAddr(PAGE_SIZE), 8, True)
        self.first = self.driver.add([segment, segment])
        self.second = self.driver.add([segment])
        self.driver.publish()
        self.hidden = self.driver.add([segment])

    def use(self, place: int, number: int, length: int = 0) -> None:
        self.ram.write(GPA(16 * (place % 4)), PackedDesc(0, length, number, self.layout.used(place)).pack())


@pytest.mark.parametrize("number", [77, 0xFFFF])
def test_a_buffer_id_that_nobody_gave(number: int) -> None:
    liar = Liar()
    liar.use(0, number)
    assert liar.driver.used_moved()
    with pytest.raises(ProtocolError, match=f"buffer id {number}"):
        liar.driver.poll()


def test_a_request_that_was_not_published_yet() -> None:
    liar = Liar()
    liar.use(0, liar.hidden)
    with pytest.raises(ProtocolError, match="no pending"):
        liar.driver.poll()


def test_a_request_that_is_used_twice() -> None:
    liar = Liar()
    liar.use(0, liar.first)
    liar.use(2, liar.first)
    assert liar.driver.poll() is not None
    with pytest.raises(ProtocolError, match="no pending"):
        liar.driver.poll()


@pytest.mark.parametrize("flags", [0, PACKED_F_USED, PACKED_F_AVAIL])
def test_flags_that_do_not_say_used(flags: int) -> None:
    liar = Liar()
    liar.ram.write(GPA(0), PackedDesc(0, 0, liar.first, flags).pack())
    assert not liar.driver.used_moved()
    assert liar.driver.poll() is None


def test_one_used_descriptor_for_two_requests_in_order() -> None:
    liar = Liar(in_order=True)
    liar.use(0, liar.second, 5)
    # What the device does not name is done wholly: both buffers of 8.
    assert [(used.head, used.length) for used in (liar.driver.poll(), liar.driver.poll()) if used] == [
        (liar.first, 16),
        (liar.second, 5),
    ]
    assert liar.driver.poll() is None
    assert liar.driver.room == 3


def test_the_place_that_the_driver_waits_for_is_in_the_ring() -> None:
    liar = Liar()
    assert liar.ram.read(GPA(64), 4) == (0x8000).to_bytes(2, "little") + EVENT_DESC.to_bytes(2, "little")
    liar.use(0, liar.first)
    liar.driver.poll()
    assert liar.ram.read(GPA(64), 2) == (0x8002).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("flags", "place", "kick"),
    [
        (0, 0, True),
        (EVENT_DISABLE, 0, False),
        (EVENT_DESC, 0x8003, True),
        (EVENT_DESC, 0x8002, False),
        (3, 0, True),
        (EVENT_DESC, 99, True),
    ],
)
def test_what_the_device_wishes(flags: int, place: int, kick: bool) -> None:
    liar = Liar()
    liar.ram.write(GPA(68), place.to_bytes(2, "little") + flags.to_bytes(2, "little"))
    assert liar.driver.publish() is kick
