# SPDX-License-Identifier: Apache-2.0
"""A disk's engine whose file makes it wait: by io_uring, with bytes of its own, and nothing of a guest's held on to."""

from __future__ import annotations

import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_kit import PAGE, World, forget
from virtiova import _core
from virtiova.device.blk import MAX_DATA, SECTOR
from virtiova.device.store import FileStore

SIZE = 1 << 20
HEADERS, STATUSES, DATA = 2 * PAGE, 3 * PAGE, 4
"""Offsets of headers and statuses, and the first page of data: request number n has its own of each."""
IN, OUT, FLUSH = 0, 1, 4


class Bench:
    """A disk image of random sectors, its engine, and a driver."""

    def __init__(self, path: Path, *, always: bool = True, size: int = 64) -> None:
        self.image = random.Random(1).randbytes(SIZE)
        path.write_bytes(self.image)
        self.file = path.open("r+b", buffering=0)
        self.disk = _core.Disk(SIZE, MAX_DATA, fd=self.file.fileno(), uring=True)
        self.disk.may_write = True
        self.disk.always_later = always
        self.world = World(size=size)

    def close(self) -> None:
        self.disk.close()
        self.world.close()
        self.file.close()

    def ask(self, number: int, kind: int, sector: int = 0, pages: int = 1, data: bytes = b"") -> int:
        """Request ``number``: whole pages, or whatever ``data`` there is, up to one page; the head."""
        world = self.world
        world.put(HEADERS + 16 * number, struct.pack("<IIQ", kind, 0, sector))
        world.put(STATUSES + number, b"\xee")
        places = [(DATA + number * pages + at) * PAGE for at in range(pages)]
        if kind == OUT:
            world.put(places[0], data)
            middle = [(places[0], len(data), False)]
        else:
            middle = [(place, PAGE, True) for place in places] if kind == IN else []
        return world.offer((HEADERS + 16 * number, 16, False), *middle, (STATUSES + number, 1, True))

    def data(self, number: int, pages: int = 1) -> bytes:
        return b"".join(self.world.get((DATA + number * pages + at) * PAGE, PAGE) for at in range(pages))

    def status(self, number: int) -> int:
        return self.world.get(STATUSES + number, 1)[0]

    def step(self, budget: int = 64) -> int:
        return self.disk.step(self.world.drain, budget)[0]

    def wait(self) -> int:
        """Step until it says something else than that it is waiting for the kernel."""
        while (outcome := self.step()) in (_core.EMPTY, _core.WAIT):
            assert select.select([self.disk.fd], [], [], 10)[0], "the kernel never told"
        return outcome

    def finish(self, count: int) -> None:
        """Step until so many are given back, sleeping as a worker does."""
        for _ in range(1000):
            outcome = self.step()
            assert outcome != _core.HELP
            if len(self.world.used) >= count:
                return
            assert self.disk.begun, "nothing is under way, and something is missing"
            assert select.select([self.disk.fd], [], [], 10)[0], "the kernel never told"
        raise AssertionError("no end")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "disk.img")
    yield bench
    bench.close()


def test_what_has_to_wait_does_not_wait_here(bench: Bench) -> None:
    head = bench.ask(0, IN, 8)
    assert bench.step() == _core.EMPTY
    assert bench.disk.begun == 1 or bench.world.used
    bench.finish(1)
    assert bench.world.used == [(head, PAGE + 1)]
    assert (bench.status(0), bench.data(0)) == (0, bench.image[8 * SECTOR :][:PAGE])
    assert bench.disk.begun == 0


def test_many_at_a_time_in_any_order(bench: Bench) -> None:
    heads = [bench.ask(number, IN, 8 * number, pages=2) for number in range(12)]
    bench.finish(12)
    assert sorted(head for head, _ in bench.world.used) == sorted(heads)
    for number in range(12):
        assert bench.data(number, 2) == bench.image[8 * number * SECTOR :][: 2 * PAGE]
        assert bench.status(number) == 0


def test_a_cold_file_is_not_waited_for(tmp_path: Path) -> None:
    """What is in the page cache is there at once, and what is not comes later; either way the bytes are right."""
    bench = Bench(tmp_path / "cold.img", always=False)
    forget(bench.file.fileno())
    for number in range(8):
        bench.ask(number, IN, 160 * number)
    bench.finish(8)
    assert all(bench.data(number) == bench.image[160 * number * SECTOR :][:PAGE] for number in range(8))
    bench.close()


