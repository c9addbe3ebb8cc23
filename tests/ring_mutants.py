# SPDX-License-Identifier: Apache-2.0
"""Device ends of rings, written once more, in few lines and by the specification alone; and with one mistake each, by
its name in ``wrong``, and the check that is made for it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from virtiova.addr import Access
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.layout import PackedLayout, SplitLayout, need_event
from virtiova.testing import Place, Taken

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC: Final = struct.Struct("<QIHH")
BIG: Final = struct.Struct(">QIHH")


class Tiny:
    """What they have in common."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        self.place = place
        self.space = place.space
        self.size = place.begin.size
        self.wrong = wrong
        self.desc, self.driver, self.device = place.parts
        self.next_avail = self.next_used = self.told = place.begin.start
        self.out: list[Taken] = []

    def refuse(self, mistake: str, what: str) -> None:
        """Refuse it, but for one mistake."""
        if self.wrong != mistake:
            raise ProtocolError(what)

    def gather(self, rows: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, Access]]:
        parts = [(at, length, Access.WRITE if flags & WRITE else Access.READ) for at, length, flags in rows]
        if parts != sorted(parts, key=lambda part: part[2].value):
            self.refuse("order", "readable behind writable")
        if self.wrong == "reversed":
            parts.reverse()
        return parts

    def count(self, written: int) -> int:
        return written + 1 if self.wrong == "counts one more" else written

    def linear(self, address: int) -> int:
        """The address, or one as if the ring lay in one piece, for the mistake of that name."""
        region = self.place.region
        if self.wrong != "linear" or not region.addr <= address < region.addr + region.size:
            return address
        page = (address - region.addr) // 4096
        return address if page == 0 else address - 4096

    def pair(self, address: int) -> tuple[int, int, int, int]:
        data = self.space.load_pair(self.linear(address))
        if self.wrong == "reads again":
            data = self.space.load_pair(address)
        one: tuple[int, int, int, int] = (BIG if self.order == "big" else DESC).unpack(data)
        return one

    order = "little"


