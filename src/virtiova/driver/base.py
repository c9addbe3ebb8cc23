# SPDX-License-Identifier: Apache-2.0
"""What the drivers share: a queue over DMA ops, a request that is ready to go, and waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.dma.ops import DmaOps, DmaRegion
from virtiova.driver.negotiate import Negotiated
from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.features import DeviceId, Feature
from virtiova.ports import Peer, Transport
from virtiova.ring.ends import DriverRing, Segment, Used
from virtiova.ring.layout import PackedLayout, SplitLayout
from virtiova.ring.packed_driver import PackedDriver
from virtiova.ring.split_driver import SplitDriver

QUEUE_SIZE: Final = 8
"""Entries of a modern queue: its three parts fit into one page. Legacy queues have a fixed size."""
REQUEST_SECONDS: Final = 2.0

Wait = Callable[[Callable[[], bool], float], bool]
"""`ports.Machine.wait`: let the device work until something is true, or a time is over."""
Buffer = tuple[int, int]
"""Address for the device, and length in bytes."""


class Queue:
    """One virtqueue of a driver: its ring, split or packed as negotiated, in memory of the device's own DMA ops, and
    the way to kick it."""

    def __init__(
        self,
        transport: Transport,
        index: int,
        ops: DmaOps,
        negotiated: Negotiated,
        vector: int | None = None,
        *,
        size: int = QUEUE_SIZE,
    ) -> None:
        largest = transport.queue_size(index)
        if largest == 0:
            raise ProtocolError(f"the device has no queue {index}")
        size = largest if transport.legacy else min(size, largest)
        self.region: DmaRegion
        self.ring: DriverRing
        self.index = index
        self._transport = transport
        self._ops = ops
        self._negotiated = negotiated
        self._vector = vector
        if negotiated.in_rings(Feature.RING_PACKED):
            self.lay_out(PackedLayout(size))
        else:
            self.lay_out(SplitLayout(size, used_align=PAGE_SIZE if transport.legacy else 4))

    def lay_out(self, layout: SplitLayout | PackedLayout, start: int = 0) -> None:
        """Make the ring, in memory of its own, empty: from ``start`` on, as its driver end counts."""
        has = self._negotiated.in_rings
        event_idx, in_order = has(Feature.RING_EVENT_IDX), has(Feature.IN_ORDER)
        region = self.region = self._ops.alloc(layout.total)
        if isinstance(layout, PackedLayout):
            self.ring = PackedDriver(region, layout, event_idx=event_idx, in_order=in_order, start=start)
        else:
            order = self._transport.byte_order
            self.ring = SplitDriver(region, layout, order, event_idx=event_idx, in_order=in_order, start=start)

    def enable(self) -> None:
        """Hand the ring to the device (virtio 1.4, 4.1.5.1.3)."""
        self._transport.enable_queue(self.index, self.ring.layout.size, *self.ring.parts, self._vector)

    def add(self, segments: Sequence[Segment], table: DmaRegion | None = None) -> None:
        """Add a request, through the indirect ``table`` if one is given. Not yet visible to the device."""
        if table is None:
            self.ring.add(segments)
        else:
            self.ring.add_indirect(segments, table)

    def go(self) -> None:
        """Publish, and kick if the device wants to be kicked."""
        if self.ring.publish():
            self.kick()

    def kick(self) -> None:
        """Kick, wanted or not."""
        self._transport.notify(self.index)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that lies in the ring but is not published. ``arrived`` tells what the device gave away after it
    read the buffers: bytes as long as these, or None while nothing has come."""

    queue: Queue
    after: Callable[[], None]
    arrived: Callable[[], bytes | None]

    def go(self) -> None:
        """Publish it, kick, and do what makes the device use it."""
        self.queue.go()
        self.after()

    def done(self) -> bool:
        """Has the device used it? That says nothing about where its bytes went."""
        return self.queue.ring.used_moved()


class Driver(Protocol):
    """A driver as the experiments see it: it can make its device write to memory, and maybe read from it."""

    device_id: DeviceId
    reads: bool
    """Whether there is a request that makes the device read a payload and give it away."""
    writes: bool
    """Whether there is a request that makes the device fill a payload of any length."""

    def start(self) -> None:
        """Make the queues and hand them to the device. DRIVER_OK is the caller's."""

    def queues(self) -> list[Queue]: ...

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A request that makes the device fill ``buffers``. Their total is a multiple of 512 bytes."""

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A request that makes the device read ``buffers``. Their total is a multiple of 512 bytes."""


class DriverBase:
    """The state that every driver has. ``size`` is that of its rings where the device leaves the choice, ``first`` the
    number of its first queue: a device with several alike may have several drivers."""

    device_id: DeviceId
    reads = True
    writes = True
    out_of_reach = ""
    """Why no request may make the device read a payload where what it does with it is out of reach (`Peer.reach`)."""
    table = 0
    """Device-specific feature bits that the driver understands."""

    def __init__(
        self,
        transport: Transport,
        ops: DmaOps,
        negotiated: Negotiated,
        peer: Peer,
        wait: Wait,
        vector: int | None = None,
        *,
        size: int = QUEUE_SIZE,
        first: int = 0,
    ) -> None:
        if transport.device_id != self.device_id:
            raise ProtocolError(f"a driver for device type {self.device_id} on type {transport.device_id}")
        self.transport = transport
        self.ops = ops
        self.negotiated = negotiated
        self.peer = peer
        self._wait = wait
        self._vector = vector
        self._size = size
        self._first = first
        self._queues: list[Queue] = []

    def _open(self, count: int) -> None:
        """Make and enable ``count`` queues."""
        numbers = range(self._first, self._first + count)
        self._queues = [
            Queue(self.transport, index, self.ops, self.negotiated, self._vector, size=self._size) for index in numbers
        ]
        for queue in self._queues:
            queue.enable()

    def queues(self) -> list[Queue]:
        """All queues that were made."""
        return self._queues

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[DmaRegion]:
        """Memory that the device may reach until the block ends. After an error it is never used again: the device
        may still be at it."""
        region = self.ops.alloc(size)
        yield region
        self.ops.free(region)

    def run(self, request: Request) -> Used:
        """Publish a request and wait for it; `MachineError` if the device does not use it in time."""
        request.go()
        if not self._wait(request.done, REQUEST_SECONDS):
            raise MachineError(f"the device did not complete a request within {REQUEST_SECONDS:g} s")
        used = request.queue.ring.poll()
        if used is None:
            raise ProtocolError("the used index moved and moved back")
        return used


class PayloadDriver(DriverBase):
    """A driver for a device that moves no bytes of the driver's choice: its requests are about memory itself."""

    reads = False
    writes = False

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """There is no such request."""
        raise UsageError(f"a device of type {self.device_id} fills no buffers")

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """There is no such request."""
        raise UsageError(f"a device of type {self.device_id} reads no buffers that it would show")


def segments(buffers: Sequence[Buffer], *, write: bool) -> list[Segment]:
    """Buffers as segments of a request; ``write``: the device writes them."""
    return [Segment(DmaAddr(addr), length, write) for addr, length in buffers]


def total(buffers: Sequence[Buffer]) -> int:
    """Bytes in all."""
    return sum(length for _, length in buffers)
