# SPDX-License-Identifier: Apache-2.0
"""A native end of a ring that dies before each of its stores, and one in Python that goes on by its notes. A program.

It wants a `_core` whose stores count and end the process (`HOOK`, planted by ``tools/sanitize.py``): a killed process
has done a prefix of its stores. Prints how many there are, for each kind of ring and way to give back.
"""

from __future__ import annotations

import abc
import json
import mmap
import os
import struct
from collections.abc import Iterator

from native_kit import PLACES, RIGHTS, World
from ring_storm import RING, SHARED
from virtiova import _core
from virtiova.addr import Access
from virtiova.ring.chain import Chain
from virtiova.ring.layout import (
    DESC_F_NEXT,
    DESC_F_WRITE,
    PACKED_FLAGS,
    Desc,
    PackedDesc,
    PackedLayout,
    SplitLayout,
)
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.ends import packed_end
from virtiova.serve.inflight import Inflight
from virtiova.serve.inflight_packed import PackedInflight

HOOK = (
    "/* may_alias: the memory belongs to nobody's C type. */",
    """#include <stdlib.h>
#include <unistd.h>
static inline void vv_step(void)
{
    static long done;
    const char *last = getenv("STORES");

    if (last && done++ >= atol(last))
        _exit(7);
}
#define __atomic_store_n(...) (vv_step(), __atomic_store_n(__VA_ARGS__))
""",
)
IDS = [4, 0, 6, 2]
"""Of four requests, in the order in which they are offered: each says which it is."""
WAYS = ("one by one", "together", "some put back")


class Kind(abc.ABC):
    """A kind of ring, in which the requests are offered, and that has been in use: it wraps in between."""

    def __init__(self, made: World) -> None:
        self.made = made
        for place in PLACES:
            made.answer(place, RIGHTS.get(place, Access.RW))
        for number in range(len(IDS)):
            made.put(SHARED + 32 * number, bytes([number]))

    @abc.abstractmethod
    def seen(self) -> list[int]:
        """What the driver finds given back, by now."""

    @abc.abstractmethod
    def resume(self) -> list[Chain]:
        """One in Python that goes on by the notes: what it is to do first."""

    @abc.abstractmethod
    def ring(self) -> SplitDevice | PackedDevice:
        """Its end, where it goes on."""


class Split(Kind):
    BEFORE = 0xFFFE
    LAYOUT = SplitLayout(8)

    def __init__(self) -> None:
        layout = self.LAYOUT
        super().__init__(World(layout, RING, self.BEFORE, event_idx=False, indirect=False, native=True))
        table = bytearray(16 * 8)
        for number, head in enumerate(IDS):
            first = Desc(SHARED + 32 * number, 1, DESC_F_NEXT, head + 1).pack()
            table[16 * head : 16 * head + 32] = first + Desc(SHARED + 32 * number + 8, 4, DESC_F_WRITE, 0).pack()
        ids = [IDS[(at - self.BEFORE) % 8 % 4] for at in range(8)]
        self.made.offer(bytes(table), ids, 4, 0, b"")
        self.made.put(RING + layout.used, struct.pack("<HH", 0, self.BEFORE))
        assert isinstance(self.made.inflight, Inflight)
        assert self.made.inflight.unfinished(self.BEFORE) == []

    def _used(self) -> int:
        return self.made.space.load16(RING + self.LAYOUT.used + 2)

    def seen(self) -> list[int]:
        given = (self._used() - self.BEFORE) & 0xFFFF
        assert given <= len(IDS)
        where = [RING + self.LAYOUT.used + self.LAYOUT.used_entry(self.BEFORE + at) for at in range(given)]
        return [struct.unpack("<II", self.made.space.read(at, 8))[0] for at in where]

    def resume(self) -> list[Chain]:
        used = self._used()
        left = Inflight(_core.Window(self.made.notes), 0, 8).unfinished(used)
        base = (used + len(left)) & 0xFFFF
        parts, layout = self.made.parts, self.LAYOUT
        self._ring = SplitDevice(
            self.made.space, *parts, layout, event_idx=False, indirect=False, next_avail=base, next_used=used
        )
        return [self._ring.chain_at(head) for head in left]

    def ring(self) -> SplitDevice:
        return self._ring


