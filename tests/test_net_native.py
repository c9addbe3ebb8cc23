# SPDX-License-Identifier: Apache-2.0
"""A network device's queues without Python: the same frames, the same rings, and what Python is still there for."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_kit import PAGE, World
from net_storm import both
from serve_kit import PLAIN, RING, SIZE, USED, WITH_BIT, FrontEnd
from test_ring_storm import sanitized
from virtiova import _core
from virtiova.device.net import MAX_FRAME, RX, TX, Net
from virtiova.serve.crew import Crew, Spin
from virtiova.serve.wires import DatagramWire, Discard, between
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import LogDescription, Request

MRG = 1 << 15
SECONDS = 5.0
HEADER = bytes(12)
DATA = 0x20000
"""Offset of the buffers of this file, a page each."""


# -- beside the same device in Python


def test_random_rings_end_as_in_python() -> None:
    came = both(seed=11, rings=2500)
    assert came["native"] > 1000
    assert came["helped"] > 500
    assert came["out of reach"]


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_many_random_rings_under_sanitizers(tmp_path: Path) -> None:
    for number, options in enumerate((["--seed", "3"], ["--seed", "4", "--scribble"])):
        arguments = ["tests/net_storm.py", "--rings", "20000", *options]
        done = sanitized(tmp_path / str(number), *arguments, seconds=400)
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("wrong", "planted"),
    [
        ("count > ring->size - slot", "0 && count > ring->size - slot"),
        ("left < one[at].length", "left + 64 < one[at].length"),
        ("to += piece->length - skip;", "to += piece->length;"),
        ("from += step;\n        left -= step;\n    }\n    return all;", "left -= step;\n    }\n    return all;"),
    ],
    ids=["lap", "leaf", "pieces", "spread"],
)
def test_a_planted_mistake_is_found(tmp_path: Path, wrong: str, planted: str) -> None:
    arguments = ["tests/net_storm.py", "--rings", "20000"]
    done = sanitized(tmp_path / "san", *arguments, plant=(wrong, planted), seconds=500)
    assert done.returncode != 0, done.stdout


# -- step by step


def bench(kind: int = _core.Wire.DISCARD, fd: int = -1) -> tuple[World, _core.Wire, _core.Transmit]:
    native = _core.Wire(kind, fd)
    engine = _core.Transmit(native)
    engine.set_up(12)
    return World(size=256), native, engine


def test_many_frames_at_a_time() -> None:
    """A whole ring of them, and around its end."""
    world, native, engine = bench()
    for lap in range(3):
        for number in range(100):
            world.free = [number, *world.free]
            world.offer(((4 + number % 50) * PAGE + 64, 12 + 60, False))
        assert engine.step(world.drain, 256)[:2] == (_core.EMPTY, 100)
        assert (native.frames, native.bytes) == (100 * (lap + 1), 6000 * (lap + 1))
    assert [head for head, _ in world.used[-100:]] == list(range(100))
    world.close()


def test_a_frame_is_the_same_in_one_piece_and_in_many() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    world, native, engine = bench(_core.Wire.SOCKET, ours.fileno())
    for length in (0, 1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 1514):
        frame = bytes(n % 255 + 1 for n in range(length))
        world.put(8 * PAGE, HEADER + frame)
        world.offer((8 * PAGE, 12 + length, False))
        assert engine.step(world.drain)[1] == 1
        assert theirs.recv(2000) == frame, "in one piece"
        cut = 5 + length // 2
        world.put(10 * PAGE - cut, (HEADER + frame)[:cut])
        world.put(12 * PAGE, (HEADER + frame)[cut:])
        world.offer((10 * PAGE - cut, cut, False), (12 * PAGE, 12 + length - cut, False))
        assert engine.step(world.drain)[1] == 1
        assert theirs.recv(2000) == frame, "in two"
    assert (native.frames, native.lost) == (28, 0)
    world.close()
    ours.close()
    theirs.close()


def test_what_is_not_a_frame_is_for_python() -> None:
    """A header that is not whole stays in the ring; those before it are done."""
    world, _, engine = bench()
    world.offer((8 * PAGE, 72, False))
    world.offer((8 * PAGE, 11, False))
    world.offer((8 * PAGE, 72, False))
    assert engine.step(world.drain)[:2] == (_core.HELP, 1)
    assert world.drain.state[:2] == (1, 1)
    world.close()


# -- with workers


class Kit(FrontEnd):
    """A front end before a network device whose queues have threads of their own, and the wire's other end."""

    def __init__(self, features: int = PLAIN | MRG) -> None:
        ours, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.other.settimeout(SECONDS)
        self.wire = DatagramWire(ours)
        self.net = self.wire.connect(Net(self.wire))
        self.crew = Crew(self.net, Spin(0.00002), lambda line: self.said.append(line))  # noqa: PLW0108 - there is none yet
        super().__init__(self.net, crew=self.crew)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self._fds += self.kicks
        self.negotiate(features)
        for index in (RX, TX):
            self.start(index)
            self.send(Request.SET_VRING_KICK, wire.encode_vring_fd(index, True), (self.kicks[index],))
        if self.bit:
            for at in (*range(RING, RING + 0x8000, PAGE), *range(USED, USED + 0x8000, PAGE)):
                self.map(at)
        self.until(lambda: self.host.rings[TX].lent)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.crew.close()
        self.wire.close()
        self.other.close()

    def until(self, done: Callable[[], bool]) -> None:
        """Do the main thread's part until then, as the server's loop does."""
        end = time.monotonic() + SECONDS
        while not done():
            if self.wire.events():
                self.wire.ready(selectors.EVENT_READ)
            self.host.rounds.work()
            assert time.monotonic() < end, self.said
            time.sleep(0)

    def post(self, number: int, length: int = 1526) -> None:
        """Receive buffer ``number``, on a page of its own."""
        self.offer((self.dma(DATA + number * PAGE), length, True), index=RX, head=number % SIZE, kick=False)
        os.eventfd_write(self.kicks[RX], 1)

    def transmit(self, number: int, frame: bytes) -> None:
        at = DATA + (8 + number % SIZE) * PAGE
        self.put(at, HEADER + frame)
        self.offer((self.dma(at), len(HEADER + frame), False), index=TX, head=number % SIZE, kick=False)
        os.eventfd_write(self.kicks[TX], 1)

    def received(self, number: int, length: int) -> bytes:
        return self.get(DATA + number * PAGE, length)

    def listening(self) -> None:
        """The worker has the receive queue, after a first frame."""
        self.post(0)
        self.other.send(b"first")
        self.until(lambda: self.used(RX) == 1 and self.host.rings[RX].lent)
        assert self.wire.events() == 0, "nobody else reads the wire"


