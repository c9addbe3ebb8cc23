# SPDX-License-Identifier: Apache-2.0
"""Two worlds with the same bytes: one ring served by Python alone, the other by the native end as far as that goes."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ring_storm import BASE, ONLY_READ, ONLY_WRITE, PAGE, PAGES, RING, SHARED, TABLE, Arena, descriptors, tame
from virtiova import _core
from virtiova.addr import UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import Miss
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_INDIRECT, PACKED_FLAGS, Desc, PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.counters import Counters
from virtiova.serve.inflight import Inflight, ring_bytes
from virtiova.serve.inflight_packed import ENTRY, HEADER, PackedInflight
from virtiova.serve.misses import Want
from virtiova.serve.platform import MAX_PAGES, Platform, missing

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
    together: bool = False
    """Requests that were taken together are given back together."""

    def __call__(self, chain: Chain | _core.Request) -> list[object]:
        came: list[object] = [chain.head, chain.length, chain.readable, chain.writable]
        came += [outcome(lambda: chain.read(self.read)), outcome(chain.read) if self.read % 3 == 0 else None]
        came.append(outcome(lambda: chain.skip(min(self.skip, chain.writable) if self.skip % 5 else self.skip)))
        came.append(outcome(lambda: chain.write(b"w" * (min(self.write, chain.writable) if self.write % 7 else 9000))))
        return [*came, chain.readable, chain.writable, chain.written, chain.moved]


def _nobody(_: object) -> None:
    raise AssertionError


def outcome(call: Callable[[], object]) -> object:
    """What it returned, or which of the errors that are promised it raised, with all its words."""
    try:
        return call()
    except (ProtocolError, AccessError) as problem:
        return type(problem), str(problem)


class World:
    """RAM, a front end's answers, and one ring of ``layout`` at ``where`` behind them; ``native``: both ends.

    ``index``: where it stands; its meaning is the ring's. What is in flight is noted unless ``noted`` says no.
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
        noted: bool = True,
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
        self.notes = memoryview(mmap.mmap(-1, ring_bytes(layout.size, packed=packed)))
        self.inflight: Inflight | PackedInflight | None = None
        if isinstance(layout, PackedLayout):
            self.twin = PackedDevice(space, *parts, layout, next_avail=index, next_used=index, **options)
        else:
            self.twin = SplitDevice(
                space, *parts, layout, event_idx=event_idx, indirect=indirect, next_avail=index, next_used=index
            )
        if noted and packed:
            self.inflight = PackedInflight(_core.Window(self.notes), 0, layout.size, fresh=True)
            self.inflight.forget(index)
        elif noted:
            self.inflight = Inflight(_core.Window(self.notes), 0, layout.size, fresh=True)
        self.drain: _core.Drain | None = None
        if native:
            self.drain = _core.Drain(self.iotlb.radix, *parts, layout.size, packed=packed, **options)
            if self.inflight is not None:
                self.inflight.lend(self.drain)
        self.natively = 0
        self.helped = 0
        self.batches: list[int] = []
        """Of the last `serve`: requests that were taken at a time natively, or 0 for one of Python's."""

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

    def serve(self, touch: Touch, count: int, batches: list[int] | None = None) -> list[object]:
        """Up to ``count`` requests; what came of each. ``batches``: as many at a time as the other world did."""
        self.hand_over()
        came: list[object] = []
        self.batches = []
        while count > 0:
            found = self._natively(touch, count)
            self.batches.append(len(found))
            if not found:
                found = self._in_python(touch, batches.pop(0) or 1 if batches else 1)
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
            if not touch.together:
                drain.push(request, request.written)
        if touch.together:
            drain.push_all([(request, request.written) for request in requests])
        self.twin.state = drain.state
        if self.inflight is not None:
            self.inflight.counter = drain.counter
        self.natively += len(requests)
        self.helped += drain.needs_help
        if not requests and not drain.needs_help:
            return [None]
        return came

    def _in_python(self, touch: Touch, count: int) -> list[object]:
        """So many requests, all taken first; or what came instead of the first that could not be."""
        chains: list[Chain] = []
        entries: list[int] = []
        stop: list[object] = []
        while len(chains) < count and not stop:
            chain = outcome(self.twin.pop)
            if not isinstance(chain, Chain):
                stop = [chain]
                break
            noted = outcome(lambda chain=chain: self._note(chain))  # type: ignore[misc]
            if isinstance(noted, int):
                chains.append(chain)
                entries.append(noted)
            else:
                stop = [noted]
        came: list[object] = []
        for at, chain in enumerate(chains):
            came.append(touch(chain))
            if not touch.together:
                came[-1] = self._give([chain], [entries[at]]) or came[-1]
        if touch.together and chains:
            came[-1] = self._give(chains, entries) or came[-1]
        return came + stop

    def _note(self, chain: Chain) -> int:
        """Before the device sees it; the entry, of a packed ring's."""
        if isinstance(self.inflight, PackedInflight):
            return self.inflight.take(chain)
        if self.inflight is not None:
            self.inflight.begin([chain.head])
        return 0

    def _give(self, chains: list[Chain], entries: list[int]) -> object:
        notes = self.inflight
        if isinstance(notes, PackedInflight):
            notes.give(chains, entries)
        pushed = outcome(lambda: self.twin.push_all([(chain, chain.written) for chain in chains]))
        if pushed is not None:
            return pushed
        if isinstance(notes, PackedInflight):
            notes.end()
        elif notes is not None:
            notes.end([chain.head for chain in chains], self.twin.next_used)
        return None

    def scribble(self, where: int, value: int) -> None:
        """The front end's doing: a number among the notes that say which entries are free."""
        if isinstance(self.inflight, PackedInflight):
            # Where the ring stands is not among them: Python believes the notes, and the native end the ring.
            offset = (12, 14)[where] if where < 2 else HEADER.size + ENTRY.size * ((where - 2) % self.layout.size) + 2
            self.notes[offset : offset + 2] = struct.pack("<H", value)

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

    def missing(self, chains: int) -> dict[Want, None] | None:
        """What the next ``chains`` chains miss, by the end that this world has; None: it does not say."""
        wants: dict[Want, None] = {}
        if self.drain is None:
            mark = self.twin.next_avail
            for number in range(chains):
                if not self._one_missing(wants, first=not number):
                    break
            self.twin.back_to(mark)
            return wants
        self.drain.state = self.twin.state
        first, parts = self.drain.missing(chains)
        for number, (address, length, needed) in enumerate(parts):
            if number == first and not wants:
                return None
            for page in self.iotlb.missing(address, length, Access(needed), MAX_PAGES - len(wants)):
                wants[page, Access(needed)] = None
        assert self.drain.state == self.twin.state
        return wants or None

    def _one_missing(self, wants: dict[Want, None], *, first: bool) -> bool:
        """As ``serve.rings`` does in Python; whether the next chain is to be looked at."""
        ram = cast("RegionRam", None)
        platform = Platform(ram, self.space, self.iotlb, None, _nobody, _nobody, Counters(), self.iotlb.radix)
        mark = self.twin.next_avail
        try:
            chain = self.twin.pop()
        except AccessError as gone:
            missing([(gone.address, gone.length, Access.READ)], platform, wants)
            return self.twin.next_avail != mark
        except ProtocolError:
            return False
        if chain is None:
            return False
        missing(chain.buffers(), platform, wants)
        return bool(wants) or not first

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
            batches: list[list[int]] = []
            came = [_one_step(world, random.Random(same), batches) for world in (other, one)]
            if came[0] != came[1] or one.bytes() != other.bytes() or one.twin.state != other.twin.state:
                raise AssertionError(f"done otherwise: {came}")
        done += other.natively
    return done


