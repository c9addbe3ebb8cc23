# SPDX-License-Identifier: Apache-2.0
"""The load generator over a packed ring: what the device sees, and what it may not say."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from virtiova import _load
from virtiova.ring.layout import PACKED_F_AVAIL, PACKED_FLAGS, PackedDesc, PackedLayout

SIZE = 7
LAYOUT = PackedLayout(SIZE)
RING = (SIZE, 0, 0x1000, 0x2000)
HEADS, HEADS_ADDRESS = 0x3000, 0xA_0000
PAGES, PAGE = 0x10000, 4096


class Bench:
    """A driver, its memory, and a device that is us."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES + 8 * PAGE)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.driver = _load.Driver(self.memory, RING, kick=self.kick, call=self.call, packed=True)
        entries = b"".join(struct.pack("<QQQ", 0x7000_0000 + page * 0x2000, page, page + 4) for page in range(4))
        self.driver.prepare(
            _load.READ, heads=HEADS, heads_address=HEADS_ADDRESS, entries=entries, pages=PAGES, length=PAGE, every=100
        )

    def desc(self, place: int) -> PackedDesc:
        at = LAYOUT.entry(place)
        return PackedDesc.unpack(self.memory[at : at + 16])

    def use(self, place: int, name: int, length: int = PAGE + 1, status: int = 0) -> None:
        """The used descriptor of a request that went well."""
        if name < self.driver.slots:
            self.memory[HEADS + name * _load.HEAD + 16] = status
            _load.paint(self.memory, PAGES, 4, 4)
        struct.pack_into("<IHH", self.memory, LAYOUT.entry(place) + 8, length, name, LAYOUT.used(place))

    def close(self) -> None:
        self.driver.release()
        os.close(self.kick)
        os.close(self.call)
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.closing(Bench()) as made:
        yield made


def test_a_read_as_the_device_sees_it(bench: Bench) -> None:
    assert bench.driver.slots == SIZE // 3
    assert bench.driver.run(2, 0.001) == _load.TIME
    assert bench.driver.flying == 2
    header, data, status = (bench.desc(place) for place in range(3))
    assert [one.flags for one in (header, data, status)] == [PACKED_F_AVAIL | 1, PACKED_F_AVAIL | 3, PACKED_F_AVAIL | 2]
    assert (header.length, data.length, status.length) == (16, PAGE, 1)
    assert data.addr == 0x7000_0000
    assert header.id == data.id == status.id
    at = HEADS + header.addr - HEADS_ADDRESS
    assert struct.unpack_from("<IIQ", bench.memory, at) == (0, 0, 4 * 8)
    assert bench.memory[HEADS + status.addr - HEADS_ADDRESS] == 0xFF
    assert bench.desc(6).flags & PACKED_FLAGS == 0, "no third one has room"


def test_in_any_order_and_around_the_ring(bench: Bench) -> None:
    place = 0
    for _ in range(20):
        bench.driver.run(2, 0.001)
        names = [bench.desc(place + at).id for at in (0, 3)]
        # The later one first: it takes the place of the earlier.
        bench.use(place, names[1])
        bench.use(place + 3, names[0])
        assert bench.driver.run(0, 0.01) == _load.DONE, bench.driver.wrong
        place += 6
    assert bench.driver.tally()["done"] == 40


@pytest.mark.parametrize("name", [1, 2, 3, 0xFFFF])
def test_what_is_not_out(bench: Bench, name: int) -> None:
    bench.driver.run(1, 0.001)
    assert bench.desc(0).id == 0
    bench.use(0, name)
    assert bench.driver.run(0, 0.01) == _load.BAD
    assert f"element {name}" in bench.driver.wrong


def test_the_same_one_twice(bench: Bench) -> None:
    bench.driver.run(2, 0.001)
    name = bench.desc(0).id
    bench.use(0, name)
    bench.use(3, name)
    assert bench.driver.run(0, 0.01) == _load.BAD


@pytest.mark.parametrize(("length", "status", "word"), [(PAGE + 2, 0, "4098 bytes"), (PAGE + 1, 1, "status 1")])
def test_length_and_status_are_looked_at(bench: Bench, length: int, status: int, word: str) -> None:
    bench.driver.run(1, 0.001)
    bench.use(0, bench.desc(0).id, length, status)
    assert bench.driver.run(0, 0.01) == _load.BAD
    assert word in bench.driver.wrong


def test_kicks_are_for_who_wants_them(bench: Bench) -> None:
    struct.pack_into("<HH", bench.memory, RING[3], 0, 1)
    bench.driver.run(1, 0.001)
    assert bench.driver.tally()["kicks"] == 0
    # With the descriptor in the middle of the next one.
    struct.pack_into("<HH", bench.memory, RING[3], LAYOUT.encode(4), 2)
    bench.driver.run(2, 0.001)
    assert bench.driver.tally()["kicks"] == 1


def test_a_sleeping_driver_is_called(bench: Bench) -> None:
    bench.driver.run(1, 0.001)
    assert struct.unpack_from("<H", bench.memory, RING[2] + 2) == (1,), "who polls wants no call"

    def answer() -> None:
        bench.use(0, bench.desc(0).id)
        os.eventfd_write(bench.call, 1)

    timer = threading.Timer(0.05, answer)
    timer.start()
    assert bench.driver.run(0, 10.0, sleeping=True) == _load.DONE
    timer.join()
    assert struct.unpack_from("<HH", bench.memory, RING[2]) == (0x8000, 2), "with the next one"
    assert bench.driver.tally()["sleeps"] == 1


def test_the_smallest_device_goes_around_the_ring() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    ring = (5, 0, 0x1000, 0x2000)
    driver = _load.Driver(memory, ring, kick=-1, call=-1, packed=True)
    driver.prepare(_load.EMPTY, heads=0x3000)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(_load.echo(memory, ring, 1.5, packed=True)))
    thread.start()
    assert driver.run(4, 10.0, limit=83) == _load.DONE
    thread.join()
    assert (driver.wrong, driver.tally()["done"], done) == ("", 83, [83])
    driver.release()


def test_what_makes_no_ring() -> None:
    memory = mmap.mmap(-1, 2 * PAGE)
    with pytest.raises(IndexError):
        _load.Driver(memory, (SIZE, 0, 0x1000, 0x2000), kick=-1, call=-1, packed=True)
    for size in (0, 1, 32769):
        with pytest.raises(ValueError, match=f"a ring of {size} entries"):
            _load.Driver(memory, (size, 0, 0, 0), kick=-1, call=-1, packed=True)
