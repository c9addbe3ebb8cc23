# SPDX-License-Identifier: Apache-2.0
"""The driver end of the split ring: what `check_ring` does not ask (that it is asked: test_testing_rings.py)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Segment
from virtiova.ring.layout import SplitLayout, need_event
from virtiova.ring.split_driver import SplitDriver
from virtiova.testing import Begin, RingPlay, World


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 40))
def test_need_event_counts_the_way_from_old_to_new(event: int, old: int, step: int) -> None:
    passed = {(old + at) & 0xFFFF for at in range(step)}
    assert need_event(event, (old + step) & 0xFFFF, old) is (event in passed)


def test_verbs_are_the_only_way_to_a_verb_ram() -> None:
    pair = RingPlay(Begin(size=4, order="big", reach="verbs", event_idx=True))
    before = pair.world.verbs
    assert before
    pair.add([16], [16], indirect=False)
    assert pair.world.verbs > before


def test_nothing_is_visible_before_it_is_published() -> None:
    pair = RingPlay(Begin(size=4))
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
    world = World()
    with pytest.raises(ProtocolError, match="does not fit"):
        SplitDriver(world.alloc(PAGE_SIZE), SplitLayout(256))


@pytest.mark.parametrize("size", [1, 4])
def test_an_indirect_chain_is_no_longer_than_the_queue(size: int) -> None:
    """The driver must not make such a chain, through a table either (virtio 1.4, 2.7.5.3.1)."""
    pair = RingPlay(Begin(size=size))
    segment = Segment(DmaAddr(pair.slots.addr), 1, True)
    with pytest.raises(ProtocolError):
        pair.driver.add_indirect([segment] * (size + 1), pair.tables)
    pair.driver.add_indirect([segment] * size, pair.tables)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert chain.writable == size


def test_what_a_driver_must_not_ask_for() -> None:
    pair = RingPlay(Begin(size=4))
    readable = Segment(DmaAddr(pair.slots.addr), 1, False)
    writable = Segment(DmaAddr(pair.slots.addr), 1, True)
    for add in (pair.driver.add, lambda segments: pair.driver.add_indirect(segments, pair.tables)):
        with pytest.raises(ProtocolError, match="at least one"):
            add([])
        with pytest.raises(ProtocolError, match="before"):
            add([writable, readable])
    pair.drain()
