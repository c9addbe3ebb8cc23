# SPDX-License-Identifier: Apache-2.0
"""Entropy (virtio 1.4, 5.4): the device only ever writes."""

from __future__ import annotations

from collections.abc import Sequence

from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Request, segments
from virtiova.errors import UsageError
from virtiova.features import DeviceId


class RngDriver(DriverBase):
    """One queue of buffers that the device fills with random bytes."""

    device_id = DeviceId.ENTROPY
    reads = False

    def start(self) -> None:
        """Make the request queue."""
        self._open(1)

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Ask for as many random bytes as the buffers take."""
        queue = self._queues[0]
        queue.add(segments(buffers, write=True), table)
        return Request(queue, lambda: None, lambda: None)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """There is no such request: an entropy device has no device-readable buffers."""
        raise UsageError("an entropy device reads no buffers")

    def random(self, length: int) -> bytes:
        """``length`` random bytes from the device, up to 4096."""
        with self.memory(length) as region:
            used = self.run(self.make_device_write([(region.addr, length)]))
            return region.read(0, min(used.length, length))
