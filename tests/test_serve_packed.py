# SPDX-License-Identifier: Apache-2.0
"""Packed rings of a served device: negotiation, numbers on the wire, laps, what is written where, hostile notes."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_serve_kit import INITIAL, PACKED, base_of, driver_of, segment, start
from serve_kit import DATA, GPA_BASE, HEADER, PLAIN, RING, STATUS, WITH_BIT, FrontEnd, disk, fives
from virtiova import _core
from virtiova.device.blk import SECTOR
from virtiova.dma.ops import DmaRegion
from virtiova.errors import ProtocolError
from virtiova.features import Feature, has
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, PackedDesc
from virtiova.ring.packed_device import PackedChain
from virtiova.ring.packed_driver import PackedDriver
from virtiova.serve.inflight import ring_bytes
from virtiova.serve.inflight_packed import ENTRY, PackedInflight
from virtiova.serve.inflight_packed import HEADER as NOTES_HEADER
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import InflightDescription, LogDescription, Request, VringState

from packed_serve_kit import FileRegion  # isort: skip

EVENTS = 1 << Feature.RING_EVENT_IDX
INDIRECT = 1 << Feature.RING_INDIRECT_DESC
ORDERED = 1 << Feature.IN_ORDER
SIZE = 7
TABLE = 0x32000


def read(end: FrontEnd, driver: PackedDriver, sector: int, table: DmaRegion | None = None) -> bytes:
    """One block request, there and back; the sector's bytes."""
    end.put(HEADER, struct.pack("<IIQ", 0, 0, sector))
    end.put(DATA, b"\xee" * SECTOR)
    end.put(STATUS, b"\xee")
    chain = [
        segment(end, HEADER, 16, False),
        segment(end, DATA, SECTOR, True),
        segment(end, STATUS, 1, True),
    ]
    number = driver.add(chain) if table is None else driver.add_indirect(chain, table)
    if driver.publish():
        end.host.rounds.kicked(0)
    end.serve()
    used = driver.poll()
    assert used is not None, end.said
    assert (used.head, used.length) == (number, SECTOR + 1)
    assert end.get(STATUS, 1) == b"\0"
    return end.get(DATA, SECTOR)


def test_they_are_offered() -> None:
    with FrontEnd(disk()) as end:
        (answer,) = end.send(Request.GET_FEATURES)
        offered = wire.u64_of(answer.payload)
        assert has(offered, Feature.RING_PACKED)
        assert has(offered, Feature.IN_ORDER)


@pytest.mark.parametrize("inflight", [False, True])
@pytest.mark.parametrize("extra", [0, EVENTS, EVENTS | INDIRECT | ORDERED])
@pytest.mark.parametrize("bit", [PLAIN, WITH_BIT])
def test_laps_of_a_ring_that_is_no_power_of_two(bit: int, extra: int, inflight: bool) -> None:
    features = bit | extra | PACKED
    with FrontEnd(disk()) as end:
        end.negotiate(features)
        if inflight:
            (answer,) = end.send(Request.GET_INFLIGHT_FD, InflightDescription(0, 0, 1, SIZE).encode())
            os.close(answer.fds[0])
        driver = driver_of(end, SIZE, features)
        table = FileRegion(end.file, TABLE, 4096, end.dma(TABLE)) if extra & INDIRECT else None
        start(end, SIZE)
        for n in range(40):
            assert read(end, driver, n % 64, table if n % 3 else None) == bytes([n % 64 + 1]) * SECTOR
        assert not end.host.rings[0].broken
        assert end.host.counters.requests == 40
        drain = end.host.rings[0].lend()
        assert drain is not None, "a worker could go on with it"
        assert drain.counter == (40 if inflight else 0)


@pytest.mark.parametrize("inflight", [False, True])
def test_it_stops_and_goes_on_where_it_stood(inflight: bool) -> None:
    features = PLAIN | EVENTS | PACKED
    with FrontEnd(disk()) as end:
        end.negotiate(features)
        if inflight:
            (answer,) = end.send(Request.GET_INFLIGHT_FD, InflightDescription(0, 0, 1, SIZE).encode())
            os.close(answer.fds[0])
        driver = driver_of(end, SIZE, features)
        base = INITIAL
        for n in range(12):
            start(end, SIZE, base)
            read(end, driver, n)
            base = base_of(end)
            place = 3 * (n + 1)
            word = place % SIZE | (place // SIZE % 2 == 0) << 15
            assert base == word << 16 | word
            if n % 2:
                # DPDK's front end says nothing of what is used.
                base &= 0xFFFF


def test_numbers_of_a_split_ring_stay_what_they_were() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN)
        assert "16 bits" in end.refused(Request.SET_VRING_BASE, VringState(0, INITIAL).encode())
        assert "power of two" in end.refused(Request.SET_VRING_NUM, VringState(0, SIZE).encode())


def test_an_index_that_is_not_in_the_ring() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN | PACKED)
        start(end, SIZE, 0x8000 | SIZE)
        end.host.rounds.kicked(0)
        end.work()
        assert "descriptor 7 of a packed ring, wanted less than 7" in end.host.rings[0].broken
        for size in (0, 32769):
            assert "1 of at most" in end.refused(Request.SET_VRING_NUM, VringState(1 - 1, size).encode()) or size


