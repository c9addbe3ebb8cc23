# SPDX-License-Identifier: Apache-2.0
"""Random rings against our device end, and random numbers against the native half. A program, and a kit for tests.

Usage: ring_storm.py [--rings N] [--seed N] [--scribble]. Prints what came of them as one line of JSON. Whatever lies
in the rings: no exception but those that are promised, and no byte changed that the device may not write. Run under
an address sanitizer (sanitize.py) it also says when native code so much as looks past the memory that it was given.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from virtiova._core import Drain, Radix, Request, Window
from virtiova.addr import GPA, UVA, Access
from virtiova.device.base import Device
from virtiova.device.blk import Blk
from virtiova.device.host import Drained, Served, drain_queue, give, serve_queue, take
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.ram import RamBlock
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace, Miss, Span
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_device import SplitDevice

PAGE = 0x1000
PAGES = 6
"""Of each of the two blocks of RAM."""
FAR = 0x100000
BASE = 0x7000_0000_0000
GUARD = b"\xa5" * PAGE
RING, TABLE, SHARED, ONLY_READ, ONLY_WRITE = 0x10000, 0x12000, 0x14000, 0x20000, 0x30000
"""IOVAs: a ring and an indirect table over two pages each, payload, and what may be used one way only."""


def poison(address: int, length: int, *, verb: str = "poison") -> bool:
    """Tell the address sanitizer, if there is one in this process, that nobody may touch these bytes ("unpoison": that
    all may again)."""
    tell = getattr(ctypes.CDLL(None), f"__asan_{verb}_memory_region", None)
    if tell is not None:
        tell(ctypes.c_void_p(address), ctypes.c_size_t(length))
    return tell is not None


class Arena(RegionRam):
    """RAM in two windows, at 0 and at `FAR`, with a page that is nobody's before, between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = mmap.mmap(-1, (2 * PAGES + 3) * PAGE)
        self.starts = {0: PAGE, FAR: (PAGES + 2) * PAGE}
        view = memoryview(self.memory)
        self.windows = {gpa: Window(view[at : at + PAGES * PAGE]) for gpa, at in self.starts.items()}
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.guards = (0, PAGES + 1, 2 * PAGES + 2)
        for page in self.guards:
            self.memory[page * PAGE : (page + 1) * PAGE] = GUARD
        self.start = start
        self.poisoned = all([poison(start + page * PAGE, PAGE) for page in self.guards])

    def __del__(self) -> None:
        # What is mapped here next has other guards.
        poison(self.start, len(self.memory), verb="unpoison")

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return tuple(RamBlock(GPA(gpa), PAGES * PAGE, at) for gpa, at in self.starts.items())

    def _find(self, gpa: int, length: int, align: int = 1) -> tuple[Window, int]:
        start = FAR if gpa >= FAR else 0
        if gpa % align or gpa + length > start + PAGES * PAGE:
            raise AccessError(gpa, length, "not in this arena, or not aligned")
        return self.windows[start], gpa - start

    def gpa_of(self, uva: UVA, length: int) -> Sequence[Span] | Miss:
        gpa = uva - BASE
        start = FAR if gpa >= FAR else 0
        if not start <= gpa <= start + PAGES * PAGE - length:
            return Miss(uva, length, Access.RW, "not in this arena")
        return [Span(GPA(gpa), length)]

    def place(self, gpa: int) -> int:
        """Offset in ``memory``."""
        start = FAR if gpa >= FAR else 0
        return self.starts[start] + gpa - start


class Toucher(Device):
    """Reads and writes whatever a chain has, up to a limit."""

    def handle(self, queue: int, chain: Chain) -> None:
        with suppress(AccessError):
            chain.read(min(chain.readable, 5000))
        chain.write(b"w" * min(chain.writable, 9000))


