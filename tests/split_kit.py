# SPDX-License-Identifier: Apache-2.0
"""Both ends of a split ring over one memory, which check each other, for tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from virtiova.addr import GPA, PAGE_SIZE, DmaAddr
from virtiova.dma.ops import DirectOps, DmaOps, PlatformOps, RamRegion
from virtiova.dma.ram import ByteOrder, MappedRam, PageAllocator, Ram, RamBlock, VerbRam
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace
from virtiova.iommu.soft import SoftIommu
from virtiova.ring.chain import Chain
from virtiova.ring.ends import DeviceRing, DriverRing, RingLayout, Segment
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_device import SplitDevice
from virtiova.ring.split_driver import SplitDriver

Reach = Literal["mapped", "verbs"]
Way = Literal["direct", "platform"]

BASE = 0x10_0000
"""Guest-physical start of RAM: no address of it is also an offset into the buffer behind it."""
SLOT = PAGE_SIZE
"""Bytes of buffer for each request that can be under way."""
EMPTY = b"\xee"


@dataclass
class World:
    """RAM that the driver end reaches its way, and the device end through an address space."""

    reach: Reach
    way: Way
    pages: int = 200
    verbs: int = 0
    ram: Ram = field(init=False)
    ops: DmaOps = field(init=False)
    space: AddressSpace = field(init=False)

    def __post_init__(self) -> None:
        self.memory = bytearray(self.pages * PAGE_SIZE)
        block = RamBlock(GPA(BASE), len(self.memory), 0)
        mapped = MappedRam(self.memory, [block])
        # Verbs have addresses of the machine, not of the buffer behind it.
        self.ram = mapped if self.reach == "mapped" else VerbRam(self._read, self._write, [block])
        allocator = PageAllocator(self.ram, GPA(BASE), GPA(BASE + len(self.memory)))
        if self.way == "direct":
            self.ops, self.space = DirectOps(self.ram, allocator), FlatSpace(mapped)
        else:
            iommu = SoftIommu(mapped)
            iommu.enable()
            self.ops, self.space = PlatformOps(self.ram, allocator, iommu), MediatedSpace(mapped, iommu)

    def _read(self, gpa: int, length: int) -> bytes:
        self.verbs += 1
        return bytes(self.memory[gpa - BASE : gpa - BASE + length])

    def _write(self, gpa: int, data: bytes) -> None:
        self.verbs += 1
        self.memory[gpa - BASE : gpa - BASE + len(data)] = data

    def alloc(self, size: int) -> RamRegion:
        region = self.ops.alloc(size)
        assert isinstance(region, RamRegion)
        if self.way == "platform":
            steps = [after - before for before, after in itertools.pairwise(region.gpas)]
            assert PAGE_SIZE not in steps, "pages of a region are meant to be apart here"
            assert region.addr not in range(BASE, BASE + len(self.memory))
        return region


@dataclass
class Sent:
    """A request as the model knows it."""

    head: int
    slot: int
    at: int
    """Where in the slots the payload lies."""
    payload: bytes
    room: list[tuple[int, int]]
    """Where in the slots the device may write: offset and length."""
    answer: bytes = b""
    order: int = 0
    """The how-manieth it was that the device took."""


class AnyPair:
    """Both ends of one ring, and a model of every request that is under way."""

    world: World
    layout: RingLayout
    driver: DriverRing
    device: DeviceRing

    def __init__(self, size: int, *, event_idx: bool) -> None:
        """A subclass has made the world and the ends."""
        self.event_idx = event_idx
        # A slot for every descriptor, and room for the last one to reach into the next page.
        self.slots = self.world.alloc((size + 1) * SLOT)
        self.tables = self.world.alloc(size * 16 * 16)
        self.free_slots = list(range(size))
        self.free_descs = size
        self.costs: dict[int, int] = {}
        self.serial = 0
        self.added: list[Sent] = []
        self.published: list[Sent] = []
        self.popped: list[tuple[Sent, Chain]] = []
        self.used: list[Sent] = []
        # Free-running counters of what was published, pushed, polled; and the last wish of either side.
        self.n_published = 0
        self.n_pushed = 0
        self.n_signalled = 0
        self.n_polled = 0
        self.n_popped = 0
        self.wish = 0
        self.wants_kick = True

    def check_kick(self, kick: bool, old: int) -> None:
        """Is it right to kick, or not, for what was published after request ``old``?"""
        # The wish is a number of requests: the one after it is to be told.
        wanted = old <= self.wish < self.n_published if self.event_idx else self.wants_kick
        assert kick is wanted, "a notification lost, or one too many"

    # -- the driver end

    def add(self, parts: list[int], room: list[int], *, indirect: bool) -> bool:
        """A request of readable parts and writable parts of these lengths; False if there is no room for it."""
        count = len(parts) + len(room)
        cost = 1 if indirect else count
        if cost > self.free_descs or count > self.layout.size or not self.free_slots:
            return False
        slot = self.free_slots.pop(0)
        # In every other slot it is the payload that lies across the border of two pages, in the rest the room.
        payload_at = slot * SLOT + (1024 if slot % 2 else SLOT - 3)
        room_at = slot * SLOT + (SLOT - 3 if slot % 2 else 2048)
        self.slots.write(room_at, EMPTY * (sum(room) + len(room)))
        self.serial += 1
        payload = (b"%08d " % self.serial * (sum(parts) // 9 + 1))[: sum(parts)]
        self.slots.write(payload_at, payload)
        segments, at = [], payload_at
        for length in parts:
            segments.append(Segment(DmaAddr(self.slots.addr + at), length, False))
            at += length
        places, at = [], room_at
        for length in room:
            segments.append(Segment(DmaAddr(self.slots.addr + at), length, True))
            places.append((at, length))
            # One byte between the writable parts: whoever writes too much is seen.
            at += length + 1
        if indirect:
            head = self.driver.add_indirect(segments, self.tables, slot * 16 * 16)
        else:
            head = self.driver.add(segments)
        assert head not in self.costs, "a head that is still in use"
        self.costs[head] = cost
        self.free_descs -= cost
        self.added.append(Sent(head, slot, payload_at, payload, places))
        return True

    def publish(self) -> bool:
        old = self.n_published
        self.n_published += len(self.added)
        self.published += self.added
        self.added = []
        kick = self.driver.publish()
        if self.n_published != old:
            self.check_kick(kick, old)
        elif self.event_idx:
            assert not kick
        return kick

    def poll(self) -> bool:
        moved = self.driver.used_moved()
        assert moved is bool(self.used)
        used = self.driver.poll()
        if not self.used:
            assert used is None
            return False
        sent = self.used.pop(0)
        assert used is not None
        assert (used.head, used.length) == (sent.head, len(sent.answer))
        self.n_polled += 1
        seen, expected, left = b"", b"", sent.answer
        for at, length in sent.room:
            seen += self.slots.read(at, length + 1)
            here, left = left[:length], left[length:]
            expected += here.ljust(length + 1, EMPTY)
        assert seen == expected
        assert self.slots.read(sent.at, len(sent.payload)) == sent.payload
        self.free_slots.append(sent.slot)
        self.free_descs += self.costs.pop(sent.head)
        return True

    # -- the device end

    def pop(self) -> bool:
        chain = self.device.pop()
        if not self.published:
            assert chain is None
            return False
        assert chain is not None
        sent = self.published.pop(0)
        self.n_popped += 1
        sent.order = self.n_popped
        assert chain.head == sent.head
        assert chain.writable == sum(length for _, length in sent.room)
        assert chain.read() == sent.payload
        self.popped.append((sent, chain))
        return True

    def put_back(self, count: int) -> None:
        """The latest of those at hand are as if they had never been taken."""
        latest: list[tuple[Sent, Chain]] = []
        while self.popped and len(latest) < count and self.popped[-1][0].order == self.n_popped - len(latest):
            latest.insert(0, self.popped.pop())
        self.device.put_back(len(latest))
        self.n_popped -= len(latest)
        self.published[:0] = [sent for sent, _ in latest]

    def push(self, which: int, fill: int) -> bool:
        """Complete one of the requests at hand, in any order, with ``fill`` bytes or as many as fit."""
        if not self.popped:
            return False
        sent, chain = self.popped.pop(which % len(self.popped))
        sent.answer = (b"answer to %08d " % self.serial * SLOT)[: min(fill, chain.writable)]
        chain.write(sent.answer)
        assert chain.written == len(sent.answer)
        self.device.push(chain, chain.written)
        self.n_pushed += 1
        self.used.append(sent)
        return True

    def interrupt(self) -> bool:
        """Does the device interrupt now? The driver wants to hear of the first element that it has not polled."""
        old, self.n_signalled = self.n_signalled, self.n_pushed
        told = self.device.needs_interrupt()
        if self.event_idx:
            assert told is (old <= self.n_polled < self.n_pushed), "an interrupt lost, or one too many"
        else:
            assert told is (old != self.n_pushed)
        return told

    def sleep(self) -> bool:
        """The device asks to be kicked; False if there was more to do, so that it must not sleep."""
        more = self.device.enable_notify()
        self.wish, self.wants_kick = self.n_popped, True
        assert more is bool(self.published)
        return not more

    def stay_awake(self) -> None:
        self.device.disable_notify()
        if not self.event_idx:
            self.wants_kick = False

    # -- what holds at all times

    def check(self) -> None:
        under_way = [*self.added, *self.published, *(sent for sent, _ in self.popped), *self.used]
        assert sorted(sent.head for sent in under_way) == sorted(self.costs)
        assert self.free_descs == self.layout.size - sum(self.costs.values())

    def drain(self) -> None:
        """Let everything that is under way come to its end: nothing lost, nothing doubled."""
        self.publish()
        while self.pop():
            pass
        while self.push(0, SLOT):
            pass
        while self.poll():
            pass
        assert not self.costs
        assert self.free_descs == self.layout.size
        assert self.device.pop() is None
        assert self.driver.poll() is None
        # All descriptors are there again.
        assert self.add([1] * min(self.layout.size, 16), [], indirect=False)


class Pair(AnyPair):
    """Both ends of a split ring."""

    layout: SplitLayout
    driver: SplitDriver

    def __init__(
        self,
        size: int,
        order: ByteOrder,
        reach: Reach,
        way: Way,
        *,
        event_idx: bool,
        used_align: int = 4,
    ) -> None:
        self.world = World(reach, way, pages=2 * size + 80)
        self.layout = SplitLayout(size, used_align)
        self.region = self.world.alloc(self.layout.total)
        self.driver = SplitDriver(self.region, self.layout, order, event_idx=event_idx)
        self.device = SplitDevice(
            self.world.space, *self.driver.parts, self.layout, order, event_idx=event_idx, indirect=True
        )
        super().__init__(size, event_idx=event_idx)
