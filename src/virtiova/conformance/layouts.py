# SPDX-License-Identifier: Apache-2.0
"""Rings laid out as no driver of ours would: each part on a page of its own, or where the specification just allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, DmaAddr
from virtiova.conformance.stand import MISS_SECONDS, Stand
from virtiova.dma.ops import DmaRegion, RamRegion
from virtiova.driver.base import Driver, Queue, Request
from virtiova.driver.negotiate import driver_ok
from virtiova.machine.vhost_user.asked import Asked
from virtiova.probe.canary import TwinRegion, Watch
from virtiova.probe.rig import LENGTH, twin
from virtiova.ring.layout import DESC_SIZE, PackedLayout, SplitLayout

BATCH: Final = 16
"""Requests that are made available at once."""
_ECHOED: Final = 16
"""Frames that we send ourselves in one case: each takes a page."""
_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class PlacedSplit(SplitLayout):
    """A split ring whose parts begin at these offsets of its memory."""

    desc_at: int = 0
    avail_at: int = 0
    used_at: int = 0

    @property
    def desc(self) -> int:
        return self.desc_at

    @property
    def avail(self) -> int:
        return self.avail_at

    @property
    def used(self) -> int:
        return self.used_at

    @property
    def total(self) -> int:
        """Bytes up to the end of the last part."""
        desc, avail = self.desc_at + DESC_SIZE * self.size, self.avail_at + 6 + 2 * self.size
        return max(desc, avail, self.used_at + 6 + 8 * self.size)


@dataclass(frozen=True, slots=True)
class PlacedPacked(PackedLayout):
    """A packed ring whose parts begin at these offsets of its memory."""

    desc_at: int = 0
    driver_at: int = 0
    device_at: int = 0

    @property
    def desc(self) -> int:
        return self.desc_at

    @property
    def driver(self) -> int:
        return self.driver_at

    @property
    def device(self) -> int:
        return self.device_at

    @property
    def total(self) -> int:
        """Bytes up to the end of the last part."""
        return max(self.desc_at + DESC_SIZE * self.size, self.driver_at + 4, self.device_at + 4)

    def entry(self, place: int) -> int:
        """Offset of a descriptor in the ring's memory."""
        return self.desc_at + DESC_SIZE * (place % self.size)


def apart(size: int, *, packed: bool = False) -> SplitLayout | PackedLayout:
    """Each of the three parts on pages of its own."""
    if packed:
        driver = _pages(DESC_SIZE * size)
        return PlacedPacked(size, 0, driver, driver + PAGE_SIZE)
    avail = _pages(DESC_SIZE * size)
    return PlacedSplit(size, 4, 0, avail, avail + _pages(6 + 2 * size))


def straddling(size: int, *, element: bool = False) -> PlacedSplit:
    """Parts at the least alignment that there is, 16, 2 and 4 bytes, each over a border between two pages; and if so
    wanted, an ``element`` of the used ring lies on such a border."""
    used = 5 * PAGE_SIZE - (24 if element else 20)
    return PlacedSplit(size, 4, PAGE_SIZE - DESC_SIZE * 3, 3 * PAGE_SIZE - 10, used)


