# SPDX-License-Identifier: Apache-2.0
"""A device on the in-process machine, its driver, and memory in which every byte is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from virtiova.addr import IOVA, PAGE_SIZE, Access, DmaAddr
from virtiova.device.base import Device
from virtiova.dma.ops import DmaRegion, RamRegion
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.driver.base import Queue
from virtiova.driver.negotiate import begin, driver_ok, finish
from virtiova.errors import VirtiovaError
from virtiova.features import Feature, Status, mask
from virtiova.machine.model_transport import ModelTransport, Offer
from virtiova.ring.ends import Segment
from virtiova.testing.checks import NotApplicable, Wrong
from virtiova.testing.ring_world import Op, Watched, World

T = TypeVar("T")
EMPTY: Final = 0xEE
SIZE: Final = 16
"""Entries of each queue."""
PAGES: Final = 400
TURNS: Final = 50
"""How often a device is asked to go on, before it is thought to be done."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that a device answers: ``readable`` bytes, and room for ``writable`` more, on queue ``queue``.

    ``answer``: the bytes that it writes. None: whatever it writes the first time, if that is the same on another
    device that was made the same way; otherwise only how many they are is compared.
    """

    name: str
    readable: bytes = b""
    writable: int = 0
    queue: int = 0
    answer: bytes | None = None

    def __str__(self) -> str:
        return f"{self.name}: {len(self.readable)} bytes to read, room for {self.writable}, queue {self.queue}"


@dataclass(frozen=True, slots=True)
class Cut:
    """How a request lies in the ring: its parts are cut at these places (modulo their lengths), an empty buffer stands
    before each of the first ``empties``, and the chain goes through a table if ``indirect``."""

    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    empties: int = 0
    indirect: bool = False

    def __str__(self) -> str:
        how = [f"read part cut at {list(self.readable)}"] if self.readable else []
        how += [f"written part cut at {list(self.writable)}"] if self.writable else []
        how += [f"{self.empties} empty buffers"] if self.empties else []
        return ", ".join([*how, *(["through a table"] if self.indirect else [])]) or "in one piece each"


def pieces(length: int, cuts: Sequence[int], empties: int) -> list[int]:
    """The lengths of the buffers."""
    places = sorted({cut % length for cut in cuts} - {0}) if length else []
    lengths = [end - start for start, end in zip([0, *places], [*places, length], strict=True)] if length else []
    return [0] * empties + lengths


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. ``length``: what the device promised; None: it did not use the chain."""

    length: int | None
    data: bytes = b""
    broken: str = ""
    """Why the device needs a reset, if it does."""


@dataclass
class Laid:
    """A request in memory."""

    ask: Ask
    source: RamRegion
    target: RamRegion
    table: RamRegion
    segments: list[Segment]
    room: list[tuple[int, int]]
    """Offset in the target, and length, of each buffer to write."""
    ops: list[Op] = field(default_factory=list)
    """What the device did to memory while it was under way."""


class Tap(Watched):
    """The device's address space. ``outside``: accesses to what is in no request and no ring."""

    def __init__(self, inner: AddressSpace) -> None:
        super().__init__(inner)
        self.live: list[tuple[int, int]] = []
        """Addresses and lengths that the device may use now."""
        self.outside: list[str] = []

    def _look(self, what: str, address: int, length: int) -> None:
        if length and not any(at <= address and address + length <= at + size for at, size in self.live):
            self.outside.append(f"a {what} of {length} bytes at 0x{address:x}")

    def read(self, address: int, length: int) -> bytes:
        self._look("read", address, length)
        return super().read(address, length)

    def write(self, address: int, data: bytes) -> None:
        self._look("write", address, len(data))
        super().write(address, data)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        self._look("write", address, 4)
        super().store32(address, value, order)


@dataclass(frozen=True, slots=True)
class Platform:
    """What the device is behind: bit 33, and the kind of its rings."""

    bit33: bool = True
    packed: bool = False

    def __str__(self) -> str:
        return f"device = make()  # bit 33 {'on' if self.bit33 else 'off'}, {'packed' if self.packed else 'split'} ring"