def test_writes_and_a_flush(bench: Bench) -> None:
    bench.ask(0, OUT, 16, data=b"w" * 1024)
    bench.finish(1)
    bench.ask(1, FLUSH)
    bench.finish(2)
    assert (bench.status(0), bench.status(1)) == (0, 0)
    assert [length for _, length in bench.world.used] == [1, 1]
    assert os.pread(bench.file.fileno(), 2048, 16 * SECTOR) == b"w" * 1024 + bench.image[18 * SECTOR :][:1024]


def test_what_the_driver_writes_afterwards_is_not_written(bench: Bench) -> None:
    bench.ask(0, OUT, 0, data=b"a" * PAGE)
    bench.step()
    bench.world.put(DATA * PAGE, b"b" * PAGE)
    bench.finish(1)
    assert os.pread(bench.file.fileno(), PAGE, 0) == b"a" * PAGE


def test_a_page_that_is_taken_away_meanwhile_is_not_written(bench: Bench) -> None:
    """The promise: the bytes are there, and the page is not the driver's any more. Python is left the request."""
    head = bench.ask(0, IN)
    bench.step(1)
    bench.world.unmap(DATA)
    bench.world.put(DATA * PAGE, b"free" * (PAGE // 4))
    outcome = bench.wait()
    assert outcome == _core.HELP
    assert bench.step(0) == _core.GOT
    assert (bench.disk.begun, bench.disk.left(), bench.disk.left()) == (0, [(head, bench.image[:PAGE])], [])
    assert bench.data(0) == b"free" * (PAGE // 4)
    assert (bench.world.used, bench.status(0)) == ([], 0xEE)
    assert bench.world.drain.taken == 0


def test_a_page_that_is_another_one_by_then(bench: Bench) -> None:
    bench.ask(0, IN, 8)
    bench.step(1)
    bench.world.unmap(DATA)
    bench.world.map(DATA, to=DATA + 9)
    bench.finish(1)
    assert bench.data(9) == bench.image[8 * SECTOR :][:PAGE]
    assert bench.data(0) == bytes(PAGE)


@pytest.mark.parametrize("change", ["shorter", "loop", "read only", "no status"])
def test_a_chain_that_is_changed_meanwhile(bench: Bench, change: str) -> None:
    """A driver that rewrites its descriptors gets no byte where it may not, and its request is Python's."""
    head = bench.ask(0, IN)
    bench.step(1)
    at = 16 * 1
    desc = bytearray(bench.world.get(at, 16))
    match change:
        case "shorter":
            desc[8:12] = struct.pack("<I", 512)
        case "loop":
            desc[14:16] = struct.pack("<H", 1)
        case "read only":
            desc[12:14] = struct.pack("<H", 1)
        case "no status":
            desc[12:14] = struct.pack("<H", 0)
    bench.world.put(at, bytes(desc))
    outcome = bench.wait()
    bench.step(0)
    assert (outcome, bench.disk.left()) == (_core.HELP, [(head, bench.image[:PAGE])])
    assert bench.data(0) == bytes(PAGE)


def test_a_file_that_became_shorter(bench: Bench) -> None:
    """Half of the bytes are there, and then the file ends: nothing is given back as if it were read."""
    bench.file.truncate(SIZE - PAGE)
    heads = [bench.ask(0, IN, (SIZE - 2 * PAGE) // SECTOR, pages=2), bench.ask(3, IN, (SIZE - PAGE) // SECTOR)]
    good = bench.ask(10, IN, 0)
    outcome = bench.wait()
    while bench.disk.begun:
        bench.step(0)
    assert outcome == _core.HELP
    found = bench.disk.left()
    assert all(data is None for _, data in found), "not done"
    left = [head for head, _ in found]
    assert sorted((*left, *(head for head, _ in bench.world.used))) == sorted((*heads, good))
    assert left == sorted(left), "in the order in which they were taken"
    assert good not in left
    assert bench.data(3) == bytes(PAGE)


def test_a_queue_that_is_full_waits_for_the_file_alone(bench: Bench) -> None:
    """16 MiB of our memory at most, whatever the driver asks for: here 20 times 1 MiB, all into one page."""
    world, far = bench.world, 0x8_0000_0000
    for page in range(SIZE // PAGE):
        first = far + page * PAGE
        assert world.radix.fill(first, first, first + PAGE - 1, world.window, DATA * PAGE, 3)
    world.put(HEADERS, struct.pack("<IIQ", IN, 0, 0))
    for _ in range(20):
        world.offer_at((world.dma(HEADERS), 16, False), (far, SIZE, True), (world.dma(STATUSES), 1, True))
    outcomes, most = set(), 0
    while len(world.used) < 20:
        outcomes.add(bench.step())
        most = max(most, bench.disk.begun)
        if bench.disk.begun:
            assert select.select([bench.disk.fd], [], [], 10)[0]
    assert _core.HELP not in outcomes
    assert _core.WAIT in outcomes
    assert most == 16
    assert bench.data(0) == bench.image[-PAGE:]


def test_a_push_that_finds_no_room_is_not_unseen(tmp_path: Path) -> None:
    """The used ring lies in two pages, and the next element in the one that is gone; the one behind it is there."""
    ours, file = socket.socketpair()
    world = World()
    disk = _core.Disk(SIZE, MAX_DATA, fd=file.fileno(), uring=True)
    used = 2 * PAGE - (4 + 8 * 60)
    drain = _core.Drain(
        world.radix, world.dma(0), world.dma(world.layout.avail), world.dma(used), 64, event_idx=False, indirect=False
    )
    # The second page has no other part of the ring; the last elements are in the page behind it, which is made here.
    first = world.dma(PAGE) + PAGE
    world.radix.fill(first, first, first + PAGE - 1, world.window, 50 * PAGE, 3)
    drain.state, world.available = (63, 63, 0), 63
    world.put(HEADERS, struct.pack("<IIQ", IN, 0, 0))
    world.put(STATUSES, b"\xee\xee")
    disk.always_later = True
    head = world.offer((HEADERS, 16, False), (DATA * PAGE, SECTOR, True), (STATUSES, 1, True))
    assert disk.step(drain)[0] == _core.EMPTY
    world.radix.drop(first, first + PAGE - 1)
    # One that is done at once, since there is nothing to be read.
    disk.always_later = False
    world.offer((HEADERS, 16, False), (STATUSES + 1, 1, True))
    assert disk.step(drain)[:2] == (_core.WAIT, 0), "not done, and Python's once nothing is under way"
    assert (drain.taken, drain.state[:2]) == (1, (64, 63))
    ours.send(bytes(SECTOR))
    assert select.select([disk.fd], [], [], 10)[0]
    assert disk.step(drain)[0] == _core.HELP
    assert disk.step(drain, 0)[0] == _core.GOT
    assert (drain.taken, disk.left()) == (0, [(head, bytes(SECTOR))])
    disk.close()
    world.close()
    ours.close()
    file.close()


def test_a_file_that_cannot_say_whether_it_waits(tmp_path: Path) -> None:
    """No RWF_NOWAIT: then all goes later, and nothing is waited for under the gate. Here waiting is an error."""
    path = tmp_path / "disk.img"
    program = f"""
        import ctypes, errno, pathlib
        import test_uring
        library = ctypes.CDLL("libseccomp.so.2")
        library.seccomp_init.restype = ctypes.c_void_p

        class Compare(ctypes.Structure):
            _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))

        bench = test_uring.Bench(pathlib.Path({str(path)!r}), always=False)
        context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
        for name in (b"preadv2", b"pwritev2"):
            number = library.seccomp_syscall_resolve_name(name)
            for flags, problem in ((8, errno.EOPNOTSUPP), (0, errno.EIO)):
                compare = (Compare * 1)(Compare(5, 4, flags, 0))
                assert not library.seccomp_rule_add_array(context, 0x00050000 | problem, number, 1, compare)
        assert not library.seccomp_load(context)
        for number, kind in enumerate((test_uring.IN, test_uring.OUT, test_uring.IN, test_uring.OUT)):
            bench.ask(number, kind, 8 * number, data=b"w" * 4096)
        bench.finish(4)
        assert bench.data(2) == bench.image[16 * 512:][:4096]
        assert [bench.status(number) for number in range(4)] == [0, 0, 0, 0]
        """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, timeout=30, check=True)


def test_a_file_in_memory_never_waits() -> None:
    """It does not know RWF_NOWAIT either, but there is nothing to wait for: no way round by bytes of our own."""
    file = os.memfd_create("disk")
    os.ftruncate(file, SIZE)
    disk = _core.Disk(SIZE, MAX_DATA, fd=file, uring=True)
    world = World()
    world.put(HEADERS, struct.pack("<IIQ", IN, 0, 0))
    world.offer((HEADERS, 16, False), (DATA * PAGE, SECTOR, True), (STATUSES, 1, True))
    assert disk.step(world.drain)[1] == 1
    assert disk.begun == 0
    disk.close()
    world.close()
    os.close(file)


def test_a_file_that_says_again_for_ever() -> None:
    """What is not to wait, and cannot say whether it would, fails by io_uring each time: Python's, and not a loop."""
    file = os.memfd_create("disk")
    os.ftruncate(file, SIZE)
    disk = _core.Disk(SIZE, MAX_DATA, fd=file, uring=True)
    os.set_blocking(file, False)
    disk.always_later = True
    world = World()
    world.put(HEADERS, struct.pack("<IIQ", IN, 0, 0))
    head = world.offer((HEADERS, 16, False), (DATA * PAGE, SECTOR, True), (STATUSES, 1, True))
    looks = 0
    while disk.step(world.drain)[0] != _core.HELP:
        looks += 1
        assert looks < 1000
        assert select.select([disk.fd], [], [], 10)[0]
    disk.step(world.drain, 0)
    assert disk.left() == [(head, None)]
    disk.close()
    world.close()
    os.close(file)


def test_a_store_in_memory_by_io_uring() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image:
        image.write(random.Random(2).randbytes(SIZE))
        image.flush()
        with FileStore(image.name, uring="all") as store:
            disk = store.disk(MAX_DATA)
            world = World()
            world.put(HEADERS, struct.pack("<IIQ", IN, 0, 8))
            world.offer((HEADERS, 16, False), (DATA * PAGE, SECTOR, True), (STATUSES, 1, True))
            while not world.used:
                assert disk.step(world.drain)[0] == _core.EMPTY
            assert world.get(DATA * PAGE, SECTOR) == store.read(8 * SECTOR, SECTOR)
            world.close()


def test_the_file_may_be_closed_with_something_under_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk.img")
    for number in range(8):
        bench.ask(number, IN, 100 * number)
    bench.step()
    bench.close()


def test_where_there_is_none(tmp_path: Path) -> None:
    """Forbidden, as in most containers: it is said why, and all goes on without, unless all was to go by it."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    program = f"""
        import ctypes, errno, os
        from virtiova.device.store import FileStore
        from virtiova.errors import NotPossibleError
        library = ctypes.CDLL("libseccomp.so.2")
        library.seccomp_init.restype = ctypes.c_void_p
        context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
        number = library.seccomp_syscall_resolve_name(b"io_uring_setup")
        assert not library.seccomp_rule_add_array(context, 0x00050000 | errno.EPERM, number, 0, None)
        assert not library.seccomp_load(context)
        with FileStore({str(path)!r}, uring="waiting") as store:
            print(store.disk(1 << 20).uring, store.how)
        with FileStore({str(path)!r}, uring="all") as store:
            try:
                store.disk(1 << 20)
            except NotPossibleError as problem:
                print(problem)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("False no io_uring (Operation not permitted)")
    assert second == "no io_uring: Operation not permitted"


def test_a_file_that_is_none() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.Disk(SIZE, MAX_DATA, fd=999_999, uring=True)


def test_the_lock_goes_with_the_store(tmp_path: Path) -> None:
    """The kernel's side holds the file, too: it lets go of it with us."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    for _ in range(2):
        with FileStore(path, uring="waiting") as store:
            assert store.disk(MAX_DATA).uring


def test_rings_that_anybody_may_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a front end could hand over a ring that nobody has restricted, the sandbox is not opened for ours."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    monkeypatch.setattr("virtiova.device.store.uring_travels", lambda: True)
    with FileStore(path, uring="waiting") as store:
        assert not store.disk(MAX_DATA).uring
        assert "no io_uring (this kernel lets others send rings" in store.how
    with FileStore(path, uring="all") as store:
        assert store.disk(MAX_DATA).uring


def test_whether_rings_travel() -> None:
    """What is said of this kernel is so."""
    travels = _core.uring_travels()
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    assert not (travels and release >= (6, 7))
    assert travels in (False, True)
