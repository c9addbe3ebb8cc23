# SPDX-License-Identifier: Apache-2.0
"""How often a ring waits for its front end: for all that is missing at once, and not again for each answer."""

from __future__ import annotations

import os
import socket

import pytest

from serve_kit import PAGE, RING, RINGS, SIZE, WITH_BIT, FrontEnd
from virtiova.device.rng import Rng
from virtiova.features import Feature
from virtiova.ring.layout import DESC_F_INDIRECT, DESC_F_WRITE, Desc
from virtiova.serve.counters import Counters
from virtiova.serve.loop import Connection

TABLES, BUFFERS = 0x40000, 0x80000
LENGTH = 64


def ready(end: FrontEnd, features: int = WITH_BIT) -> Counters:
    """The ring is known, nothing else."""
    end.negotiate(features)
    end.start()
    end.serve(RINGS)
    counters = end.host.counters
    counters.looks = counters.waits = counters.misses = 0
    return counters


def test_one_wait_for_all_buffers_of_all_requests() -> None:
    with FrontEnd(Rng(lambda length: b"\x55" * length)) as end:
        counters = ready(end)
        for n in range(4):
            end.offer(*((end.dma(BUFFERS + (2 * n + part) * PAGE), LENGTH, True) for part in range(2)), head=2 * n)
        misses = end.work()
        assert len(misses) == 8
        for miss in misses:
            assert end.used() == 0, "while an answer is due nothing is looked at again"
            assert counters.looks == counters.waits == 1
            end.map(miss.iova - end.dma(0))
            end.answer(True)
            end.host.rounds.work()
        assert end.used() == 4
        assert (counters.waits, counters.misses) == (1, 8)


def test_indirect_tables_of_requests_behind_are_asked_for_with_the_first() -> None:
    """Two waits for eight requests: for all tables, then for all that they name."""
    with FrontEnd(Rng(lambda length: b"\x55" * length)) as end:
        counters = ready(end, WITH_BIT | 1 << Feature.RING_INDIRECT_DESC)
        assert SIZE >= 8
        for n in range(8):
            end.put(TABLES + n * PAGE, Desc(end.dma(BUFFERS + n * PAGE), LENGTH, DESC_F_WRITE, 0).pack())
            end.offer((end.dma(TABLES + n * PAGE), 16, False), head=n)
        ring_flags(end)
        tables = end.work()
        assert [miss.iova for miss in tables] == [end.dma(TABLES + n * PAGE) for n in range(8)]
        for miss in tables:
            end.map(miss.iova - end.dma(0))
            end.answer(True)
        buffers = end.work()
        assert [miss.iova for miss in buffers] == [end.dma(BUFFERS + n * PAGE) for n in range(8)]
        assert counters.waits == 2
        for miss in buffers:
            end.map(miss.iova - end.dma(0))
            end.answer(True)
        assert end.work() == []
        assert end.used() == 8
        assert counters.waits == 2
        assert all(end.get(BUFFERS + n * PAGE, LENGTH) == b"\x55" * LENGTH for n in range(8))


def ring_flags(end: FrontEnd) -> None:
    """Make each descriptor one of an indirect table."""

    for n in range(8):
        end.put(RING + 16 * n, Desc(end.dma(TABLES + n * PAGE), 16, DESC_F_INDIRECT, 0).pack())


def test_an_answer_that_is_not_heard_of_is_not_waited_for() -> None:
    """A refusal ends the wait as well, and so does an INVALIDATE of what was asked for."""
    with FrontEnd(Rng(lambda length: b"\x55" * length)) as end:
        counters = ready(end)
        end.offer((end.dma(BUFFERS), LENGTH, True), (end.dma(BUFFERS + PAGE), LENGTH, True))
        assert len(end.work()) == 2
        end.map(BUFFERS)
        end.answer(True)
        end.host.rounds.work()
        assert end.host.rings[0].parked
        end.answer(False)
        end.work()
        assert end.used() == 1
        assert counters.faults == 1
        end.offer((end.dma(BUFFERS + 2 * PAGE), LENGTH, True), head=2)
        assert len(end.work()) == 1
        end.invalidate(end.dma(BUFFERS + 2 * PAGE), PAGE)
        assert len(end.work()) == 1, "it is asked for again"


def test_what_comes_while_kicks_are_asked_for_is_asked_for_before_sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may come after the last look-out and before the driver knows that it has to kick: nobody kicks then,
    and nobody looks again before its translations have come."""
    ours, theirs = socket.socketpair()
    asked, channel = socket.socketpair()
    wake = os.eventfd(0)
    connection = Connection(Rng(), theirs, say=lambda _: None, counters=Counters())

    def work(*, arm: bool = True) -> bool:
        assert arm
        connection.host.outbox.append(b"MISS")
        return False

    monkeypatch.setattr(connection.host.rounds, "work", work)
    monkeypatch.setattr(connection, "_channel", channel)
    try:
        assert not connection._look_out(wake)
        assert asked.recv(64, socket.MSG_DONTWAIT) == b"MISS"
    finally:
        connection.close()
        asked.close()
        ours.close()
        os.close(wake)
