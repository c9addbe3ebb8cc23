# SPDX-License-Identifier: Apache-2.0
"""A disk whose file answers when the test wants it to: a socket, of which io_uring reads what the test sends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

from serve_kit import HEADER, OTHER, PAGE, PLAIN, STATUS
from virtiova import _core
from virtiova.device.blk import SECTOR, Blk
from virtiova.features import Feature
from worker_kit import FLUSH, SECONDS, Kit

SECTORS: Final = 64
IN, OUT = 0, 1
WITH_BIT: Final = PLAIN | 1 << Feature.ACCESS_PLATFORM


class HeldStore:
    """What engines do of it takes as long as the test likes. What Python does of it is counted."""

    read_only, size, how = False, SECTORS * SECTOR, "held"

    def __init__(self) -> None:
        self.ours, self.file = socket.socketpair()
        self.ours.setblocking(False)
        self.calls: list[str] = []

    def disk(self, most: int) -> _core.Disk:
        disk = _core.Disk(self.size, most, fd=self.file.fileno(), uring=True)
        disk.always_later = True
        return disk

    def fill(self) -> int:
        """Writes wait from now on; how many bytes are in their way."""
        self.file.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                count += self.file.send(bytes(PAGE))
        self.file.setblocking(True)
        return count

    def drain(self, count: int) -> bytes:
        """Take so many bytes that were written, and whatever comes behind them within a moment."""
        data, end = b"", time.monotonic() + SECONDS
        while len(data) < count:
            assert time.monotonic() < end, f"{len(data)} bytes were written, wanted {count}"
            with contextlib.suppress(BlockingIOError):
                data += self.ours.recv(1 << 20)
        return data

    def close(self) -> None:
        self.ours.close()
        self.file.close()

    # -- what Python asks of it

    def read(self, offset: int, length: int) -> bytes:
        self.calls.append("read")
        return b"p" * length

    def write(self, offset: int, data: bytes) -> None:
        self.calls.append("write")

    def flush(self) -> None:
        self.calls.append("flush")

    def discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")

    def zero(self, offset: int, length: int, *, free: bool) -> None:
        self.calls.append("zero")


class Held(Kit):
    """A front end before such a disk."""

    def __init__(self, store: HeldStore) -> None:
        self.store = store
        self.device = Blk(store)
        self.notes = -1
        self.flush = FLUSH
        super().__init__(self.device)

    def ask(self, head: int, kind: int = IN) -> None:
        """A request of the first sector (sockets have no other place). Each ``head`` has bytes of its own."""
        at = 0x100 * head
        self.put(HEADER + at, struct.pack("<IIQ", kind, 0, 0))
        self.put(STATUS + at, b"\xee")
        data = (self.data(head), SECTOR, kind == IN)
        self.offer(
            (self.dma(HEADER + at), 16, False),
            (self.dma(data[0]), *data[1:]),
            (self.dma(STATUS + at), 1, True),
            head=head,
            kick=False,
        )
        self.kick()

    @staticmethod
    def data(head: int) -> int:
        return OTHER + PAGE * head

    def status(self, head: int) -> int:
        return self.get(STATUS + 0x100 * head, 1)[0]

    def begun(self, count: int) -> None:
        """Until so many are under way."""
        self.until(lambda: self.engine.begun == count)

    @property
    def engine(self) -> _core.Disk:
        return self.device._disks[0]

    def asked(self) -> list[int]:
        """Until something was asked for: the pages, as offsets."""
        self.until(lambda: bool(self.host.outbox))
        return [miss.iova - self.dma(0) for miss in self.work()]

    def granted(self) -> list[int]:
        """Until something was asked for, and it is mapped where it was before; the pages."""
        pages = self.asked()
        for page in pages:
            self.map(page)
            self.answer(True)
        return pages

    def get_notes(self, head: int) -> int:
        """Whether it is noted in the file of what is in flight."""
        return os.pread(self.notes, 1, 16 + 16 * head)[0]

    def take_away(self, offset: int) -> None:
        """A page that is not the driver's any more."""
        self.invalidate(self.dma(offset), PAGE)


@contextlib.contextmanager
def held(features: int = WITH_BIT) -> Iterator[Held]:
    store = HeldStore()
    try:
        with Held(store) as front:
            try:
                yield front.begin(features)
            finally:
                # Nothing hangs at the end, whatever the test left.
                store.ours.close()
    finally:
        store.close()
