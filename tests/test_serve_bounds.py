# SPDX-License-Identifier: Apache-2.0
"""How long one turn of the server may be, whatever the driver does; and that nobody is left waiting."""

from __future__ import annotations

import struct

import pytest

from serve_kit import (
    DATA,
    HEADER,
    IOVA_BASE,
    PAGE,
    PLAIN,
    RAM,
    RING,
    SIZE,
    STATUS,
    USED,
    WITH_BIT,
    FrontEnd,
    disk,
    fives,
    request,
)
from virtiova.device.blk import Blk
from virtiova.device.host import MAX_WALKED
from virtiova.device.net import Net
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.ring import split_device
from virtiova.ring.chain import Chain
from virtiova.ring.ends import MAX_CHAIN
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, SplitLayout
from virtiova.serve.ahead import LOOKAHEAD
from virtiova.serve.offer import offer_of
from virtiova.serve.rounds import TURN_SECONDS
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

WHERE = 0x10000
BIG_RING = 0
BIG_USED = 0x100000
MRG_RXBUF = 1 << 15


class Nowhere:
    """A wire that nobody is at."""

    def send(self, frame: bytes, /) -> None:
        """Lost."""


class Slow(Rng):
    """A quarter of a turn for each request."""

    def __init__(self, end: list[FrontEnd]) -> None:
        super().__init__(lambda length: b"\x55" * length)
        self._end = end

    def handle(self, queue: int, chain: Chain) -> None:
        self._end[0].now += TURN_SECONDS / 4
        super().handle(queue, chain)


class Walks:
    """Counts the descriptors that are loaded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        load = split_device.SplitDevice._load

        def counted(this: split_device.SplitDevice, where: int, direct: bool) -> Desc:
            self.count += 1
            return load(this, where, direct)

        patch.setattr(split_device.SplitDevice, "_load", counted)


def big_ring(end: FrontEnd, size: int, *, chain: int, flags: int = 0, length: int = 0) -> None:
    """A ring of ``size`` whose every entry is one and the same chain, of ``chain`` buffers."""
    at = end.dma if end.bit else end.uva
    layout = SplitLayout(size)
    entries = [Desc(end.dma(WHERE), length, flags | DESC_F_NEXT, n + 1) for n in range(chain - 1)]
    entries.append(Desc(end.dma(WHERE), length, flags, 0))
    end.put(BIG_RING, b"".join(entry.pack() for entry in entries))
    end.put(BIG_RING + layout.avail, struct.pack("<HH", 0, size) + bytes(2 * size))
    end.put(BIG_USED, bytes(6 + 8 * size))
    end.send(Request.SET_VRING_NUM, VringState(0, size).encode())
    end.send(Request.SET_VRING_BASE, VringState(0, 0).encode())
    address = VringAddr(0, 0, at(BIG_RING), at(BIG_USED), at(BIG_RING + layout.avail), 0)
    end.send(Request.SET_VRING_ADDR, address.encode())
    end.send(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (end.call,))
    end.send(Request.SET_VRING_KICK, wire.encode_vring_fd(0, True), (end.call,))
    end.send(Request.SET_VRING_ENABLE, VringState(0, 1).encode())


# -- turns


def test_no_request_is_begun_after_the_turn() -> None:
    ends: list[FrontEnd] = []
    with FrontEnd(Slow(ends)) as end:
        ends.append(end)
        end.negotiate(PLAIN)
        end.start()
        for head in range(SIZE):
            end.offer((end.dma(WHERE), 64, True), head=head)
        for turn in range(1, 3):
            assert end.host.rounds.work(), "it was not looked whether that is all"
            assert end.used() == 4 * turn
        assert not end.host.rounds.work()


def test_the_look_ahead_ends_with_the_turn() -> None:
    asked = []
    for tick in (0.0, TURN_SECONDS / 4):
        with FrontEnd(fives()) as end:
            end.negotiate(WITH_BIT)
            end.start()
            end.map(RING)
            end.map(USED)
            for head in range(SIZE):
                end.offer((end.dma(WHERE + head * PAGE), 64, True), head=head)

            def clock(end: FrontEnd = end, tick: float = tick) -> float:
                end.now += tick
                return end.now

            end.host.rounds.clock = clock
            end.host.rounds.work()
            asked.append(len(end.host.outbox))
    assert asked[0] == SIZE
    assert 1 <= asked[1] <= 4, "the one that is next, and what there was time for"


def test_the_look_ahead_walks_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of a thousand buffers, all of which miss one page: again when an answer is not waited for any more."""
    walks = Walks(monkeypatch)
    with FrontEnd(Blk(MemoryStore(bytearray(1 << 20)))) as end:
        end.negotiate(WITH_BIT)
        big_ring(end, MAX_CHAIN, chain=MAX_CHAIN, length=1)
        for page in range(0, 1 << 21, PAGE):
            if page != WHERE:
                end.map(page)
        end.host.rounds.work()
        assert [end.host.rings[0].parked, len(end.host.outbox)] == [True, 1]
        assert LOOKAHEAD * MAX_CHAIN > MAX_CHAIN + MAX_WALKED + MAX_CHAIN >= walks.count
        before = walks.count
        end.invalidate(IOVA_BASE + 0x180000, PAGE)
        end.host.rounds.work()
        assert walks.count == before, "that is not what it waits for"
        end.invalidate(IOVA_BASE + WHERE, PAGE)
        end.host.rounds.work()
        assert 0 < walks.count - before <= MAX_CHAIN + MAX_WALKED + MAX_CHAIN


