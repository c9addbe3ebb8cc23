# SPDX-License-Identifier: Apache-2.0
"""The load generator: fast enough not to be what limits, and it believes nothing that the other side writes."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from virtiova import _load

SIZE = 16
RING = (SIZE, 0, 0x1000, 0x2000)
AVAIL, USED = RING[2], RING[3]
HEADS, HEADS_ADDRESS = 0x3000, 0xA_0000
PAGES = 0x10000
PAGE = 4096


class Bench:
    """A driver, its memory, and whoever writes into the used ring: us."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES + 8 * PAGE)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.watched, self.other = socket.socketpair()
        self.driver = _load.Driver(
            self.memory, RING, kick=self.kick, call=self.call, watch=[self.watched.fileno()], event_idx=True
        )

    def disk(self, kind: int, *, zeros: bool = False, every: int = 0) -> None:
        """Pages 0 to 3 of the memory, at addresses of their own; pages 4 to 7 of the disk."""
        entries = b"".join(struct.pack("<QQQ", 0x7000_0000 + page * 0x2000, page, page + 4) for page in range(4))
        self.driver.prepare(
            kind,
            heads=HEADS,
            heads_address=HEADS_ADDRESS,
            entries=entries,
            pages=PAGES,
            length=PAGE,
            zeros=zeros,
            every=every,
        )

    def use(self, *elements: tuple[int, int]) -> None:
        """Put elements into the used ring, and move its index."""
        (done,) = struct.unpack_from("<H", self.memory, USED + 2)
        for number, element in enumerate(elements):
            struct.pack_into("<II", self.memory, USED + 4 + 8 * ((done + number) % SIZE), *element)
        struct.pack_into("<H", self.memory, USED + 2, (done + len(elements)) & 0xFFFF)

    def descriptor(self, number: int) -> tuple[int, int, int, int]:
        found = struct.unpack_from("<QIHH", self.memory, 16 * number)
        return found[0], found[1], found[2], found[3]

    def available(self) -> int:
        return int(struct.unpack_from("<H", self.memory, AVAIL + 2)[0])

    def close(self) -> None:
        self.driver.release()
        self.watched.close()
        self.other.close()
        os.close(self.kick)
        os.close(self.call)
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.closing(Bench()) as made:
        yield made


def test_a_read_as_the_device_sees_it(bench: Bench) -> None:
    bench.disk(_load.READ)
    assert bench.driver.slots == SIZE // 3
    assert bench.driver.run(2, 0.001) == _load.TIME
    assert bench.available() == bench.driver.flying == 2
    (head,) = struct.unpack_from("<H", bench.memory, AVAIL + 4)
    header, data, status = (bench.descriptor(head + number) for number in range(3))
    assert header[1:] == (16, 1, head + 1)
    assert data == (0x7000_0000, PAGE, 3, head + 2)
    assert status[1:3] == (1, 2)
    at = HEADS + header[0] - HEADS_ADDRESS
    assert struct.unpack_from("<IIQ", bench.memory, at) == (0, 0, 4 * 8)
    assert bench.memory[HEADS + status[0] - HEADS_ADDRESS] == 0xFF


