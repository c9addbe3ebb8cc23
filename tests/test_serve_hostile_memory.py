# SPDX-License-Identifier: Apache-2.0
"""Hostile front ends at the socket of a real server: their memory, their IOMMU, their rings. It stays, and the
next one is served."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile_kit import LiveFrontEnd, Served, served, wait_for_fds
from serve_kit import GPA_BASE, PAGE, PLAIN, RAM, SIZE, UVA_BASE, WITH_BIT
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    MemoryRegion,
    Message,
    Request,
    VringAddr,
    VringState,
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all of these tests: what one leaves behind, the next would notice."""
    with served(tmp_path_factory.mktemp("hostile"), "blk", "--memory", "1M", "--num-queues", "2") as server:
        yield server


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Served]:
    """A server of its own, for those who read its log: of that there is only so much."""
    with served(tmp_path, "blk", "--memory", "1M", "--num-queues", "2") as server:
        yield server
        server.serves()


@pytest.fixture
def bad(live: Served) -> Iterator[LiveFrontEnd]:
    """A front end up to no good. Behind it comes one that is served, and no descriptor is left."""
    before = live.costs().fds
    with live.front_end() as front_end:
        yield front_end
    live.serves()
    wait_for_fds(live, before)


def iotlb(iova: int, size: int, uaddr: int, perm: int = 3, kind: int = IotlbKind.UPDATE) -> bytes:
    return struct.pack("<QQQBB6x", iova, size, uaddr, perm, kind)


# -- memory


def region_numbers() -> Iterator[tuple[int, int, int, int]]:
    """GPA, size, user address, offset: none of them can be, beside the region that is there."""
    yield GPA_BASE, PAGE, 0, 0
    yield GPA_BASE - PAGE, 2 * PAGE, 0, 0
    yield 0, PAGE, UVA_BASE + RAM - PAGE, 0
    yield (1 << 64) - PAGE, 2 * PAGE, 0, 0
    yield 0, 2 * PAGE, (1 << 64) - PAGE, 0
    yield 0, PAGE, 0, (1 << 64) - PAGE
    yield 0, PAGE, 0, (1 << 63) - PAGE
    yield 0, RAM + PAGE, 0, 0
    yield 0, PAGE, 0, RAM
    yield 0, (1 << 64) - PAGE, 0, 0
    yield 0, 0, 0, 0
    yield 1, PAGE, 0, 0
    yield 0, PAGE, 0, 1


def test_regions_that_cannot_be(live: Served, bad: LiveFrontEnd) -> None:
    bad.ready()
    for gpa, size, uva, offset in region_numbers():
        region = MemoryRegion(GPA(gpa), size, UVA(uva), offset)
        (answer,) = bad.send(Request.ADD_MEM_REG, region.encode_single(), (bad.file,), ack=True)
        assert answer.payload == wire.u64(1), region
    assert bad.read_sector() == 0


