# SPDX-License-Identifier: Apache-2.0
"""Network (virtio 1.4, 5.1): one receive and one transmit queue, no offloads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Queue, Request, segments, total
from virtiova.errors import UsageError
from virtiova.features import DeviceId, Feature
from virtiova.ring.split_driver import Segment

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
            return Request(queue, self._transmit(frame).go, lambda: None)
        return Request(queue, lambda: self.peer.send(frame), lambda: None)

    def _transmit(self, frame: bytes) -> Queue:
        """A frame of our own in the transmit queue, not yet visible to the device."""
        region = self.ops.alloc(len(frame))
        region.write(0, frame)
        self._add_frame([(region.addr, len(frame))], None)
        return self._queues[TX]

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
        """Transmit the buffers, with a receive buffer ready for what comes back."""
        receive, length = self._queues[RX], total(buffers)
        room = self.ops.alloc(self.header_size + MAX_FRAME)
        receive.add(segments([(room.addr, self.header_size + MAX_FRAME)], write=True))
        receive.go()
        self._add_frame(buffers, table)

        def arrived() -> bytes | None:
            return room.read(self.header_size, length) if receive.ring.used_moved() else None

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
