# SPDX-License-Identifier: Apache-2.0
"""Memory of a VDUSE device that is odd, goes away, or is cut short: nothing is touched but what is mapped."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vduse_kit import (
    AGREED,
    DATA,
    HEADER,
    IOVA,
    PAGE,
    RAM,
    READY,
    RING,
    RUNNING,
    SHIFT,
    STATUS,
    STEP,
    Fake,
    Map,
    no_leaks,
    serves,
    two_rings,
)
from virtiova.errors import MachineError
from virtiova.serve.vduse import loop, session
from virtiova.wire import vduse as wire


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A disk with two rings. Whatever a test did, its thread ends and no descriptor is left."""
    with no_leaks(), Fake(two_rings(), tmp_path, monkeypatch) as made:
        yield made


def test_a_page_that_nobody_mapped_fails_the_request_and_nothing_else(fake: Fake) -> None:
    fake.start()
    fake.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    for hole in (0, IOVA - PAGE, IOVA + RAM - 256, (1 << 64) - 512, (1 << 63) - 1):
        fake.put(STATUS, b"\xee")
        fake.offer((IOVA + HEADER, 16, False), (hole, 512, True), (IOVA + STATUS, 1, True))
        assert fake.done()
        assert fake.get(STATUS, 1) == b"\1"
    assert fake.reads()


def test_what_may_only_be_read_is_not_written(fake: Fake) -> None:
    fake.start()
    fake.map(0, PAGE, iova=0x1000_0000, perm=1)
    fake.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    fake.offer((IOVA + HEADER, 16, False), (0x1000_0000, 512, True), (IOVA + STATUS, 1, True))
    assert fake.done()
    assert fake.get(STATUS, 1) == b"\1"
    assert fake.get(0, 512) == bytes(512)
    assert fake.reads()


@pytest.mark.parametrize("workers", [False, True])
def test_a_file_that_is_cut_short_under_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: bool) -> None:
    with no_leaks(), Fake(two_rings(), tmp_path, monkeypatch, workers=workers) as fake:
        fake.start()
        assert fake.reads()
        os.ftruncate(fake.file, SHIFT)
        fake.kick()
        assert fake.told("shortened its memory at")
        assert fake.ended is None
        os.ftruncate(fake.file, SHIFT + RAM)
        assert serves(fake)


def test_a_file_shorter_than_its_region(fake: Fake) -> None:
    os.ftruncate(fake.file, SHIFT + RING)
    fake.start()
    fake.kick()
    assert fake.told("in its file")
    os.ftruncate(fake.file, SHIFT + RAM)
    assert serves(fake)


@pytest.mark.parametrize(
    "odd",
    [
        Map(0x2000_0000, 0x2000_0FFF, 0, 0),
        Map(0x2000_0000, 0x2000_0FFF, 0, 4),
        Map(0x2000_0000, 0x2000_0FFF, 1 << 63),
        Map(0x2000_0000, 0x2000_0FFF, (1 << 63) - PAGE),
    ],
)
def test_regions_that_cannot_be(fake: Fake, odd: Map) -> None:
    fake.start()
    odd.fd = fake.file
    fake.kernel.maps.append(odd)
    fake.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    for _ in range(3):
        fake.offer((IOVA + HEADER, 16, False), (0x2000_0000, 512, True), (IOVA + STATUS, 1, True))
        assert fake.done()
        assert fake.get(STATUS, 1) == b"\1"
    fake.kernel.maps.remove(odd)
    assert fake.reads()
    assert serves(fake)


@pytest.mark.parametrize(
    ("start", "last"),
    [(0, (1 << 64) - 1), (0, (1 << 63) - 1), (1, 1 << 63), (IOVA, IOVA + (1 << 62)), (IOVA, IOVA + (1 << 46))],
)
def test_regions_of_everything(fake: Fake, start: int, last: int) -> None:
    # The rings are there as well.
    for index in (0, 1):
        fake.ring(index)
    fake.kernel.maps.append(Map(start, last, 0, 3, fake.file))
    for status in (READY, AGREED, RUNNING):
        assert fake.status(status)
    for _ in range(3):
        fake.offer((IOVA + DATA, 512, True))
        time.sleep(0.02)
    assert fake.used() == 0
    assert serves(fake)


@pytest.mark.parametrize("fd", ["pipe", "read-only", "gone"])
def test_what_is_no_file_of_memory(fake: Fake, tmp_path: Path, fd: str) -> None:
    fake.start()
    made: list[int] = list(os.pipe()) if fd == "pipe" else []
    if fd == "read-only":
        made = [os.open(f"/proc/self/fd/{fake.file}", os.O_RDONLY)]
    fake.kernel.maps.append(Map(0x2000_0000, 0x2000_0FFF, 0, 3, made[0] if made else 999))
    fake.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    fake.offer((IOVA + HEADER, 16, False), (0x2000_0000, 512, True), (IOVA + STATUS, 1, True))
    assert fake.done()
    assert fake.get(STATUS, 1) == b"\1"
    assert fake.reads()
    for each in made:
        os.close(each)


def test_regions_that_overlap(fake: Fake) -> None:
    # Nothing that Linux hands out; whichever of them counts, nobody else's bytes do.
    fake.start()
    fake.map(DATA, PAGE, iova=IOVA + DATA + 512)
    fake.map(0, RAM, iova=IOVA - PAGE)
    assert fake.changed(IOVA, IOVA + RAM - 1)
    for _ in range(3):
        fake.ask_sector()
        fake.done(seconds=0.2)
    assert fake.ended is None
    assert serves(fake)