def descriptors(rng: random.Random, count: int) -> list[bytes]:
    """Descriptors as a hostile driver might write them: addresses around every border, all lengths and flags."""
    edges = [
        at + step
        for at in (
            RING,
            TABLE,
            SHARED,
            ONLY_READ,
            ONLY_WRITE,
            0,
            PAGES * PAGE,
            FAR,
            FAR + PAGES * PAGE,
            1 << 48,
            1 << 64,
        )
        for step in (0, 8, PAGE - 8, PAGE, 2 * PAGE - 1, 2 * PAGE, -1, -16)
    ]
    lengths = [0, 1, 15, 16, 32, 64, 512, 513, PAGE, PAGE + 1, 2 * PAGE, 0x10000, 1 << 26, (1 << 26) + 1, 0xFFFFFFFF]
    flags = [0, 1, 2, 3, 1, 3, 2, 4, 5, 6, 7, 8, 0xFFFF]
    found = []
    for _ in range(count):
        address = rng.choice(edges) if rng.random() < 0.9 else rng.getrandbits(64)
        length = rng.choice(lengths) if rng.random() < 0.9 else rng.getrandbits(32)
        # Most go somewhere in the ring, so that chains and loops come about.
        after = rng.randrange(9) if rng.random() < 0.95 else rng.getrandbits(16)
        found.append(struct.pack("<QIHH", address & (1 << 64) - 1, length, rng.choice(flags), after))
    return found


def tame(rng: random.Random, count: int) -> list[bytes]:
    """Descriptors that nearly mean something, so that chains come to their end and devices get to work."""
    places = (SHARED, SHARED + 8, SHARED + PAGE - 5, ONLY_READ, ONLY_WRITE, ONLY_WRITE + PAGE - 1, 2 * PAGE, FAR)
    lengths = (0, 1, 16, 16, 20, 512, 513, PAGE + 1, 2 * PAGE)
    return [
        struct.pack(
            "<QIHH",
            rng.choice(places),
            rng.choice(lengths),
            rng.choice((0, 0, 1, 1, 1, 2, 2, 2, 2, 3)),
            rng.randrange(8),
        )
        for _ in range(count)
    ]


def serve_natively(device: Device, ring: SplitDevice, drain: Drain) -> Served:
    """`serve_queue` with the native end, and with the one in Python for what that leaves."""
    total = Drained()
    while True:
        drain.state = ring.state
        try:
            drained = drain_queue(device, 0, drain, 1 << 16, lambda: False, total)
        finally:
            ring.state = drain.state
        if drained is not None:
            return Served(total.chains, drained=drained)
        chains = take(device, 0, ring)
        if chains:
            give(device, 0, ring, chains)
            total.chains += len(chains)
        elif chains is not None and not ring.enable_notify():
            return Served(total.chains, drained=True)