@pytest.mark.parametrize("how", ["read-only", "sealed"])
def test_memory_that_cannot_be_written(fresh: Served, how: str) -> None:
    with fresh.front_end() as bad:
        import fcntl

        if how == "sealed":
            fcntl.fcntl(bad.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            fd = os.dup(bad.file)
        else:
            fd = os.open(f"/proc/self/fd/{bad.file}", os.O_RDONLY)
        assert bad.send(Request.GET_PROTOCOL_FEATURES)
        bad.send(Request.SET_PROTOCOL_FEATURES, wire.u64(1 << 3))
        table = wire.encode_table([bad.region()])
        assert bad.send(Request.SET_MEM_TABLE, table, (fd,), ack=True)[0].payload == wire.u64(1)
        os.close(fd)
        fresh.said("cannot map its file for reading and writing")


@pytest.mark.parametrize("bit", [False, True], ids=["without the bit", "with it"])
def test_a_file_that_shrinks_under_a_running_ring(fresh: Served, bit: bool) -> None:
    with fresh.front_end() as bad:
        bad.ready(WITH_BIT if bit else PLAIN)
        assert bad.read_sector() == 0
        os.ftruncate(bad.file, 0)
        bad.kick()
        bad.wait_err()
        fresh.said("shortened its memory")
        # It is still there, and listens.
        assert bad.send(Request.GET_QUEUE_NUM)[0].payload == wire.u64(2)


# -- IOTLB


def test_updates_of_what_does_not_exist(live: Served, bad: LiveFrontEnd) -> None:
    bad.ready()
    top = (1 << 64) - PAGE
    for payload, ok in (
        (iotlb(top, PAGE, UVA_BASE), True),
        (iotlb(top, 2 * PAGE, UVA_BASE), False),
        (iotlb(0, PAGE, UVA_BASE - PAGE), False),
        (iotlb(0, PAGE, UVA_BASE + RAM), False),
        (iotlb(0, RAM + PAGE, UVA_BASE), False),
        (iotlb(0, (1 << 64) - 1, 0), False),
        (iotlb(0, PAGE, top + 1), False),
        (iotlb(0, 0, UVA_BASE), False),
        (iotlb(0, PAGE, UVA_BASE, 4), False),
        (iotlb(0, PAGE, UVA_BASE, 3, 1), False),
        (iotlb(0, PAGE, UVA_BASE, 3, 4), False),
        (iotlb(0, PAGE, UVA_BASE, 3, 0), False),
        (iotlb(0, PAGE, UVA_BASE, 3, 255), False),
        (iotlb(5, 7, UVA_BASE + 3), True),
        (iotlb(top, PAGE, 0, 0, IotlbKind.INVALIDATE), True),
        (iotlb(0, 0, 0, 0, IotlbKind.INVALIDATE), True),
        (b"", False),
        (bytes(25), False),
        (bytes(33), False),
    ):
        (answer,) = bad.send(Request.IOTLB_MSG, payload, ack=True)
        assert answer.payload == wire.u64(0 if ok else 1), payload.hex()


@pytest.mark.sweep
def test_no_end_of_updates(live: Served, bad: LiveFrontEnd) -> None:
    """Each of another page, more than are kept."""
    bad.ready()
    before = live.costs().rss_kib
    count = 150_000
    for start in range(0, count, 500):
        messages = b"".join(
            Message(
                Request.IOTLB_MSG,
                IotlbMessage(IOVA(2 * page * PAGE), PAGE, UVA(UVA_BASE), Access.RW, IotlbKind.UPDATE).encode(),
            ).encode()
            for page in range(start, start + 500)
        )
        bad.sock.sendall(messages)
        bad.send(Request.GET_FEATURES)
    assert live.costs().rss_kib - before < 80 << 10
    assert bad.read_sector() == 0


def test_misses_that_nobody_answers_are_asked_once(live: Served, bad: LiveFrontEnd) -> None:
    """Whatever the front end says of other pages meanwhile: the ring is looked at again, and its parts still miss."""
    bad.negotiate()
    bad.start()
    bad.kick()
    for _ in range(300):
        bad.map(0x100000)
    assert bad.send(Request.GET_QUEUE_NUM)
    miss = len(Message(1, iotlb(0, 0, 0)).encode())
    assert miss <= len(bad.back.recv(1 << 16)) <= 4 * miss


# -- rings


@pytest.mark.parametrize(
    "size",
    [0, 3, 7, 65535, 65536, 1 << 31, 0xFFFFFFFF],
)
def test_sizes_of_rings(live: Served, bad: LiveFrontEnd, size: int) -> None:
    bad.negotiate()
    (answer,) = bad.send(Request.SET_VRING_NUM, VringState(0, size).encode(), ack=True)
    assert answer.payload == wire.u64(1)


@pytest.mark.parametrize("features", [PLAIN, WITH_BIT], ids=["user addresses", "IOVAs"])
@pytest.mark.parametrize("where", [1, 3, 0xFFF, (1 << 64) - 16, (1 << 64) - 1, 0, 1 << 63])
def test_addresses_of_rings(live: Served, bad: LiveFrontEnd, where: int, features: int) -> None:
    """A ring that cannot be is stopped, or waits for ever; the other one is served."""
    bad.ready(features, rings=2)
    for desc, used, avail in ((where, 0, 0), (0, where, 0), (0, 0, where)):
        address = VringAddr(1, 0, desc, used, avail, 0)
        bad.send(Request.SET_VRING_ADDR, address.encode(), ack=True)
        bad.send(Request.SET_VRING_KICK, wire.encode_vring_fd(1, True), (bad.kicks[1],), ack=True)
        bad.kick(1)
        assert bad.send(Request.GET_QUEUE_NUM)
    assert bad.send(Request.GET_VRING_BASE, VringState(1, 0).encode())
    assert bad.read_sector() == 0


def test_a_storm_of_kicks(live: Served, bad: LiveFrontEnd) -> None:
    """/dev/zero would be one without end, and is refused; a pipe that is always full is not."""
    bad.ready(rings=2)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    bad.ok(Request.SET_VRING_KICK, wire.encode_vring_fd(1, True), (ours,))
    try:
        for _ in range(50):
            with contextlib.suppress(BlockingIOError):
                os.write(theirs, bytes(1 << 16))
            assert bad.read_sector() == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_descriptors_that_wait(live: Served, bad: LiveFrontEnd) -> None:
    """A call that is full, a kick and a channel that wait: all made to after the server had them."""
    bad.ready()
    for fd in (bad.kicks[0], bad.call, bad.theirs.fileno()):
        os.set_blocking(fd, True)
    for _ in range(3):
        assert bad.read_sector() == 0
        os.set_blocking(bad.theirs.fileno(), True)
    os.eventfd_write(bad.call, (1 << 64) - 2 - 3)
    os.set_blocking(bad.call, True)
    bad.put(0, b"")
    for _ in range(5):
        assert bad.read_sector() == 0


@pytest.mark.parametrize("flag", [0, 1, 0xFF])
@pytest.mark.parametrize("counter", [(1 << 64) - 1, 1 << 63, 0])
def test_notes_of_what_is_in_flight_that_lie(live: Served, bad: LiveFrontEnd, counter: int, flag: int) -> None:
    """All that such a file says is the front end's to write: the ring may be stopped, no more."""
    file = os.memfd_create("inflight")
    entry = struct.pack("<B5xHQ", flag, 0xFFFF, counter)
    os.write(file, struct.pack("<QHHHH", (1 << 64) - 1, 1, SIZE, 0xFFFF, 0) + entry * SIZE)
    os.ftruncate(file, PAGE)
    bad.negotiate()
    bad.ok(Request.SET_INFLIGHT_FD, InflightDescription(PAGE, 0, 1, SIZE).encode(), (file,))
    os.close(file)
    bad.start()
    if flag != 1:
        # Nothing is unfinished, so the ring is served, and the request noted.
        assert bad.read_sector() == 0
    else:
        bad.kick()
        bad.answer_misses(0.2)
    assert bad.send(Request.GET_QUEUE_NUM)


def test_files_of_what_is_in_flight_without_end(live: Served, bad: LiveFrontEnd) -> None:
    bad.ready()
    before = live.costs()
    for _ in range(20):
        bad.raw(Message(Request.GET_INFLIGHT_FD, InflightDescription(0, 0, 2, 32768).encode()).encode())
        os.close(bad.reply().fds[0])
    after = live.costs()
    wait_for_fds(live, before.fds)
    assert after.maps <= before.maps + 2
    assert after.rss_kib - before.rss_kib < 8 << 10