def test_others_stay_when_one_region_goes(fake: Fake) -> None:
    fake.start()
    fake.kernel.maps.clear()
    for offset in range(0, RAM, PAGE):
        fake.map(offset, PAGE)
    assert fake.changed(0, (1 << 64) - 1)
    assert fake.reads()
    gone = next(each for each in fake.kernel.maps if each.start == IOVA + DATA)
    fake.kernel.maps.remove(gone)
    assert fake.changed(gone.start, gone.last)
    fake.ask_sector()
    assert fake.done()
    assert fake.get(STATUS, 1) == b"\1", "it is not mapped any more"
    fake.kernel.maps.append(gone)
    assert fake.changed(gone.start, gone.last)
    assert fake.reads()


@pytest.mark.parametrize("workers", [False, True])
def test_regions_come_and_go_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: bool) -> None:
    with no_leaks(), Fake(two_rings(), tmp_path, monkeypatch, workers=workers) as fake:
        fake.start()
        fake.kernel.maps.clear()
        for offset in range(0, RAM, PAGE):
            fake.map(offset, PAGE)
        assert fake.changed(0, (1 << 64) - 1)
        home, other = (next(e for e in fake.kernel.maps if e.start == IOVA + at) for at in (DATA, DATA + STEP))
        ended = threading.Event()
        bad: list[str] = []

        def churn() -> None:
            while not ended.is_set():
                for each in (home, other):
                    fake.kernel.maps.remove(each)
                    if not fake.changed(each.start, each.last):
                        bad.append("a change was refused")
                    # What is written there now is seen by nobody but us.
                    mark = os.urandom(512)
                    os.pwrite(fake.file, mark, each.offset)
                    if os.pread(fake.file, 512, each.offset) != mark:
                        bad.append("it wrote to what was taken back")
                    fake.kernel.maps.append(each)
                    fake.changed(each.start, each.last)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            good = failed = 0
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                index = good % 2
                fake.ask_sector(index=index, clear=False)
                assert fake.done(index), fake.said[-3:]
                result = fake.get(STATUS + index * STEP, 1)
                good, failed = good + (result == b"\0"), failed + (result == b"\1")
        finally:
            ended.set()
            thread.join()
        assert not bad
        assert good > 10, (good, failed, fake.counters.text())
        assert fake.reads(0)
        assert fake.reads(1)


FEW = 40
"""Regions at a time, for a test that cannot wait for 509."""


@pytest.fixture
def few(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The same disk, whose regions are few."""
    monkeypatch.setattr(session, "MAX_REGIONS", FEW)
    monkeypatch.setattr(loop, "AT_ONCE", FEW - 16)
    return fake


def test_more_regions_than_are_kept_at_a_time(few: Fake) -> None:
    few.start()
    few.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    for number in range(3 * FEW):
        iova = 0x4000_0000 + number * PAGE
        few.map(DATA, 512, iova=iova)
        few.put(STATUS, b"\xee")
        few.offer((IOVA + HEADER, 16, False), (iova, 512, True), (IOVA + STATUS, 1, True))
        assert few.done()
        assert few.get(STATUS, 1) == b"\0"
        assert len(few.connection.host.ram.blocks) <= FEW
    assert few.reads(1)


def test_requests_that_together_are_in_more_regions_than_there_may_be(few: Fake) -> None:
    # What is looked for ahead does not drive away what the next request needs.
    few.start()
    for offset in range(0, RAM, 512):
        few.map(offset, 512, iova=0x4000_0000 + offset)
    few.kernel.maps = [each for each in few.kernel.maps if each.start < IOVA]
    few.map(0, DATA)
    assert few.changed(0, (1 << 64) - 1)
    few.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    for _ in range(6):
        for turn in range(4):
            few.put(STATUS, b"\xee")
            parts = [(0x4000_0000 + DATA + (turn * 5 + n) * 0x1200, 512, True) for n in range(5)]
            few.offer((IOVA + HEADER, 16, False), *parts, (IOVA + STATUS, 1, True), kick=turn == 3)
        assert few.done(), few.counters.text()
        assert few.get(STATUS, 1) == b"\0"


def test_a_request_in_more_regions_than_there_may_be_fails(few: Fake) -> None:
    few.start()
    for number in range(3 * FEW):
        few.map(DATA, PAGE, iova=0x4000_0000 + number * PAGE)
    few.put(HEADER, struct.pack("<IIQ", 0, 0, 3))
    for _ in range(2):
        few.put(STATUS, b"\xee")
        few.offer((IOVA + HEADER, 16, False), (0x4000_0000, 3 * FEW * PAGE, True), (IOVA + STATUS, 1, True))
        assert few.done()
        assert few.get(STATUS, 1) == b"\1"
        assert few.reads(1), "the other ring has nothing to do with it"
    assert serves(few)


def test_a_call_that_the_kernel_refuses_for_good(fake: Fake) -> None:
    fake.start()
    fake.kernel.errors[wire.IOTLB_GET_FD] = errno.EPERM
    assert fake.changed(0, (1 << 64) - 1)
    fake.ask_sector()
    fake._thread.join(10)
    assert isinstance(fake.ended, (OSError, MachineError))
