# SPDX-License-Identifier: Apache-2.0
"""Queues on threads of their own: the same bytes as from Python, whoever has the ring, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import struct
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile_kit import served
from serve_kit import DATA, HEADER, PLAIN, SIZE, STATUS, USED, WITH_BIT, FrontEnd, request
from virtiova import _core
from virtiova.device.blk import SECTOR, WRITEBACK_AT, Bit, Blk
from virtiova.device.store import FileStore, MappedStore, MemoryStore
from virtiova.features import Feature
from virtiova.serve.crew import Spin
from virtiova.serve.rings import BATCH, SETTLED
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ConfigSpace, LogDescription, Request, VringState
from worker_kit import FLUSH, IMAGE, SECONDS, SECTORS, Kit


@contextlib.contextmanager
def kit(features: int = PLAIN, spin: Spin | None = None, *, queues: int = 1) -> Iterator[Kit]:
    with Kit(Blk(MemoryStore(bytearray(IMAGE)), queues=queues), spin) as front:
        yield front.begin(features)


FEATURES = pytest.mark.parametrize("features", [PLAIN, WITH_BIT], ids=["flat", "bit 33"])


@FEATURES
def test_reads_and_writes_are_the_workers(features: int) -> None:
    with kit(features) as front:
        request(front)
        front.kick()
        front.until(lambda: front.used() == 1)
        assert front.get(DATA, SECTOR) == IMAGE[3 * SECTOR : 4 * SECTOR]
        assert front.get(STATUS, 1) == b"\0"
        assert front.used_element(0) == (0, SECTOR + 1)
        front.put(DATA, b"new!" * (SECTOR // 4))
        request(front, kind=1, sector=9)
        front.kick()
        front.until(lambda: front.used() == 2)
        assert front.used_element(1) == (0, 1)
        front.put(DATA, bytes(SECTOR))
        request(front, sector=9)
        front.kick()
        front.until(lambda: front.used() == 3)
        assert front.get(DATA, SECTOR) == b"new!" * (SECTOR // 4)
        told = front.tally()
        assert (told["requests"], told["helps"]) == (3, 0)
        assert told["bytes"] == 3 * (16 + SECTOR + 1)
        front.host.close()
        assert front.host.counters.requests == 3, "they are counted with those of Python"
        assert front.host.counters.bytes == told["bytes"]


# -- the same as Python

_pieces = st.lists(st.integers(1, 1500), min_size=1, max_size=4)
_request = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 4, 8, 11, 99]),
    st.integers(0, SECTORS + 2),
    st.integers(0, 4),
    _pieces,
    st.booleans(),
)


def offered(front: FrontEnd, kind: int, sector: int, sectors: int, cuts: list[int], odd: bool) -> None:
    """A request whose data is cut into pieces, and of a length that is none, perhaps."""
    front.put(HEADER, struct.pack("<IIQ", kind, 0, sector))
    length = sectors * SECTOR + (7 if odd else 0)
    pieces, at = [], 0
    for cut in cuts[: SIZE - 3]:
        step = min(cut, length - at)
        if step:
            pieces.append((front.dma(DATA + at), step, kind != 1))
            at += step
    if at < length:
        pieces.append((front.dma(DATA + at), length - at, kind != 1))
    front.offer((front.dma(HEADER), 16, False), *pieces, (front.dma(STATUS), 1, True), kick=False)


@settings(max_examples=30, deadline=None)
@given(requests=st.lists(_request, min_size=1, max_size=12), features=st.sampled_from([PLAIN, WITH_BIT]))
def test_the_same_bytes_as_from_python(requests: list[tuple[int, int, int, list[int], bool]], features: int) -> None:
    stores = [MemoryStore(bytearray(IMAGE)) for _ in range(2)]
    with Kit(Blk(stores[0])) as native, FrontEnd(Blk(stores[1], native=False)) as plain:
        native.begin(features)
        plain.negotiate(features | FLUSH)
        plain.start()
        for count, each in enumerate(requests, 1):
            for front in (native, plain):
                front.put(DATA, bytes(range(256)) * 16)
                front.put(STATUS, b"\xee")
                offered(front, *each)
            native.kick()
            native.until(lambda count=count: native.used() == count)  # type: ignore[misc]
            plain.host.rounds.kicked(0)
            plain.serve()
            # All but the hint whether kicks are wanted.
            assert native.get(0, USED) == plain.get(0, USED)
            assert native.get(USED + 2, 0x40000) == plain.get(USED + 2, 0x40000)
            assert stores[0].read(0, len(IMAGE)) == stores[1].read(0, len(IMAGE))
        assert native.tally()["requests"] + native.host.counters.requests == len(requests)
        assert any("makes no sense" in line for line in native.said) == any("makes no sense" in s for s in plain.said)


def test_what_the_driver_may_not_hear_of_twice_is_settled() -> None:
    """A driver that has no FLUSH takes a write for stable: not one for a worker. So does one without a cache."""
    with kit() as front:
        front.send(Request.SET_FEATURES, wire.u64(PLAIN))
        front.send(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        front.until(front.lent)
        request(front, kind=1)
        front.kick()
        front.until(lambda: front.used() == 1)
        assert front.tally()["helps"] >= 1
        assert front.tally()["requests"] == 0
        front.send(Request.SET_FEATURES, wire.u64(PLAIN | FLUSH | 1 << Bit.CONFIG_WCE))
        front.until(front.lent)
        request(front, kind=1)
        front.kick()
        front.until(lambda: front.used() == 2)
        assert front.tally()["requests"] == 1
        front.send(Request.SET_CONFIG, ConfigSpace(WRITEBACK_AT, 0, b"\0").encode())
        front.until(front.lent)
        request(front, kind=1)
        front.kick()
        front.until(lambda: front.used() == 3)
        assert front.tally()["requests"] == 1


# -- whose the ring is


def test_a_page_that_is_not_there_is_asked_for_and_the_worker_goes_on_some_time_later() -> None:
    """Who comes back at once is not sent again at once: the next page may be missing as well."""
    with kit(WITH_BIT) as front:
        front.invalidate(front.dma(DATA), 0x1000)
        request(front)
        front.kick()
        front.until(lambda: bool(front.host.outbox))
        assert front.used() == 0
        assert not front.lent()
        front.map(DATA, 0x35000)
        front.answer(True)
        front.until(lambda: front.used() == 1)
        assert front.get(0x35000, SECTOR) == IMAGE[3 * SECTOR : 4 * SECTOR]
        done = 1
        while not front.lent():
            assert done <= 2 * SETTLED
            assert front.tally()["requests"] == 0
            done += 1
            request(front)
            front.kick()
            front.until(lambda so_many=done: front.used() == so_many)  # type: ignore[misc]
        assert done >= SETTLED
        request(front)
        front.kick()
        front.until(lambda: front.used() == done + 1)
        assert front.tally()["requests"] >= 1


def test_the_base_of_a_ring_that_is_stopped_in_the_middle() -> None:
    """A driver that adds and adds: what was taken was given back, and what was not was not."""
    with kit() as front:
        ended = threading.Event()

        def drive() -> None:
            while not ended.is_set():
                if (front._avail[0] - front.used()) & 0xFFFF < SIZE:
                    request(front)
                front.kick()

        driver = threading.Thread(target=drive)
        driver.start()
        try:
            front.until(lambda: front.used() > 50)
            (told,) = front.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
            used = front.used()
            time.sleep(0.02)
            assert VringState.decode(told.payload).value == used == front.used()
        finally:
            ended.set()
            driver.join()


def test_all_is_given_back_while_a_log_is_kept() -> None:
    """Python writes then, and notes each page."""
    with kit() as front:
        log = os.memfd_create("log")
        front._fds.append(log)
        os.ftruncate(log, 0x1000)
        front.send(Request.SET_LOG_BASE, LogDescription(0x1000, 0).encode(), (log,))
        front.send(Request.SET_FEATURES, wire.u64(PLAIN | FLUSH | 1 << wire.F_LOG_ALL))
        before = front.tally()["requests"]
        request(front)
        front.kick()
        front.host.rounds.kicked(0)
        front.until(lambda: front.used() == 1)
        assert not front.lent()
        assert front.tally()["requests"] == before
        page = (0x10_0000 + DATA) >> 12
        assert os.pread(log, 1, page // 8)[0] >> page % 8 & 1
        front.send(Request.SET_FEATURES, wire.u64(PLAIN | FLUSH))
        front.until(front.lent)


def test_a_flood_of_what_python_does_leaves_it_with_the_worker() -> None:
    with kit() as front:
        for _ in range(3 * BATCH):
            request(front, kind=8)
            front.kick()
            used = front.used()
            front.until(lambda used=used: front.used() != used)  # type: ignore[misc]
        front.until(front.lent)
        assert front.tally()["helps"] >= BATCH


# -- notifications


def test_calls_and_kicks_are_counted_and_made() -> None:
    with kit(spin=Spin(0.0)) as front:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(front.call)
        request(front)
        front.kick()
        front.until(lambda: front.used() == 1)
        front.until(lambda: front.tally()["calls"] == 1)
        assert os.eventfd_read(front.call) >= 1
        front.until(lambda: front.tally()["kicks"] == 1)
        front.until(lambda: front.tally()["slept"] >= 2)


@pytest.mark.parametrize("how", ["its end", "an error"])
def test_kicks_that_end(how: str) -> None:
    with kit() as front:
        ours, theirs = os.pipe()
        front.send(Request.SET_VRING_KICK, wire.encode_vring_fd(0, True), (ours if how == "its end" else theirs,))
        if how == "its end":
            front.until(front.lent)
            request(front)
            os.write(theirs, b"x" * 8)
            front.until(lambda: front.used() == 1)
        os.close(theirs)
        os.close(ours)
        front.until(lambda: any("no kicks come any more" in line for line in front.said))
        front.until(front.lent)
        assert front.host.rings[0].kick is None


def test_a_driver_that_cannot_be_told() -> None:
    with kit() as front:
        ours, theirs = os.pipe()
        front.send(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (theirs,))
        os.close(ours)
        os.close(theirs)
        for count in (1, 2, 3):
            request(front)
            front.kick()
            front.until(lambda count=count: front.used() == count)  # type: ignore[misc]
        front.until(front.lent)
        assert sum("cannot be told" in line for line in front.said) == 1


def test_a_ring_of_which_no_kicks_come() -> None:
    with kit() as front:
        front.send(Request.SET_VRING_KICK, wire.encode_vring_fd(0, False))
        front.until(front.lent)
        assert not front.host.rounds.polls, "it is the worker who looks"
        request(front)
        end = time.monotonic() + SECONDS
        while front.used() != 1:
            assert time.monotonic() < end
        assert front.tally()["requests"] == 1


# -- memory that goes


def test_memory_that_is_shortened_stops_the_ring() -> None:
    with kit() as front:
        os.ftruncate(front.file, DATA)
        front.offer((front.dma(HEADER), 16, False), (front.dma(STATUS), 1, True), kick=False)
        front.kick()
        front.until(lambda: any("shortened its memory" in line for line in front.said))
        front.host.rounds.work()
        assert not front.lent()
        assert front.host.rings[0].broken


@pytest.mark.parametrize("kind", [FileStore, MappedStore])
def test_an_image_that_is_shortened_is_an_error_and_no_zeroes(kind: type[FileStore], tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    with kind(path) as store, Kit(Blk(store)) as front:
        front.begin(PLAIN)
        request(front, sector=40)
        front.kick()
        front.until(lambda: front.used() == 1)
        assert front.tally()["requests"] == 1
        assert front.get(DATA, SECTOR) == IMAGE[40 * SECTOR : 41 * SECTOR]
        os.truncate(path, 0)
        for count in (2, 3):
            front.put(DATA, b"?" * SECTOR)
            request(front, sector=40)
            front.kick()
            front.until(lambda count=count: front.used() == count)  # type: ignore[misc]
            assert front.get(STATUS, 1) == b"\1", "IOERR, the second time too"
        front.put(DATA, b"back" * (SECTOR // 4))
        request(front, kind=1, sector=0)
        front.kick()
        front.until(lambda: front.used() == 4)
        assert front.get(STATUS, 1) == b"\0"
        assert path.read_bytes() == b"back" * (SECTOR // 4), "what is said to be written is in the file"
        front.host.close()


def test_a_mapped_image_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    with MappedStore(path) as store, Kit(Blk(store)) as front:
        front.begin(WITH_BIT)
        front.put(DATA, b"disk" * (SECTOR // 4))
        request(front, kind=1, sector=5)
        front.kick()
        front.until(lambda: front.used() == 1)
        assert front.tally()["requests"] == 1
        assert path.read_bytes() == IMAGE[: 5 * SECTOR] + b"disk" * (SECTOR // 4) + IMAGE[6 * SECTOR :]
        front.host.close()


def test_a_read_only_image_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(IMAGE)
    path.chmod(0o400)
    with MappedStore(path, read_only=True) as store, Kit(Blk(store)) as front:
        front.begin(PLAIN)
        request(front, kind=1, sector=5)
        front.kick()
        front.until(lambda: front.used() == 1)
        assert front.get(STATUS, 1) == b"\1"
        assert path.read_bytes() == IMAGE
        front.host.close()


# -- threads


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_behind() -> None:
    with kit(queues=4):
        pass
    before = threads(), descriptors()
    for _ in range(20):
        with kit(WITH_BIT, queues=4) as front:
            request(front)
            front.kick()
            front.until(lambda front=front: front.used() == 1)  # type: ignore[misc]
            assert threads() == before[0] + 4
    assert (threads(), descriptors()) == before


def test_a_thread_ends_although_the_gate_is_closed() -> None:
    gate = _core.Gate()
    wake = os.eventfd(0)
    first, second = _core.Worker(gate, wake), _core.Worker(gate, wake)
    with gate, gate:
        first.close()
        assert gate.closed
    assert not gate.closed
    second.close()
    second.close()
    os.close(wake)


def test_one_that_has_a_ring_takes_no_other() -> None:
    with kit() as front:
        worker, ring = front.crew.workers[0], front.host.rings[0]
        assert worker.running
        drain, engine = ring._drain, front.host._device.engine(0)
        assert drain is not None
        assert engine is not None
        with pytest.raises(ValueError, match="has a ring"):
            worker.run(drain, engine, -1, -1)
        assert worker.take()
        assert not worker.take()
        ring.take_back()
        with pytest.raises(ValueError, match="the engine is none"):
            worker.run(drain, _core.Engine(), -1, -1)


@pytest.mark.parametrize("works", [True, False])
def test_a_bell_is_rung_by_the_worker_itself_and_the_call_only_if_that_fails(works: bool) -> None:
    """FIONBIO of ring 1 is a bell of which can be seen that it was rung; no request of that number fails."""
    with kit() as front:
        worker, ring = front.crew.workers[0], front.host.rings[0]
        drain, engine = ring._drain, front.host._device.engine(0)
        assert drain is not None
        assert engine is not None
        assert ring.kick is not None
        worker.take()
        heard, bell = os.pipe()
        call = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            wanted = termios.FIONBIO if works else 0x12345678
            worker.run(drain, engine, ring.kick, call, bell=bell, request=wanted, ring=1)
            request(front)
            front.kick()
            front.until(lambda: front.used() == 1 and worker.tally["calls"] == 1)
            front.until(lambda: not os.get_blocking(bell) or not works)
            assert os.get_blocking(bell) is not works
            worker.take()
            if works:
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(call)
            else:
                assert os.eventfd_read(call) == 1
        finally:
            for fd in (heard, bell, call):
                os.close(fd)


def test_event_indices_keep_the_kicks_away_while_it_looks() -> None:
    with kit(PLAIN | 1 << Feature.RING_EVENT_IDX, Spin(0.01, fixed=True)) as front:
        wanted = 0
        for count in range(1, 200):
            request(front)
            if struct.unpack("<H", front.get(USED + 4 + 8 * SIZE, 2)) == (count - 1,):
                front.kick()
                wanted += 1
            front.until(lambda count=count: front.used() == count)  # type: ignore[misc]
        assert front.tally()["kicks"] <= wanted < 100, "nearly all came while it looked"


# -- in a process of its own


def seconds_of(pid: int) -> float:
    """Processor time of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "arguments", [("blk", "--memory", "1M", "--num-queues", "4"), ("rng",)], ids=["workers", "Python"]
)
def test_who_has_nothing_to_do_does_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with served(tmp_path, *arguments) as server, server.front_end() as front:
        front.ready(PLAIN | (FLUSH if arguments[0] == "blk" else 0))
        for count in range(1, 20):
            if arguments[0] == "blk":
                assert front.read_sector() == 0
            else:
                front.offer((front.dma(DATA), 64, True))
                front.wait_used(count)
        time.sleep(0.1)
        before = seconds_of(server.process.pid)
        time.sleep(2)
        assert seconds_of(server.process.pid) - before <= 0.02
