# SPDX-License-Identifier: Apache-2.0
"""A native end of a ring that dies before each of its stores, and one in Python that goes on by its notes. A program.

It wants a `_core` whose stores count and end the process (`HOOK`, planted by ``tools/sanitize.py``): a killed process
has done a prefix of its stores. Prints how many there are.
"""

from __future__ import annotations

import mmap
import os
import struct

from native_kit import PLACES, RIGHTS, World
from ring_storm import RING, SHARED
from virtiova import _core
from virtiova.addr import Access
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.inflight import Inflight

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
LAYOUT = SplitLayout(8)
HEADS = [4, 0, 6, 2]
BEFORE = 0xFFFE
"""Used index before the first request: it wraps in between."""


def world() -> World:
    """Four requests, each of which says which it is, in a ring that has been in use."""
    made = World(LAYOUT, RING, BEFORE, event_idx=False, indirect=False, native=True)
    for place in PLACES:
        made.answer(place, RIGHTS.get(place, Access.RW))
    table = bytearray(16 * 8)
    for number, head in enumerate(HEADS):
        first = Desc(SHARED + 32 * number, 1, DESC_F_NEXT, head + 1).pack()
        table[16 * head : 16 * head + 32] = first + Desc(SHARED + 32 * number + 8, 4, DESC_F_WRITE, 0).pack()
        made.put(SHARED + 32 * number, bytes([number]))
    ids = [HEADS[(at - BEFORE) % 8 % 4] for at in range(8)]
    made.offer(bytes(table), ids, 4, 0, b"")
    made.put(RING + LAYOUT.used, struct.pack("<HH", 0, BEFORE))
    assert made.inflight is not None
    assert made.inflight.unfinished(BEFORE) == []
    return made


def live(made: World, done: mmap.mmap, last: int) -> None:
    """One back end's life, of so many stores: in a process of its own."""
    os.environ["STORES"] = str(last)
    drain = made.drain
    assert drain is not None
    drain.state = made.twin.state
    for request in drain.pop(8):
        done[request.read(1)[0]] += 1
        request.write(b"done")
        drain.give(request)
    drain.needs_interrupt()
    os._exit(0 if drain.state[:2] == ((BEFORE + 4) & 0xFFFF,) * 2 else 1)


def go_on(made: World, done: mmap.mmap) -> None:
    """The one after it, in Python."""
    space = made.space
    used = space.load16(RING + LAYOUT.used + 2)
    notes = Inflight(_core.Window(made.notes), 0, 8)
    left = notes.unfinished(used)
    base = (used + len(left)) & 0xFFFF
    given = (used - BEFORE) & 0xFFFF
    assert left == HEADS[given : given + len(left)], f"{left} after {given}"
    ring = SplitDevice(space, *made.parts, LAYOUT, event_idx=False, indirect=False, next_avail=base, next_used=used)
    while True:
        chain = ring.chain_at(left.pop(0)) if left else ring.pop()
        if chain is None:
            break
        done[chain.read(1)[0]] += 1
        ring.push(chain, 4)
    ids = [
        struct.unpack("<II", space.read(RING + LAYOUT.used + LAYOUT.used_entry(BEFORE + at), 8))[0] for at in range(4)
    ]
    assert ids == HEADS, f"given back: {ids}"
    assert ring.next_used == (BEFORE + 4) & 0xFFFF
    assert min(done[:4]) == 1, "lost"
    assert sum(done[:4]) <= 5, "done again that was given back"


def main() -> None:
    """Die before each store, until there is none left to die before."""
    last = 0
    while True:
        made, done = world(), mmap.mmap(-1, 4096)
        child = os.fork()
        if not child:
            live(made, done, last)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 7), f"the one that was to die ended with {code}"
        go_on(made, done)
        if code == 0:
            break
        last += 1
    print(last)


if __name__ == "__main__":
    main()