class TinySplit(Tiny):
    """A device end of a split ring."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        super().__init__(place, wrong)
        assert isinstance(place.layout, SplitLayout)
        self.layout = place.layout
        self.order = "little" if wrong == "little" else place.begin.order
        self.seen = self.next_avail

    def load(self, address: int) -> int:
        return self.space.load16(address, self.order)  # type: ignore[arg-type]

    def store(self, address: int, value: int) -> None:
        self.space.store16(address, value & 0xFFFF, self.order)  # type: ignore[arg-type]

    def pop(self) -> Taken | None:
        try:
            return self.take()
        except AccessError as error:
            if self.wrong == "raises":
                raise IndexError(error.address) from error
            raise

    def take(self) -> Taken | None:
        index = self.load(self.driver + 2)
        more = (index - self.next_avail) & 0xFFFF
        if more > self.size or (more == self.size and self.wrong == "never full"):
            self.refuse("jump", "index")
        if self.wrong == "does not wrap" and index < self.next_avail & 0xFFFF:
            more = 0
        if not more and not (self.wrong == "looks ahead" and self.next_avail % 3 == 1):
            return None
        head = self.load(self.driver + self.layout.avail_entry(self.next_avail))
        self.next_avail += 1
        if head >= self.size:
            self.refuse("head", "head")
            head %= self.size
        taken = Taken(head, self.gather(self.walk(head)))
        self.out.append(taken)
        return taken

    def walk(self, index: int) -> list[tuple[int, int, int]]:
        table, entries, inside = self.desc, self.size, False
        rows: list[tuple[int, int, int]] = []
        while True:
            at, length, flags, following = self.entry(table, index, inside=inside)
            if flags & INDIRECT:
                if not self.place.begin.indirect:
                    self.refuse("not taken", "indirect")
                if inside:
                    self.refuse("nested", "nested")
                    length = 16
                if flags & NEXT:
                    self.refuse("not alone", "goes on")
                if length % 16 or not length:
                    self.refuse("half", "length")
                    length = max(length, 16)
                table, entries, inside, index = at, length // 16, True, 0
                if self.wrong == "first of the table":
                    entry = self.entry(table, 0, inside=True)
                    return [entry[:3]]
                continue
            rows.append((at, length, flags))
            if not flags & NEXT:
                return rows
            if len(rows) >= self.size:
                self.refuse("loop in a table" if inside else "loop", "loop")
            if following >= entries:
                self.refuse("next in a table" if inside else "next", "next")
                if inside:
                    return rows
                following %= entries
            index = following

    def entry(self, table: int, index: int, *, inside: bool) -> tuple[int, int, int, int]:
        where = table + 16 * index
        if not inside:
            return self.pair(where)
        row: tuple[int, int, int, int] = (BIG if self.order == "big" else DESC).unpack(self.space.read(where, 16))
        return row

    def push(self, chain: Taken, written: int) -> None:
        head = self.out.pop(0).head if self.wrong == "in order only" else chain.head
        where = self.device + self.layout.used_entry(self.next_used)
        element = struct.pack(">II" if self.order == "big" else "<II", head, self.count(written))
        self.space.write(self.linear(where), element)
        self.next_used += 1
        if self.wrong == "12 bits":
            self.next_used &= 0xFFF
        if self.wrong == "tidies up":
            self.store(self.driver + self.layout.avail_entry(self.next_used - 1), 0)
        self.store(self.device + 2, self.next_used)

    def needs_interrupt(self) -> bool:
        new, old, self.told = self.next_used & 0xFFFF, self.told & 0xFFFF, self.next_used
        if new == old or self.wrong == "mute":
            return False
        if self.place.begin.event_idx and self.wrong != "always":
            return need_event(self.load(self.driver + self.layout.used_event), new, old)
        return not self.load(self.driver) & 1

    def disable_notify(self) -> None:
        if not self.place.begin.event_idx:
            self.store(self.device, 1)

    def enable_notify(self) -> bool:
        if self.place.begin.event_idx:
            event = self.next_avail + (self.wrong == "one too far")
            self.store(self.device + self.layout.avail_event, event)
        elif self.wrong != "stays quiet":
            self.store(self.device, 0)
        if self.wrong == "one look":
            return False
        return self.load(self.driver + 2) != self.next_avail & 0xFFFF

    def put_back(self, count: int) -> None:
        self.next_avail -= count - (self.wrong == "all but one" and count > 0)


class TinyPacked(Tiny):
    """A device end of a packed ring."""

    def __init__(self, place: Place, wrong: str = "") -> None:
        super().__init__(place, wrong)
        assert isinstance(place.layout, PackedLayout)
        self.layout = place.layout
        self.slots: dict[int, int] = {}
        self.order_taken: list[int] = []

    def flags(self, place: int) -> int:
        return self.space.load16(self.linear(self.desc + self.layout.entry(place) + 14))

    def here(self, place: int, flags: int) -> bool:
        mine = 0x80 if self.wrong == "first lap" else self.layout.available(place)
        return flags & 0x8080 == mine

    def pop(self) -> Taken | None:
        place = self.next_avail
        flags = self.flags(place)
        if not self.here(place, flags) and not (self.wrong == "looks ahead" and place % 3 == 1):
            return None
        if place - self.next_used >= self.size:
            self.refuse("again", "not given back")
        rows: list[tuple[int, int, int]] = []
        while True:
            at, length, number, found = self.pair(self.desc + self.layout.entry(place))
            flags = found if rows else flags
            rows.append((at, length, flags))
            place += 1
            if not flags & NEXT:
                break
            if len(rows) == self.size - (self.next_avail - self.next_used):
                self.refuse("loop", "loop")
        self.slots[number] = place - self.next_avail
        self.order_taken.append(self.slots[number])
        self.next_avail = place
        if any(flags & INDIRECT for _, _, flags in rows):
            rows = self.table(rows)
        taken = Taken(number, self.gather(rows))
        self.out.append(taken)
        return taken

    def table(self, rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        if not self.place.begin.indirect:
            self.refuse("not taken", "indirect")
        if len(rows) > 1:
            self.refuse("not alone", "in a list")
        at, length, _ = rows[0]
        if length % 16 or not length:
            self.refuse("half", "length")
        if length // 16 > self.size:
            raise ProtocolError("too long")
        data = self.space.read(at, length - length % 16)
        if self.wrong == "reads again":
            data = self.space.read(at, length)
        if self.wrong == "first of the table":
            data = data[:16]
        return [
            (row[0], row[1], row[3] & WRITE) for row in (DESC.unpack_from(data, n) for n in range(0, len(data), 16))
        ]

    def push(self, chain: Taken, written: int) -> None:
        head = self.out.pop(0).head if self.wrong == "in order only" else chain.head
        where = self.desc + self.layout.entry(self.next_used)
        self.space.write(self.linear(where + 8), struct.pack("<IH", self.count(written), head))
        self.space.store16(self.linear(where + 14), self.layout.used(self.next_used))
        self.next_used += 1 if self.wrong == "one slot" else self.slots.pop(head, 1)
        if self.wrong == "tidies up":
            self.space.store16(self.driver, 0x1234)

    def needs_interrupt(self) -> bool:
        new, old, self.told = self.next_used, self.told, self.next_used
        if new == old or self.wrong == "mute":
            return False
        wish = self.space.load16(self.driver + 2) & 3
        if wish == 2 and self.wrong != "always":
            return self.layout.passed(self.space.load16(self.driver), new, old)
        return wish != 1

    def disable_notify(self) -> None:
        self.space.store16(self.device + 2, 1)

    def enable_notify(self) -> bool:
        if self.place.begin.event_idx:
            self.space.store16(self.device, self.layout.encode(self.next_avail + (self.wrong == "one too far")))
            self.space.store16(self.device + 2, 2)
        elif self.wrong != "stays quiet":
            self.space.store16(self.device + 2, 0)
        return self.wrong != "one look" and self.here(self.next_avail, self.flags(self.next_avail))

    def put_back(self, count: int) -> None:
        for _ in range(count - (self.wrong == "all but one" and count > 0)):
            self.next_avail -= self.order_taken.pop()


def device(wrong: str = "") -> Any:
    """How a device end with that mistake is made."""
    return lambda place: (TinyPacked if place.begin.packed else TinySplit)(place, wrong)


BOTH: Final = ("split", "packed")
DEVICES: Final[list[tuple[str, str, tuple[str, ...]]]] = [
    ("counts one more", "moves", BOTH),
    ("reversed", "moves", BOTH),
    ("tidies up", "moves", BOTH),
    ("looks ahead", "hidden", BOTH),
    ("first of the table", "indirect", BOTH),
    ("in order only", "any-order", BOTH),
    ("never full", "full", ("split",)),
    ("one slot", "full", ("packed",)),
    ("does not wrap", "around", ("split",)),
    ("first lap", "around", ("packed",)),
    ("linear", "scattered", BOTH),
    ("little", "big-endian", ("split",)),
    ("stays quiet", "kicks", BOTH),
    ("one look", "kicks", BOTH),
    ("one too far", "kicks-event-idx", BOTH),
    ("mute", "interrupts", BOTH),
    ("mute", "interrupts-event-idx", BOTH),
    ("always", "interrupts-event-idx", BOTH),
    ("all but one", "put-back", BOTH),
    ("12 bits", "lasts", ("split",)),
    ("first lap", "lasts", ("packed",)),
    ("loop", "loop", BOTH),
    ("head", "head", ("split",)),
    ("next", "next", ("split",)),
    ("jump", "jump", ("split",)),
    ("half", "table-length", BOTH),
    ("next in a table", "table-next", ("split",)),
    ("loop in a table", "table-loop", ("split",)),
    ("nested", "nested", ("split",)),
    ("not alone", "not-alone", BOTH),
    ("not taken", "not-taken", BOTH),
    ("order", "order", BOTH),
    ("again", "again", ("packed",)),
    ("reads again", "reads-once", BOTH),
    ("raises", "junk", ("split",)),
    ("loop", "junk", ("packed",)),
]
"""Mistake, the check that has to find it, and of which kinds of ring."""
