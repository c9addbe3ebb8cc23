# SPDX-License-Identifier: Apache-2.0
"""Waiting by the pump: what it takes, what it leaves, and when it comes back. Runs are in ``test_serve_runs.py``."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from virtiova import _core
from virtiova.addr import GPA, UVA, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.wire.vhost_user import Message, Request

PAGE = 0x1000
USER = 0x7000_0000_0000
MESSAGE = struct.Struct("<IIIQQQBB6x")
UPDATE = MESSAGE.pack(22, 9, 32, PAGE, PAGE, USER, 3, 2)
INVALIDATE = MESSAGE.pack(22, 9, 32, PAGE, PAGE, 0, 0, 3)
DONE = Message(Request.IOTLB_MSG).acknowledge().encode()


@dataclass
class Bench:
    """A pump between two sockets, the front end's and the back-end channel, with another descriptor beside them."""

    table: Iotlb
    pump: _core.Pump = field(default_factory=_core.Pump)
    heard: list[bytes] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    todo: bool = False

    def __post_init__(self) -> None:
        self.front, self.ours = socket.socketpair()
        self.back, self.channel = socket.socketpair()
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.front.setblocking(False)

    def hear(self, messages: bytes) -> bool:
        self.heard.append(messages)
        return self.todo

    def answer(self, data: bytes) -> bool:
        self.answers.append(data)
        return self.todo

    def wait(self, milliseconds: int, *, take: bool = True) -> list[tuple[int, int]]:
        fds = [(fd, select.POLLIN) for fd in (self.ours.fileno(), self.channel.fileno(), self.event)]
        if not take:
            return self.pump.wait(fds, milliseconds)
        return self.pump.wait(
            fds, milliseconds, self.table.answers(), 100, self.hear, self.channel.fileno(), self.answer
        )


@pytest.fixture
def bench() -> Iterator[Bench]:
    fd = os.memfd_create("pump")
    os.ftruncate(fd, PAGE)
    ram = RegionRam()
    ram.add(GPA(0), PAGE, UVA(USER), 0, fd)
    os.close(fd)
    made = Bench(Iotlb(ram))
    # Its lists are begun by Python.
    made.table.update(4 * PAGE, PAGE, UVA(USER), Access.RW)
    yield made
    for sock in (made.front, made.ours, made.back, made.channel):
        sock.close()
    os.close(made.event)
    ram.clear()


def test_messages_are_done_and_acknowledged_and_the_wait_goes_on(bench: Bench) -> None:
    bench.front.sendall(UPDATE + INVALIDATE)
    bench.back.sendall(b"answer")
    began = time.monotonic()
    assert bench.wait(30) == []
    assert time.monotonic() - began >= 0.03
    assert bench.front.recv(100) == DONE * 2
    assert (bench.heard, bench.answers) == ([UPDATE + INVALIDATE], [b"answer"])
    assert (bench.pump.updates, bench.pump.invalidates, bench.pump.unsent) == (1, 1, b"")
    assert bench.pump.longest > 0
    bench.front.sendall(UPDATE)
    assert bench.wait(0) == []
    assert len(bench.table) == 2


def test_it_comes_back_for_whoever_has_something_to_do(bench: Bench) -> None:
    bench.todo = True
    bench.front.sendall(UPDATE)
    assert bench.wait(60_000) == []
    assert bench.front.recv(100) == DONE
    bench.back.sendall(b"answer")
    assert bench.wait(60_000) == []
    bench.todo = False
    bench.front.sendall(INVALIDATE)
    os.eventfd_write(bench.event, 1)
    assert bench.wait(60_000) == [(bench.event, select.POLLIN)]
    assert bench.front.recv(100) == DONE, "messages come first"


def test_what_is_not_for_it_stays(bench: Bench) -> None:
    odd = Message(Request.GET_FEATURES).encode()
    bench.front.sendall(odd)
    assert bench.wait(60_000) == [(bench.ours.fileno(), select.POLLIN)]
    assert bench.ours.recv(100) == odd
    bench.front.sendall(UPDATE)
    assert bench.wait(60_000, take=False) == [(bench.ours.fileno(), select.POLLIN)]
    assert bench.ours.recv(100) == UPDATE
    with open(os.devnull, "rb") as null:
        socket.send_fds(bench.back, [b"answer"], [null.fileno()])
        socket.send_fds(bench.front, [UPDATE], [null.fileno()])
    assert [fd for fd, _ in bench.wait(60_000)] == [bench.ours.fileno(), bench.channel.fileno()]
    bench.back.close()
    bench.front.close()
    assert not bench.heard
    assert not bench.answers


def test_acknowledgements_without_room_are_not_lost(bench: Bench) -> None:
    bench.ours.setblocking(False)
    filled = 0
    while True:
        try:
            filled += bench.ours.send(b"." * 4096)
        except BlockingIOError:
            break
    bench.front.sendall(UPDATE * 3)
    assert bench.wait(60_000) == []
    assert bench.pump.unsent.endswith(DONE)
    came = b""
    while len(came) < filled:
        came += bench.front.recv(1 << 16)
    assert (came[filled:] + bench.pump.unsent) == DONE * 3


def test_what_is_no_wait_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="descriptors"):
        bench.pump.wait([(0, 0)] * 600, 0)
    assert _core.Pump().wait([], 0) == []
