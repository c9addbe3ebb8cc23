# SPDX-License-Identifier: Apache-2.0
"""Requests that a device in Python handles, for callgrind to count. Run by tools/instructions.py.

Usage: python_requests.py MARKS, the library of ``tools/native/marks.c``. A request is the way through a host, from the
kick to the used ring, without sockets: 16 bytes are read and a page is written, by two calls of a chain. Without
callgrind it runs as well, and counts nothing.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import partial

import serve_kit
from serve_kit import DATA, HEADER, PAGE, WITH_BIT, FrontEnd
from virtiova.device.rng import Rng
from virtiova.ring.chain import Chain

CHAINS = 32
TURNS = 4


class Handler(Rng):
    """The least that a device does with a request."""

    def __init__(self) -> None:
        super().__init__(bytes)
        self.page = b"\x5a" * PAGE
        self.handled = 0

    def handle(self, queue: int, chain: Chain) -> None:
        chain.read(16)
        chain.write(self.page)
        self.handled += 1


def offer(end: FrontEnd, count: int) -> None:
    for number in range(count):
        buffers = (end.dma(HEADER), 16, False), (end.dma(DATA + number % 8 * PAGE), PAGE, True)
        end.offer(*buffers, head=2 * number, kick=False)
    end.host.rounds.kicked(0)


def main() -> None:
    marks = ctypes.CDLL(sys.argv[1])
    serve_kit.SIZE = 2 * CHAINS
    device = Handler()
    # Its work is done at times that depend on all that came before.
    gc.disable()

    def counted(name: str, times: int, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
        for turn in range(TURNS + 8):
            before()
            # The first turns are for Python to learn which types it has to do with.
            if turn == 8:
                marks.vv_begin()
            if turn >= 8:
                marks.vv_toggle()
            work()
            if turn >= 8:
                marks.vv_toggle()
        marks.vv_done(f"{name}/{times * TURNS}".encode())

    with FrontEnd(device) as end:
        end.negotiate(WITH_BIT)
        end.start()
        offer(end, CHAINS)
        end.serve()
        counted("nothing", 1, lambda: None)
        for count in (1, CHAINS):
            name = f"python: a request handled, {count} at a time"
            counted(name, count, end.host.rounds.work, partial(offer, end, count))
        done = CHAINS + (TURNS + 8) * (1 + CHAINS)
        if (device.handled, end.used()) != (done, done & 0xFFFF) or end.get(DATA, PAGE) != device.page:
            raise SystemExit(f"{device.handled} requests were handled, wanted {done}")


if __name__ == "__main__":
    main()
