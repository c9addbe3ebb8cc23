# SPDX-License-Identifier: Apache-2.0
"""Hostile drivers on the rings of a real server: an error, or a stopped ring with a line in the log; others go on."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hostile_kit import DATA, HEADER, SECONDS, STATUS, LiveFrontEnd, Served, served
from serve_kit import GPA_BASE, PAGE, PLAIN, RAM, RING, SIZE, USED, WITH_BIT
from virtiova.addr import Access
from virtiova.features import Feature
from virtiova.ring.layout import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Request

INDIRECT = 1 << Feature.RING_INDIRECT_DESC
AVAIL = RING + SplitLayout(SIZE).avail
TABLE = 0xC000
OUTSIDE = 1 << 46
BITS = pytest.mark.parametrize("features", [PLAIN, WITH_BIT], ids=["without the bit", "with it"])


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, "blk", "--memory", "1M", "--num-queues", "2") as server:
        yield server
        server.serves()


class Chain(NamedTuple):
    """What a driver puts into the descriptor table and into an indirect one; what the log says of it."""

    name: str
    ring: list[Desc]
    table: list[Desc]
    line: str


def senseless(bad: LiveFrontEnd) -> Iterator[Chain]:
    here, there, header = bad.dma(DATA), bad.dma(TABLE), bad.dma(HEADER)
    more, write, indirect = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT

    def through(*table: Desc, length: int = 0) -> tuple[list[Desc], list[Desc]]:
        return [Desc(there, length or 16 * len(table), indirect, 0)], list(table)

    yield Chain("a loop", [Desc(here, 16, more, 1), Desc(here, 16, more, 0)], [], "a loop")
    yield Chain("itself", [Desc(here, 16, more, 0)], [], "a loop")
    yield Chain("next behind the table", [Desc(here, 16, more, SIZE)], [], "next 8, wanted less than 8")
    yield Chain("next far behind", [Desc(here, 16, more, 65535)], [], "next 65535")
    yield Chain("order", [Desc(here, 16, more | write, 1), Desc(here, 16, 0, 0)], [], "readable after writable")
    yield Chain("5 GiB", [Desc(here, 0xFFFFFFFF, more, 1), Desc(here, 2, 0, 0)], [], "wanted at most 2**32")
    yield Chain("twice indirect", *through(Desc(there, 16, indirect, 0)), "indirect")
    yield Chain("indirect and next", [Desc(there, 16, indirect | more, 1)], [Desc(here, 16, 0, 0)], "indirect")
    yield Chain("an empty table", *through(length=0), "indirect")
    yield Chain("a table with a rest", *through(Desc(here, 16, 0, 0), length=17), "indirect")
    yield Chain("a table of 4 GiB", *through(Desc(here, 16, 0, 0), length=0xFFFFFFF0), "")
    yield Chain("a loop in a table", *through(Desc(here, 1, more, 1), Desc(here, 1, more, 0)), "a loop")
    yield Chain("next behind a table", *through(Desc(here, 1, more, 1)), "next 1, wanted less than 1")
    yield Chain("no status", [Desc(header, 16, 0, 0)], [], "wanted a header of 16 and a status of 1")
    yield Chain("half a header", [Desc(header, 15, more, 1), Desc(here, 1, write, 0)], [], "wanted a header of 16")
    yield Chain("no bytes", [Desc(here, 0, more, 1), Desc(here, 0, write, 0)], [], "wanted a header of 16")


def publish(bad: LiveFrontEnd, index: int, head: int = 0) -> None:
    """The available index, with the same head everywhere."""
    bad.put(AVAIL + 4, struct.pack("<H", head) * SIZE)
    bad.put(AVAIL + 2, struct.pack("<H", index))
    bad.kick()


def stopped(live: Served, bad: LiveFrontEnd, line: str) -> None:
    """Ring 0 is stopped: the front end is told, the log says why; ring 1 goes on; set up again, so does ring 0."""
    before = live.log.count("ring 0 is stopped")
    end = time.monotonic() + SECONDS
    while not select.select([bad.err], [], [], 0)[0]:
        assert time.monotonic() < end, "nothing was told"
        bad.answer_misses()
    os.eventfd_read(bad.err)
    said = [each for each in live.log.splitlines() if "ring 0 is stopped" in each]
    assert len(said) >= max(before, 1)
    assert line in said[-1]
    assert bad.read_sector(index=1) == 0
    bad.send(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    bad.put(RING, bytes(USED + PAGE - RING))
    bad.start()
    assert bad.read_sector() == 0
    bad.send(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    bad.put(RING, bytes(USED + PAGE - RING))
    bad.start()


@BITS
def test_chains_without_meaning(live: Served, features: int) -> None:
    with live.front_end() as bad:
        bad.ready(features | INDIRECT, rings=2)
        for name, ring, table, line in senseless(bad):
            bad.put(RING, b"".join(desc.pack() for desc in ring))
            bad.put(TABLE, b"".join(desc.pack() for desc in table))
            publish(bad, 1)
            try:
                stopped(live, bad, line)
            except AssertionError as error:
                raise AssertionError(name) from error


@BITS
@pytest.mark.parametrize("index", [SIZE + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_an_index_that_jumps(live: Served, features: int, index: int) -> None:
    with live.front_end() as bad:
        bad.ready(features, rings=2)
        publish(bad, index)
        stopped(live, bad, "and at most 8 more")


@BITS
@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_a_head_that_does_not_exist(live: Served, features: int, head: int) -> None:
    with live.front_end() as bad:
        bad.ready(features, rings=2)
        publish(bad, 1, head)
        stopped(live, bad, f"head {head}, wanted less than 8")


# -- requests that fail, and the ring goes on


def buffers(bad: LiveFrontEnd, features: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, request, address and length of a buffer that cannot be used."""
    top = (1 << 64) - 512
    for kind in (0, 1):
        yield "past every mapping", kind, OUTSIDE, 512
        yield "the top of all addresses", kind, top, 512
        yield "over the top", kind, top + 256, 512
        yield "past the end of memory", kind, bad.dma(RAM - 256), 512
        yield "longer than a request may be", kind, bad.dma(0), 0xFFFFFE00
        yield "past the end of the disk", kind, bad.dma(0), 1 << 20
    if features == WITH_BIT:
        yield "a guest-physical address", 0, GPA_BASE, 512
        yield "read-only", 0, bad.dma(0x40000), 512
        yield "write-only", 1, bad.dma(0x41000), 512
        yield "half of it read-only", 0, bad.dma(0x40000 - 256), 512


