# SPDX-License-Identifier: Apache-2.0
"""Two worlds with the same bytes: one ring served by Python alone, the other by the native end as far as that goes."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ring_storm import BASE, ONLY_READ, ONLY_WRITE, PAGE, PAGES, RING, SHARED, TABLE, Arena, descriptors, tame
from virtiova import _core
from virtiova.addr import UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import PACKED_FLAGS, PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.inflight import Inflight, ring_bytes

POOL = descriptors(random.Random(1), 2048)
TAME = tame(random.Random(2), 512)
PLACES = (RING, RING + PAGE, TABLE, TABLE + PAGE, SHARED, SHARED + PAGE, ONLY_READ, ONLY_WRITE)
PAGE_OF = dict(zip(PLACES, (0, 1, 2, 3, 4, 5, 0x100, 0x101), strict=True))
RIGHTS = {ONLY_READ: Access.READ, ONLY_WRITE: Access.WRITE}


@dataclass(frozen=True)
class Touch:
    """What a device does with a request: reads, skips and writes so much, less where there is less."""

    read: int
    skip: int
    write: int

    def __call__(self, chain: Chain | _core.Request) -> list[object]:
        came: list[object] = [chain.head, chain.length, chain.readable, chain.writable]
        came += [outcome(lambda: chain.read(self.read)), outcome(chain.read) if self.read % 3 == 0 else None]
        came.append(outcome(lambda: chain.skip(min(self.skip, chain.writable) if self.skip % 5 else self.skip)))
        came.append(outcome(lambda: chain.write(b"w" * (min(self.write, chain.writable) if self.write % 7 else 9000))))
        return [*came, chain.readable, chain.writable, chain.written, chain.moved]


def outcome(call: Callable[[], object]) -> object:
    """What it returned, or which of the errors that are promised it raised, with all its words."""
    try:
        return call()
    except (ProtocolError, AccessError) as problem:
        return type(problem), str(problem)


class World:
    """RAM, a front end's answers, and one ring of ``layout`` at ``where`` behind them; ``native``: both ends.

    ``index``: where it stands; its meaning is the ring's. What is in flight is noted for split rings.
    """

    def __init__(
        self,
        layout: SplitLayout | PackedLayout,
        where: int,
        index: int,
        *,
        event_idx: bool,
        indirect: bool,
        native: bool,
    ) -> None:
        self.arena = Arena()
        self.iotlb = Iotlb(self.arena)
        self.layout, self.where = layout, where
        packed = isinstance(layout, PackedLayout)
        driver, device = (
            (layout.driver, layout.device) if isinstance(layout, PackedLayout) else (layout.avail, layout.used)
        )
        parts = self.parts = (where, where + driver, where + device)
        space = self.space = CachedSpace(self.arena, self.iotlb)
        options = {"event_idx": event_idx, "indirect": indirect}
        self.twin: SplitDevice | PackedDevice
        self.notes = memoryview(mmap.mmap(-1, ring_bytes(layout.size)))
        self.inflight: Inflight | None = None
        if isinstance(layout, PackedLayout):
            self.twin = PackedDevice(space, *parts, layout, next_avail=index, next_used=index, **options)
        else:
            self.twin = SplitDevice(
                space, *parts, layout, event_idx=event_idx, indirect=indirect, next_avail=index, next_used=index
            )
            self.inflight = Inflight(_core.Window(self.notes), 0, layout.size, fresh=True)
        self.drain: _core.Drain | None = None
        if native:
            self.drain = _core.Drain(self.iotlb.radix, *parts, layout.size, packed=packed, **options)
            if self.inflight is not None:
                self.inflight.lend(self.drain)
        self.natively = 0
        self.helped = 0

    # -- what the front end and the driver do

    def answer(self, place: int, access: Access) -> None:
        self.iotlb.update(place, PAGE, UVA(BASE + PAGE_OF[place] * PAGE), access)

    def put(self, address: int, data: bytes) -> None:
        """Bytes of the driver's, at an IOVA, where that is mapped at all."""
        while data:
            step = min(len(data), PAGE - address % PAGE)
            spans = self.iotlb.lookup(address, step, Access.NONE)
            if not isinstance(spans, Miss):
                at = self.arena.place(spans[0].gpa)
                self.arena.memory[at : at + step] = data[:step]
            address, data = address + step, data[step:]

    def offer(self, table: bytes, ids: list[int], more: int, event: int, indirect: bytes) -> None:
        """A driver's doing: descriptors as a split ring has them, heads or buffer ids, and how many are available."""
        self.put(TABLE, indirect)
        if isinstance(self.layout, PackedLayout):
            self._offer_packed(table, ids, more, event)
            return
        flags = event & 1
        index = (self.twin.next_avail + more) & 0xFFFF
        self.put(self.where, table + struct.pack(f"<HH{len(ids)}HH", flags, index, *ids, event))

    def _offer_packed(self, table: bytes, ids: list[int], more: int, event: int) -> None:
        """``more`` descriptors from where the device looks next, over whatever was there; the others stay."""
        layout = self.layout
        assert isinstance(layout, PackedLayout)
        place = layout.decode(self.twin.next_avail)
        for number in range(more % (layout.size + 2)):
            one = bytearray(table[16 * (number % layout.size) :][:16])
            flags = one[12] & 7 | layout.available(place + number)
            if one[13] == 0xFF:
                flags ^= PACKED_FLAGS & (event << 7)
            one[12:] = struct.pack("<HH", ids[number % layout.size], flags)
            self.put(self.where + layout.entry(place + number), bytes(one))
        self.put(self.parts[1], struct.pack("<HH", event, ids[0] & 3))

    # -- what the device does

    def serve(self, touch: Touch, count: int) -> list[object]:
        """Up to ``count`` requests; what came of each."""
        self.hand_over()
        came: list[object] = []
        while count > 0:
            found = self._natively(touch, count) or [self._in_python(touch)]
            came += found
            count -= len(found)
            if not isinstance(found[-1], list):
                break
        return came

    def hand_over(self) -> None:
        """Nothing is known of what was seen in the ring, as where somebody else goes on."""
        self.twin.state = self.twin.state

    def _natively(self, touch: Touch, count: int) -> list[object]:
        drain = self.drain
        if drain is None:
            return []
        drain.state = self.twin.state
        if self.inflight is not None:
            drain.counter = self.inflight.counter
        requests = drain.pop(count)
        came: list[object] = []
        for request in requests:
            came.append(touch(request))
            drain.push(request, request.written)
        self.twin.state = drain.state
        if self.inflight is not None:
            self.inflight.counter = drain.counter
        self.natively += len(requests)
        self.helped += drain.needs_help
        if not requests and not drain.needs_help:
            return [None]
        return came

    def _in_python(self, touch: Touch) -> object:
        chain = outcome(self.twin.pop)
        if not isinstance(chain, Chain):
            return chain
        if self.inflight is not None:
            self.inflight.begin([chain.head])
        came = touch(chain)
        pushed = outcome(lambda: self.twin.push(chain, chain.written))
        if pushed is not None:
            return pushed
        if self.inflight is not None:
            self.inflight.end([chain.head], self.twin.next_used)
        return came

    def known(self) -> bool:
        """Whether all of the ring is in the native table."""
        size = self.layout.size
        sizes = (16 * size, 4, 4) if isinstance(self.layout, PackedLayout) else (0, 2 * size + 6, 8 * size + 6)
        return all(self.iotlb.radix.covers(at, length, 3) for at, length in zip(self.parts, sizes, strict=True))

    def interrupt(self) -> object:
        # What is out of reach natively is told once too often.
        if self.drain is None or not self.known():
            return outcome(self.twin.needs_interrupt)
        self.drain.state = self.twin.state
        wanted = self.drain.needs_interrupt()
        self.twin.state = self.drain.state
        return wanted

    def quiet(self) -> None:
        if self.drain is None or not self.known():
            # A hint, which the native end does not give then.
            outcome(self.twin.disable_notify)
        else:
            self.drain.disable_notify()

    def arm(self) -> object:
        self.hand_over()
        if self.drain is not None:
            self.drain.state = self.twin.state
            more = self.drain.enable_notify()
            if not self.drain.needs_help:
                return more
        return outcome(self.twin.enable_notify)

    def bytes(self) -> bytes:
        """All memory that there is, but for what nobody may look at; and all notes of what is in flight."""
        memory = self.arena.memory
        blocks = [memory[at : at + PAGES * PAGE] for at in self.arena.starts.values()]
        return b"".join(blocks) + bytes(self.notes)


