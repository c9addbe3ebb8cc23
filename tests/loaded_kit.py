# SPDX-License-Identifier: Apache-2.0
"""A guest that keeps several queues of a disk busy over our own front end, and outlives its back ends.

Request n writes its number all over a place of its own on the disk. Its driver looks at a ring only when it was called,
and paints the buffer of a request that is done: whoever does it once more writes POISON to the disk.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Self

from virtiova.addr import PAGE_SIZE, UVA
from virtiova.device.blk import SECTOR, Bit, Request
from virtiova.dma.ops import PlatformOps, RamRegion
from virtiova.errors import MachineError
from virtiova.features import Feature, mask
from virtiova.machine.vhost_user.frontend import WANTED, FrontEnd, drain
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.machine.vhost_user.memory import REGIONS, SharedMemory
from virtiova.ring.ends import Segment
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_driver import SplitDriver
from virtiova.serve.inflight import ring_bytes
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import InflightDescription, ProtocolFeature, VringAddr, VringState
from virtiova.wire.vhost_user import Request as Message

FEATURES: Final = mask(
    [wire.F_PROTOCOL_FEATURES, Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_EVENT_IDX, Bit.FLUSH]
)
LENGTH: Final = 4 * SECTOR
"""Bytes that a request writes."""
DATA: Final = PAGE_SIZE
STATUS: Final = 16
SLOTS: Final = 40
AT_ONCE: Final = 20
"""Requests of one queue that there are buffers for, and that are under way at a time."""
SIZE: Final = 64
POISON: Final = b"POISON!!"
SECONDS: Final = 20.0


@dataclass
class Slot:
    """A buffer, and the request that is or was in it. Its place on the disk is its own."""

    index: int
    region: RamRegion
    number: int = 0
    kind: Request = Request.OUT
    moved: bool = False
    """Whether its data page went elsewhere while it was under way."""


class Queue:
    """One ring and its driver's side."""

    def __init__(self, ops: PlatformOps, slots: Iterator[int]) -> None:
        layout = SplitLayout(SIZE)
        self.region = ops.alloc(layout.total)
        self.driver = SplitDriver(self.region, layout, event_idx=True)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.idle = [Slot(index, ops.alloc(2 * PAGE_SIZE)) for index, _ in zip(slots, range(SLOTS), strict=False)]
        self.busy: dict[int, Slot] = {}
        self.called = False

    @property
    def used(self) -> int:
        """The used index, as anybody may see it."""
        return self.region.load16(self.driver.layout.used + 2)


