# SPDX-License-Identifier: Apache-2.0
"""Driver ends of rings, as `ring_mutants` has device ends."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from virtiova.dma.ops import DmaRegion
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Segment, Used
from virtiova.ring.layout import PackedLayout, SplitLayout, need_event
from virtiova.testing import Place

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC: Final = struct.Struct("<QIHH")
BIG: Final = struct.Struct(">QIHH")


class TinyDriver:
    """What the driver ends have in common."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        self.region: DmaRegion = place.region
        self.begin = place.begin
        self.size = place.begin.size
        self.wrong = wrong
        self.pending: dict[int, tuple[int, int]] = {}
        """Slots, and bytes of room, of what was published, by head."""
        self.added: dict[int, tuple[int, int]] = {}
        self.done: list[Used] = []
        self.left = self.size
        self.avail = self.told = self.used = self.begin.start

    def rows(self, segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
        if not segments or (len(segments) > self.left and self.wrong != "overfills"):
            raise ProtocolError("no room")
        return [(segment.addr, segment.length, WRITE if segment.write else 0) for segment in segments]

    def keep(self, head: int, slots: int, segments: Sequence[Segment]) -> int:
        self.added[head] = slots, sum(segment.length for segment in segments if segment.write)
        self.left -= slots
        if self.wrong == "not hidden":
            self.publish()
        return head

    def finish(self, head: int, length: int) -> None:
        known = self.pending | (self.added if self.wrong == "hidden" else {})
        if head not in known and self.wrong not in {"unknown", "twice"}:
            raise ProtocolError("no such request")
        if self.begin.in_order and self.wrong != "names all":
            for other in list(self.pending):
                if other == head:
                    break
                self.take(other, self.pending[other][1])
        self.take(head, length)

    def take(self, head: int, length: int) -> None:
        slots, _ = self.pending.pop(head, (1, 0))
        self.left += slots
        self.used += slots if self.begin.packed else 1
        self.done.append(Used(head, length - (self.wrong == "counts one less" and length > 0)))

    def publish(self) -> bool:
        raise NotImplementedError


class TinySplitDriver(TinyDriver):
    """A driver end of a split ring."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        super().__init__(place, wrong)
        assert isinstance(place.layout, SplitLayout)
        self.layout = place.layout
        self.order: Any = "little" if wrong == "little" else place.begin.order
        self.free = list(range(self.size))
        self.chains: dict[int, list[int]] = {}
        self.wish()

    def wish(self) -> None:
        if self.begin.event_idx:
            self.region.store16(self.layout.avail + self.layout.used_event, self.used & 0xFFFF, self.order)

    def put(self, at: int, row: tuple[int, int, int, int]) -> None:
        self.region.write(at, (BIG if self.order == "big" else DESC).pack(*row))

    def add(self, segments: Sequence[Segment]) -> int:
        rows = self.rows(segments)
        if self.wrong == "overfills":
            self.free += [0] * (len(rows) - len(self.free))
        chain = [self.free.pop(0) for _ in rows]
        for number, (at, length, flags) in enumerate(rows):
            last = number == len(rows) - 1
            following = 0 if last else chain[number + 1]
            self.put(16 * chain[number], (at, length, flags | (0 if last else NEXT), following))
        return self.offer(chain, segments)

    def add_indirect(self, segments: Sequence[Segment], table: DmaRegion, offset: int = 0) -> int:
        if not self.left:
            raise ProtocolError("no room")
        for number, segment in enumerate(segments):
            last = number == len(segments) - 1
            flags = (WRITE if segment.write else 0) | (0 if last or self.wrong == "ends early" else NEXT)
            row = (segment.addr, segment.length, flags, 0 if last else number + 1)
            table.write(offset + 16 * number, (BIG if self.order == "big" else DESC).pack(*row))
        chain = [self.free.pop(0)]
        self.put(16 * chain[0], (table.addr + offset, 16 * len(segments), INDIRECT, 0))
        return self.offer(chain, segments)

    def offer(self, chain: list[int], segments: Sequence[Segment]) -> int:
        self.chains[chain[0]] = chain
        self.region.store16(self.layout.avail + self.layout.avail_entry(self.avail), chain[0], self.order)
        self.avail += 1
        return self.keep(chain[0], len(chain), segments)

    def publish(self) -> bool:
        old, self.told = self.told, self.avail
        self.pending |= self.added
        self.added.clear()
        index = self.avail if self.wrong != "stops at 4095" else min(self.avail, 0xFFF)
        self.region.store16(self.layout.avail + 2, index & 0xFFFF, self.order)
        if self.wrong in {"never kicks", "always kicks"}:
            return self.wrong == "always kicks"
        if self.begin.event_idx:
            event = self.region.load16(self.layout.used + self.layout.avail_event, self.order)
            return need_event(event, self.avail & 0xFFFF, old & 0xFFFF)
        return not self.region.load16(self.layout.used, self.order) & 1

    def poll(self) -> Used | None:
        if not self.done:
            index = self.region.load16(self.layout.used + 2, self.order)
            fresh = (index - self.used) & 0xFFFF
            if not fresh or (self.wrong == "compares" and index < self.used & 0xFFFF):
                return None
            if fresh > len(self.pending) and self.wrong not in {"jump", "hidden", "twice"}:
                raise ProtocolError("jumped")
            at = self.layout.used + self.layout.used_entry(self.used)
            head = self.region.load32(at, self.order)
            length = self.region.load32(at + 4, self.order)
            self.finish(head, length)
            self.wish()
        return self.done.pop(0)

    def take(self, head: int, length: int) -> None:
        self.free += self.chains.pop(head, [])
        super().take(head, length)


class TinyPackedDriver(TinyDriver):
    """A driver end of a packed ring."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        super().__init__(place, wrong)
        assert isinstance(place.layout, PackedLayout)
        self.layout = place.layout
        self.free = list(range(self.size))
        self.hidden: tuple[int, int] | None = None
        self.wish()

    def wish(self) -> None:
        if self.begin.event_idx:
            self.region.store16(self.layout.driver, self.layout.encode(self.used))
            self.region.store16(self.layout.driver + 2, 2)

    def add(self, segments: Sequence[Segment]) -> int:
        rows = self.rows(segments)
        last = len(rows) - 1
        return self.put(
            [(at, n, flags | (0 if k == last else NEXT)) for k, (at, n, flags) in enumerate(rows)], segments
        )

    def add_indirect(self, segments: Sequence[Segment], table: DmaRegion, offset: int = 0) -> int:
        if not self.left:
            raise ProtocolError("no room")
        for number, segment in enumerate(segments):
            row = (segment.addr, segment.length, 0, WRITE if segment.write else 0)
            table.write(offset + 16 * number, DESC.pack(*row))
        length = 16 if self.wrong == "ends early" else 16 * len(segments)
        return self.put([(table.addr + offset, length, INDIRECT)], segments)

    def put(self, rows: Sequence[tuple[int, int, int]], segments: Sequence[Segment]) -> int:
        number = self.free.pop(0) if self.free else 0
        for at, length, flags in rows:
            where = self.layout.entry(self.avail)
            lap = 0x80 if self.wrong == "first lap" else self.layout.available(self.avail)
            data = DESC.pack(at, length, number, flags | lap)
            if self.hidden is None:
                self.hidden = where + 14, flags | lap
                data = data[:14]
            self.region.write(where, data)
            self.avail += 1
        return self.keep(number, len(rows), segments)

    def publish(self) -> bool:
        old, self.told = self.told, self.avail
        self.pending |= self.added
        self.added.clear()
        if self.hidden is not None:
            self.region.store16(*self.hidden)
            self.hidden = None
        if self.wrong in {"never kicks", "always kicks"}:
            return self.wrong == "always kicks"
        wish = self.region.load16(self.layout.device + 2) & 3
        if wish == 2:
            return self.layout.passed(self.region.load16(self.layout.device), self.avail, old)
        return wish != 1

    def poll(self) -> Used | None:
        if not self.done:
            where = self.layout.entry(self.used)
            if self.region.load16(where + 14) & 0x8080 != self.layout.used(self.used):
                return None
            length, head = struct.unpack("<IH", self.region.read(where + 8, 6))
            self.finish(head, length)
            self.wish()
        return self.done.pop(0)

    def take(self, head: int, length: int) -> None:
        self.free.append(head)
        super().take(head, length)


def driver(wrong: str = "") -> Any:
    """How a driver end with that mistake is made."""
    return lambda place: (TinyPackedDriver if place.begin.packed else TinySplitDriver)(place, wrong)


BOTH: Final = ("split", "packed")
DRIVERS: Final[list[tuple[str, str, tuple[str, ...]]]] = [
    ("counts one less", "moves", BOTH),
    ("not hidden", "hidden", BOTH),
    ("ends early", "indirect", BOTH),
    ("overfills", "full", BOTH),
    ("names all", "in-order", BOTH),
    ("compares", "around", ("split",)),
    ("first lap", "around", ("packed",)),
    ("little", "big-endian", ("split",)),
    ("never kicks", "kicks", BOTH),
    ("always kicks", "kicks", BOTH),
    ("never kicks", "kicks-event-idx", BOTH),
    ("always kicks", "kicks-event-idx", BOTH),
    ("stops at 4095", "lasts", ("split",)),
    ("first lap", "lasts", ("packed",)),
    ("unknown", "used-unknown", BOTH),
    ("hidden", "used-hidden", BOTH),
    ("twice", "used-twice", BOTH),
    ("jump", "used-jump", ("split",)),
]
"""Mistake, the check that has to find it, and of which kinds of ring."""