class Packed(Kind):
    LAYOUT = PackedLayout(9)
    BEFORE = 5

    def __init__(self) -> None:
        layout = self.LAYOUT
        index = layout.encode(self.BEFORE)
        super().__init__(World(layout, RING, index, event_idx=False, indirect=False, native=True))
        # Another lap's are there, too.
        for place in range(self.BEFORE + 8, self.BEFORE + 9):
            self._put(place, PackedDesc(0, 0, 0, layout.used(place - 9)))
        for number, name in enumerate(IDS):
            place, at = self.BEFORE + 2 * number, SHARED + 32 * number
            self._put(place, PackedDesc(at, 1, 0xFFFF, DESC_F_NEXT | layout.available(place)))
            self._put(place + 1, PackedDesc(at + 8, 4, name, DESC_F_WRITE | layout.available(place + 1)))

    def _put(self, place: int, desc: PackedDesc) -> None:
        self.made.put(RING + self.LAYOUT.entry(place), desc.pack())

    def seen(self) -> list[int]:
        found: list[int] = []
        while len(found) <= len(IDS):
            place = self.BEFORE + 2 * len(found)
            desc = PackedDesc.unpack(self.made.space.read(RING + self.LAYOUT.entry(place), 16))
            if desc.flags & PACKED_FLAGS != self.LAYOUT.used(place):
                break
            found.append(desc.id)
        return found

    def resume(self) -> list[Chain]:
        notes = PackedInflight(_core.Window(self.made.notes), 0, 9)
        where = self.made.parts
        # A front end knows no better than where it began.
        base = self.LAYOUT.encode(self.BEFORE)
        self._ring, left = packed_end(self.made.space, where, 9, base, notes, event_idx=False, indirect=False)
        assert not any(isinstance(each, int) for each in left)
        return [self._ring.chain_of(each) for each in left if isinstance(each, list)]

    def ring(self) -> PackedDevice:
        return self._ring


def requests(drain: _core.Drain, way: str) -> Iterator[list[_core.Request]]:
    """As a device takes them, and gives them back."""
    found = drain.pop(8)
    if way == "some put back":
        drain.put_back(found[2:])
        yield from ([each] for each in found[:2])
        found = drain.pop(8)
    if way == "together":
        yield found
    else:
        yield from ([each] for each in found)


def live(kind: Kind, way: str, done: mmap.mmap, last: int) -> None:
    """One back end's life, of so many stores: in a process of its own."""
    os.environ["STORES"] = str(last)
    drain = kind.made.drain
    assert drain is not None
    drain.state = kind.made.twin.state
    for together in requests(drain, way):
        for request in together:
            done[request.read(1)[0]] += 1
            request.write(b"done")
        drain.push_all([(request, request.written) for request in together])
    drain.needs_interrupt()
    os._exit(0 if kind.seen() == IDS and not drain.pop(1) else 1)


def go_on(kind: Kind, done: mmap.mmap) -> None:
    """The one after it, in Python."""
    given = kind.seen()
    assert given == IDS[: len(given)], f"given back: {given}"
    left = kind.resume()
    heads = [chain.head for chain in left]
    assert heads == IDS[len(given) : len(given) + len(left)], f"{heads} after {given}"
    ring = kind.ring()
    while True:
        chain = left.pop(0) if left else ring.pop()
        if chain is None:
            break
        assert kind.seen() == given, "the driver sees what is still to be done"
        done[chain.read(1)[0]] += 1
        ring.push(chain, 4)
        given.append(chain.head)
    assert kind.seen() == IDS, f"given back: {kind.seen()}"
    assert min(done[: len(IDS)]) >= 1, "lost"
    assert max(done[: len(IDS)]) <= 2, "done again that was given back"


def die_everywhere(kind: type[Split | Packed], way: str) -> int:
    """Die before each store, until there is none left to die before."""
    last = 0
    while True:
        made, done = kind(), mmap.mmap(-1, 4096)
        child = os.fork()
        if not child:
            live(made, way, done, last)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 7), f"the one that was to die ended with {code}"
        try:
            go_on(made, done)
        except AssertionError as wrong:
            raise AssertionError(f"{kind.__name__}, {way}, before store {last}: {wrong}") from wrong
        if code == 0:
            return last
        last += 1


def main() -> None:
    """All kinds and ways."""
    print(
        json.dumps({f"{kind.__name__}, {way}": die_everywhere(kind, way) for kind in (Split, Packed) for way in WAYS})
    )


if __name__ == "__main__":
    main()
