# SPDX-License-Identifier: Apache-2.0
"""What is left of a device that was reset, in each of the ways there are; and of what is in flight."""

from __future__ import annotations

import os

import pytest

from serve_kit import (
    DATA,
    HEADER,
    PAGE,
    PLAIN,
    RING,
    SIZE,
    STATUS,
    USED,
    WITH_BIT,
    FrontEnd,
    fives,
    request,
)
from virtiova.device.blk import WRITEBACK_AT, Bit, Blk
from virtiova.device.store import MemoryStore
from virtiova.dma.shared import map_shared
from virtiova.ring.layout import SplitLayout
from virtiova.serve.inflight import Inflight, ring_bytes
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import InflightDescription, LogDescription, Request, VringAddr, VringState

WHERE = 0x10000


def start_again(end: FrontEnd, *, leave_out: int) -> None:
    """What starts a ring, without one of the messages."""
    layout = SplitLayout(SIZE)
    end.put(RING + layout.avail, bytes(4 + 2 * SIZE))
    end.put(USED, bytes(6 + 8 * SIZE))
    address = VringAddr(0, 0, end.uva(RING), end.uva(USED), end.uva(RING + layout.avail), 0)
    for message, payload, fds in (
        (Request.SET_FEATURES, wire.u64(PLAIN), ()),
        (Request.SET_VRING_NUM, VringState(0, SIZE).encode(), ()),
        (Request.SET_VRING_BASE, VringState(0, 0).encode(), ()),
        (Request.SET_VRING_ADDR, address.encode(), ()),
        (Request.SET_VRING_KICK, wire.encode_vring_fd(0, True), (end.call,)),
        (Request.SET_VRING_ENABLE, VringState(0, 1).encode(), ()),
    ):
        if message != leave_out:
            end.send(message, payload, fds)
    end._avail[0] = 0


# -- resets


@pytest.mark.parametrize("missing", [Request.SET_VRING_NUM, Request.SET_VRING_ADDR, Request.SET_VRING_ENABLE, 0])
def test_after_a_reset_a_ring_is_set_up_from_nothing(missing: int) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.send(Request.SET_STATUS, wire.u64(15))
        end.offer((end.dma(WHERE), 64, True))
        end.work()
        assert end.used() == 1
        end.ok(Request.RESET_DEVICE)
        assert end.send(Request.GET_STATUS)[0].payload == wire.u64(0)
        assert end.session.features == 1 << wire.F_PROTOCOL_FEATURES, (
            "what the driver took is gone, the protocol is not"
        )
        start_again(end, leave_out=missing)
        end.offer((end.dma(WHERE), 64, True))
        end.work()
        assert end.used() == (0 if missing else 1)
        assert bool(end.host.rings[0].broken) is (missing in (Request.SET_VRING_NUM, Request.SET_VRING_ADDR))


@pytest.mark.parametrize("how", ["status", "reset", "owner", "close"])
def test_what_the_driver_took_is_forgotten(how: str) -> None:
    blk = Blk(MemoryStore(bytearray(1 << 20)))
    with FrontEnd(blk) as end:
        end.negotiate(PLAIN | 1 << Bit.CONFIG_WCE | 1 << Bit.FLUSH)
        blk.configure(WRITEBACK_AT, b"\0")
        match how:
            case "status":
                end.ok(Request.SET_STATUS, wire.u64(0))
            case "reset":
                end.ok(Request.RESET_DEVICE)
            case "owner":
                end.ok(Request.SET_OWNER)
            case "close":
                end.host.close()
        assert blk.accepted == 0
        assert blk.config()[WRITEBACK_AT] == (0 if how == "status" else 1), "which may be a pause"


def test_a_device_in_need_of_a_reset_stays_so_until_it_is_reset() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.put(RING + SplitLayout(SIZE).avail + 2, b"\xff\x7f")
        end.host.rounds.kicked(0)
        end.work()
        for written, kept in ((15, 15 | 64), (0, 0), (15, 15)):
            end.send(Request.SET_STATUS, wire.u64(written))
            assert end.send(Request.GET_STATUS)[0].payload == wire.u64(kept)


def test_reset_owner_makes_the_rings_rest_and_no_more() -> None:
    """It is out of use, and may disable the rings; what else some made of it led to errors (vhost-user.rst)."""
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.ok(Request.RESET_OWNER)
        end.offer((end.dma(WHERE), 64, True))
        end.work()
        assert end.used() == 0
        end.ok(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        end.work()
        assert end.used() == 1
        assert end.session.features == PLAIN


def test_another_owner_finds_nothing_of_the_first() -> None:
    """No log of dirty pages that is not its own, and nobody else's driver to be called."""
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)
        end.send(Request.SET_LOG_BASE, LogDescription(PAGE, 0).encode(), (log,))
        end.ok(Request.SET_FEATURES, wire.u64(PLAIN | 1 << wire.F_LOG_ALL))
        end.ok(Request.SET_OWNER)
        assert end.session.features == 1 << wire.F_PROTOCOL_FEATURES
        end.table()
        start_again(end, leave_out=0)
        end.offer((end.dma(WHERE), 64, True))
        end.work()
        assert end.used() == 1
        assert os.pread(log, PAGE, 0) == bytes(PAGE)
        os.close(log)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(end.call)


# -- in flight


def test_what_a_predecessor_left_is_done_also_if_its_file_goes() -> None:
    """Before it could be done: the ring waits for a page, and the front end brings a file without this ring. So it is
    taken from the available ring, where it still is."""
    with FrontEnd(Blk(MemoryStore(bytearray(1 << 20)), queues=2)) as end:
        end.negotiate(WITH_BIT)
        files: list[tuple[bytes, int]] = []
        for queues in (2, 1):
            (answer,) = end.send(Request.GET_INFLIGHT_FD, InflightDescription(0, 0, queues, SIZE).encode())
            files.append((answer.payload, answer.fds[0]))
        mapping, window = map_shared(files[0][1], 0, 2 * ring_bytes(SIZE), "what is in flight")
        Inflight(window, ring_bytes(SIZE), SIZE).begin([0])
        end.send(Request.SET_INFLIGHT_FD, files[0][0], (files[0][1],))
        end.start(1)
        request(end, index=1)
        for page in (RING, USED):
            end.map(page + 0x4000)
        assert len(end.work()) == 3
        assert end.host.counters.resumed == 1
        end.send(Request.SET_INFLIGHT_FD, files[1][0], (files[1][1],))
        for page in (HEADER, DATA, STATUS):
            end.map(page)
        end.work()
        assert (end.used(1), end.get(STATUS, 1)) == (1, b"\0")
        window.release()
        mapping.close()
        for _, fd in files:
            os.close(fd)


@pytest.mark.parametrize("entries", [SIZE // 2, SIZE, 2 * SIZE])
def test_a_file_of_what_is_in_flight_holds_the_ring(entries: int) -> None:
    with FrontEnd(Blk(MemoryStore(bytearray(1 << 20)))) as end:
        end.negotiate(PLAIN)
        wanted = InflightDescription(0, 0, 1, entries)
        (answer,) = end.send(Request.GET_INFLIGHT_FD, wanted.encode())
        os.close(answer.fds[0])
        end.start()
        end.work()
        assert bool(end.host.rings[0].broken) is (entries < SIZE)
    assert any(f"room for {entries} entries" in line for line in end.said) is (entries < SIZE)
