# SPDX-License-Identifier: Apache-2.0
"""The dirty log: every page of guest-physical memory that changed is in it, and no other, whatever the rings hold."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

import pytest

from serve_kit import GPA_BASE, IOVA_BASE, PAGE, PLAIN, RAM, RING, USED, WITH_BIT, FrontEnd
from virtiova.device.base import Device
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_WRITE, Desc, SplitLayout
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import LogDescription, Request, VringAddr, VringState

DATA = 0x10000
PAGES = 16
"""Pages of buffers, by IOVA."""
HOMES = range(0x40000, RAM, PAGE)
LOG = 1 << wire.F_LOG_ALL


class Fill(Device):
    """Writes as much as there is room for, and something else each time."""

    device_id, queues = DeviceId.ENTROPY, 1

    def handle(self, queue: int, chain: Chain) -> None:
        chain.write(os.urandom(chain.writable))


@pytest.fixture
def log() -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 2 * PAGE)
    yield fd
    os.close(fd)


def marked(log: int) -> set[int]:
    """The pages in the log, which is empty afterwards."""
    bits = os.pread(log, PAGE, PAGE)
    os.pwrite(log, bytes(PAGE), PAGE)
    return {page for page in range(PAGE * 8) if bits[page // 8] >> page % 8 & 1}


def changed(before: bytes, after: bytes) -> set[int]:
    return {(GPA_BASE + at) // PAGE for at in range(0, RAM, PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}


def logged(end: FrontEnd, log: int, features: int) -> None:
    """From here on with a log, at the second page of its file."""
    (answer,) = end.send(Request.SET_LOG_BASE, LogDescription(PAGE, PAGE).encode(), (log,))
    assert answer.reply
    end.ok(Request.SET_FEATURES, wire.u64(features | LOG))


def offer(end: FrontEnd, draw: random.Random, round_: int) -> None:
    """One to three buffers of 8 bytes to three pages, anywhere in the buffers' pages."""
    lengths = [draw.randrange(8, 3 * PAGE) for _ in range(draw.randint(1, 3))]
    at = [DATA + draw.randrange(PAGES * PAGE - length) for length in lengths]
    end.offer(*((end.dma(start), length, True) for start, length in zip(at, lengths, strict=True)), head=round_ % 2 * 4)


@pytest.mark.parametrize("features", [PLAIN, WITH_BIT, WITH_BIT | 1 << Feature.RING_EVENT_IDX])
def test_exactly_what_changed_is_marked(log: int, features: int) -> None:
    draw = random.Random(features)
    with FrontEnd(Fill()) as end:
        end.negotiate(features)
        end.start()
        logged(end, log, features)
        used = draw.choice(HOMES)
        for round_ in range(60):
            # Everything lies elsewhere in each round, the used ring too.
            homes = draw.sample(list(HOMES), PAGES + 1)
            if end.bit:
                end.invalidate(IOVA_BASE, RAM)
                end.put(homes[0], end.get(used, PAGE))
                used = homes[0]
            mapped = {RING: RING, USED: used}
            mapped |= {DATA + PAGE * n: home for n, home in enumerate(homes[1:])}
            offer(end, draw, round_)
            marked(log)
            before = end.get(0, RAM)
            end.serve(mapped)
            seen = changed(before, end.get(0, RAM))
            assert marked(log) == seen
            assert (GPA_BASE + (used if end.bit else USED)) // PAGE in seen
    assert end.host.counters.requests == 60


