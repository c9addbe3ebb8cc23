# SPDX-License-Identifier: Apache-2.0
"""Random rings against a network device's engines, beside the same rings against the same device in Python.

Usage: net_storm.py [--rings N] [--seed N] [--scribble]. After each ring both memories, what was sent and
what was dropped must be the same; with --scribble another process changes the memory meanwhile, and nothing is
compared: then it is for the sanitizers (sanitize.py).
"""

from __future__ import annotations

import argparse
import collections
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise

from ring_storm import ONLY_READ, ONLY_WRITE, PAGE, PAGES, RING, SHARED, Storm, scribbler
from virtiova import _core
from virtiova.device.host import give, serve_queue, take
from virtiova.device.net import RX, TX, Net
from virtiova.dma.space import AddressSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import Feature
from virtiova.ring.layout import Desc, SplitLayout
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.wires import FrameWire

BITS = [0, 1 << Feature.VERSION_1, 1 << 15, 1 << Feature.VERSION_1 | 1 << 15]
"""Neither, a header of 12 bytes, and frames over several buffers."""
LENGTHS = (0, 9, 10, 11, 12, 13, 28, 60, 72, 73, 76, 77, 1500, 1526, PAGE, PAGE + 1, 2 * PAGE)


class NetStorm(Storm):
    """A stream of rings from ``seed``, for a network device whose wire is a pair of sockets; natively if ``native``."""

    def __init__(self, seed: int, *, native: bool) -> None:
        super().__init__(seed)
        self.native = native
        ours, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.other.setblocking(False)
        self.wire = FrameWire(ours.detach(), _core.Wire.SOCKET)
        self.net = self.wire.connect(Net(self.wire))
        self.sent: list[bytes] = []
        self.told = False
        self.still = True
        """Nobody else changes the memory."""
        # What lies in the used ring while a request is done depends on how many are given back at a time.
        self.pool = [
            desc for desc in self.pool if not RING - PAGE < int.from_bytes(desc[:8], "little") < RING + 2 * PAGE
        ]

    def close(self) -> None:
        self.wire.close()
        self.other.close()

    def plain(self, layout: SplitLayout, where: int, queue: int, start: int) -> None:
        """A ring as drivers lay it: chains that end, of buffers in memory, most of them of one."""
        rng, size = self.rng, layout.size
        table: list[bytes] = []
        heads: list[int] = []
        while len(table) < size:
            parts = min(rng.choice((1, 1, 1, 1, 2, 3)), size - len(table))
            heads.append(len(table))
            for part in range(parts):
                place = rng.choice(
                    (SHARED, SHARED, SHARED + 64, SHARED + PAGE - 40, ONLY_WRITE if queue == RX else ONLY_READ)
                )
                flags = (2 if queue == RX else 0) | (1 if part + 1 < parts else 0)
                table.append(Desc(place, rng.choice(LENGTHS), flags, len(table) + 1).pack())
        rng.shuffle(heads)
        count = rng.randrange(len(heads) + 1)
        turn = start % size
        heads = (heads + [0] * size)[:size]
        heads = heads[-turn:] + heads[:-turn] if turn else heads
        avail = (0).to_bytes(2, "little") + (start + count & 0xFFFF).to_bytes(2, "little")
        self.put(
            self.spaces[0], where, b"".join(table) + avail + b"".join(head.to_bytes(2, "little") for head in heads)
        )

    def ring(self) -> int:
        rng, space, net = self.rng, self.spaces[0], self.net
        layout = SplitLayout(rng.choice((1, 2, 4, 8, 8, 64)))
        where = RING + rng.choice((0, 0, 0, PAGE - 16, PAGE - 64))
        queue, bits, start = rng.choice((RX, TX)), rng.getrandbits(2), rng.choice((0, 5, 0xFFFE))
        net.accepted = rng.choice(BITS)
        self.told = False
        for page in (SHARED, SHARED + PAGE):
            self.put(space, page, rng.randbytes(PAGE))
        if rng.random() < 0.6:
            self.plain(layout, where, queue, start)
        else:
            self.lay(space, layout, where, start)
        for length in rng.choices(LENGTHS[1:], k=rng.randrange(6) if queue == RX else 0):
            net.deliver(rng.randbytes(length))
        used = bytes(2) + start.to_bytes(2, "little") + bytes(2 + 8 * layout.size)
        self.put(space, where + layout.used, used)
        with suppress(AccessError):
            self.serve(space, layout, where, queue, bits, start)
        net.reset()
        self.sent = list(self.arrived())
        return 1

    def arrived(self) -> Iterator[bytes]:
        with suppress(BlockingIOError):
            while True:
                # An empty frame is one, too: only nothing at all is none.
                yield self.other.recv(1 << 17)

    def serve(self, space: AddressSpace, layout: SplitLayout, where: int, queue: int, bits: int, start: int) -> None:
        parts = where, where + layout.avail, where + layout.used
        event_idx, indirect = bool(bits & 1), bool(bits & 2)
        drain = _core.Drain(self.iotlb.radix, *parts, layout.size, event_idx=event_idx, indirect=indirect)

        drain.state = start, start, 0

        def python() -> SplitDevice:
            """The same ring's end in Python, where the native one stands."""
            end = SplitDevice(space, *parts, layout, event_idx=event_idx, indirect=indirect)
            end.state = drain.state
            return end

        try:
            more = not self.native or self.natively(queue, python, drain)
            split = python()
            if more:
                served = serve_queue(self.net, queue, split)
                assert not (self.native and self.still and served.chains), "the engine had said that there is nothing"
            self.told = split.needs_interrupt()
        except AccessError:
            self.came["out of reach"] += 1
        except ProtocolError as problem:
            self.came[f"means nothing: {str(problem).split()[0]}"] += 1

    def natively(self, queue: int, python: Callable[[], SplitDevice], drain: _core.Drain) -> bool:
        """The engine, and Python for what it does not do. False: it waits for the outside."""
        engine = self.net.engine(queue)
        assert engine is not None
        if not self.net.pending(queue):
            return True
        python().disable_notify()
        while True:
            outcome, chains, _, _ = engine.step(drain, 5)
            self.came["native"] += chains
            if outcome == _core.HELP:
                self.came["helped"] += 1
                split = python()
                found = take(self.net, queue, split)
                if found:
                    give(self.net, queue, split, found)
                    drain.state = split.state
                if found == ():
                    return True
            elif outcome != _core.GOT:
                return outcome != _core.WAIT
            if not self.net.pending(queue):
                return False


