# SPDX-License-Identifier: Apache-2.0
"""Console (virtio 1.4, 5.3): the one port that every console has, input and output as bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Request, segments, total
from virtiova.features import DeviceId

RX: Final = 0
TX: Final = 1


class ConsoleDriver(DriverBase):
    """`make_device_write` posts a buffer and lets input arrive that fills it; `make_device_read` puts buffers out."""

    device_id = DeviceId.CONSOLE
    out_of_reach = "nobody here sees what this device puts out"

    def start(self) -> None:
        """Make both queues of port 0."""
        self._open(2)
        self._numbers = itertools.count(1)

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Post a buffer for input; once it is published, the peer types as much as it takes."""
        queue = self._queues[RX]
        queue.add(segments(buffers, write=True), table)
        typed = self.text(total(buffers))
        return Request(queue, lambda: self.peer.send(typed), lambda: None)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Put the buffers out; what was read shows at the peer."""
        queue = self._queues[TX]
        self.peer.received()
        output = bytearray()
        wanted = total(buffers)

        def arrived() -> bytes | None:
            for piece in self.peer.received():
                output.extend(piece)
            return bytes(output) if len(output) >= wanted else None

        queue.add(segments(buffers, write=False), table)
        return Request(queue, lambda: None, arrived)

    def text(self, length: int) -> bytes:
        """``length`` bytes, no two calls alike."""
        line = b"input %08d " % next(self._numbers)
        return (line * (length // len(line) + 1))[:length]

    def write(self, data: bytes) -> None:
        """Put bytes out."""
        with self.memory(len(data)) as region:
            region.write(0, data)
            self.run(self.make_device_read([(region.addr, len(data))]))

    def exchange(self, data: bytes) -> bytes:
        """Let the peer type ``data``; what the device put into a buffer of that size."""
        queue = self._queues[RX]
        with self.memory(len(data)) as region:
            queue.add(segments([(region.addr, len(data))], write=True))
            used = self.run(Request(queue, lambda: self.peer.send(data), lambda: None))
            return region.read(0, min(used.length, len(data)))