def _pages(length: int) -> int:
    return -(-length // PAGE_SIZE) * PAGE_SIZE


def lay_out(stand: Stand, layout: SplitLayout | PackedLayout, start: int = 0) -> Driver:
    """Rings as ``layout`` says, all queues of the driver alike, after `Stand.translating(start=False)`. They run."""
    driver = stand.start(ok=False)
    for queue in driver.queues():
        queue.lay_out(layout, start)
        queue.enable()
    driver_ok(stand.transport)
    return driver


def again_from(stand: Stand, layout: SplitLayout, start: int) -> None:
    """Stop the rings, and start them as a front end does that has moved: empty, the next index is ``start``."""
    queues = stand.driver.queues()
    for queue in queues:
        stand.registers.stop_queue(queue.index)
    for queue in queues:
        queue.lay_out(layout, start)
        queue.enable()
    for queue in queues:
        stand.registers.start_queue(queue.index, start)


def move_page(stand: Stand, region: TwinRegion, offset: int) -> Watch:
    """Point the page of ``region`` that holds ``offset`` at another page of memory, with what it holds; the page where
    it was, which holds nonsense now. The back end is told, and touches neither until that is done."""
    index, ram = offset // PAGE_SIZE, stand.machine.ram
    home, page = region.homes["A"], region.addr + index * PAGE_SIZE
    old, new = home.gpas[index], stand.ops.spare("C")
    stand.hold(page)
    stand.tables.map(IOVA(page), new, PAGE_SIZE)
    stand.tables.invalidate()
    ram.write(new, ram.read(old, PAGE_SIZE))
    gpas = [new if each == old else each for each in home.gpas]
    region.homes["A"] = RamRegion(ram, region.addr, gpas)
    ram.write(old, b"\xff" * PAGE_SIZE)
    stand.release()
    return Watch("former", "C", old, PAGE_SIZE)


def echoed(stand: Stand) -> bool:
    """Whether what arrives is what we send ourselves: frames, which may get lost, and of which there are few."""
    return stand.kind == "net" and stand.vhost.peer.reach == "echo"


def many(stand: Stand, count: int, *, together: int = BATCH) -> int:
    """Let the device write to page X so often, ``together`` at a time; how many of them were used in time."""
    if echoed(stand):
        count, together = min(count, _ECHOED), 1
    done = 0
    while done < count:
        step = min(together, count - done)
        used = each_used(stand, step)
        done += used
        if used < step:
            break
    return done


def each_used(stand: Stand, count: int) -> int:
    """So many requests, published together; how many were used."""
    requests = [stand.driver.make_device_write([(stand.data.addr, LENGTH)]) for _ in range(count)]
    ring = requests[0].queue.ring
    used = 0

    def all_used() -> bool:
        nonlocal used
        while requests[used].done() and ring.poll() is not None:
            used += 1
            if used == count:
                return True
        return False

    for request in requests:
        request.go()
    stand.machine.wait(all_used, _SECONDS)
    return used


def await_miss(stand: Stand, request: Request, page: int) -> Asked | None:
    """As `Stand.await_miss`, with the request helped along: a frame that finds no buffer is lost, and sent again."""

    def asked() -> bool:
        return request.done() or any(each.iova // PAGE_SIZE == page // PAGE_SIZE for each in stand.held)

    stand.machine.wait(asked, MISS_SECONDS)
    return stand.await_miss(page, 0.0)


def written_queue(stand: Stand) -> Queue:
    """The queue of the buffers that the device writes to."""
    return stand.driver.queues()[0]


def written_ring(stand: Stand) -> tuple[TwinRegion, SplitLayout]:
    """The memory of that queue, and how a split ring lies there; not applicable to packed ones."""
    queue = written_queue(stand)
    layout = queue.ring.layout
    if not isinstance(layout, SplitLayout):
        stand.skip("the rings are packed")
    return twin(queue.region), layout


class Part:
    """Memory from ``at`` bytes into a region on (`DmaRegion`): a table need not begin where a page does."""

    def __init__(self, region: DmaRegion, at: int) -> None:
        self.addr = DmaAddr(region.addr + at)
        self.size = region.size - at
        self._region = region
        self._at = at

    def read(self, offset: int, length: int) -> bytes:
        return self._region.read(self._at + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._region.write(self._at + offset, data)

    def load16(self, offset: int, order: str = "little") -> int:
        return int.from_bytes(self.read(offset, 2), "big" if order == "big" else "little")

    def load32(self, offset: int, order: str = "little") -> int:
        return int.from_bytes(self.read(offset, 4), "big" if order == "big" else "little")

    def store16(self, offset: int, value: int, order: str = "little") -> None:
        self.write(offset, value.to_bytes(2, "big" if order == "big" else "little"))

    def fence(self) -> None:
        self._region.fence()