def _one_step(world: World, rng: random.Random, batches: list[list[int]]) -> list[object]:
    """``batches``: what the native world did at a time; it is first."""
    size = world.layout.size
    pool = TAME if rng.random() < 0.8 else POOL
    rows = rng.choices(pool, k=size)
    if rng.random() < 0.5:
        # A table, behind whose end lies what would do, too.
        rows[rng.randrange(size)] = Desc(TABLE, 16 * rng.randrange(1, 4), DESC_F_INDIRECT, 0).pack()
    table = b"".join(rows)
    event = (world.twin.next_used + rng.randrange(-2, 3) ^ rng.getrandbits(1) << 15) & 0xFFFF
    ids = [rng.randrange(size) for _ in range(size)]
    world.offer(table, ids, rng.randrange(size + 1), event, b"".join(rng.choices(pool, k=4)))
    touch = Touch(rng.choice((0, 16, 17, 5000)), rng.randrange(600), rng.randrange(9000), bool(rng.getrandbits(1)))
    came = []
    for _ in range(3):
        came.append(world.serve(touch, 3 if pool is TAME else 1, batches.pop(0) if world.drain is None else None))
        if world.drain is not None:
            batches.append(world.batches)
    world.quiet()
    return [came, world.interrupt(), world.arm()]


if __name__ == "__main__":
    print(hold_together(1, 800))
