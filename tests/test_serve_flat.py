# SPDX-License-Identifier: Apache-2.0
"""What a server takes does not grow: descriptors, mappings and memory after much that comes and goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostile_kit import Closed, Costs, LiveFrontEnd, Served, served
from serve_kit import PAGE, RAM, UVA_BASE, WITH_BIT
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    LogDescription,
    MemoryRegion,
    Message,
    Request,
)

Churn = Callable[[Served, int], None]
GROWS_KIB = 1 << 10
"""What Python may take and not give back, whatever the number of rounds."""


def connections(live: Served, count: int) -> None:
    for _ in range(count):
        with live.front_end() as front_end:
            front_end.negotiate()


def requests(live: Served, count: int) -> None:
    for _ in range(count // 10):
        with live.front_end() as front_end:
            front_end.ready()
            for _ in range(5):
                assert front_end.read_sector() == 0


def halves_of_messages(live: Served, count: int) -> None:
    whole = Message(Request.SET_MEM_TABLE, wire.encode_table([MemoryRegion(GPA(0), RAM, UVA(0), 0)] * 8)).encode()
    for n in range(count):
        with live.front_end() as front_end:
            front_end.raw(whole[: 1 + n % (len(whole) - 1)], [front_end.file] * 8)


def refused_messages(live: Served, count: int) -> None:
    for n in range(count):
        with live.front_end() as front_end:
            try:
                front_end.raw(Message(n % 48, bytes(n % 64)).encode(), [front_end.file] * (n % 9))
                front_end.sock.shutdown(1)
                front_end.reply()
            except Closed:
                pass


def within(change: Callable[[LiveFrontEnd, int], object]) -> Churn:
    """Many times on one connection."""

    def churn(live: Served, count: int) -> None:
        with live.front_end() as front_end:
            front_end.ready()
            for n in range(count):
                change(front_end, n)
            assert front_end.send(Request.GET_QUEUE_NUM)

    return churn


def tables(front_end: LiveFrontEnd, n: int) -> None:
    half = RAM // 2
    front_end.table(*(front_end.region(half * part, half, n % 3 * half) for part in range(2)))


def slots(front_end: LiveFrontEnd, n: int) -> None:
    region = MemoryRegion(GPA(1 << 40), PAGE, UVA(1 << 41), n % 4 * PAGE).encode_single()
    front_end.ok(Request.ADD_MEM_REG, region, (front_end.file,))
    front_end.ok(Request.REM_MEM_REG, region, (front_end.file,) * (n % 2))


def notifications(front_end: LiveFrontEnd, n: int) -> None:
    request = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)[n % 3]
    front_end.ok(request, wire.encode_vring_fd(0, True), (front_end.call,))


def channels(front_end: LiveFrontEnd, n: int) -> None:
    front_end.ok(Request.SET_BACKEND_REQ_FD, b"", (front_end.theirs.fileno() if n % 2 else front_end.call,))


def translations(front_end: LiveFrontEnd, n: int) -> None:
    for page in range(16):
        update = IotlbMessage(IOVA((n * 16 + page) * PAGE), PAGE, UVA(UVA_BASE), Access.RW, IotlbKind.UPDATE)
        front_end.send(Request.IOTLB_MSG, update.encode())
    if n % 4:
        front_end.invalidate(0, (n + 1) * 16 * PAGE)


def logs(front_end: LiveFrontEnd, n: int) -> None:
    front_end.send(Request.SET_LOG_BASE, LogDescription(PAGE, n % 2 * PAGE).encode(), (front_end.file,))
    front_end.send(Request.SET_FEATURES, wire.u64(WITH_BIT | (n % 2) << wire.F_LOG_ALL))


def in_flight(front_end: LiveFrontEnd, n: int) -> None:
    wanted = InflightDescription(0, 0, 1, 128).encode()
    front_end.raw(Message(Request.GET_INFLIGHT_FD, wanted).encode())
    answer = front_end.reply()
    front_end.ok(Request.SET_INFLIGHT_FD, answer.payload, answer.fds)
    for fd in answer.fds:
        os.close(fd)


def owners(front_end: LiveFrontEnd, n: int) -> None:
    front_end.send(Request.SET_OWNER)
    front_end.table()


def resets(front_end: LiveFrontEnd, n: int) -> None:
    front_end.ok(Request.RESET_OWNER)
    front_end.ok(Request.RESET_DEVICE)
    front_end.start()


CHURN: dict[str, tuple[Churn, int]] = {
    "connections": (connections, 60),
    "requests": (requests, 60),
    "halves of messages": (halves_of_messages, 150),
    "refused messages": (refused_messages, 150),
    "memory tables": (within(tables), 300),
    "memory slots": (within(slots), 200),
    "kick, call and error": (within(notifications), 600),
    "back-end channels": (within(channels), 300),
    "translations": (within(translations), 100),
    "dirty logs": (within(logs), 200),
    "in flight": (within(in_flight), 100),
    "owners": (within(owners), 200),
    "resets": (within(resets), 100),
}


def grown(live: Served, churn: Churn, count: int) -> tuple[Costs, Costs]:
    """What it takes before and after; before, a quarter of the same was done, so that nothing is new to it."""
    churn(live, count // 4)
    live.serves()
    before = live.settled()
    churn(live, count)
    live.serves()
    return before, live.settled()


def judge(before: Costs, after: Costs) -> None:
    assert after.fds == before.fds
    assert after.maps <= before.maps + 2
    assert after.rss_kib <= before.rss_kib + GROWS_KIB


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("flat"), "blk", "--memory", "1M", "--num-queues", "2") as server:
        yield server


@pytest.mark.parametrize("what", CHURN)
def test_nothing_grows(live: Served, what: str) -> None:
    churn, count = CHURN[what]
    judge(*grown(live, churn, count))


@pytest.mark.sweep
@pytest.mark.parametrize("what", CHURN)
def test_nothing_grows_in_the_long_run(tmp_path: Path, what: str) -> None:
    churn, count = CHURN[what]
    with served(tmp_path, "blk", "--memory", "1M", "--num-queues", "2") as server:
        judge(*grown(server, churn, 20 * count))


def test_the_scale_is_right(tmp_path: Path) -> None:
    """What is measured is what a process has: memory that it takes is seen, and descriptors that it is given."""
    with served(tmp_path, "blk", "--memory", "1M") as server, server.front_end() as front_end:
        assert front_end.send(Request.GET_QUEUE_NUM)
        before = server.settled()
        front_end.ready()
        after = server.settled()
        # The connection, two for its channel, kick, call and error.
        assert after.fds == before.fds + 5
        assert after.maps == before.maps + 1