def hold_together(seed: int, rings: int) -> int:
    """As ``tests/test_drain_model.py`` does, without Hypothesis: for programs. How many requests were done natively."""
    rng = random.Random(seed)
    done = 0
    for ring in range(rings):
        size = rng.choice((1, 2, 8, 8))
        layout: SplitLayout | PackedLayout = SplitLayout(size)
        index = rng.choice((0, 0xFFFE))
        if ring % 2:
            layout = PackedLayout(size + rng.getrandbits(1))
            index = rng.choice((0, 0x8000))
        where = RING + rng.choice((0, 0, PAGE - 16, PAGE - 160))
        options = {"event_idx": bool(rng.getrandbits(1)), "indirect": bool(rng.getrandbits(1))}
        one, other = (World(layout, where, index, native=native, **options) for native in (False, True))
        for place in PLACES:
            for world in (one, other):
                world.answer(place, RIGHTS.get(place, Access.RW))
        for _ in range(8):
            same = rng.getrandbits(32)
            came = [_one_step(world, random.Random(same)) for world in (one, other)]
            if came[0] != came[1] or one.bytes() != other.bytes() or one.twin.state != other.twin.state:
                raise AssertionError(f"done otherwise: {came}")
        done += other.natively
    return done


def _one_step(world: World, rng: random.Random) -> list[object]:
    size = world.layout.size
    pool = TAME if rng.random() < 0.8 else POOL
    table = b"".join(rng.choices(pool, k=size))
    event = (world.twin.next_used + rng.randrange(-2, 3) ^ rng.getrandbits(1) << 15) & 0xFFFF
    ids = [rng.randrange(size) for _ in range(size)]
    world.offer(table, ids, rng.randrange(size + 1), event, b"".join(rng.choices(pool, k=4)))
    touch = Touch(rng.choice((0, 16, 17, 5000)), rng.randrange(600), rng.randrange(9000))
    came = [world.serve(touch, 1) for _ in range(3)]
    world.quiet()
    return [came, world.interrupt(), world.arm()]


if __name__ == "__main__":
    print(hold_together(1, 400))
