# SPDX-License-Identifier: Apache-2.0
"""Frames over several receive buffers: through a real ring, as a host serves it."""

from __future__ import annotations

import pytest

from ring_kit import make_ram
from virtiova.addr import GPA
from virtiova.device.host import Served, serve_queue
from virtiova.device.net import MAX_FRAME, RX, Net
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import FlatSpace
from virtiova.errors import ProtocolError
from virtiova.features import Feature
from virtiova.ring.split_device import SplitDevice
from virtiova.testing.raw_rings import RawRing

MRG_RXBUF = 15
DATA = 0x4000
STEP = 0x1000
NOWHERE = 0x100_0000
SIZE = 8


class Silent:
    def send(self, data: bytes, /) -> None:
        raise AssertionError("nothing was to be sent")


class Bench:
    """A network device on a ring of eight entries, its n-th buffer at ``DATA + n * STEP``."""

    def __init__(self, bits: int, *, event_idx: bool = False) -> None:
        self.ram: MappedRam = make_ram(0x40000)
        self.ram.write(GPA(DATA), b"\xee" * 0x20000)
        self.raw = RawRing(self.ram, 0, SIZE)
        raw = self.raw
        self.end = SplitDevice(
            FlatSpace(self.ram), raw.desc, raw.avail, raw.used, raw.layout, event_idx=event_idx, indirect=False
        )
        self.net = Net(Silent())
        self.net.accepted = bits
        self._next = 0

    def post(self, *lengths: int, at: int | None = None) -> None:
        for length in lengths:
            place = DATA + self._next * STEP if at is None else at
            self.raw.put_chain(self._next % SIZE, (place, length, True))
            self.raw.offer(self._next % SIZE)
            self._next += 1

    def serve(self) -> Served:
        return serve_queue(self.net, RX, self.end)

    def buffer(self, number: int, length: int) -> bytes:
        return self.ram.read(GPA(DATA + number * STEP), length)

    def used(self) -> list[tuple[int, int]]:
        return [self.raw.used_element(n) for n in range(self.raw.used_index)]


MODERN = 1 << Feature.VERSION_1 | 1 << MRG_RXBUF


@pytest.mark.parametrize("bits", [MODERN, 1 << MRG_RXBUF])
def test_a_frame_over_three_buffers(bits: int) -> None:
    bench = Bench(bits)
    frame = bytes(range(1, 201))
    bench.post(100, 50, 100, 100)
    bench.net.deliver(frame)
    assert bench.serve() == Served(3, drained=False)
    assert bench.used() == [(0, 100), (1, 50), (2, 62)], "all but the last are full"
    assert bench.buffer(0, 101) == bytes(10) + b"\3\0" + frame[:88] + b"\xee"
    assert bench.buffer(1, 51) == frame[88:138] + b"\xee"
    assert bench.buffer(2, 63) == frame[138:] + b"\xee"
    assert bench.buffer(3, 1) == b"\xee"


def test_a_frame_that_fits_takes_one_buffer() -> None:
    bench = Bench(MODERN)
    bench.post(112, 112)
    bench.net.deliver(b"x" * 100)
    bench.net.deliver(b"y" * 100)
    assert bench.serve().chains == 2
    assert bench.used() == [(0, 112), (1, 112)]
    assert bench.buffer(1, 112) == bytes(10) + b"\1\0" + b"y" * 100


def test_the_driver_sees_no_half_of_a_frame() -> None:
    """The used index moves once, whatever the number of buffers (virtio 1.4, 5.1.6.4)."""
    bench = Bench(MODERN)
    bench.post(100, 100)
    bench.net.deliver(b"x" * 150)
    seen = []
    store = bench.ram.store16

    def watched(gpa: GPA, value: int, order: object = "little") -> None:
        if gpa == bench.raw.used + 2:
            seen.append(value)
        store(gpa, value)

    bench.ram.store16 = watched  # type: ignore[method-assign]
    bench.serve()
    assert seen == [2]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_frame_waits_until_there_are_enough_buffers(event_idx: bool) -> None:
    bench = Bench(MODERN, event_idx=event_idx)
    bench.net.deliver(b"x" * 200)
    for posted in range(2):
        assert bench.serve() == Served(0, drained=True), "and does not turn in circles"
        assert bench.used() == []
        if event_idx:
            assert bench.raw.get16(bench.raw.used + bench.raw.layout.avail_event) == posted
        else:
            assert bench.raw.get16(bench.raw.used) == 0
        bench.post(100)
    bench.post(100)
    assert bench.serve().chains == 3
    assert bench.used() == [(0, 100), (1, 100), (2, 12)]
    assert bench.net.dropped == 0


def test_a_frame_that_no_ring_holds_is_dropped_and_the_next_one_is_not() -> None:
    bench = Bench(MODERN)
    bench.post(*[20] * SIZE)
    bench.net.deliver(b"x" * 1000)
    bench.net.deliver(b"y" * 20)
    assert bench.serve().chains == 2
    assert bench.net.dropped == 1
    assert bench.buffer(0, 20) == bytes(10) + b"\2\0" + b"y" * 8
    assert bench.used() == [(0, 20), (1, 12)]


def test_a_buffer_out_of_reach_spoils_the_whole_frame() -> None:
    bench = Bench(MODERN)
    bench.post(100)
    bench.post(100, at=NOWHERE)
    bench.net.deliver(b"x" * 150)
    bench.net.deliver(b"y" * 10)
    bench.post(100)
    assert bench.serve().chains == 3
    assert bench.used() == [(0, 0), (1, 0), (2, 22)], "lengths that no driver takes for a frame"
    assert bench.net.dropped == 1


def test_an_empty_buffer_makes_no_sense() -> None:
    bench = Bench(MODERN)
    bench.post(100, 0)
    bench.net.deliver(b"x" * 150)
    with pytest.raises(ProtocolError, match="has no room"):
        bench.serve()
    assert bench.used() == []


def test_without_the_feature_one_buffer_is_all() -> None:
    bench = Bench(1 << Feature.VERSION_1)
    bench.post(100, 200)
    bench.net.deliver(b"x" * 150)
    bench.net.deliver(b"y" * 150)
    assert bench.serve().chains == 2
    assert bench.net.dropped == 1
    assert bench.used() == [(0, 0), (1, 162)]
    assert bench.buffer(1, 12) == bytes(10) + b"\1\0"


def test_the_largest_frame() -> None:
    bench = Bench(MODERN)
    bench.post(*[STEP] * SIZE)
    bench.net.deliver(b"x" * MAX_FRAME)
    bench.net.deliver(b"y" * (SIZE * STEP - 12))
    assert bench.serve().chains == SIZE
    assert bench.net.dropped == 1
    assert bench.used() == [(n, STEP) for n in range(SIZE)]