@pytest.fixture
def kit() -> Iterator[Kit]:
    with Kit() as front:
        yield front


def test_frames_out(kit: Kit) -> None:
    for number in range(20):
        kit.transmit(number, bytes([number + 1]) * (60 + number))
        assert kit.other.recv(2000) == bytes([number + 1]) * (60 + number)
        assert select.select([kit.call], [], [], SECONDS)[0], "the driver is told"
        os.eventfd_read(kit.call)
    assert kit.used_element(3, TX) == (3, 0)
    assert kit.crew.workers[TX].tally["requests"] == 20
    assert kit.crew.workers[TX].tally["helps"] == 0


def test_frames_in(kit: Kit) -> None:
    kit.listening()
    for number in range(1, 7):
        kit.post(number)
        kit.other.send(bytes([number]) * 100)
        kit.until(lambda number=number: kit.used(RX) == number + 1)  # type: ignore[misc]
        assert kit.received(number, 113) == bytes(10) + b"\1\0" + bytes([number]) * 100 + b"\0"
    assert kit.crew.workers[RX].tally["helps"] == 0


def test_without_buffers_frames_wait_and_the_wire_is_not_read_for_ever(kit: Kit) -> None:
    kit.listening()
    sent = 0
    end = time.monotonic() + 0.5
    kit.other.setblocking(False)
    while time.monotonic() < end and sent < 2000:
        with contextlib.suppress(BlockingIOError):
            kit.other.send(sent.to_bytes(4, "little") * 16)
            sent += 1
    assert 256 <= sent < 2000, "256 wait here, some in the kernel, and then nobody takes any"
    assert (kit.net.room, kit.net.dropped) == (0, 0)
    for number in range(1, 1 + 2 * SIZE):
        kit.post(number % SIZE)
        kit.until(lambda number=number: kit.used(RX) == number + 1)  # type: ignore[misc]
        assert kit.received(number % SIZE, 76) == bytes(10) + b"\1\0" + (number - 1).to_bytes(4, "little") * 16


def test_too_few_buffers_are_slept_on(kit: Kit) -> None:
    """Half of what a frame needs is there: nothing is used, nobody spins, and one more buffer wakes the worker."""
    kit.listening()
    frame = bytes(range(1, 201))
    kit.post(1, 100)
    kit.post(2, 100)
    kit.other.send(frame)
    kit.until(lambda: len(kit.net._waiting) == 1)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1, "of any thread"
    assert kit.used(RX) == 1
    kit.post(3, 100)
    kit.until(lambda: kit.used(RX) == 4)
    assert kit.received(1, 100) + kit.received(2, 100) + kit.received(3, 12) == bytes(10) + b"\3\0" + frame
    assert [kit.used_element(at, RX) for at in (1, 2, 3)] == [(1, 100), (2, 100), (3, 12)]