class Stand:
    """One device, hosted, with features negotiated and its queues running."""

    def __init__(self, make: Callable[[], Device], platform: Platform) -> None:
        self.steps = [str(platform)]
        self.platform = platform
        self.world = World(way="platform" if platform.bit33 else "direct", pages=PAGES)
        self.tap = Tap(self.world.space)
        self.device = self.sane(make, "making it")
        offer = Offer(access_platform=True, insists=False, packed=platform.packed)
        self.transport = ModelTransport(self.device, offer, lambda _: self.tap, self.world.space)
        self.rings: list[DmaRegion] = []
        self.start()

    # -- words

    def wrong(self, what: str) -> Wrong:
        """With the steps so far."""
        return Wrong(self.steps, what)

    def sane(self, call: Callable[[], T], what: str) -> T:
        """What a call gives; nothing of what it may raise is an answer."""
        try:
            return call()
        except (Wrong, NotApplicable):
            raise
        except Exception as error:
            raise self.wrong(f"{what} raised {type(error).__name__}: {error}") from error

    # -- the driver

    def start(self) -> None:
        """Reset, negotiate, set the queues up."""
        transport = self.transport
        offered = self.sane(lambda: begin(transport), "a reset")
        wanted = self.device.features | mask([Feature.VERSION_1, Feature.RING_INDIRECT_DESC])
        if self.platform.bit33:
            wanted |= mask([Feature.ACCESS_PLATFORM])
        if self.platform.packed:
            wanted |= mask([Feature.RING_PACKED, Feature.IN_ORDER])
        negotiated = finish(transport, offered, wanted & offered)
        if negotiated.refused:
            raise self.wrong(f"FEATURES_OK was refused: {'; '.join(transport.words)}")
        self.tap.live.clear()
        self.queues = [
            Queue(transport, index, self.world, negotiated, size=SIZE) for index in range(self.device.queues)
        ]
        for queue in self.queues:
            queue.enable()
            self.allow(queue.region)
        driver_ok(transport)

    def alloc(self, size: int) -> RamRegion:
        """Memory that the device may use."""
        region = self.world.alloc(max(size, 1))
        self.allow(region)
        return region

    def allow(self, region: DmaRegion) -> None:
        """The device may use it."""
        self.tap.live.append((region.addr, region.size))

    def free(self, region: RamRegion) -> None:
        """It may not any more, and does not. Never given out again: what is late is seen."""
        self.tap.live.remove((region.addr, region.size))
        if self.platform.bit33:
            self.take_away(region)

    def lay(self, ask: Ask, cut: Cut) -> Laid:
        """A request in memory, not in a ring yet."""
        lengths = pieces(len(ask.readable), cut.readable, cut.empties)
        rooms = pieces(ask.writable, cut.writable, cut.empties if ask.writable or not ask.readable else 0)
        source = self.alloc(len(ask.readable))
        # One byte between the buffers to write: who writes too much is seen.
        target = self.alloc(ask.writable + len(rooms))
        table = self.alloc(16 * (len(lengths) + len(rooms)))
        source.write(0, ask.readable)
        target.write(0, bytes((EMPTY,)) * target.size)
        segments, at, room = [], 0, []
        for length in lengths:
            segments.append(Segment(DmaAddr(source.addr + at), length, False))
            at += length
        at = 0
        for length in rooms:
            segments.append(Segment(DmaAddr(target.addr + at), length, True))
            room.append((at, length))
            at += length + 1
        return Laid(ask, source, target, table, segments, room)

    def put(self, laid: Laid, cut: Cut) -> None:
        """Into the ring, not visible yet."""
        ring = self.queues[laid.ask.queue].ring
        if cut.indirect:
            ring.add_indirect(laid.segments, laid.table)
        else:
            ring.add(laid.segments)

    def go(self, queue: int) -> None:
        """Make visible what is in the ring, and let the device work."""
        self.queues[queue].ring.publish()
        self.queues[queue].kick()
        self.tap.ops.clear()
        for _ in range(TURNS):
            if not self.sane(self.transport.work, "handling it"):
                break
        if self.tap.outside:
            raise self.wrong(f"{self.tap.outside[0]}, which is in no request that it has")

    def collect(self, laid: Laid) -> Answer:
        """What came of the oldest request of its queue. The memory is given back if the device has used it."""
        broken = ""
        if self.transport.read_status() & Status.DEVICE_NEEDS_RESET:
            broken = self.transport.words[-1] if self.transport.words else "it needs a reset"
        try:
            used = self.queues[laid.ask.queue].ring.poll()
        except VirtiovaError as error:
            raise self.wrong(f"used what nobody sent: {error}") from error
        if laid.source.read(0, len(laid.ask.readable)) != laid.ask.readable and not self.gone(laid.source):
            raise self.wrong("changed what was only to be read")
        if used is None:
            return Answer(None, broken=broken)
        data = self.written(laid, used.length)
        for region in (laid.source, laid.target, laid.table):
            self.free(region)
        return Answer(used.length, data, broken)

    def gone(self, region: RamRegion) -> bool:
        """Whether some of it was taken away meanwhile."""
        return any(read[0] == 0xDB for read in (region.read(at, 1) for at in range(0, region.size, PAGE_SIZE)))

    def written(self, laid: Laid, length: int) -> bytes:
        """The first ``length`` bytes of the room. Raises `Wrong` if they were not written, or any between buffers."""
        room = sum(size for _, size in laid.room)
        if length > room:
            raise self.wrong(f"promised {length} bytes, where there is room for {room}")
        stores = [op for op in self.tap.ops if op.what == "store"]
        data = b""
        left = length
        for at, size in laid.room:
            step = min(size, left)
            start = laid.target.addr + at
            if not _covered(start, start + step, stores):
                raise self.wrong(f"promised {length} bytes, and did not write all of them")
            data += laid.target.read(at, step)
            left -= step
            if laid.target.read(at + size, 1)[0] not in {EMPTY, 0xDB}:
                raise self.wrong("wrote behind the end of a buffer")
        return data

    # -- the platform

    def restrict(self, region: RamRegion, access: Access) -> None:
        """The device may use ``region`` in this way only."""
        for number, gpa in enumerate(region.gpas):
            self.world.iommu.map(IOVA(region.addr + number * PAGE_SIZE), gpa, PAGE_SIZE, access)
        self.world.iommu.invalidate()

    def take_away(self, region: RamRegion) -> None:
        """It leaves the tables, and is poisoned."""
        self.world.iommu.unmap(IOVA(region.addr), region.size)
        self.world.iommu.invalidate()

    # -- all of it

    def ask(self, ask: Ask, cut: Cut | None = None) -> Answer:
        """One request, from memory to memory."""
        how = cut or Cut()
        self.steps.append(f"{ask}; {how}")
        laid = self.lay(ask, how)
        self.put(laid, how)
        self.go(ask.queue)
        return self.collect(laid)

    def check_stray(self) -> None:
        """Nothing was changed that nobody gave it."""
        stray = self.world.stray()
        if stray is not None:
            raise self.wrong(f"RAM at 0x{stray:x} was changed, which is in no request")


def _covered(start: int, end: int, stores: Sequence[Op]) -> bool:
    for op in sorted(stores, key=lambda op: op.address):
        if op.address <= start < op.address + op.length:
            start = op.address + op.length
    return start >= end
