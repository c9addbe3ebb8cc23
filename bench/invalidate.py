# SPDX-License-Identifier: Apache-2.0
"""How long a loaded back end takes to acknowledge an INVALIDATE: from sending it to the answer, at the front end.

Usage: invalidate.py [--rounds N] [--json]. ``virtiova serve`` in a process of its own, every queue full of requests of
one kind over our own front end, and an INVALIDATE of a page that no request uses every few milliseconds. The file lies
in the page cache. Who is not running does not answer: on a shared machine the largest figures say little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from virtiova.addr import IOVA, UVA, DmaAddr
from virtiova.device.blk import MAX_DATA, SECTOR, SEG_MAX, SIZE_MAX, Bit, Request
from virtiova.dma.ops import PlatformOps, RamRegion
from virtiova.features import Feature
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.connection import Running
from virtiova.machine.vhost_user.frontend import FrontEnd
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.machine.vhost_user.memory import REGIONS, SharedMemory
from virtiova.ring.ends import Segment
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_driver import SplitDriver
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Request as Message
from virtiova.wire.vhost_user import VringAddr, VringState

SIZE = 128
IMAGE = 64 << 20
FEATURES = (
    1 << wire.F_PROTOCOL_FEATURES
    | 1 << Feature.VERSION_1
    | 1 << Feature.ACCESS_PLATFORM
    | 1 << Feature.RING_INDIRECT_DESC
)
CACHED = 1 << Bit.FLUSH
"""A driver without it has each write on the disk before it is done, and waits for that."""


@dataclass(frozen=True)
class Kind:
    """One kind of load."""

    name: str
    argv: str
    rings: Sequence[int]
    """The indices of the rings that are loaded."""
    buffers: int
    length: int
    """Of each buffer of a request, in bytes."""
    disk: bool = True


BLK = f"{sys.executable} -m virtiova serve blk {{image}} --num-queues 4 --socket-path {{socket}}"
NET = f"{sys.executable} -m virtiova serve net --neighbour 10.0.2.2 --socket-path {{socket}}"
KINDS = (
    Kind("blk, 4 queues, 4 KiB", BLK, range(4), 1, 4096),
    Kind("blk, 4 queues, 1 MiB", BLK, range(4), 8, SIZE_MAX),
    Kind(f"blk, 4 queues, {MAX_DATA / 2**20:.2f} MiB", BLK, range(4), SEG_MAX, SIZE_MAX),
    Kind("net, frames of 1514 bytes", NET, (1,), 1, 1526, disk=False),
)


class Load:
    """A back end with all its rings full."""

    def __init__(self, front: FrontEnd, memory: SharedMemory, iotlb: IotlbServer, kind: Kind) -> None:
        self.front, self.kind = front, kind
        ops = PlatformOps(memory.ram, memory.pages, iotlb)
        # All requests have the same buffer: what is measured is how long they take.
        self.data = ops.alloc(kind.length)
        self.page = IOVA(ops.alloc(4096).addr)
        self.count = 0
        self._random = random.Random(1)
        self.rings: list[tuple[SplitDriver, int, list[RamRegion]]] = []
        front.must(Message.SET_MEM_TABLE, wire.encode_table(REGIONS), [memory.fd] * len(REGIONS))
        for index in kind.rings:
            layout = SplitLayout(SIZE)
            driver = SplitDriver(ops.alloc(layout.total), layout)
            tables = [ops.alloc(4096) for _ in range(16)]
            self.rings.append((driver, self._start(index, driver), tables))

    def _start(self, index: int, driver: SplitDriver) -> int:
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        must, one = self.front.must, wire.encode_vring_fd(index, True)
        must(Message.SET_VRING_NUM, VringState(index, SIZE).encode())
        must(Message.SET_VRING_BASE, VringState(index, 0).encode())
        where = VringAddr(index, 0, UVA(driver.desc), UVA(driver.used), UVA(driver.avail), 0)
        must(Message.SET_VRING_ADDR, where.encode())
        must(Message.SET_VRING_KICK, one, [kick])
        must(Message.SET_VRING_ENABLE, VringState(index, 1).encode())
        return kick

    def fill(self) -> None:
        """Take what is done, and offer it again."""
        for driver, kick, tables in self.rings:
            added = False
            while driver.poll() is not None:
                self.count += 1
            while SIZE - driver.room < len(tables):
                self._add(driver, tables[driver.room % len(tables)])
                added = True
            if added and driver.publish():
                os.eventfd_write(kick, 1)

    def _add(self, driver: SplitDriver, table: RamRegion) -> None:
        """A request whose header and status are at the end of its own indirect table."""
        kind, at = self.kind, table.addr
        data = [Segment(self.data.addr, kind.length, write=False)] * kind.buffers
        if not kind.disk:
            driver.add_indirect(data, table)
            return
        sector = self._random.randrange((IMAGE - kind.buffers * kind.length) // SECTOR)
        table.write(3072, struct.pack("<IIQ", Request.OUT, 0, sector))
        ends = Segment(DmaAddr(at + 3072), 16, write=False), Segment(DmaAddr(at + 3088), 1, write=True)
        driver.add_indirect([ends[0], *data, ends[1]], table)

    def measure(self, count: int) -> list[float]:
        """Seconds that so many acknowledgements took."""
        waits: list[float] = []
        while len(waits) < count:
            end = time.monotonic() + self._random.uniform(0, 0.005)
            while time.monotonic() < end:
                self.fill()
                self.front.pump(0.0005)
            begin = time.monotonic()
            self.front.invalidate(self.page, 4096)
            waits.append(time.monotonic() - begin)
        return waits


@contextlib.contextmanager
def loaded(kind: Kind, image: str) -> Iterator[Load]:
    """A back end of that kind, under load."""
    spawn = kind.argv.replace("{image}", image)
    with contextlib.ExitStack() as stack:
        memory = SharedMemory()
        stack.callback(memory.close)
        running = stack.enter_context(Running(BackEnd(spawn=spawn)))
        sock = stack.enter_context(running.connect())
        iotlb = IotlbServer(memory.ram)
        iotlb.enable()
        front = FrontEnd(sock, iotlb.resolve, iotlb.failed, memory.uva, running.gone)
        stack.callback(front.close)
        iotlb.tell = front.invalidate
        front.open()
        front.set_features(FEATURES | (CACHED if kind.disk else 0), translating=True)
        yield Load(front, memory, iotlb, kind)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="acknowledgements of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(IMAGE)
        for kind in KINDS:
            with loaded(kind, image.name) as load:
                begin = time.monotonic()
                waits = sorted(load.measure(options.rounds))
                seconds = time.monotonic() - begin
            rows.append(
                {
                    "load": kind.name,
                    "requests per second": round(load.count / seconds),
                    "median ms": round(statistics.median(waits) * 1e3, 2),
                    "99 % ms": round(waits[len(waits) * 99 // 100] * 1e3, 2),
                    "largest ms": round(waits[-1] * 1e3, 2),
                }
            )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
