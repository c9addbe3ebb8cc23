# SPDX-License-Identifier: Apache-2.0
"""The dirty log: every page of guest-physical memory that changed is in it, and no other, whatever the rings hold."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from serve_kit import GPA_BASE, IOVA_BASE, PAGE, PLAIN, RAM, RING, USED, WITH_BIT, FrontEnd
from virtiova.device.base import Device
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import LogDescription, Request

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