@BITS
def test_buffers_that_may_not_be_touched(live: Served, features: int) -> None:
    """An error status, and not one byte is written; the next request is served."""
    with live.front_end() as bad:
        bad.ready(features, rings=2)
        bad.refuses = {0x40000, 0x41000}
        canary = os.urandom(RAM - 0x20000)
        for name, kind, address, length in buffers(bad, features):
            bad.put(0x20000, canary)
            if features == WITH_BIT:
                bad.map(0x40000, access=Access.READ)
                bad.map(0x41000, access=Access.WRITE)
            bad.put(HEADER, struct.pack("<IIQ", kind, 0, 1))
            bad.put(STATUS, b"\xff")
            want = bad.used() + 1
            bad.offer((bad.dma(HEADER), 16, False), (address, length, kind == 0), (bad.dma(STATUS), 1, True))
            bad.wait_used(want)
            assert bad.get(STATUS, 1) == b"\1", name
            assert bad.get(0x20000, len(canary)) == canary, name
            assert bad.read_sector(index=1) == 0
        assert "is stopped" not in live.log


@BITS
def test_a_status_that_cannot_be_written(live: Served, features: int) -> None:
    with live.front_end() as bad:
        bad.ready(features, rings=2)
        bad.put(HEADER, struct.pack("<IIQ", 0, 0, 0))
        bad.offer((bad.dma(HEADER), 16, False), (bad.dma(DATA), 512, True), (OUTSIDE, 1, True))
        bad.wait_used(1)
        assert bad.read_sector() == 0


@BITS
def test_everything_changes_while_it_is_read(live: Served, features: int) -> None:
    """Another thread writes over descriptors, indices and headers for a second. The ring may be stopped, no more."""
    stop = threading.Event()
    with live.front_end() as bad:
        bad.ready(features | INDIRECT, rings=2)
        for page in range(0, 0x10000, PAGE) if features == WITH_BIT else ():
            bad.map(page)
        valid = b"".join(
            Desc(bad.dma(DATA), 512, DESC_F_NEXT | DESC_F_WRITE * (n % 2), (n + 1) % SIZE).pack() for n in range(SIZE)
        )

        def scribble() -> None:
            while not stop.is_set():
                bad.put(RING, os.urandom(16 * SIZE))
                bad.put(RING, valid)
                bad.put(AVAIL + 2, os.urandom(2 + 2 * SIZE))
                bad.put(HEADER, os.urandom(16))

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                bad.kick()
                # A ring that was stopped starts with the next kick descriptor.
                bad.send(Request.SET_VRING_KICK, wire.encode_vring_fd(0, True), (bad.kicks[0],), ack=True)
                bad.answer_misses(0)
        finally:
            stop.set()
            thread.join()
    live.serves()


def test_a_request_that_never_ends_is_bounded_on_a_console(tmp_path: Path) -> None:
    """4 GiB of output, all of it one page: what is passed on has a bound, and memory as well."""
    with (
        served(tmp_path, "console", "--terminal", str(tmp_path / "tty")) as server,
        server.front_end() as bad,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as user,
    ):
        user.connect(str(tmp_path / "tty"))
        bad.ready(PLAIN, rings=2)
        before = server.costs().rss_kib
        # A region of one GiB, all holes; its bytes are the kernel's zeroes until somebody writes.
        os.ftruncate(bad.file, 1 << 30)
        bad.table(bad.region(0, 1 << 30))
        bad.offer(*[(bad.dma(0), 1 << 29, False)] * (SIZE - 1), index=1)
        bad.wait_used(1, 1)
        assert server.costs().rss_kib - before < 16 << 10
