# SPDX-License-Identifier: Apache-2.0
"""The marks of what is in flight are needed: after a back end that worked out of order, nothing else says what to do.

It took two requests, gave the second one back, and was killed with ``kill -9``. Its used index says 1, and so does the
machine, which has nothing else to go by. Our server takes over: with the file, and without it.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile_kit import LiveFrontEnd, served
from serve_kit import PLAIN, SIZE
from served_guest import wait_for
from vhost_user_kit import listening
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.blk import Request as BlkRequest
from virtiova.device.store import MemoryStore
from virtiova.serve.inflight import ring_bytes
from virtiova.serve.offer import offer_of
from virtiova.wire.vhost_user import InflightDescription, ProtocolFeature, Request

FIRST, SECOND = 0, 4
"""Heads of the two requests; their places in memory, and their sectors, follow from them."""
WITH_FILE = offer_of(Blk(MemoryStore(bytearray(SECTOR)))).protocol
WITHOUT = WITH_FILE & ~(1 << ProtocolFeature.INFLIGHT_SHMFD)


def at(head: int) -> int:
    """Where a request's header is; its data 16 bytes further on, its status after a page."""
    return 0x10000 + 0x2000 * head


def write(end: LiveFrontEnd, head: int, text: bytes) -> None:
    """A request that writes ``text`` to the sector with its head's number."""
    end.put(at(head), struct.pack("<IIQ", BlkRequest.OUT, 0, head) + text * (SECTOR // len(text)))
    end.put(at(head) + 0x1000, b"\xee")
    end.offer((end.dma(at(head)), 16 + SECTOR, False), (end.dma(at(head) + 0x1000), 1, True), head=head, kick=False)


def status(end: LiveFrontEnd, head: int) -> int:
    return end.get(at(head) + 0x1000, 1)[0]


def sector(disk: Path, head: int) -> bytes:
    return disk.read_bytes()[head * SECTOR : head * SECTOR + 8]


@pytest.fixture
def notes() -> Iterator[int]:
    """The file of what is in flight, which the machine keeps."""
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, ring_bytes(SIZE))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("protocol", [WITH_FILE, WITHOUT], ids=["with the file", "without it"])
def test_what_a_disorderly_back_end_left(tmp_path: Path, notes: int, protocol: int) -> None:
    disk, path = tmp_path / "disk", tmp_path / "live.sock"
    disk.write_bytes(bytes(64 * SECTOR))
    description = InflightDescription(ring_bytes(SIZE), 0, 1, SIZE).encode()

    def ready(end: LiveFrontEnd, base: int) -> None:
        end.negotiate(PLAIN, protocol)
        if protocol == WITH_FILE:
            end.ok(Request.SET_INFLIGHT_FD, description, (notes,))
        end.start(base=base)

    command = [sys.executable, str(Path(__file__).with_name("disorderly.py")), str(path), str(disk)]
    with subprocess.Popen(command) as before:
        try:
            wait_for(lambda: listening(path), "a socket")
            with LiveFrontEnd(path) as guest:
                ready(guest, 0)
                write(guest, FIRST, b"first!!!")
                write(guest, SECOND, b"second!!")
                os.eventfd_write(guest.kicks[0], 1)
                guest.wait_used(1)
                before.kill()
                before.wait()
                assert guest.used_element(0) == (SECOND, 1)
                assert (status(guest, FIRST), status(guest, SECOND)) == (0xEE, 0)
                assert (sector(disk, FIRST), sector(disk, SECOND)) == (bytes(8), b"second!!")
                # It is done, so that its buffer is somebody else's now.
                guest.put(at(SECOND) + 16, b"POISON!!" * (SECTOR // 8))
                with served(tmp_path, "blk", str(disk)) as server, server.front_end() as end:
                    os.dup2(guest.file, end.file)
                    end._avail = guest._avail
                    available = guest._avail[0]
                    ready(end, guest.used())
                    end._avail[0] = available
                    end.wait_used(2)
                    given, answered = end.used_element(1)[0], status(end, FIRST)
        finally:
            before.kill()
    if protocol == WITH_FILE:
        assert (given, answered) == (FIRST, 0), "what was left is done, and nothing else"
        assert (sector(disk, FIRST), sector(disk, SECOND)) == (b"first!!!", b"second!!")
    else:
        assert (given, answered) == (SECOND, 0xEE), "the second one twice, the first one never"
        assert (sector(disk, FIRST), sector(disk, SECOND)) == (bytes(8), b"POISON!!")