def test_a_miss_is_asked_for_and_order_is_kept() -> None:
    with Kit(WITH_BIT | MRG) as kit:
        kit.map(DATA + 8 * PAGE)
        kit.map(DATA + 10 * PAGE)
        for number in range(3):
            kit.transmit(number, bytes([number + 1]) * 60)
        assert kit.other.recv(100) == b"\1" * 60
        end = time.monotonic() + SECONDS
        while not (misses := kit.work()):
            assert time.monotonic() < end
        assert [miss.iova & -PAGE for miss in misses] == [kit.dma(DATA + 9 * PAGE)]
        assert kit.used(TX) == 1, "the third does not overtake the second"
        kit.map(DATA + 9 * PAGE)
        kit.answer(True)
        kit.until(lambda: kit.used(TX) == 3)
        assert [kit.other.recv(100)[0] for _ in range(2)] == [2, 3]


def test_a_frame_that_makes_no_sense_stops_its_ring_alone(kit: Kit) -> None:
    kit.listening()
    kit.put(DATA + 8 * PAGE, HEADER)
    kit.offer((kit.dma(DATA + 8 * PAGE), 11, False), index=TX, kick=False)
    os.eventfd_write(kit.kicks[TX], 1)
    kit.until(lambda: any("ring 1 is stopped" in line for line in kit.said))
    assert any("transmission of 11 bytes, wanted a header of 12" in line for line in kit.said)
    kit.post(1)
    kit.other.send(b"still there")
    kit.until(lambda: kit.used(RX) == 2)


def test_a_dirty_log_takes_the_queues_back_and_loses_no_frame(kit: Kit) -> None:
    """Frames that wait with the worker are Python's afterwards, in order, and it hears of the wire again."""
    kit.listening()
    kit.other.send(b"second")
    kit.until(lambda: len(kit.net._waiting) == 1)
    log = os.memfd_create("log")
    os.ftruncate(log, 1 << 16)
    kit.ok(Request.SET_FEATURES, wire.u64(PLAIN | MRG | 1 << wire.F_LOG_ALL))
    kit.send(Request.SET_LOG_BASE, LogDescription(1 << 16, 0).encode(), (log,))
    os.close(log)
    kit.other.send(b"third")
    for number in (1, 2):
        kit.post(number)
        kit.host.rounds.kicked(RX)
    kit.until(lambda: kit.used(RX) == 3)
    assert not kit.host.rings[RX].lent
    assert (kit.received(1, 18)[12:], kit.received(2, 17)[12:]) == (b"second", b"third")


def test_a_neighbour_that_is_not_there(tmp_path: Path) -> None:
    """Frames to a name that nobody has are lost and counted, and come through once somebody has it."""
    named = between(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    net = named.connect(Net(named))
    net.accepted = 1 << 32
    engine = net.engine(TX)
    assert engine is not None
    world = World()
    for _ in range(20):
        world.offer((8 * PAGE, 72, False))
    assert engine.step(world.drain)[1] == 20
    assert named.lost == 20
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "theirs"))
        for number in range(5):
            world.put((9 + number) * PAGE, HEADER + bytes([number]) * 60)
            world.offer(((9 + number) * PAGE, 72, False))
        assert engine.step(world.drain)[1] == 5
        assert [other.recv(100) for _ in range(5)] == [bytes([number]) * 60 for number in range(5)]
    assert named.lost == 20
    named.close()
    world.close()


def test_a_frame_that_is_too_large_is_dropped_and_counted() -> None:
    wire_ = Discard()
    net = wire_.connect(Net(wire_))
    net.accepted = 1 << 32
    engine = net.engine(TX)
    assert engine is not None
    world, far = World(), 0x8_0000_0000
    for page in range(20):
        first = far + page * PAGE
        assert world.radix.fill(first, first, first + PAGE - 1, world.window, 8 * PAGE, 3)
    for length in (12 + MAX_FRAME, 13 + MAX_FRAME, 12 + MAX_FRAME):
        world.offer_at((far, length, False))
    assert engine.step(world.drain) == (_core.EMPTY, 3, 2 * (12 + MAX_FRAME), 1)
    assert (net.dropped, wire_.frames, wire_.bytes) == (1, 2, 2 * MAX_FRAME)
    assert [length for _, length in world.used] == [0, 0, 0]
    world.close()
