# SPDX-License-Identifier: Apache-2.0
"""Requests that the kernel is at while pages are taken away: asked for, waited for, answered once, never in part."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest

from hostile_kit import LiveFrontEnd
from later_kit import OUT, WITH_BIT, Held, held
from serve_kit import HEADER, OTHER, PAGE, PLAIN, RING, STATUS, USED
from virtiova.device.blk import SECTOR
from virtiova.features import Status
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import InflightDescription, LogDescription, Message, Request, VringState

BYTES = bytes(range(256)) * 2
ELSEWHERE = 0x35000
"""A page that nobody has."""


def under_way(front: Held, head: int = 0, kind: int = 0) -> None:
    """A request that the file has, and has not answered."""
    front.ask(head, kind)
    front.begun(1)


def base(front: Held) -> int:
    (told,) = front.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
    return VringState.decode(told.payload).value


def test_it_is_the_workers_where_nothing_happens() -> None:
    with held() as front:
        under_way(front)
        assert front.used() == 0
        front.store.ours.send(BYTES)
        front.until(lambda: front.used() == 1)
        assert (front.get(front.data(0), SECTOR), front.status(0)) == (BYTES, 0)
        assert front.used_element(0) == (0, SECTOR + 1)
        assert front.tally()["helps"] == 0


@pytest.mark.parametrize("what", ["data", "status"])
def test_a_page_that_is_taken_away_is_asked_for(what: str) -> None:
    """The driver still waits for it: somebody dropped a cache. It gets what was read, once all of it can be."""
    with held() as front:
        under_way(front)
        page = front.data(0) if what == "data" else STATUS
        front.take_away(page)
        front.store.ours.send(BYTES)
        assert page in front.asked()
        assert (front.used(), front.status(0)) == (0, 0xEE)
        assert not front.lent()
        front.ask(3)
        assert front.used() == 0
        front.map(page, ELSEWHERE)
        front.answer(True)
        front.until(lambda: front.used() == 1)
        where = (ELSEWHERE, STATUS) if what == "data" else (front.data(0), ELSEWHERE)
        assert (front.get(where[0], SECTOR), front.get(where[1], 1)) == (BYTES, b"\0")
        assert front.used_element(0) == (0, SECTOR + 1)
        assert front.store.calls == [], "what is done is not done again"
        front.until(front.lent)
        front.store.ours.send(BYTES)
        front.until(lambda: front.used() == 2)
        assert not any("stopped" in line for line in front.said)


@pytest.mark.parametrize("what", ["its descriptors", "the used ring"])
def test_so_is_a_part_of_the_ring(what: str) -> None:
    page = RING if what == "its descriptors" else USED
    with held() as front:
        under_way(front)
        front.take_away(page)
        front.store.ours.send(BYTES)
        assert page in front.asked()
        front.map(page)
        front.answer(True)
        front.until(lambda: front.used() == 1)
        assert (front.get(front.data(0), SECTOR), front.status(0)) == (BYTES, 0)
        assert front.store.calls == []
        assert not any("stopped" in line for line in front.said)
        front.until(front.lent)


def test_one_that_is_refused() -> None:
    """As for any other request: the driver gets an error."""
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES)
        assert front.asked() == [front.data(0)]
        front.answer(False)
        front.until(lambda: front.used() == 1)
        assert front.status(0) == 1
        assert front.get(front.data(0), SECTOR) == bytes(SECTOR)
        assert front.host.counters.faults == 1
        front.until(front.lent)


def test_many_are_asked_for_at_once() -> None:
    with held() as front:
        front.ask(0)
        front.ask(3)
        front.begun(2)
        for head in (0, 3):
            front.take_away(front.data(head))
        front.store.ours.send(BYTES + BYTES[::-1])
        assert sorted(front.granted()) == [front.data(0), front.data(3)]
        front.until(lambda: front.used() == 2)
        # Which of them the kernel woke up first is its own matter.
        assert {front.get(front.data(head), SECTOR) for head in (0, 3)} == {BYTES, BYTES[::-1]}


def test_one_that_misses_nothing_does_not_wait_for_one_that_does() -> None:
    with held() as front:
        front.ask(0)
        front.ask(3)
        front.begun(2)
        front.take_away(front.data(0))
        front.store.ours.send(2 * BYTES)
        front.until(lambda: front.used() == 1)
        assert front.used_element(0) == (3, SECTOR + 1)
        assert front.status(0) == 0xEE
        assert front.granted() == [front.data(0)]
        front.until(lambda: front.used() == 2)


def test_a_write_that_is_done_is_not_done_again() -> None:
    """By the time that its status can be written a later one to the same place may be done: it would be undone."""
    with held() as front:
        before = front.store.fill()
        front.put(front.data(0), BYTES)
        under_way(front, kind=OUT)
        front.take_away(front.data(0))
        front.take_away(STATUS)
        assert front.store.drain(before + SECTOR)[before:] == BYTES
        assert front.asked() == [STATUS], "what was read of the driver is not needed any more"
        assert front.used() == 0
        front.map(STATUS)
        front.answer(True)
        front.until(lambda: front.used() == 1)
        assert front.used_element(0) == (0, 1)
        assert front.status(0) == 0
        assert front.store.calls == []


def test_what_the_file_did_not_do_is_done_from_the_start() -> None:
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES[:100])
        front.store.ours.close()
        assert front.granted() == [front.data(0)]
        assert front.store.calls == []
        front.until(lambda: front.used() == 1)
        assert front.store.calls == ["read"]
        assert front.get(front.data(0), SECTOR) == b"p" * SECTOR


def test_python_gets_the_ring_when_nothing_is_under_way() -> None:
    """A request that misses a page comes behind one that the disk does not answer: nobody waits for the disk."""
    with held() as front:
        under_way(front)
        front.take_away(front.data(3))
        front.ask(3)
        begin = time.monotonic()
        while time.monotonic() < begin + 0.05:
            assert not front.host.rounds.work()
        assert front.lent()
        assert not front.host.outbox
        front.store.ours.send(BYTES)
        assert front.granted() == [front.data(3)]
        assert front.used() == 1
        front.until(lambda: front.used() == 2)
        assert (front.get(front.data(0), SECTOR), front.get(front.data(3), SECTOR)) == (BYTES, b"p" * SECTOR)


# -- rings that stop meanwhile


def test_one_that_stops_is_taken_anew() -> None:
    """What is left are those that were taken last: the index says it all."""
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES)
        assert front.asked() == [front.data(0)]
        assert base(front) == 0 == front.used()
        assert front.status(0) == 0xEE
        front.start(base=0)
        front._avail[0] = 1
        front.host.rounds.kicked(0)
        front.serve()
        front.until(lambda: front.used() == 1)
        assert (front.get(front.data(0), SECTOR), front.status(0)) == (b"p" * SECTOR, 0)
        assert front.store.calls == ["read"]


def two_of_which_the_first_is_left(front: Held) -> None:
    front.ask(0)
    front.ask(3)
    front.begun(2)
    front.take_away(front.data(0))
    front.store.ours.send(2 * BYTES)
    assert front.asked() == [front.data(0)]
    front.until(lambda: front.used() == 1)


def test_one_that_no_index_can_tell_of() -> None:
    """Without a file of what is in flight: to take the last one anew would be to give the other back twice."""
    with held() as front:
        two_of_which_the_first_is_left(front)
        assert base(front) == 2
        assert front.used() == 1
        assert any("1 requests were begun that it stopped without" in line for line in front.said)
        assert front.session.status & Status.DEVICE_NEEDS_RESET


def test_one_that_the_file_tells_of() -> None:
    with held() as front:
        recorded(front)
        two_of_which_the_first_is_left(front)
        assert base(front) == 1 == front.used()
        assert not front.session.status & Status.DEVICE_NEEDS_RESET
        front.start(base=1)
        front._avail[0] = 2
        front.serve()
        front.until(lambda: front.used() == 2)
        assert front.used_element(1) == (0, SECTOR + 1)
        assert front.host.counters.resumed == 1
        assert front.store.calls == ["read"]
        assert not any(front.get_notes(head) for head in range(8))


def test_one_that_stops_has_done_what_the_file_did_not() -> None:
    with held() as front:
        front.ask(0)
        front.ask(3)
        front.begun(2)
        threading.Timer(0.05, front.store.ours.close).start()
        assert base(front) == 2 == front.used()
        assert front.store.calls == ["read", "read"]
        assert (front.status(0), front.status(3)) == (0, 0)


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("how", ["stopped", "status 0", "reset", "no owner", "memory", "new kicks", "gone"])
def test_whatever_comes_while_the_file_is_at_it(how: str, noted: bool) -> None:
    """It is waited for, and given back before anything changes: all of it, and once."""
    messages = {
        "stopped": (Request.GET_VRING_BASE, VringState(0, 0).encode()),
        "status 0": (Request.SET_STATUS, wire.u64(0)),
        "reset": (Request.RESET_DEVICE, b""),
        "no owner": (Request.RESET_OWNER, b""),
        "new kicks": (Request.SET_VRING_KICK, wire.encode_vring_fd(0, True)),
    }
    with held() as front:
        if noted:
            recorded(front)
        front.ask(0)
        front.ask(3)
        front.begun(2)
        threading.Timer(0.05, front.store.ours.send, (2 * BYTES,)).start()
        if how == "gone":
            front.host.close()
        elif how == "memory":
            front.table()
        else:
            front.send(*messages[how], (front.kicks[0],) if how == "new kicks" else ())
        assert front.used() == 2
        assert sorted(front.used_element(at) for at in range(2)) == [(0, SECTOR + 1), (3, SECTOR + 1)]
        assert [front.get(front.data(head), SECTOR) for head in (0, 3)] == [BYTES, BYTES]
        assert front.store.calls == []
        assert not front.session.status & Status.DEVICE_NEEDS_RESET
        if noted:
            assert not any(front.get_notes(head) for head in range(8))


def recorded(front: Held) -> None:
    """A file of what is in flight, and the ring is lent once more."""
    wanted = InflightDescription(0, 0, 1, 8)
    (told,) = front.send(Request.GET_INFLIGHT_FD, wanted.encode())
    front.notes = os.dup(told.fds[0])
    front._fds.append(front.notes)
    front.host.rounds.kicked(0)
    front.serve()
    front.until(front.lent)


@pytest.mark.parametrize("noted", [False, True])
def test_memory_that_comes_meanwhile(noted: bool) -> None:
    """A table of memory makes a ring be found anew; what it has begun stays begun."""
    with held() as front:
        if noted:
            recorded(front)
        two_of_which_the_first_is_left(front)
        front.table()
        front.serve()
        front.until(lambda: front.used() == 2)
        assert front.used_element(1) == (0, SECTOR + 1)
        assert front.get(front.data(0), SECTOR) == BYTES
        assert front.store.calls == []
        assert front.host.counters.resumed == 0
        front.until(front.lent)
        if noted:
            assert not any(front.get_notes(head) for head in range(8))


def test_a_log_that_is_begun_meanwhile() -> None:
    """What is written afterwards is in it."""
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES)
        assert front.asked() == [front.data(0)]
        log = os.memfd_create("log")
        front._fds.append(log)
        os.ftruncate(log, PAGE)
        front.send(Request.SET_LOG_BASE, LogDescription(PAGE, 0).encode(), (log,))
        front.send(Request.SET_FEATURES, wire.u64(WITH_BIT | front.flush | 1 << wire.F_LOG_ALL))
        front.map(front.data(0))
        front.answer(True)
        front.until(lambda: front.used() == 1)
        page = (0x10_0000 + front.data(0)) >> 12
        assert os.pread(log, 1, page // 8)[0] >> page % 8 & 1
        assert front.get(front.data(0), SECTOR) == BYTES


def test_other_features_are_another_start() -> None:
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES)
        front.asked()
        front.send(Request.SET_FEATURES, wire.u64(PLAIN))
        front.send(Request.RESET_DEVICE)
        assert front.host.rings[0].base == 0
        assert front.used() == 0


def test_the_front_end_goes_meanwhile() -> None:
    with held() as front:
        two_of_which_the_first_is_left(front)
        front.host.close()
        assert front.used() == 1


def test_a_chain_that_is_another_one_by_then() -> None:
    """A driver that rewrites its descriptors: what it wants now is done from the start."""
    with held() as front:
        under_way(front)
        front.take_away(front.data(0))
        desc = bytearray(front.get(RING + 16, 16))
        desc[8:12] = struct.pack("<I", 2 * SECTOR)
        front.put(RING + 16, bytes(desc))
        front.store.ours.send(BYTES)
        front.granted()
        front.until(lambda: front.used() == 1)
        assert front.store.calls == ["read"]
        assert front.get(front.data(0), 2 * SECTOR) == b"p" * 2 * SECTOR


def test_the_header_is_not_needed_any_more() -> None:
    with held() as front:
        under_way(front)
        front.take_away(HEADER)
        front.take_away(front.data(0))
        front.store.ours.send(BYTES)
        assert front.asked() == [front.data(0)]


# -- a disk that does not answer


class Told(Exception):
    """A signal has come."""


def test_who_waits_for_the_disk_hears_signals() -> None:
    """A ring that stops waits for what is under way; a handler that raises ends that, and all can be done later."""

    def told(_signum: int, _frame: FrameType | None) -> None:
        raise Told

    with held() as front:
        under_way(front)
        before = signal.signal(signal.SIGUSR2, told)
        late = threading.Timer(10, front.store.ours.send, (BYTES,))
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        late.start()
        try:
            with pytest.raises(Told):
                base(front)
            assert late.is_alive(), "the disk came first"
        finally:
            late.cancel()
            signal.signal(signal.SIGUSR2, before)
        assert front.engine.begun == 1
        front.store.ours.send(BYTES)
        assert base(front) == 1 == front.used()
        assert front.get(front.data(0), SECTOR) == BYTES


HANGS = """
import socket, sys, threading, time
from virtiova import _core
from virtiova.device.blk import Blk
from virtiova.device.store import MemoryStore
from virtiova.serve.server import Server, signals