def test_a_ring_that_makes_no_sense_is_stopped_and_the_next_is_served() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN | PACKED)
        start(end, SIZE)
        end.put(RING, PackedDesc(end.dma(DATA), 16, 0, 0x80 | DESC_F_NEXT).pack())
        end.host.rounds.kicked(0)
        end.work()
        assert "not available, but the one before it goes on there" in end.said[-1]
        base_of(end)
        end.put(RING, bytes(16 * SIZE))
        driver = driver_of(end, SIZE, PLAIN | PACKED)
        start(end, SIZE)
        assert read(end, driver, 5) == b"\6" * SECTOR


def test_the_dirty_log_has_ring_and_data() -> None:
    features = WITH_BIT | PACKED
    log = os.memfd_create("log")
    os.ftruncate(log, 4096)
    try:
        with FrontEnd(disk()) as end:
            end.negotiate(features)
            driver = driver_of(end, SIZE, features)
            end.send(Request.SET_LOG_BASE, LogDescription(4096, 0).encode(), (log,))
            end.send(Request.SET_FEATURES, wire.u64(features | 1 << wire.F_LOG_ALL))
            start(end, SIZE)
            read(end, driver, 3)
        bits = os.pread(log, 4096, 0)
        dirty = {at * 8 + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}
        assert dirty == {(GPA_BASE + at) >> 12 for at in (RING, DATA, STATUS)}
    finally:
        os.close(log)


def test_two_misses_at_most_for_the_ring_of_one_page() -> None:
    features = WITH_BIT | EVENTS | PACKED
    with FrontEnd(fives()) as end:
        end.negotiate(features)
        driver = driver_of(end, 8, features)
        start(end, 8)
        driver.add([segment(end, DATA, 100, True)])
        driver.publish()
        end.host.rounds.kicked(0)
        first = end.work()
        assert {miss.iova for miss in first} == {end.dma(RING)}
        # To be read, and to be written.
        assert len(first) == 2
        assert {miss.iova for miss in _answered(end, RING)} == {end.dma(DATA)}
        _answered(end, DATA)
        assert end.get(DATA, 100) == b"\x55" * 100


def _answered(end: FrontEnd, page: int) -> list[wire.IotlbMessage]:
    end.map(page)
    for _ in range(2):
        if end.host.misses is not None and end.host.misses.waiting:
            end.answer(True)
    return end.work()


# -- the notes by themselves


def window(entries: int) -> tuple[_core.Window, bytearray]:
    memory = bytearray(ring_bytes(entries, packed=True))
    return _core.Window(memory), memory


def chain(number: int, count: int = 1) -> Chain:
    """A chain of ``count`` descriptors with that buffer id."""
    last = PackedDesc(DATA, 1, number, DESC_F_WRITE)
    return PackedChain(None, [PackedDesc(HEADER, 16, 0, DESC_F_NEXT)] * (count - 1) + [last], [], [])  # type: ignore[arg-type]


def test_the_sizes_are_those_of_the_specification() -> None:
    assert (NOTES_HEADER.size, ENTRY.size) == (32, 32)
    assert ring_bytes(8, packed=True) == 320
    assert ring_bytes(128, packed=True) == 4160


def test_what_is_taken_comes_back_oldest_first() -> None:
    notes, memory = window(8)
    first = PackedInflight(notes, 0, 8, fresh=True)
    first.forget(0x8005)
    assert first.resume(8, lambda _: True).used == 0x8005
    first.begin([chain(3, 2)])
    first.end()
    assert first.resume(8, lambda _: True).lists == []
    first.begin([chain(9, 3)])
    # It dies; the flags in the ring say that the driver has not seen it.
    second = PackedInflight(notes, 0, 8)
    left = second.resume(8, lambda word: word == 0x8007)
    assert left.used == 0x8007
    assert [[desc.id for desc in each] for each in left.lists] == [[0, 0, 9]]
    # Or that it has.
    third = PackedInflight(notes, 0, 8)
    assert third.resume(8, lambda _: True).lists == left.lists, "asked again, it says the same"
    third.begin([chain(9, 3)])
    fourth = PackedInflight(notes, 0, 8)
    left = fourth.resume(8, lambda _: False)
    assert (left.used, left.lists) == (0x0002, [])
    assert memory[8:12] == struct.pack("<HH", 1, 8)


def test_a_file_of_another_size_is_begun_anew() -> None:
    notes, memory = window(8)
    memory[8:12] = struct.pack("<HH", 1, 4)
    memory[32] = 1
    fresh = PackedInflight(notes, 0, 8)
    assert not fresh.used_before
    assert fresh.resume(8, lambda _: True).lists == []
    assert memory[12:24] == struct.pack("<6H", 0, 0, 0, 0, 0x0101, 0)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=20, max_size=24), st.lists(st.binary(min_size=32, max_size=32), min_size=4, max_size=4))
def test_hostile_notes(header: bytes, entries: list[bytes]) -> None:
    """Whatever the front end wrote there: an answer or a refusal, never an access outside."""
    notes, memory = window(4)
    memory[12 : 12 + len(header) - 12] = header[12:]
    memory[8:12] = struct.pack("<HH", 1, 4)
    memory[32:160] = b"".join(entries)
    rest = bytes(memory[160:])
    try:
        found = PackedInflight(notes, 0, 4)
        left = found.resume(4, lambda word: word % 2 == 0)
        assert sum(map(len, left.lists)) <= 4
        found.begin([chain(1, 2)])
        found.end()
    except ProtocolError:
        pass
    assert memory[160:] == rest