def compare(one: NetStorm, other: NetStorm) -> None:
    """Two storms after the same ring."""
    for start in one.arena.starts.values():
        # Not the pages between: nobody may look at those.
        block = slice(start, start + PAGES * PAGE)
        assert one.arena.memory[block] == other.arena.memory[block]
    assert (one.sent, one.net.dropped, one.wire.lost) == (other.sent, other.net.dropped, other.wire.lost)
    assert one.told == other.told


def both(seed: int, rings: int) -> collections.Counter[str]:
    """So many rings through both; what came of the native one's."""
    storms = [NetStorm(seed, native=native) for native in (False, True)]
    try:
        for at in range(rings):
            for storm in storms:
                if at % 16 == 0:
                    storm.mappings()
                storm.ring()
            for one, other in pairwise(storms):
                compare(one, other)
        return storms[1].came
    finally:
        for storm in storms:
            storm.close()


def main() -> None:
    """Run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scribble", action="store_true", help="change memory all the time, from another process")
    options = parser.parse_args()
    if not options.scribble:
        print(json.dumps({"rings": options.rings, **both(options.seed, options.rings)}))
        return
    storm = NetStorm(options.seed, native=True)
    storm.still = False
    with scribbler(storm):
        for at in range(options.rings):
            if at % 16 == 0:
                storm.mappings()
            storm.ring()
    print(json.dumps({"rings": options.rings, "poisoned": storm.arena.poisoned, **storm.came}))


if __name__ == "__main__":
    main()
