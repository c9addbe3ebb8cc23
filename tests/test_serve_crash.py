# SPDX-License-Identifier: Apache-2.0
"""A back end that is killed between any two of its stores, and the one after it: nothing lost, nothing done twice.

A killed process has done a prefix of its stores to shared memory: the guest's, the file of what is in flight, the
disk, the call descriptor. So here each store is a step, and the "process" ends before any of them. Python's stores: the
native end of a ring does the same ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from serve_kit import PLAIN, RING, SIZE, USED, WITH_BIT, FrontEnd
from virtiova import _core
from virtiova.device.blk import SECTOR, WRITEBACK_AT, Bit, Blk
from virtiova.device.blk import Request as BlkRequest
from virtiova.device.store import MemoryStore
from virtiova.dma import shared
from virtiova.dma.cached import TableSpace
from virtiova.features import Feature
from virtiova.ring.layout import SplitLayout
from virtiova.serve import descriptors, host, rounds
from virtiova.serve.dirty import LoggedRam
from virtiova.serve.inflight import Inflight, ring_bytes
from virtiova.serve.rings import Ring
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ConfigSpace, InflightDescription, Request, VringState

DATA = 0x8000
STATUS = 0x9000
EVENTS = 1 << Feature.RING_EVENT_IDX


class Killed(BaseException):
    """Here the process ends: nobody handles it."""


class Steps:
    """Counts stores; from the one after ``last`` on there is nobody left who could do any."""

    def __init__(self) -> None:
        self.done = 0
        self.last: int | None = None

    def __call__(self) -> None:
        if self.last is not None and self.done >= self.last:
            raise Killed
        self.done += 1

    def limit(self, last: int | None) -> None:
        self.done, self.last = 0, last


class StepWindow:
    """A window of the file of what is in flight."""

    def __init__(self, window: _core.Window, step: Steps) -> None:
        self._window, self._step = window, step

    def write(self, offset: int, data: bytes) -> None:
        self._step()
        self._window.write(offset, data)

    def store16(self, offset: int, value: int) -> None:
        self._step()
        self._window.store16(offset, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._window, name)


class StepDisk(MemoryStore):
    """A disk of which every write is a step, and remembered."""

    def __init__(self, step: Steps) -> None:
        super().__init__(bytearray(64 * SECTOR))
        self._step = step
        self.written: list[bytes] = []

    def write(self, offset: int, data: bytes) -> None:
        self._step()
        super().write(offset, data)
        self.written.append(data[:8])


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Steps:
    step = Steps()

    def stepping(original: Any) -> Any:
        def store(*arguments: Any, **named: Any) -> Any:
            step()
            return original(*arguments, **named)

        return store

    def mapped(*arguments: Any) -> Any:
        mapping, window = original(*arguments)
        return mapping, StepWindow(window, step)

    original = shared.map_shared
    monkeypatch.setattr("virtiova.serve.inflight.map_shared", mapped)
    for where in (LoggedRam, TableSpace):
        for name in ("write", "store16", "store32"):
            monkeypatch.setattr(where, name, stepping(getattr(where, name)))
    monkeypatch.setattr(rounds, "signal", stepping(descriptors.signal))
    space = host.Host._space
    monkeypatch.setattr(host.Host, "_space", lambda this, behind: (space(this, behind)[0], None))
    return step


class Driver:
    """A guest with four requests at a time that outlives its back ends, and looks at the ring only when it is called.

    Request n writes its number to sector n. Once it is done its buffer says POISON, so doing it again would show.
    """

    def __init__(self, step: Steps, features: int, total: int) -> None:
        self.step = step
        self.disk = StepDisk(step)
        self.features = features
        self.total = total
        self.ram = os.memfd_create("guest")
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.file: int | None = None
        self.description = InflightDescription(0, 0, 1, SIZE)
        self.available = self.seen = self.offered = self.killed = 0
        self.pending: dict[int, int] = {}
        self.completed: list[int] = []

    @contextlib.contextmanager
    def backend(self, base: int | None = None) -> Iterator[FrontEnd]:
        """A fresh back end on this guest's memory, the ring running."""
        with FrontEnd(Blk(self.disk)) as end:
            os.ftruncate(self.ram, os.fstat(end.file).st_size)
            os.dup2(self.ram, end.file)
            os.dup2(self.call, end.call)
            end.negotiate(self.features)
            if self.file is None:
                (answer,) = end.send(Request.GET_INFLIGHT_FD, self.description.encode())
                self.description = InflightDescription.decode(answer.payload)
                (self.file,) = answer.fds
            end.ok(Request.SET_INFLIGHT_FD, self.description.encode(), (self.file,))
            # As QEMU does it: what it knows of is the used index.
            end.start(base=end.used() if base is None else base)
            end._avail[0] = self.available
            yield end

    def offer(self, end: FrontEnd) -> None:
        """As many requests as fit: two descriptors each, the heads in an order of their own."""
        free = [head for head in (4, 0, 6, 2) if head not in self.pending]
        for head in free:
            if self.offered == self.total:
                break
            number, self.offered = self.offered, self.offered + 1
            at = DATA + 0x400 * (head // 2)
            end.put(at, struct.pack("<IIQ", BlkRequest.OUT, 0, number) + struct.pack("<Q", number) * 64)
            end.put(STATUS + head, b"\xee")
            self.pending[head] = number
            end.offer((end.dma(at), 16 + SECTOR, False), (end.dma(STATUS + head), 1, True), head=head)
        self.available = end._avail[0]

    def reap(self, end: FrontEnd) -> bool:
        """Take what was given back, if called."""
        try:
            os.eventfd_read(self.call)
        except BlockingIOError:
            return False
        while self.seen != end.used():
            head, _ = end.used_element(self.seen)
            number = self.pending.pop(head)
            assert end.get(STATUS + head, 1) == b"\0"
            self.completed.append(number)
            end.put(DATA + 0x400 * (head // 2), struct.pack("<IIQ", BlkRequest.OUT, 0, 63) + b"POISON!!" * 64)
            self.seen = (self.seen + 1) & 0xFFFF
            if self.features & EVENTS:
                end.put(RING + SplitLayout(SIZE).avail + 4 + 2 * SIZE, struct.pack("<H", self.seen))
        return True

    def run(self, end: FrontEnd) -> None:
        """Until there is nothing to do for anybody."""
        while True:
            before = len(self.completed), self.offered
            self.offer(end)
            end.serve()
            if not self.reap(end) and before == (len(self.completed), self.offered):
                return

    def live(self, last: int | None) -> bool:
        """One back end's life, of ``last`` stores; whether it was killed."""
        self.step.limit(last)
        try:
            with self.backend() as end:
                try:
                    self.run(end)
                except Killed:
                    # The guest goes on, and offers more meanwhile.
                    self.reap(end)
                    self.offer(end)
                    self.killed += 1
                    return True
        except Killed:
            self.killed += 1
            return True
        return False

    def check(self) -> None:
        assert sorted(self.completed) == list(range(self.total)), "nothing lost, nothing given back twice"
        assert self.completed == sorted(self.completed), "in the order of the available ring"
        assert b"POISON!!" not in self.disk.written, "nothing done after it was given back"
        assert len(self.disk.written) <= self.total + self.killed, "done again only if it was not given back"
        for number in range(self.total):
            assert self.disk.read(number * SECTOR, SECTOR) == struct.pack("<Q", number) * 64

    def close(self) -> None:
        for fd in (self.ram, self.call, self.file):
            if fd is not None:
                os.close(fd)


@contextlib.contextmanager
def driver(step: Steps, features: int, total: int) -> Iterator[Driver]:
    guest = Driver(step, features, total)
    try:
        yield guest
        guest.check()
    finally:
        step.limit(None)
        guest.close()


MODES = pytest.mark.parametrize("features", [PLAIN, WITH_BIT | EVENTS], ids=["plain", "bit 33, event index"])


def stores(step: Steps, features: int, total: int) -> int:
    """How many stores a back end does that nobody kills."""
    with driver(step, features, total) as guest:
        assert not guest.live(None)
        return step.done


@MODES
def test_killed_before_any_of_its_stores(step: Steps, features: int) -> None:
    most = stores(step, features, 7)
    assert most > 7 * 10
    for last in range(most):
        with driver(step, features, 7) as guest:
            assert guest.live(last)
            assert not guest.live(None)


def test_killed_again_while_it_picks_up_the_pieces(step: Steps) -> None:
    """The second one dies at each of its stores, too, for each end of the first: as far as one request goes."""
    for first, second in itertools.product(range(24), range(24)):
        with driver(step, PLAIN | EVENTS, 3) as guest:
            guest.live(first)
            guest.live(second)
            assert not guest.live(None)


def test_killed_all_the_time(step: Steps) -> None:
    """As often as it takes, with always a few stores more than to begin one request."""
    with driver(step, PLAIN, 30) as guest:
        while guest.live(17):
            assert guest.killed < 200
        assert guest.killed > 15


MUTANTS = {
    "what is given back is not noted": (Inflight, "end", None),
    "a used index that is ahead of the note is ignored": (Inflight, "_last_batch", ()),
    "the driver is told of nothing again": (Ring, "tell_again", None),
}
"""Marking what begins is not among them: as requests are done one by one and in their order, the used index alone says
what comes next. The marks are for who goes on with the file and does not work so (test_serve_takes_over.py)."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_would_be_seen(step: Steps, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """Each of these is needed: for some end of the first back end the second goes wrong without it."""
    where, name, instead = MUTANTS[mutant]
    monkeypatch.setattr(where, name, lambda *_: instead)
    failures = 0
    for last in range(60):
        guest = Driver(step, PLAIN, 7)
        try:
            guest.live(last)
            guest.live(None)
            guest.check()
        except (AssertionError, KeyError):
            failures += 1
        finally:
            step.limit(None)
            guest.close()
    assert failures


# -- the file by itself


def entry(flag: int, following: int, counter: int) -> bytes:
    return struct.pack("<B5xHQ", flag, following, counter)


def region(size: int, *, last: int, used: int, entries: dict[int, bytes]) -> tuple[_core.Window, bytearray]:
    """What another program has left."""
    body = b"".join(entries.get(head, bytes(16)) for head in range(size))
    memory = bytearray((struct.pack("<QHHHH", 0, 1, size, last, used) + body).ljust(ring_bytes(size), b"\0"))
    return _core.Window(memory), memory


def test_a_batch_of_another_program_that_died_before_its_note() -> None:
    """Three were given back at once (6, 1, 3, in a list), two are unfinished, the older one with the higher head."""
    left = {6: entry(1, 0, 5), 1: entry(1, 6, 7), 3: entry(1, 1, 6), 7: entry(1, 0, 8), 2: entry(1, 0, 9)}
    window, memory = region(8, last=3, used=0xFFFE, entries=left)
    ring = Inflight(window, 0, 8)
    assert ring.unfinished(1) == [7, 2]
    assert memory[14:16] == b"\1\0"
    assert ring.unfinished(1) == [7, 2], "asked again, it says the same"
    ring.begin([2])
    assert ring.unfinished(1) == [7, 2], "begun once more, it keeps its place"
    ring.end([2], 2)
    ring.begin([5])
    assert ring.unfinished(2) == [7, 5]


@pytest.mark.parametrize("last", [0, 3, 9, 0xFFFF])
def test_a_list_without_an_end_or_without_sense(last: int) -> None:
    left = {head: entry(1, {3: 3}.get(head, 700), head) for head in range(8)}
    window, _ = region(8, last=last, used=0, entries=left)
    found = Inflight(window, 0, 8).unfinished(0x7FFF)
    assert found == [head for head in range(8) if head != last]


def test_a_file_for_another_size_of_ring_is_started_anew() -> None:
    window, memory = region(16, last=3, used=7, entries={3: entry(1, 0, 5)})
    ring = Inflight(window, 0, 8)
    assert ring.unfinished(0) == []
    assert memory[: ring_bytes(8)] == struct.pack("<QHHHH", 0, 1, 8, 0, 0).ljust(ring_bytes(8), b"\0")


# -- what the front end may do with it


def inflight_file(fill: bytes = b"") -> tuple[InflightDescription, int]:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, ring_bytes(SIZE))
    os.pwrite(fd, fill, 0)
    return InflightDescription(ring_bytes(SIZE), 0, 1, SIZE), fd


def test_requests_of_a_driver_that_is_gone_are_not_done() -> None:
    """A reset that only the front end knows of, and it brings the old file: nothing was offered, nothing is done."""
    _, memory = region(SIZE, last=4, used=9, entries={4: entry(1, 0, 5)})
    description, fd = inflight_file(bytes(memory))
    with FrontEnd(Blk(MemoryStore(bytearray(64 * SECTOR)))) as end:
        end.negotiate(PLAIN)
        end.ok(Request.SET_INFLIGHT_FD, description.encode(), (fd,))
        end.start()
        end.work()
        assert (end.used(), end.host.rings[0].broken) == (0, "")
        assert os.pread(fd, 1, 16 + 16 * 4) == b"\0"
    os.close(fd)


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.SET_STATUS])
def test_a_reset_lets_go_of_the_file_and_leaves_it_as_it_is(request_: Request) -> None:
    """QEMU writes status 0 when it pauses the machine, too, and brings the same file when that goes on."""
    _, memory = region(SIZE, last=4, used=0, entries={4: entry(1, 0, 5)})
    description, fd = inflight_file(bytes(memory))
    with FrontEnd(Blk(MemoryStore(bytearray(64 * SECTOR)))) as end:
        end.negotiate(PLAIN)
        end.ok(Request.SET_INFLIGHT_FD, description.encode(), (fd,))
        end.ok(request_, wire.u64(0) if request_ == Request.SET_STATUS else b"")
        assert end.host.rings[0].inflight is None
        assert os.pread(fd, len(memory), 0) == memory
    os.close(fd)


def test_a_ring_that_is_stopped_before_what_was_left_is_done_gives_it_back() -> None:
    """Its pages are not known yet. Whoever goes on without the file takes the request from the ring again."""
    _, memory = region(SIZE, last=0, used=0, entries={0: entry(1, 0, 5)})
    description, fd = inflight_file(bytes(memory))
    with FrontEnd(Blk(MemoryStore(bytearray(64 * SECTOR)))) as end:
        end.negotiate(WITH_BIT)
        end.ok(Request.SET_INFLIGHT_FD, description.encode(), (fd,))
        end.start()
        end.offer((end.dma(DATA), 16, False), (end.dma(STATUS), 1, True))
        end.map(RING)
        end.map(USED)
        assert {miss.iova & 0xFFFF for miss in end.work()} == {DATA, STATUS}
        assert end.host.counters.resumed == 1
        (answer,) = end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert VringState.decode(answer.payload).value == 0
    os.close(fd)


@pytest.mark.parametrize("features", [PLAIN, PLAIN | EVENTS])
def test_a_new_call_descriptor_is_told_of_what_the_old_one_was(features: int) -> None:
    """Front ends start a ring with one that nobody listens to, and set the driver's own afterwards."""
    with FrontEnd(Blk(MemoryStore(bytearray(64 * SECTOR)))) as end:
        end.negotiate(features)
        end.start()
        end.work()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(end.call)
        end.offer((end.dma(DATA), 16, False), (end.dma(STATUS), 1, True))
        end.work()
        assert (end.used(), os.eventfd_read(end.call)) == (1, 1)
        other = os.eventfd(0, os.EFD_NONBLOCK)
        end.ok(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (other,))
        end.work()
        assert os.eventfd_read(other) == 1
        if features & EVENTS:
            end.put(RING + SplitLayout(SIZE).avail + 4 + 2 * SIZE, struct.pack("<H", 1))
            end.ok(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (other,))
            end.work()
            with pytest.raises(BlockingIOError):
                os.eventfd_read(other)
        os.close(other)


@pytest.mark.parametrize("reset", [False, True])
def test_status_0_is_not_the_end_of_a_ring(reset: bool) -> None:
    """QEMU 7.2 writes it first and asks for the index then, whether the machine pauses, migrates, or is reset."""
    blk = Blk(MemoryStore(bytearray(64 * SECTOR)))
    with FrontEnd(blk) as end:
        end.negotiate(PLAIN | 1 << Bit.CONFIG_WCE | 1 << Bit.FLUSH)
        end.start()
        end.ok(Request.SET_CONFIG, ConfigSpace(WRITEBACK_AT, 0, b"\0").encode())
        end.offer((end.dma(DATA), 16, False), (end.dma(STATUS), 1, True))
        end.work()
        end.ok(Request.RESET_DEVICE) if reset else end.ok(Request.SET_STATUS, wire.u64(0))
        assert not end.host.rings[0].live
        assert blk.config()[WRITEBACK_AT] == int(reset)
        (answer,) = end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert VringState.decode(answer.payload).value == (0 if reset else 1)
