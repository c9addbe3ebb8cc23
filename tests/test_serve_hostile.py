# SPDX-License-Identifier: Apache-2.0
"""Hostile front ends at the socket of a real server: it stays, and the next one is served."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile_kit import Closed, LiveFrontEnd, Served, served, wait_for_fds
from serve_kit import PAGE, RAM
from virtiova.addr import GPA, UVA
from virtiova.serve.loop import MESSAGE_SECONDS
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    InflightDescription,
    LogDescription,
    MemoryRegion,
    Message,
    Request,
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


# -- descriptors of the wrong kind


def wrong_descriptor(kind: str) -> int:
    match kind:
        case "directory":
            return os.open("/", os.O_RDONLY)
        case "path":
            return os.open("/", os.O_PATH)
        case "device":
            return os.open("/dev/zero", os.O_RDWR)
        case "socket":
            return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
        case "listening":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind("")
            sock.listen()
            return sock.detach()
        case "pipe":
            ours, theirs = os.pipe()
            os.close(theirs)
            return ours
        case "memory":
            fd = os.memfd_create("memory")
            os.ftruncate(fd, RAM)
            return fd
    return os.eventfd(0)


KINDS = ("directory", "path", "device", "socket", "listening", "pipe", "memory", "event")
GOOD = {
    Request.SET_MEM_TABLE: {"memory"},
    Request.ADD_MEM_REG: {"memory"},
    Request.SET_INFLIGHT_FD: {"memory"},
    Request.SET_LOG_BASE: {"memory"},
    Request.SET_VRING_KICK: {"event", "pipe"},
    Request.SET_VRING_CALL: {"event", "pipe"},
    Request.SET_VRING_ERR: {"event", "pipe"},
}
"""What such a descriptor may be."""
PAYLOADS = {
    Request.SET_MEM_TABLE: wire.encode_table([MemoryRegion(GPA(0), PAGE, UVA(0), 0)]),
    Request.ADD_MEM_REG: MemoryRegion(GPA(1 << 40), PAGE, UVA(1 << 41), 0).encode_single(),
    Request.SET_INFLIGHT_FD: InflightDescription(RAM, 0, 1, 8).encode(),
    Request.SET_LOG_BASE: LogDescription(PAGE, 0).encode(),
    Request.SET_VRING_KICK: wire.encode_vring_fd(1, True),
    Request.SET_VRING_CALL: wire.encode_vring_fd(1, True),
    Request.SET_VRING_ERR: wire.encode_vring_fd(1, True),
}


@pytest.mark.parametrize("request_", GOOD, ids=lambda each: Request(each).name)
def test_a_descriptor_of_the_wrong_kind_is_refused(live: Served, request_: Request) -> None:
    before = live.costs().fds
    for kind in KINDS:
        fd = wrong_descriptor(kind)
        with live.front_end() as bad:
            bad.ready()
            answer = b""
            try:
                (message,) = bad.send(request_, PAYLOADS[request_], (fd,), ack=True)
                answer = message.payload
            except Closed:
                pass
            finally:
                os.close(fd)
            if kind in GOOD[request_]:
                assert answer == wire.u64(0), kind
            else:
                assert answer in (wire.u64(1), b""), kind
            if answer and request_ != Request.SET_MEM_TABLE:
                assert bad.read_sector() == 0, kind
    live.serves()
    wait_for_fds(live, before)


def test_a_channel_that_is_none(fresh: Served) -> None:
    before = fresh.costs().fds
    with fresh.front_end() as bad:
        bad.ready()
        for count, kind in enumerate(KINDS, 1):
            fd = wrong_descriptor(kind)
            assert bad.send(Request.SET_BACKEND_REQ_FD, b"", (fd,), ack=True)[0].payload == wire.u64(0)
            os.close(fd)
            assert fresh.log.count("back-end channel: ") == count, kind
    wait_for_fds(fresh, before)


def test_descriptors_that_were_not_asked_for_or_are_too_many(live: Served) -> None:
    before = live.costs().fds
    for request in Request:
        for count in (0, 1, 2, 8, 9, 200):
            with live.front_end() as bad:
                try:
                    bad.raw(Message(request, PAYLOADS.get(request, b""), need_reply=True).encode(), [bad.call] * count)
                    bad.sock.settimeout(0.02)
                    bad.reply()
                except (Closed, TimeoutError):
                    pass
    live.serves()
    wait_for_fds(live, before)


# -- connections that are kept open, or die halfway


@pytest.mark.parametrize("bytes_sent", [1, 11, 12, 13, 27])
def test_death_in_the_middle_of_a_message(live: Served, bad: LiveFrontEnd, bytes_sent: int) -> None:
    message = Message(Request.SET_MEM_TABLE, PAYLOADS[Request.SET_MEM_TABLE]).encode()
    bad.raw(message[:bytes_sent], [bad.file] * 8)


def test_our_own_connection_as_channel_does_not_keep_it_open(fresh: Served) -> None:
    with fresh.front_end() as bad:
        bad.negotiate()
        bad.send(Request.SET_BACKEND_REQ_FD, b"", (bad.sock.fileno(),))
        fresh.said("it leads back to this server")


def test_our_own_connection_in_an_unfinished_message_does_not_keep_it_open(fresh: Served) -> None:
    with fresh.front_end() as bad:
        bad.raw(b"\1", [bad.sock.fileno()])
        started = time.monotonic()
        bad.sock.close()
        fresh.serves()
        assert time.monotonic() - started < MESSAGE_SECONDS + 5
        fresh.said("a message was begun, and not ended")


def test_bytes_one_by_one(live: Served, bad: LiveFrontEnd) -> None:
    for byte in Message(Request.GET_FEATURES).encode():
        bad.raw(bytes([byte]))
        time.sleep(0.005)
    assert bad.reply().request == Request.GET_FEATURES


def test_answers_that_nobody_reads(fresh: Served) -> None:
    """The server neither waits nor keeps them all."""
    with fresh.front_end() as bad:
        question = Message(Request.GET_FEATURES).encode()
        bad.sock.settimeout(5)
        with contextlib.suppress(Closed):
            for _ in range(20000):
                bad.raw(question * 20)
            pytest.fail("it took them all")
        fresh.said("the front end does not read what it asked for")


def test_another_front_end_waits_its_turn(live: Served, bad: LiveFrontEnd) -> None:
    bad.ready()
    with live.front_end() as second:
        second.raw(Message(Request.GET_FEATURES).encode())
        assert bad.read_sector() == 0
        second.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.reply()
        bad.sock.close()
        second.sock.settimeout(5)
        assert second.reply().request == Request.GET_FEATURES


def test_a_thousand_connections(live: Served, bad: LiveFrontEnd) -> None:
    turned_away = 0
    for _ in range(1000):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(live.path))
        except BlockingIOError:
            turned_away += 1
        sock.close()
    assert turned_away > 900
    bad.ready()
    assert bad.read_sector() == 0


# -- the log


def test_a_front_end_cannot_fill_the_log(fresh: Served, tmp_path: Path) -> None:
    with fresh.front_end() as bad:
        bad.ready()
        before = len(fresh.log)
        for _ in range(3000):
            bad.send(Request.SET_VRING_NUM, VringState(0, 3).encode(), ack=True)
        assert len(fresh.log) - before < 40_000
