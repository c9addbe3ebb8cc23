# SPDX-License-Identifier: Apache-2.0
"""Runs of IOTLB messages, taken at once: nothing comes of them that would not come of one message after the other."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_kit import WITH_BIT
from virtiova import _core
from virtiova.addr import GPA, UVA, Access
from virtiova.device.rng import Rng
from virtiova.dma.intervals import Interval, IntervalMap
from virtiova.dma.iotlb import EAGER, Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.errors import ProtocolError
from virtiova.serve.counters import Counters
from virtiova.serve.loop import RUN_BYTES, Connection
from virtiova.serve.misses import Misses
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import MemoryRegion, Message, Request

PAGE = 0x1000
MIB2 = 1 << 21
USER = 0x7000_0000_0000
SIZE = 4 * MIB2
"""Of each of two regions, adjacent in the front end, not in the guest."""
FAR = 1 << 40
MESSAGE = struct.Struct("<IIIQQQBB6x")
PLAIN, REPLY, NEED = 1, 5, 9

places = st.one_of(
    st.integers(0, 40).map(lambda n: n * PAGE),
    st.sampled_from([MIB2, MIB2 - PAGE, 0x1800, 7, (1 << 48) - PAGE, 1 << 48, (1 << 64) - PAGE, (1 << 64) - 1]),
)
sizes = st.one_of(
    st.sampled_from([PAGE] * 4 + [2 * PAGE, 5 * PAGE, 3, MIB2, MIB2 + PAGE]),
    st.sampled_from([0, 1, 1 << 32, (1 << 64) - 1, 0xFFFFFFFF01100000]),
)
users = st.one_of(
    st.integers(0, 60).map(lambda n: USER + n * PAGE),
    st.sampled_from([USER + SIZE - PAGE, USER + SIZE, USER + 2 * SIZE, USER + 8, USER - PAGE, 0, (1 << 64) - PAGE]),
)
flags = st.sampled_from([PLAIN] * 6 + [NEED] * 4)
updates = st.builds(
    lambda f, i, s, u, p: MESSAGE.pack(22, f, 32, i, s, u, p, 2), flags, places, sizes, users, st.integers(0, 4)
)
invalidates = st.builds(lambda f, i, s, u: MESSAGE.pack(22, f, 32, i, s, u, 255, 3), flags, places, sizes, users)
odd = st.one_of(
    st.builds(lambda f, k: MESSAGE.pack(22, f, 32, 0, PAGE, USER, 3, k), flags, st.sampled_from([0, 1, 4, 5, 255])),
    st.sampled_from([REPLY, 2, 0, 1 << 31 | 1, 1 << 31 | NEED]).map(
        lambda f: MESSAGE.pack(22, f, 32, PAGE, PAGE, USER, 3, 2)
    ),
    st.builds(
        lambda n: Message(22, MESSAGE.pack(22, 1, 32, 0, PAGE, USER, 3, 2)[12 : 12 + n]).encode(), st.integers(0, 33)
    ),
    st.sampled_from([Request.GET_FEATURES, Request.GET_QUEUE_NUM, Request.GET_PROTOCOL_FEATURES, 99]).map(
        lambda r: Message(r).encode()
    ),
    st.sampled_from([WITH_BIT, WITH_BIT & ~(1 << 33)]).map(lambda w: Message(2, wire.u64(w), need_reply=True).encode()),
)
plain = st.one_of(updates, updates, invalidates)


# -- the table by itself


@contextlib.contextmanager
def memory() -> Iterator[RegionRam]:
    fd = os.memfd_create("runs")
    os.ftruncate(fd, 2 * SIZE)
    ram = RegionRam()
    ram.add(GPA(0), SIZE, UVA(USER), 0, fd)
    ram.add(GPA(FAR), SIZE, UVA(USER + SIZE), SIZE, fd)
    os.close(fd)
    yield ram
    ram.clear()


def small(ram: RegionRam, load: int) -> Iotlb:
    """One whose lists are full soon."""
    made = Iotlb(ram)
    made._map = IntervalMap(load)
    made._answers = _core.Answers(made.radix, made._map, Interval, EAGER)
    return made


def by_hand(table: Iotlb, message: bytes) -> bool:
    """One message in Python; whether it was one that a run may hold."""
    request, flag, length, iova, size, user, allowed, kind = MESSAGE.unpack(message)
    if request != 22 or flag & 7 != 1 or length != 32 or kind not in (2, 3) or (kind == 2 and allowed > 3):
        return False
    if kind == 3:
        table.invalidate(iova, size)
        return True
    try:
        table.update(iova, size, UVA(user), Access(allowed))
    except ProtocolError:
        return False
    return True


def told(table: Iotlb) -> object:
    """All that can be seen of it."""
    rows = table._map.rows()
    assert len(table) == sum(map(len, rows[2])) == sum(map(len, rows[1]))
    assert rows[0] == [row[0] for row in rows[1]]
    assert [[each.start for each in row] for row in rows[2]] == rows[1]
    assert all(type(each) is Interval for each in table._map)
    known = [
        table.radix.covers(each.start, each.end - each.start, each.allowed) for each in table._map if each.end < 1 << 48
    ]
    return list(table._map), table.updates, table.invalidates, known


@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(plain, plain, odd.filter(lambda m: len(m) == MESSAGE.size)), max_size=60), st.integers(2, 9))
def test_a_run_is_one_message_after_the_other(messages: Sequence[bytes], load: int) -> None:
    with memory() as ram:
        natively, readable = small(ram, load), small(ram, load)
        rest = b"".join(messages)
        taken = 0
        while rest:
            count, updated, invalidated, replies = natively.take(rest)
            assert count == updated + invalidated >= replies
            for message in (rest[at : at + 44] for at in range(0, count * 44, 44)):
                assert by_hand(readable, message), "what a run takes is right"
            taken += count
            assert told(natively) == told(readable)
            rest = rest[count * 44 :]
            # What it left is the first that is not simple: by hand on both, and on.
            assert by_hand(natively, rest[:44]) == by_hand(readable, rest[:44]) if rest else True
            rest = rest[44:]
            assert told(natively) == told(readable)
        for iova in [*range(0, 41 * PAGE, PAGE), MIB2, (1 << 48) - PAGE]:
            for access in (Access.READ, Access.WRITE):
                if natively.radix.covers(iova, 1, access.value):
                    assert natively.lookup(iova, 1, access)


def pages(count: int, *, kind: int = 2, flag: int = PLAIN) -> list[bytes]:
    return [
        MESSAGE.pack(22, flag, 32, n * 2 * PAGE, PAGE, USER + n % 512 * PAGE if kind == 2 else 0, 3, kind)
        for n in range(1, count + 1)
    ]


def test_nearly_all_of_many_is_simple() -> None:
    with memory() as ram:
        table = Iotlb(ram)
        rest, by_python = b"".join(pages(20_000)), 0
        while rest:
            count = table.take(rest)[0]
            rest = rest[count * 44 :]
            by_python += bool(rest) and by_hand(table, rest[:44])
            rest = rest[44:]
        assert len(table) == table.updates == 20_000
        assert by_python < 200
        assert table.take(b"".join(pages(20_000)))[:2] == (20_000, 20_000), "each in place of itself"
        again = b"".join(pages(20_000, kind=3, flag=NEED)[::-1])
        assert table.take(again)[0] > 100
        assert len(table) == 20_000 - table.invalidates


def test_room_is_what_it_is_told() -> None:
    with memory() as ram:
        table = Iotlb(ram)
        table.update(0, PAGE, UVA(USER), Access.RW)
        assert table.take(b"")[0] == 0
        assert table._answers.take(b"".join(pages(5)), 3)[:2] == (2, 2)
        assert table._answers.take(b"".join(pages(5)), 3)[:2] == (0, 0)


def test_regions_that_come_and_go_are_the_ones_that_count() -> None:
    with memory() as ram:
        table = Iotlb(ram)
        table.update(0, PAGE, UVA(USER), Access.RW)
        assert table.take(b"".join(pages(3)))[0] == 3
        ram.remove(GPA(0), SIZE, UVA(USER))
        assert len(table) == 0
        table.update(0, PAGE, UVA(USER + SIZE), Access.RW)
        assert table.take(b"".join(pages(3)))[0] == 0
        assert table.take(MESSAGE.pack(22, 1, 32, PAGE, PAGE, USER + SIZE, 3, 2))[0] == 1
        assert table.lookup(PAGE, PAGE, Access.READ)[0].gpa == FAR  # type: ignore[index]


def test_what_is_no_region_is_refused() -> None:
    answers = Iotlb(RegionRam())._answers
    for wrong in ([(0, 1)], [(0, 1, 2, b"window")], [(-1, 1, 2, None)], [("a", 1, 2, None)]):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            answers.memory(wrong)  # type: ignore[arg-type]


# -- the connection


@dataclass
class Seen:
    """What came of a stream of messages."""

    replies: bytes = b""
    ended: str = ""
    mappings: list[Interval] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    asked: list[object] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class Server(Connection):
    """One in this process. ``one_by_one``: no runs. ``pumped``: what comes while it waits is taken by the pump."""

    def __init__(self, one_by_one: bool, *, pumped: bool = False) -> None:
        self.one_by_one, self.pumped = one_by_one, pumped
        self.wake, self._waker = os.pipe()
        self.seen = Seen()
        self.runs = 0
        self.finished = False
        self.pumps = 0
        self.ours, theirs = socket.socketpair()
        self.tally = Counters()
        super().__init__(Rng(), theirs, say=self.seen.log.append, counters=self.tally)
        self.ours.setblocking(False)

    def _run(self) -> int:
        if self.one_by_one:
            return 0
        did = super()._run()
        self.runs += did > 0
        return did

    def turn(self) -> None:
        """Take in all that was sent, and see what it says."""
        while select.select([self._sock], [], [], 0)[0] and not self.seen.ended:
            try:
                if self.pumped:
                    self._wait(0.0, self.wake)
                    self.pumps += self._pump.updates + self._pump.invalidates
                else:
                    self._main(select.POLLIN)
            except (ProtocolError, EOFError) as error:
                self.seen.ended = str(error) or "gone"
            with contextlib.suppress(BlockingIOError):
                while data := self.ours.recv(65536):
                    self.seen.replies += data

    def begin(self) -> None:
        fd = os.memfd_create("runs")
        os.ftruncate(fd, 2 * SIZE)
        back, self.back = socket.socketpair()
        regions = [
            MemoryRegion(GPA(0), SIZE, UVA(USER), 0),
            MemoryRegion(GPA(FAR), SIZE, UVA(USER + SIZE), SIZE),
        ]
        for request, payload, fds in (
            (Request.SET_OWNER, b"", []),
            (Request.SET_PROTOCOL_FEATURES, wire.u64(1 << 5), []),
            (Request.SET_FEATURES, wire.u64(WITH_BIT), []),
            (Request.SET_BACKEND_REQ_FD, b"", [back.fileno()]),
            (Request.SET_MEM_TABLE, wire.encode_table(regions), [fd, fd]),
        ):
            socket.send_fds(self.ours, [Message(request, payload).encode()], fds)
            self.turn()
        back.close()
        os.close(fd)
        assert self.host.misses is not None
        # Some pages are asked for, and of some it is known that they are refused.
        self.host.misses.ask([(n * PAGE, access) for n in range(6) for access in (Access.READ, Access.WRITE)], 0.0)
        self.host.misses.expire(1e9)
        self.host.rounds.clock = lambda: 0.0
        self.host.misses.ask([(n * PAGE, Access.READ) for n in range(3, 12)], 0.0)

    def finish(self) -> Seen:
        if self.finished:
            return self.seen
        self.finished = True
        misses = self.host.misses
        self.seen.mappings = list(self.host.iotlb._map)
        self.seen.counters = {**self.tally.as_dict(), "invalidate_us": 0}
        if misses is not None:
            self.seen.asked = [sorted((page, way.value) for page, way in of) for of in (misses._asked, misses._refused)]
        self.close()
        os.close(self.wake)
        os.close(self._waker)
        self.ours.close()
        self.back.close()
        return self.seen


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.one_of(plain, plain, plain, odd), min_size=1, max_size=12), st.booleans()), max_size=8
    ),
    st.data(),
)
def test_a_connection_may_not_be_told_from_one_that_takes_one_message_at_a_time(
    bursts: Sequence[tuple[Sequence[bytes], bool]], data: st.DataObject
) -> None:
    """Some bursts have a descriptor with the first byte; some are cut in the middle of a message."""
    with contextlib.ExitStack() as stack:
        # One that could not be closed in the middle would be in the way of the next example.
        servers = [Server(one_by_one=True), Server(one_by_one=False), Server(one_by_one=True, pumped=True)]
        for server in servers:
            stack.callback(server.finish)
            server.begin()
        play(servers, bursts, data)
        first, second, third = (server.finish() for server in servers)
    assert first == second
    assert first == third


def play(servers: Sequence[Server], bursts: Sequence[tuple[Sequence[bytes], bool]], data: st.DataObject) -> None:
    """The same to each of them."""
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        for messages, brought in bursts:
            stream = b"".join(messages)
            cut = data.draw(st.integers(0, len(stream))) if data.draw(st.integers(0, 3)) == 0 else len(stream)
            for server in servers:
                if server.seen.ended:
                    continue
                # One message with it is all that a front end sends at once: what is behind belongs to the next write.
                parts = [messages[0], stream[len(messages[0]) :]] if brought else [stream[:cut], stream[cut:]]
                for number, part in enumerate(parts):
                    if part:
                        socket.send_fds(server.ours, [part], [fd] if brought and not number else [])
                    if not brought:
                        server.turn()
                server.turn()
    finally:
        os.close(fd)


@pytest.mark.parametrize("pumped", [False, True])
def test_a_run_of_more_than_is_taken_at_once_is_taken(pumped: bool) -> None:
    server = Server(one_by_one=pumped, pumped=pumped)
    server.begin()
    count = 3 * RUN_BYTES // 44
    for at, message in enumerate(pages(count, flag=NEED)):
        server.ours.sendall(message)
        if at % 100 == 99:
            server.turn()
    server.turn()
    assert len(server.host.iotlb) == server.tally.updates == count
    assert server.seen.replies.count(Message(22).acknowledge().encode()) == count
    assert server.pumps > count // 2 if pumped else server.runs > 10
    server.finish()


@pytest.mark.parametrize("pumped", [False, True])
def test_a_descriptor_among_them_belongs_to_its_own_message(pumped: bool) -> None:
    """The same descriptor in the middle of a run: refused with its message, which asks; the others are taken."""
    server = Server(one_by_one=pumped, pumped=pumped)
    server.begin()
    ends = [pages(8, flag=NEED)[n] for n in range(8)]
    server.ours.sendall(b"".join(ends[:4]))
    with open(os.devnull, "rb") as null:
        socket.send_fds(server.ours, [ends[4]], [null.fileno()])
    server.ours.sendall(b"".join(ends[5:]))
    server.turn()
    assert server.seen.ended == ""
    good, bad = (Message(Request.IOTLB_MSG).acknowledge(ok).encode() for ok in (True, False))
    assert server.seen.replies.endswith(good * 4 + bad + good * 3)
    assert [each.start // (2 * PAGE) for each in server.host.iotlb._map] == [1, 2, 3, 4, 6, 7, 8]
    server.finish()


# -- what is asked for


@given(places, sizes)
def test_few_pages_are_forgotten_as_many_are(start: int, size: int) -> None:
    """Of all that has a byte in what the front end speaks of nothing is known any more, and of nothing else."""
    misses = Misses(replies=False)
    wants = [(page * PAGE, access) for page in range(30) for access in (Access.READ, Access.WRITE)]
    wants += [(MIB2, Access.READ), ((1 << 64) - PAGE, Access.WRITE)]
    misses.ask(wants, 0.0)
    misses.expire(1e9)
    misses.forgive(wants[::2])
    misses.ask(wants[::2], 0.0)
    misses.changed(start, size)
    end = start + (size or 1 << 64)
    left = [
        want
        for want in wants
        if not any(start - turn < want[0] + PAGE and want[0] < end - turn for turn in (0, 1 << 64))
    ]
    assert list(misses._asked) == [want for want in wants[::2] if want in left]
    assert misses._refused == {want for want in wants[1::2] if want in left}
    assert misses.waiting == bool(left)