def test_a_receive_buffer_without_room_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = Walks(monkeypatch)
    net = Net(Nowhere())
    with FrontEnd(net) as end:
        end.negotiate(PLAIN | MRG_RXBUF)
        big_ring(end, 1024, chain=1024)
        net.deliver(b"x" * 60)
        end.host.rounds.work()
        assert end.host.rings[0].broken
        assert "has no room" in end.said[-1]
        assert walks.count == 1024


def test_frames_that_take_too_many_buffers_are_given_up_one_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of room at the end of a thousand empty buffers, a thousand times."""
    walks = Walks(monkeypatch)
    net = Net(Nowhere())
    with FrontEnd(net) as end:
        end.negotiate(PLAIN | MRG_RXBUF)
        big_ring(end, 1024, chain=1024, flags=DESC_F_WRITE)
        end.put(BIG_RING + 1023 * DESC_SIZE, Desc(end.dma(WHERE), 1, DESC_F_WRITE, 0).pack())
        for _ in range(3):
            net.deliver(b"x" * 60)
        give_up = net.give_up

        def slowly(queue: int) -> None:
            end.now += TURN_SECONDS
            give_up(queue)

        monkeypatch.setattr(net, "give_up", slowly)
        for turn in range(1, 4):
            assert end.host.rounds.work() is (turn < 3)
            assert net.dropped == turn
            assert walks.count <= turn * (MAX_WALKED + MAX_CHAIN)
        assert not end.host.rings[0].broken
        end.put(BIG_RING, Desc(end.dma(WHERE), 100, DESC_F_WRITE, 0).pack())
        net.deliver(b"y" * 60)
        end.host.rounds.work()
        assert end.get(WHERE, 72) == bytes(10) + b"\1\0" + b"y" * 60, "and the next one is not"


def test_a_driver_that_makes_more_available_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never enough for the frame, and another buffer (or one less) whenever we have looked."""
    net = Net(Nowhere())
    with FrontEnd(net) as end:
        end.negotiate(PLAIN | MRG_RXBUF)
        end.start()
        net.deliver(b"x" * 200)
        end.offer((end.dma(WHERE), 1, True))
        flips = 0

        def never_done(this: split_device.SplitDevice, *, waiting: bool = False) -> bool:
            nonlocal flips
            flips += 1
            end.now += TURN_SECONDS / 4
            assert flips < 10, "it goes round and round"
            return True

        monkeypatch.setattr(split_device.SplitDevice, "enable_notify", never_done)
        assert end.host.rounds.work() is True
        assert flips == 4


def test_a_chain_has_a_thousand_buffers_at_most() -> None:
    for more in (0, 1):
        with FrontEnd(fives()) as end:
            end.negotiate(PLAIN)
            big_ring(end, 2 * MAX_CHAIN, chain=MAX_CHAIN + more, flags=DESC_F_WRITE, length=1)
            end.host.rounds.work()
            assert bool(end.host.rings[0].broken) is bool(more)
    assert f"a chain of more than {MAX_CHAIN} buffers" in end.said[-1]


# -- what is asked for, and forgotten


class Two(Rng):
    """Two queues."""

    queues = 2


def test_another_ring_is_stopped_while_one_waits() -> None:
    """All translations are forgotten then, so what was asked for has to be asked for again: nobody waits for ever."""
    with FrontEnd(Two(lambda length: b"\x55" * length)) as end:
        end.negotiate(WITH_BIT)
        end.start(0)
        end.start(1)
        end.serve()
        end.offer((end.dma(WHERE), 64, True))
        assert [miss.iova for miss in end.work()] == [end.dma(WHERE)]
        end.send(Request.GET_VRING_BASE, VringState(1, 0).encode())
        assert not end.host.rings[0].parked
        for page in (RING, USED):
            end.map(page)
        assert end.dma(WHERE) in [miss.iova for miss in end.work()], "the first answer will not be heard"
        end.map(WHERE)
        end.work()
        assert end.used() == 1


def test_what_is_invalidated_while_it_is_asked_for_is_asked_for_again() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.serve()
        end.offer((end.dma(WHERE), 64, True))
        for _ in range(3):
            assert [miss.iova for miss in end.work()] == [end.dma(WHERE)]
            end.invalidate(end.dma(WHERE), PAGE)


def test_a_refusal_is_told_where_the_answer_is_not_known_yet() -> None:
    """The answers come one by one; the page of the status is the last."""
    with FrontEnd(disk()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.serve()
        request(end)
        assert [miss.iova for miss in end.work()] == [end.dma(HEADER), end.dma(DATA), end.dma(STATUS)]
        end.map(HEADER)
        end.answer(True)
        end.answer(False)
        assert end.work() == []
        assert end.used() == 0
        end.map(STATUS)
        end.answer(True)
        assert end.work() == []
        assert (end.used(), end.get(STATUS, 1)) == (1, b"\1")


@pytest.mark.parametrize("replies", [True, False])
def test_an_update_that_is_refused_leaves_nobody_waiting(*, replies: bool) -> None:
    """It points outside of memory. The question that it answers is asked again, also if no answer to that is due."""
    with FrontEnd(fives()) as end:
        protocol = offer_of(fives()).protocol & ~(0 if replies else 1 << ProtocolFeature.REPLY_ACK)
        end.negotiate(WITH_BIT, protocol)
        end.start()
        end.serve() if replies else [end.map(page) for page in (RING, USED)]
        end.offer((end.dma(WHERE), 64, True))
        assert [miss.iova for miss in end.work()] == [end.dma(WHERE)]
        assert end.map(WHERE, target=RAM)[0].payload == wire.u64(1)
        assert [miss.iova for miss in end.work()] == [end.dma(WHERE)]
        end.map(WHERE)
        end.work()
        assert end.used() == 1