class LoadedGuest:
    """A guest with ``queues`` queues on the disk behind ``path``, whose file is ``disk``. A context manager."""

    def __init__(self, path: str, disk: str, queues: int) -> None:
        self.path = path
        self.memory = SharedMemory()
        self.iotlb = IotlbServer(self.memory.ram)
        self.iotlb.enable()
        ops = PlatformOps(self.memory.ram, self.memory.pages, self.iotlb)
        slots = iter(range(queues * SLOTS))
        self.queues = [Queue(ops, slots) for _ in range(queues)]
        self.front: FrontEnd | None = None
        self.number = self.done = 0
        self.reads = 0
        """Every how many-th request reads the place that it wrote before; 0: none."""
        self.disk = os.open(disk, os.O_RDWR)
        self.poison_at = queues * SLOTS * LENGTH
        self.size = queues * ring_bytes(SIZE)
        self.inflight = os.memfd_create("inflight")
        os.ftruncate(self.inflight, self.size)

    # -- the machine's side

    def connect(self) -> None:
        """To a fresh back end, with everything as the one before left it."""
        front = FrontEnd(
            _connected(self.path), self.iotlb.resolve, self.iotlb.failed, self.memory.uva, max_misses=1 << 20
        )
        self.front, self.iotlb.tell = front, front.invalidate
        front.open([*WANTED, ProtocolFeature.INFLIGHT_SHMFD])
        assert front.set_features(FEATURES, translating=True)
        description = InflightDescription(self.size, 0, len(self.queues), SIZE)
        front.must(Message.SET_INFLIGHT_FD, description.encode(), [self.inflight])
        front.must(Message.SET_MEM_TABLE, wire.encode_table(REGIONS), [self.memory.fd] * len(REGIONS))
        for index, queue in enumerate(self.queues):
            driver = queue.driver
            front.must(Message.SET_VRING_NUM, VringState(index, SIZE).encode())
            # All that a machine knows of a ring whose back end has died.
            front.must(Message.SET_VRING_BASE, VringState(index, queue.used).encode())
            address = VringAddr(index, 0, UVA(driver.desc), UVA(driver.used), UVA(driver.avail), 0)
            front.must(Message.SET_VRING_ADDR, address.encode())
            front.must(Message.SET_VRING_CALL, wire.encode_vring_fd(index, True), [queue.call])
            front.must(Message.SET_VRING_KICK, wire.encode_vring_fd(index, True), [queue.kick])
            front.watch(queue.call, functools.partial(self._called, queue))
            front.must(Message.SET_VRING_ENABLE, VringState(index, 1).encode())

    def disconnect(self) -> None:
        """The back end is gone."""
        if self.front is not None:
            self.front.close()
            self.front = None

    @staticmethod
    def _called(queue: Queue) -> None:
        queue.called |= drain(queue.call)

    # -- the driver's side

    def fill(self) -> None:
        """As many requests as are wanted at a time."""
        for queue in self.queues:
            added = False
            while len(queue.busy) < AT_ONCE:
                slot = queue.idle.pop(0)
                self._write(slot)
                queue.busy[self._add(queue, slot)] = slot
                added = True
            if added and queue.driver.publish():
                os.eventfd_write(queue.kick, 1)

    def _write(self, slot: Slot) -> None:
        self.number += 1
        slot.moved = False
        slot.kind = Request.IN if self.reads and slot.number and self.number % self.reads == 0 else Request.OUT
        if slot.kind is Request.OUT:
            slot.number = self.number
            slot.region.write(DATA, stamp(slot.number))
        slot.region.write(0, struct.pack("<IIQ", slot.kind, 0, slot.index * LENGTH // SECTOR) + b"\xee")

    @staticmethod
    def _add(queue: Queue, slot: Slot) -> int:
        at = slot.region.addr
        data = Segment(type(at)(at + DATA), LENGTH, write=slot.kind is Request.IN)
        return queue.driver.add([Segment(at, 16, write=False), data, Segment(type(at)(at + STATUS), 1, write=True)])

    def reap(self) -> int:
        """Look at what was given back in those rings that a call has come for; how many requests."""
        count = 0
        for queue in self.queues:
            if not queue.called:
                continue
            queue.called = False
            # The driver raises if a request is given back that is not under way: once too often.
            while used := queue.driver.poll():
                slot = queue.busy.pop(used.head)
                self.judge(slot)
                queue.idle.append(slot)
                count += 1
        self.done += count
        return count

    def judge(self, slot: Slot) -> None:
        """It said that it was done: it was. Then it must not be done again."""
        assert slot.region.read(STATUS, 1) == b"\0"
        there = os.pread(self.disk, LENGTH, slot.index * LENGTH)
        assert there == stamp(slot.number), f"request {slot.number} left {there[:16]!r}"
        if slot.kind is Request.IN and not slot.moved:
            assert slot.region.read(DATA, LENGTH) == stamp(slot.number)
        slot.region.write(0, struct.pack("<IIQ", Request.OUT, 0, self.poison_at // SECTOR))
        slot.region.write(DATA, POISON * (LENGTH // 8))

    def run(self, done: Callable[[], bool]) -> None:
        """Load until ``done()``. `MachineError` if the back end goes."""
        assert self.front is not None
        while not done():
            self.fill()
            self.front.pump(0.001)
            self.reap()

    def drain(self) -> None:
        """Until nothing is under way: what was lost would be missing here."""
        assert self.front is not None
        end = time.monotonic() + SECONDS
        while any(queue.busy for queue in self.queues):
            assert time.monotonic() < end, f"under way for ever: {[len(queue.busy) for queue in self.queues]}"
            self.front.pump(0.01)
            self.reap()

    def check(self) -> None:
        """The whole disk."""
        assert POISON not in os.pread(self.disk, self.poison_at + LENGTH, 0), "done again after it was given back"
        for queue in self.queues:
            for slot in queue.idle:
                if slot.number:
                    assert os.pread(self.disk, LENGTH, slot.index * LENGTH) == stamp(slot.number)

    def close(self) -> None:
        self.disconnect()
        for queue in self.queues:
            os.close(queue.kick)
            os.close(queue.call)
        os.close(self.inflight)
        os.close(self.disk)
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stamp(number: int) -> bytes:
    return struct.pack("<Q", number) * (LENGTH // 8)


def _connected(path: str) -> socket.socket:
    """As soon as somebody listens there."""
    end = time.monotonic() + SECONDS
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
            return sock
        except OSError as error:
            sock.close()
            if time.monotonic() > end:
                raise MachineError(f"nobody listens at {path}: {error.strerror}") from error
            time.sleep(0.005)
