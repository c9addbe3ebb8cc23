# SPDX-License-Identifier: Apache-2.0
"""Two worlds with the same bytes: one ring served by Python alone, the other by the native end as far as that goes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ring_storm import BASE, ONLY_READ, ONLY_WRITE, PAGE, RING, SHARED, TABLE, Arena, descriptors, tame
from virtiova import _core
from virtiova.addr import UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import SplitLayout
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
    """RAM, a front end's answers, and one split ring of ``layout`` at ``where`` behind them; ``native``: both ends."""

    def __init__(
        self, layout: SplitLayout, where: int, index: int, *, event_idx: bool, indirect: bool, native: bool
    ) -> None:
        self.arena = Arena()
        self.iotlb = Iotlb(self.arena)
        self.layout, self.where = layout, where
        parts = self.parts = (where, where + layout.avail, where + layout.used)
        space = CachedSpace(self.arena, self.iotlb)
        self.twin = SplitDevice(
            space, *parts, layout, event_idx=event_idx, indirect=indirect, next_avail=index, next_used=index
        )
        self.drain: _core.Drain | None = None
        notes = bytearray(ring_bytes(layout.size) + 8)
        self.notes = memoryview(notes)
        self.inflight = Inflight(_core.Window(self.notes), 0, layout.size, fresh=True)
        if native:
            self.drain = _core.Drain(self.iotlb.radix, *parts, layout.size, event_idx=event_idx, indirect=indirect)
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

    def offer(self, table: bytes, heads: list[int], more: int, event: int, indirect: bytes) -> None:
        """A driver's doing: all descriptors, all heads, and ``more`` of them available than were taken."""
        flags = event & 1
        index = (self.twin.next_avail + more) & 0xFFFF
        self.put(self.where, table + struct.pack(f"<HH{len(heads)}HH", flags, index, *heads, event))
        self.put(TABLE, indirect)

    # -- what the device does

    def serve(self, touch: Touch, count: int) -> list[object]:
        """Up to ``count`` requests; what came of each."""
        self.twin.state = self.twin.state  # nothing is known of the available index, as after a hand-over
        came: list[object] = []
        while count > 0:
            found = self._natively(touch, count) or [self._in_python(touch)]
            came += found
            count -= len(found)
            if not isinstance(found[-1], list):
                break
        return came

    def _natively(self, touch: Touch, count: int) -> list[object]:
        drain = self.drain
        if drain is None:
            return []
        drain.state, drain.counter = self.twin.state, self.inflight.counter
        requests = drain.pop(count)
        came: list[object] = []
        for request in requests:
            came.append(touch(request))
            drain.push(request, request.written)
        self.twin.state, self.inflight.counter = drain.state, drain.counter
        self.natively += len(requests)
        self.helped += drain.needs_help
        if not requests and not drain.needs_help:
            return [None]
        return came

    def _in_python(self, touch: Touch) -> object:
        chain = outcome(self.twin.pop)
        if not isinstance(chain, Chain):
            return chain
        self.inflight.begin([chain.head])
        came = touch(chain)
        pushed = outcome(lambda: self.twin.push(chain, chain.written))
        if pushed is not None:
            return pushed
        self.inflight.end([chain.head], self.twin.next_used)
        return came

    def known(self) -> bool:
        """Whether all of the ring is in the native table."""
        return all(self.iotlb.radix.covers(at, 8 * self.layout.size + 6, 3) for at in self.parts[1:])

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
        self.twin.state = self.twin.state
        if self.drain is not None:
            self.drain.state = self.twin.state
            more = self.drain.enable_notify()
            if not self.drain.needs_help:
                return more
        return outcome(self.twin.enable_notify)

    def bytes(self) -> bytes:
        """All memory that there is, and all notes of what is in flight."""
        return self.arena.memory[:] + bytes(self.notes)