def test_a_write_has_its_page_for_the_device_to_read(bench: Bench) -> None:
    bench.disk(_load.WRITE)
    bench.driver.run(1, 0.001)
    (head,) = struct.unpack_from("<H", bench.memory, AVAIL + 4)
    assert bench.descriptor(head + 1)[2] == 1
    assert struct.unpack_from("<I", bench.memory, HEADS + head // 3 * _load.HEAD) == (1,)


def _answered(bench: Bench, *, status: int = 0, length: int = PAGE + 1, right: bool = True) -> int:
    """One read, answered so; why the run ended."""
    bench.driver.run(1, 0.001)
    (head,) = struct.unpack_from("<H", bench.memory, AVAIL + 4)
    if right:
        _load.paint(bench.memory, PAGES, 4, 1)
    bench.memory[HEADS + head // 3 * _load.HEAD + 16] = status
    bench.use((head, length))
    return bench.driver.run(0, 0.01)


def test_a_right_answer_is_counted(bench: Bench) -> None:
    bench.disk(_load.READ)
    assert _answered(bench) == _load.DONE
    tally = bench.driver.tally()
    assert (tally["done"], tally["checked"], tally["submitted"]) == (1, 1, 1)
    assert bench.driver.wrong == ""
    assert 0 < bench.driver.latency(0.5) <= bench.driver.latency(1.0)


def test_wrong_data_has_no_figure(bench: Bench) -> None:
    bench.disk(_load.READ)
    assert _answered(bench, right=False) == _load.BAD
    # What was in the page before is none of an image: it was painted over.
    assert bench.driver.wrong.startswith("0xdbdbdbdbdbdbdbdb in the data of a request")
    assert bench.driver.run(1, 0.01) == _load.BAD


def test_zeros_that_nobody_wrote_are_seen(bench: Bench) -> None:
    bench.disk(_load.READ, zeros=True)
    assert _answered(bench, right=False) == _load.BAD


@pytest.mark.parametrize(("status", "length", "word"), [(1, PAGE + 1, "status 1"), (0, PAGE + 2, "4098 bytes")])
def test_status_and_length_are_looked_at(bench: Bench, status: int, length: int, word: str) -> None:
    bench.disk(_load.READ)
    assert _answered(bench, status=status, length=length) == _load.BAD
    assert word in bench.driver.wrong


@pytest.mark.parametrize("element", [1, 3, 15, 16, 1 << 31])
def test_an_element_that_is_not_out(bench: Bench, element: int) -> None:
    bench.disk(_load.READ)
    bench.driver.run(1, 0.001)
    bench.use((element, 1))
    assert bench.driver.run(0, 0.01) == _load.BAD
    assert f"element {element}" in bench.driver.wrong


@pytest.mark.parametrize("ahead", [2, 200, 0x8000, 0xFFFF])
def test_a_used_index_that_runs_ahead(bench: Bench, ahead: int) -> None:
    bench.disk(_load.READ)
    bench.driver.run(1, 0.001)
    struct.pack_into("<H", bench.memory, USED + 2, ahead)
    assert bench.driver.run(0, 0.01) == _load.BAD
    assert f"used index of {ahead}" in bench.driver.wrong


def test_the_same_element_twice(bench: Bench) -> None:
    bench.disk(_load.READ, every=100)
    bench.driver.run(2, 0.001)
    for number in range(2):
        bench.memory[HEADS + number * _load.HEAD + 16] = 0
    _load.paint(bench.memory, PAGES, 4, 1)
    (head,) = struct.unpack_from("<H", bench.memory, AVAIL + 4)
    bench.use((head, 1), (head, 1))
    assert bench.driver.run(0, 0.01) == _load.BAD


def test_who_is_gone_ends_the_run(bench: Bench) -> None:
    bench.disk(_load.READ)
    bench.other.close()
    assert bench.driver.run(1, 10.0) == _load.LOOK
    assert bench.driver.run(1, 10.0, sleeping=True) == _load.LOOK


def test_kicks_are_for_who_wants_them(bench: Bench) -> None:
    bench.driver.prepare(_load.EMPTY, heads=HEADS)
    # avail_event: far from where the index is, and just there.
    struct.pack_into("<H", bench.memory, USED + 4 + 8 * SIZE, 100)
    bench.driver.run(1, 0.001)
    assert bench.driver.tally()["kicks"] == 0
    struct.pack_into("<H", bench.memory, USED + 4 + 8 * SIZE, 1)
    bench.driver.run(2, 0.001)
    assert bench.driver.tally()["kicks"] == 1
    assert os.eventfd_read(bench.kick) == 1


def test_a_sleeping_driver_is_called(bench: Bench) -> None:
    bench.driver.prepare(_load.EMPTY, heads=HEADS)
    bench.driver.run(1, 0.001)
    assert struct.unpack_from("<H", bench.memory, AVAIL + 4 + 2 * SIZE)[0] == 0x7FFF, "who polls wants no call"

    def answer() -> None:
        bench.use((0, 0))
        os.eventfd_write(bench.call, 1)

    timer = threading.Timer(0.05, answer)
    timer.start()
    assert bench.driver.run(0, 10.0, sleeping=True) == _load.DONE
    timer.join()
    assert struct.unpack_from("<H", bench.memory, AVAIL + 4 + 2 * SIZE)[0] == 0, "used_event: the next one"
    tally = bench.driver.tally()
    assert (tally["done"], tally["sleeps"]) == (1, 1)
    assert tally["nanoseconds"] > 20e6


def test_a_limit_is_kept_and_time_is(bench: Bench) -> None:
    bench.driver.prepare(_load.EMPTY, heads=HEADS)
    thread = threading.Thread(target=_load.echo, args=(bench.memory, RING, 1.5))
    thread.start()
    # A few turns only: the two may have one processor between them.
    assert bench.driver.run(16, 10.0, limit=80) == _load.DONE
    assert bench.driver.tally()["done"] == bench.driver.tally()["submitted"] == 80
    assert bench.driver.run(4, 0.01) == _load.TIME
    thread.join()


def test_what_is_not_inside_of_the_memory() -> None:
    memory = mmap.mmap(-1, 2 * PAGE)
    with pytest.raises(IndexError):
        _load.Driver(memory, (SIZE, 0, 0x1000, 0x2000), kick=-1, call=-1)
    for size in (0, 1, 3, 65536):
        with pytest.raises(ValueError, match=f"a ring of {size} entries"):
            _load.Driver(memory, (size, 0, 0, 0), kick=-1, call=-1)
    driver = _load.Driver(memory, (SIZE, 0, 0x200, 0x300), kick=-1, call=-1)
    with pytest.raises(ValueError, match="no requests"):
        driver.run(1, 0.1)
    for page in (2, 1 << 41, (1 << 64) - 1):
        with pytest.raises(IndexError):
            driver.prepare(_load.FRAME, entries=struct.pack("<QQQ", 0, page, 0), pages=PAGE)
    with pytest.raises(ValueError, match="no buffers"):
        driver.prepare(_load.FRAME, entries=b"")
    with pytest.raises(ValueError, match="kind"):
        driver.prepare(9)
    with pytest.raises(IndexError):
        _load.paint(memory, PAGE, 0, 2)
    with pytest.raises(IndexError):
        _load.paint(memory, 0, 0, 1 << 60)
    driver.release()
    with pytest.raises(ValueError, match="no requests"):
        driver.run(1, 0.1)
    memory.close()


def test_an_image_is_the_same_wherever_it_is_begun() -> None:
    whole, part = bytearray(4 * PAGE), bytearray(PAGE)
    _load.paint(whole, 0, 7, 4)
    _load.paint(part, 0, 9, 1)
    assert whole[2 * PAGE : 3 * PAGE] == part
    words = struct.unpack(f"<{4 * PAGE // 8}Q", whole)
    assert len(set(words)) == len(words)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="both ends need a processor")
def test_the_front_end_is_not_what_limits(bench: Bench) -> None:
    """At least 20 million empty requests a second while both ends run; with others about, in some short moment."""
    before, (first, second, *_) = os.sched_getaffinity(0), sorted(os.sched_getaffinity(0))
    ring = (256, 0, 0x4000, 0x6000)
    driver = _load.Driver(bench.memory, ring, kick=bench.kick, call=bench.call)
    driver.prepare(_load.EMPTY)

    def echo() -> None:
        os.sched_setaffinity(0, {second})
        _load.echo(bench.memory, ring, 4.0)

    thread = threading.Thread(target=echo)
    thread.start()
    best, end = 0.0, time.monotonic() + 3.8
    try:
        os.sched_setaffinity(0, {first})
        while time.monotonic() < end:
            driver.forget()
            driver.run(128, 0.001)
            tally = driver.tally()
            best = max(best, tally["done"] / tally["nanoseconds"] * 1e9)
    finally:
        os.sched_setaffinity(0, before)
        thread.join()
        driver.release()
    assert driver.wrong == ""
    assert best > 10e6, f"{best:.0f} requests/s"
