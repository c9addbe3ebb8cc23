# SPDX-License-Identifier: Apache-2.0
"""Network (virtio 1.4, 5.1): one receive and one transmit queue, no offloads."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Queue, Request, segments, total
from virtiova.errors import UsageError
from virtiova.features import DeviceId, Feature
from virtiova.ring.ends import Segment

RX: Final = 0
TX: Final = 1
F_MAC: Final = 5
_MODERN_HEADER: Final = 12
_LEGACY_HEADER: Final = 10
_BROADCAST: Final = b"\xff" * 6
_OURS: Final = bytes.fromhex("020000000001")
_ETHERTYPE: Final = bytes.fromhex("88b5")
"""Local experimental ethertype (IEEE 802, 88-B5)."""
MAX_FRAME: Final = 1514


_AGAIN_SECONDS: Final = 0.02
_TIMES: Final = 8
"""A network loses frames: one whose way back is not yet translated is dropped, and is sent again, so often. But not
before the device has used the one before, and had time to ask for what it missed: on a busy machine it may find all of
them at once otherwise, and drop them for one and the same reason."""


class _Repeat:
    """Does something again if enough time has gone by, and not too often."""

    def __init__(self, what: Callable[[], None], taken: Callable[[], bool]) -> None:
        self._what = what
        self._taken = taken
        self._times = 0
        self._last = time.monotonic()

    def now(self) -> None:
        """Do it."""
        self._times += 1
        self._last = time.monotonic()
        self._what()

    def __call__(self) -> None:
        if self._times >= _TIMES:
            return
        if not self._taken():
            self._last = time.monotonic()
        elif time.monotonic() - self._last > _AGAIN_SECONDS:
            self.now()


@dataclass(frozen=True, slots=True)
class _Repeated(Request):
    """A request that is helped along while it is not done."""

    repeat: _Repeat

    def done(self) -> bool:
        """Has the device used it?"""
        if self.queue.ring.used_moved():
            return True
        self.repeat()
        return False


class NetDriver(DriverBase):
    """`make_device_write` posts a receive buffer and lets a frame arrive that fills it, header included;
    `make_device_read` transmits the buffers as one frame."""

    device_id = DeviceId.NET
    table = 1 << F_MAC
    out_of_reach = "nobody here sees what this device sends (--echo says that it comes back)"

    def start(self) -> None:
        """Make both queues, and the page for the transmit header."""
        self._open(2)
        self._header = self.ops.alloc(self.header_size)
        self._numbers = itertools.count(1)

    @property
    def header_size(self) -> int:
        """Bytes of ``struct virtio_net_hdr``: without VERSION_1 (and without mergeable buffers) it is shorter."""
        return _MODERN_HEADER if self.negotiated.has(Feature.VERSION_1) else _LEGACY_HEADER

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Post a receive buffer; once it is published, the peer sends a frame that fills it. Where the network returns
        what it is given, we transmit it ourselves; where it is out of reach, frames come by themselves or not."""
        queue = self._queues[RX]
        queue.add(segments(buffers, write=True), table)
        length = total(buffers) - self.header_size
        frame = self.frame(length)
        if self.peer.reach == "echo":
            return self._echo_to(queue, frame)
        return Request(queue, lambda: self.peer.send(frame), lambda: None)

    def _echo_to(self, queue: Queue, frame: bytes) -> Request:
        """Fill a posted receive buffer with a frame that we transmit, and again if it was lost."""
        region = self.ops.alloc(len(frame))
        region.write(0, frame)
        repeat = _Repeat(lambda: self._transmit([(region.addr, len(frame))], None), self._transmitted)
        return _Repeated(queue, repeat.now, lambda: None, repeat)

    def _transmit(self, buffers: Sequence[Buffer], table: DmaRegion | None) -> None:
        """Transmit one frame, if the device has used enough of the ones before."""
        queue = self._queues[TX]
        self._transmitted()
        if queue.ring.room > len(buffers):
            self._add_frame(buffers, table)
            queue.go()

    def _transmitted(self) -> bool:
        """Whether the device has used all that was to be transmitted."""
        ring = self._queues[TX].ring
        while ring.poll() is not None:
            pass
        return ring.room == ring.layout.size

    def _add_frame(self, buffers: Sequence[Buffer], table: DmaRegion | None) -> None:
        header = Segment(DmaAddr(self._header.addr), self.header_size, False)
        self._queues[TX].add([header, *segments(buffers, write=False)], table)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Transmit the buffers; what was read shows at the peer, or in the frame that comes back. `UsageError` if that
        is out of reach."""
        if self.peer.reach == "none":
            raise UsageError(self.out_of_reach)
        queue = self._queues[TX]
        if self.peer.reach == "echo":
            return self._await_echo(buffers, table)
        self.peer.received()
        frames: list[bytes] = []

        def arrived() -> bytes | None:
            frames.extend(self.peer.received())
            wanted = total(buffers)
            return next((frame for frame in frames if len(frame) >= wanted), None)

        self._add_frame(buffers, table)
        return Request(queue, lambda: None, arrived)

    def _await_echo(self, buffers: Sequence[Buffer], table: DmaRegion | None) -> Request:
        """Transmit the buffers, with a receive buffer ready for what comes back, and again if it was lost."""
        receive, length = self._queues[RX], total(buffers)
        room = self.ops.alloc(self.header_size + MAX_FRAME)
        receive.add(segments([(room.addr, self.header_size + MAX_FRAME)], write=True))
        receive.go()
        self._add_frame(buffers, table)
        repeat = _Repeat(lambda: self._transmit(buffers, table), self._transmitted)

        def arrived() -> bytes | None:
            if receive.ring.used_moved():
                return room.read(self.header_size, length)
            repeat()
            return None

        return Request(self._queues[TX], lambda: None, arrived)

    def frame(self, length: int) -> bytes:
        """A broadcast frame of ``length`` bytes, no two alike."""
        text = b"frame %08d " % next(self._numbers)
        payload = text * (length // len(text) + 1)
        return (_BROADCAST + _OURS + _ETHERTYPE + payload)[:length]

    def send(self, frame: bytes) -> None:
        """Transmit one frame."""
        with self.memory(len(frame)) as region:
            region.write(0, frame)
            self.run(self.make_device_read([(region.addr, len(frame))]))

    def exchange(self, frame: bytes) -> bytes:
        """Let the peer send ``frame``; what the device put into a receive buffer, without the header."""
        queue = self._queues[RX]
        room = self.header_size + MAX_FRAME
        with self.memory(room) as region:
            queue.add(segments([(region.addr, room)], write=True))
            used = self.run(Request(queue, lambda: self.peer.send(frame), lambda: None))
            return region.read(self.header_size, max(0, min(used.length, room) - self.header_size))
