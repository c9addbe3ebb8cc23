# SPDX-License-Identifier: Apache-2.0
"""Once an INVALIDATE is acknowledged no access through the old mapping happens: under load, with canary pages.

The data page of a request that is under way moves from page A to page C, which says the same. When the back end
has acknowledged that, A is painted, and from then on nobody may write to it, nor read it: what was read would be on
the disk. Pages wait in a queue before they are used again, and are looked at then and at the end.
"""

from __future__ import annotations

import collections
import json
import os
import random
import re
import statistics
import time
from pathlib import Path

import pytest

from loaded_kit import DATA, LoadedGuest
from served_guest import Server
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ops import RamRegion
from virtiova.dma.space import Miss

QUEUES = 3
IMAGE = 2 << 20
HOMES = 200
"""Pages that data pages move to: so many moves later one of them is used again."""
FORBIDDEN = b"NO MORE!"
PAINT = FORBIDDEN * (PAGE_SIZE // 8)


class BrokenPromiseError(AssertionError):
    """A page was written, or read, through a mapping that was acknowledged to be gone."""


class Mover:
    """Moves data pages under a guest's load."""

    def __init__(self, guest: LoadedGuest, seed: int) -> None:
        self.guest = guest
        self.draw = random.Random(seed)
        ram = guest.memory.ram
        self.homes = collections.deque(guest.memory.pages.page() for _ in range(HOMES))
        for gpa in self.homes:
            ram.write(gpa, PAINT)
        self.waits: list[float] = []

    def move(self) -> None:
        """One data page of a request that is under way."""
        guest = self.guest
        queue = self.draw.choice([queue for queue in guest.queues if queue.busy])
        slot = self.draw.choice(list(queue.busy.values()))
        data = IOVA(slot.region.addr + DATA)
        first, old = self.home(slot.region.addr), self.home(data)
        new = self.homes.popleft()
        self.look(new)
        ram = guest.memory.ram
        ram.write(new, ram.read(old, PAGE_SIZE))
        guest.iotlb.map(data, new, PAGE_SIZE)
        slot.region, slot.moved = RamRegion(ram, slot.region.addr, [first, new]), True
        begin = time.monotonic()
        guest.iotlb.invalidate()
        self.waits.append(time.monotonic() - begin)
        # Here it is acknowledged.
        ram.write(old, PAINT)
        self.homes.append(GPA(old))

    def home(self, iova: int) -> GPA:
        spans = self.guest.iotlb.lookup(iova, 1, Access.READ)
        assert not isinstance(spans, Miss)
        return spans[0].gpa

    def look(self, gpa: GPA) -> None:
        if self.guest.memory.ram.read(gpa, PAGE_SIZE) != PAINT:
            raise BrokenPromiseError(f"page 0x{gpa:x} was written after it was taken away")

    def check(self) -> None:
        """All pages that nobody has, and the disk."""
        for gpa in self.homes:
            self.look(gpa)
        if FORBIDDEN in os.pread(self.guest.disk, IMAGE, 0):
            raise BrokenPromiseError("a page was read after it was taken away")


def moves(tmp_path: Path, rounds: int, kind: str = "blk", io: str = "auto") -> Mover:
    """A guest under load, of whose pages so many are moved that the back end knew."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(IMAGE))
    with (
        Server(tmp_path, "blk", kind, str(disk), "--num-queues", str(QUEUES), "--io", io) as server,
        LoadedGuest(server.path, str(disk), QUEUES) as guest,
    ):
        guest.reads = 3
        guest.connect()
        assert guest.front is not None
        mover = Mover(guest, rounds)
        while (told := guest.front.counters.invalidates) < rounds:
            guest.fill()
            mover.move()
            # Of a page that nobody has asked for nobody is told: let them ask, who may be short of time.
            guest.front.pump(0 if guest.front.counters.invalidates > told else 0.001)
            guest.reap()
        guest.drain()
        mover.check()
        guest.check()
        print(f"{len(mover.waits)} moves, {told} INVALIDATE, {guest.done} requests")
        guest.disconnect()
        counted = json.loads(re.findall(r"\{.*\}", server.stop())[-1])
        if kind == "blk" and io != "python":
            assert counted["native"] > counted["requests"] // 2, "by the workers, not by Python"
            assert counted["helps"] > rounds // 20, "and handed to and fro all the time"
        else:
            assert not counted["native"]
    return mover


@pytest.mark.parametrize("io", ["auto", "uring", "mapped", "python"])
@pytest.mark.parametrize("rounds", [1000, pytest.param(10_000, marks=[pytest.mark.sweep, pytest.mark.timeout(300)])])
def test_no_access_through_what_is_gone(tmp_path: Path, rounds: int, io: str) -> None:
    waits = moves(tmp_path, rounds, io=io).waits
    print(f"acknowledged after {statistics.median(waits) * 1e6:.0f} us, at most {max(waits) * 1e6:.0f} us")


def test_one_that_does_not_keep_it_is_caught(tmp_path: Path) -> None:
    """``serve stale`` acknowledges, and goes on with what it knows."""
    with pytest.raises(AssertionError, match=rf"left b'{FORBIDDEN.decode()}|was written after it was taken away"):
        moves(tmp_path, 1000, "stale")
