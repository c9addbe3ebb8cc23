# SPDX-License-Identifier: Apache-2.0
"""A front end that makes a notification wait: it shares the descriptor, and what makes it wait, with the server.

It would have to clear O_NONBLOCK between our setting it and our writing, which is a race. Here it always wins: the
server runs under a filter in which that call says that it was done, and does nothing. Its counter is full, and nobody
reads it. A queue's thread stands still then, until somebody wants something of it; the main thread does not.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile_kit import LiveFrontEnd, Served
from serve_kit import DATA, PLAIN
from virtiova import _core
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Request, VringState

FULL = 2**64 - 2
ALWAYS_WINS = """
import ctypes, os, sys, termios
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p

class Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))

context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
compare = (Compare * 1)(Compare(1, 4, termios.FIONBIO, 0))
number = library.seccomp_syscall_resolve_name(b"ioctl")
assert not library.seccomp_rule_add_array(context, 0x00050000, number, 1, compare)
assert not library.seccomp_load(context)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(params=["auto", "python"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A server that can be made to wait: in a worker, and in the main thread."""
    arguments = ("blk", "--memory", "1M", "--io", request.param)
    server = Served(tmp_path, *arguments, prefix=(sys.executable, "-c", ALWAYS_WINS))
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def full(front_end: LiveFrontEnd) -> int:
    """A counter that has no room, and of which a write waits."""
    counter = os.eventfd(0, 0)
    os.eventfd_write(counter, FULL)
    front_end._fds.append(counter)
    return counter


def answers(front_end: LiveFrontEnd) -> float:
    """How long a message takes that wants all workers out."""
    begin = time.monotonic()
    front_end.ok(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
    return time.monotonic() - begin


def test_a_call_that_waits(live: Served) -> None:
    with live.front_end() as front_end:
        front_end.ready(PLAIN)
        front_end.send(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (full(front_end),))
        for _ in range(3):
            assert front_end.read_sector() == 0
            assert answers(front_end) < 5
    live.serves()
    live.end()


def test_an_error_that_waits(live: Served) -> None:
    with live.front_end() as front_end:
        front_end.ready(PLAIN)
        front_end.send(Request.SET_VRING_ERR, wire.encode_vring_fd(0, True), (full(front_end),))
        front_end.offer((front_end.dma(DATA), 1 << 31, True), (front_end.dma(DATA), 16, False))
        live.said("makes no sense")
        assert answers(front_end) < 5
    live.serves()
    live.end()


def test_it_ends_while_somebody_makes_it_wait(live: Served) -> None:
    with live.front_end() as front_end:
        front_end.ready(PLAIN)
        front_end.send(Request.SET_VRING_CALL, wire.encode_vring_fd(0, True), (full(front_end),))
        assert front_end.read_sector() == 0
        live.end()


def test_who_is_told() -> None:
    """Without anybody's tricks: counters and pipes, also full ones, one without a reader, and nothing at all."""
    counter = os.eventfd(0, os.EFD_NONBLOCK)
    assert _core.tell(counter)
    assert _core.hear(counter) == 1
    assert _core.hear(counter) == 0
    os.eventfd_write(counter, FULL)
    assert _core.tell(counter)
    assert _core.hear(counter) == 1
    ours, theirs = os.pipe()
    assert _core.tell(theirs)
    assert os.read(ours, 100) == (1).to_bytes(8, sys.byteorder)
    while writable(theirs):
        os.write(theirs, bytes(512))
    assert _core.tell(theirs)
    assert _core.hear(ours) == 1
    os.close(ours)
    assert not _core.tell(theirs)
    os.close(theirs)
    assert not _core.tell(theirs)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.hear(theirs)
    os.close(counter)


def writable(fd: int) -> bool:
    return bool(select.select([], [fd], [], 0)[1])


def test_the_end_of_a_pipe_is_heard() -> None:
    ours, theirs = os.pipe()
    os.close(theirs)
    assert _core.hear(ours) == -1
    os.close(ours)