class Storm:
    """One arena, one IOTLB, and a stream of rings from ``seed``."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.arena = Arena()
        self.iotlb = Iotlb(self.arena)
        spaces = (CachedSpace(self.arena, self.iotlb), MediatedSpace(self.arena, self.iotlb), FlatSpace(self.arena))
        # The native table most of the time: it is what the sanitizers look at.
        self.spaces: list[AddressSpace] = [spaces[0], spaces[0], *spaces]
        self.devices: list[Device] = [Toucher(), Toucher(), Rng(bytes), Blk(MemoryStore(bytearray(64 * 512)))]
        self.pool = descriptors(self.rng, 4096)
        self.tame = tame(self.rng, 512)
        self.came: collections.Counter[str] = collections.Counter()
        self.sealed: list[int] = []
        self.kept = b""

    def mappings(self) -> None:
        """New answers of the front end; pages of the arena that no device may write are filled and remembered."""
        pages = [BASE + PAGE * page for page in range(PAGES)] + [BASE + FAR + PAGE * page for page in range(PAGES)]
        self.rng.shuffle(pages)
        self.iotlb.flush()
        for iova in (RING, RING + PAGE, TABLE, TABLE + PAGE, SHARED, SHARED + PAGE):
            self.iotlb.update(iova, PAGE, UVA(pages.pop()), Access.RW)
        self.iotlb.update(ONLY_WRITE, PAGE, UVA(pages.pop()), Access.WRITE)
        # Sometimes the ring itself may only be read.
        if self.rng.random() < 0.05:
            self.sealed = [pages.pop(), pages.pop(), pages.pop()]
            self.iotlb.update(RING, PAGE, UVA(self.sealed[0]), Access.READ)
        else:
            self.sealed = [pages.pop(), pages.pop()]
        self.iotlb.update(ONLY_READ, self.rng.choice([PAGE, PAGE - 8]), UVA(self.sealed[-1]), Access.READ)
        self.kept = self.look()

    def look(self) -> bytes:
        """Bytes that no device behind the IOTLB may change."""
        return b"".join([self.arena.memory[at : at + PAGE] for at in map(self.arena.place, self.untouchable())])

    def untouchable(self) -> list[int]:
        return [page - BASE for page in self.sealed]

    def lay(self, space: AddressSpace, layout: SplitLayout, where: int, index: int) -> None:
        """A ring's bytes, behind the device's back: straight into the arena."""
        rng, size = self.rng, layout.size
        jump = (
            rng.getrandbits(16)
            if rng.random() < 0.05
            else index + rng.randrange(size + 2 if rng.random() < 0.1 else size + 1)
        )
        heads = [rng.randrange(size + 1) if rng.random() < 0.98 else rng.getrandbits(16) for _ in range(size)]
        avail = struct.pack(f"<HH{size}HH", rng.getrandbits(1), jump & 0xFFFF, *heads, rng.getrandbits(16))
        pool = self.tame if rng.random() < 0.5 else self.pool
        self.put(space, where, b"".join(rng.choices(pool, k=size)) + avail)
        self.put(space, TABLE if not isinstance(space, FlatSpace) else 2 * PAGE, b"".join(rng.choices(pool, k=4)))

    def put(self, space: AddressSpace, address: int, data: bytes) -> None:
        spans = space.translate(address, len(data), Access.READ)
        if isinstance(spans, Miss):
            return
        done = 0
        for span in spans:
            at = self.arena.place(span.gpa)
            self.arena.memory[at : at + span.length] = data[done : done + span.length]
            done += span.length
        if self.sealed and self.sealed[0] - BASE == spans[0].gpa & -PAGE:
            self.kept = self.look()

    def ring(self) -> int:
        """One ring, its bytes changed once or twice under the device. How many rings that makes."""
        rng = self.rng
        space = rng.choice(self.spaces)
        layout = SplitLayout(rng.choice((1, 2, 4, 8, 8, 8)))
        base = 0 if isinstance(space, FlatSpace) else RING
        # At the start, over the border of two pages, and where its end is in no mapping.
        where = base + rng.choice((0, 0, 0, PAGE - 16, PAGE - 64, PAGE - 160, 2 * PAGE - 64))
        bits = rng.getrandbits(2)
        avail, used = where + layout.avail, where + layout.used
        event_idx, indirect = bool(bits & 1), bool(bits & 2)
        ring = SplitDevice(space, where, avail, used, layout, event_idx=event_idx, indirect=indirect)
        drain = None
        if space is self.spaces[0] and rng.random() < 0.7:
            drain = Drain(self.iotlb.radix, where, avail, used, layout.size, event_idx=event_idx, indirect=indirect)
        device = rng.choice(self.devices)
        laps = 1 + (rng.random() < 0.5)
        for _ in range(laps):
            self.lay(space, layout, where, ring._next_avail)
            try:
                served = serve_queue(device, 0, ring) if drain is None else serve_natively(device, ring, drain)
                ring.needs_interrupt()
                self.came[f"{min(served.chains, 3)} served"] += 1
                self.came["natively"] += drain is not None
            except AccessError:
                self.came["out of reach"] += 1
            except ProtocolError:
                self.came["means nothing"] += 1
        if not isinstance(space, FlatSpace):
            assert self.look() == self.kept, f"bytes were written that may only be read; seed and ring: {self.came}"
        else:
            self.kept = self.look()
        return laps

    def packed(self) -> int:
        """One packed ring, for the native end alone: what it leaves stays where it is."""
        rng = self.rng
        size = rng.choice((1, 2, 3, 5, 8))
        where = RING + rng.choice((0, 0, PAGE - 16, PAGE - 64, 2 * PAGE - 64))
        lap = rng.getrandbits(1)
        options = {"event_idx": bool(rng.getrandbits(1)), "indirect": rng.random() < 0.7}
        driver = where + 16 * size
        drain = Drain(self.iotlb.radix, where, driver, driver + 4, size, packed=True, **options)
        at = rng.randrange(size)
        drain.state = (lap << 15 | at,) * 2 + (rng.randrange(3),)
        pool = self.tame if rng.random() < 0.6 else self.pool
        ring = bytearray(b"".join(rng.choices(pool, k=size)) + rng.randbytes(8))
        for slot in range(size):
            # Available, nearly all of them, in this lap and behind its end in the next one.
            flags = ring[16 * slot + 12] & 7 | (0x80 if (slot >= at) == lap else 0x8000)
            ring[16 * slot + 12 : 16 * slot + 16] = struct.pack(
                "<HH", rng.randrange(size), rng.choice((flags,) * 9 + (rng.getrandbits(16),))
            )
        self.put(self.spaces[0], where, bytes(ring))
        self.put(self.spaces[0], TABLE, b"".join(rng.choices(pool, k=4)))
        drain.disable_notify()
        requests = drain.pop(rng.randrange(1, 10))
        rng.shuffle(kept := list(requests))
        if rng.random() < 0.3:
            drain.put_back(requests[1:])
            kept = requests[:1]
        self.touch_all(kept)
        drain.push_all([(request, request.written) for request in kept])
        drain.needs_interrupt()
        drain.enable_notify()
        self.came[f"{min(len(kept), 3)} packed"] += 1
        assert self.look() == self.kept, f"bytes were written that may only be read; seed and ring: {self.came}"
        return 1

    @staticmethod
    def touch_all(requests: list[Request]) -> None:
        for request in requests:
            request.read(5000)
            request.skip(min(3, request.writable))
            request.write(b"p" * min(request.writable, 9000))

    def numbers(self) -> None:
        """The native half with numbers that no layer above it would pass on."""
        rng = self.rng
        gpa, window = rng.choice(list(self.arena.windows.items()))
        size = PAGES * PAGE
        offset = rng.choice(
            (0, 1, 8, PAGE, size, size - 1, size - 2, size - 4, size - 8, size - 16, -1, 1 << 63, size + 1)
        )
        length = rng.choice((0, 1, 2, 16, PAGE, size, size + 1, -1, 1 << 40, (1 << 63) - 1))
        radix = Radix(1 << 16)
        first = rng.choice((0, PAGE, (1 << 48) - PAGE, 5 * PAGE + 8))
        last = first + rng.choice((0, 15, PAGE - 2, PAGE - 1, PAGE, size - 1, size, 2 * size))
        calls: list[Callable[[], object]] = [
            lambda: window.read(offset, length),
            lambda: window.write(offset, bytes(length if 0 <= length <= size + 1 else 3)),
            lambda: window.load16(offset),
            lambda: window.load32(offset),
            lambda: window.load_pair(offset),
            lambda: window.store16(offset, 1),
            lambda: window.store32(offset, 1),
            lambda: radix.fill(first, first, last, window, offset, 3),
            lambda: radix.read(last - 7, 16),
            lambda: radix.write(last - 7, bytes(16)),
            lambda: radix.load_pair(last - 15),
            lambda: radix.read(first, min(length, 1 << 16)),
            lambda: radix.drop(first + 1, last),
        ]
        with suppress(IndexError, ValueError, OverflowError):
            radix.fill(first, first, last, window, 0, 3)
        assert not radix.covers(last + 1, 1, 1), "more than the interval"
        for call in calls:
            with suppress(IndexError, ValueError, OverflowError):
                call()
        radix.clear()
        assert gpa in self.arena.starts

    def run(self, rings: int) -> None:
        """At least so many rings."""
        done = 0
        while done < rings:
            self.mappings()
            for _ in range(32):
                done += self.ring()
            for _ in range(8):
                done += self.packed()
            self.numbers()
            self.kept = self.look()
            if not self.arena.poisoned:
                for page in self.arena.guards:
                    assert self.arena.memory[page * PAGE : (page + 1) * PAGE] == GUARD
        self.came["rings"] = done


@contextmanager
def scribbler(storm: Storm) -> Iterator[None]:
    """Another process that writes into rings and tables all the time, while the device reads them."""
    started = os.fork()
    if not started:
        rng = random.Random(1)
        pages = [page for page in range(1, 2 * PAGES + 2) if page != PAGES + 1]
        while os.getppid() != 1:
            for _ in range(1000):
                at = rng.choice(pages) * PAGE + rng.randrange(PAGE - 16)
                storm.arena.memory[at : at + 16] = rng.choice(storm.pool)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(started, signal.SIGKILL)
        os.waitpid(started, 0)


def main() -> None:
    """Run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scribble", action="store_true", help="change memory all the time, from another process")
    options = parser.parse_args()
    storm = Storm(options.seed)
    start = time.monotonic()
    if options.scribble:
        # Nothing can be said of what lies in memory then; only that we stay within it, and alive.
        storm.look = lambda: b""  # type: ignore[method-assign]
        with scribbler(storm):
            storm.run(options.rings)
    else:
        storm.run(options.rings)
    seconds = time.monotonic() - start
    said = {"poisoned": storm.arena.poisoned, "seconds": round(seconds, 1), **storm.came}
    print(json.dumps({**said, "per second": round(storm.came["rings"] / seconds)}))


if __name__ == "__main__":
    main()