def test_on_and_off_while_a_ring_runs(log: int) -> None:
    with FrontEnd(Fill()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        for round_, on in enumerate([False, True, False, True]):
            if round_ == 1:
                logged(end, log, WITH_BIT)
            else:
                end.ok(Request.SET_FEATURES, wire.u64(WITH_BIT | (LOG if on else 0)))
            end.offer((end.dma(DATA), 8, True))
            end.serve()
            assert end.used() == round_ + 1
            assert marked(log) == ({(GPA_BASE + USED) // PAGE, (GPA_BASE + DATA) // PAGE} if on else set())


@pytest.mark.parametrize("features", [PLAIN, WITH_BIT])
def test_a_used_ring_of_several_pages(log: int, features: int) -> None:
    """The used index is in another page than the element: both are marked, and nothing between them."""
    size, base, ring, used = 1024, 1000, 0x20000, 0x30000
    layout = SplitLayout(size)
    with FrontEnd(Fill()) as end:
        end.negotiate(features)
        end.start()
        end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        end.ok(Request.SET_VRING_NUM, VringState(0, size).encode())
        end.ok(Request.SET_VRING_BASE, VringState(0, base).encode())
        place = end.dma if end.bit else end.uva
        address = VringAddr(0, 0, place(ring), place(used), place(ring + layout.avail), 0)
        end.ok(Request.SET_VRING_ADDR, address.encode())
        end.ok(Request.SET_VRING_KICK, wire.encode_vring_fd(0, True), (end.call,))
        end.put(used + 2, struct.pack("<H", base))
        logged(end, log, features)
        end.put(ring, Desc(end.dma(DATA), 8, DESC_F_WRITE, 0).pack())
        end.put(ring + layout.avail + 2, struct.pack("<H", base + 1))
        end.host.rounds.kicked(0)
        end.serve()
        assert struct.unpack("<H", end.get(used + 2, 2)) == (base + 1,)
        wanted = {(GPA_BASE + at) // PAGE for at in (DATA, used, used + 4 + 8 * base)}
        assert len(wanted) == 3
        assert marked(log) == wanted


def test_a_second_log_takes_the_place_of_the_first(log: int) -> None:
    second = os.memfd_create("second")
    try:
        os.ftruncate(second, 2 * PAGE)
        with FrontEnd(Fill()) as end:
            end.negotiate(PLAIN)
            end.start()
            logged(end, log, PLAIN)
            wanted = {(GPA_BASE + USED) // PAGE, (GPA_BASE + DATA) // PAGE}
            # The second without another word on features: QEMU changes the log's size while it is on.
            for fresh, old in ((log, second), (second, log), (log, second)):
                (answer,) = end.send(Request.SET_LOG_BASE, LogDescription(PAGE, PAGE).encode(), (fresh,))
                assert answer.reply
                end.offer((end.dma(DATA), 8, True))
                end.serve()
                assert marked(fresh) == wanted
                assert marked(old) == set()
    finally:
        os.close(second)


def test_the_marks_of_others_stay(log: int) -> None:
    """Other back ends have the same log, and share its bytes."""
    others = {page for page in range(PAGE * 8) if page % 2}
    with FrontEnd(Fill()) as end:
        end.negotiate(PLAIN)
        end.start()
        logged(end, log, PLAIN)
        os.pwrite(log, b"\xaa" * PAGE, PAGE)
        end.offer((end.dma(DATA), 5 * PAGE, True))
        end.serve()
        ours = {(GPA_BASE + USED) // PAGE} | {(GPA_BASE + DATA) // PAGE + n for n in range(5)}
        assert marked(log) == others | ours
        assert not others >= ours


def test_a_log_that_ends_before_memory_does(log: int) -> None:
    """What is beyond its end is not in it, and nothing is written behind it."""
    with FrontEnd(Fill()) as end:
        end.negotiate(PLAIN)
        end.start()
        last = (GPA_BASE + DATA) // PAGE + 1
        size = last // 8 + 1
        end.send(Request.SET_LOG_BASE, LogDescription(size, PAGE).encode(), (log,))
        end.ok(Request.SET_FEATURES, wire.u64(PLAIN | LOG))
        end.offer((end.dma(DATA), PAGES * PAGE, True))
        end.serve()
        assert end.used() == 1
        pages = marked(log)
        assert max(pages) == size * 8 - 1
        assert {(GPA_BASE + USED) // PAGE, last} < pages