class Store(MemoryStore):
    files = socket.socketpair()
    def disk(self, most):
        self.disk_ = _core.Disk(self.size, most, fd=self.files[0].fileno(), uring=True)
        self.disk_.always_later = True
        return self.disk_

def watch():
    while not store.disk_.begun:
        time.sleep(0.001)
    print("begun", flush=True)

store = Store(bytearray(1 << 16))
with Server(Blk(store), sys.argv[1]) as server, signals(server):
    threading.Thread(target=watch, daemon=True).start()
    print("ready", flush=True)
    server.run()
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_server_whose_disk_hangs_can_be_ended(tmp_path: Path, end: signal.Signals) -> None:
    """The first signal waits for what is under way, as a second one tells that it shall not."""
    path = tmp_path / "s"
    command = [sys.executable, "-c", HANGS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with LiveFrontEnd(path) as front_end:
                front_end.ready(PLAIN)
                front_end.put(HEADER, bytes(16))
                header, data, status = (front_end.dma(at) for at in (HEADER, OTHER, STATUS))
                for _ in range(100):
                    # The first may be Python's, who finds the ring.
                    front_end.offer((header, 16, False), (data, SECTOR, True), (status, 1, True))
                    if select.select([process.stdout], [], [], 0.1)[0]:
                        break
                assert process.stdout.readline() == "begun\n"
                front_end.raw(Message(Request.GET_VRING_BASE, VringState(0, 0).encode()).encode())
                process.send_signal(end)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
                # Two that come at once are one: on a machine that is busy, once more.
                for _ in range(50):
                    process.send_signal(end)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
                        break
                assert process.wait(10) == -end
        finally:
            process.kill()
