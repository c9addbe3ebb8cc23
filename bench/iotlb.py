# SPDX-License-Identifier: Apache-2.0
"""What a front end's answers cost: an update and its invalidation, and an access, with 1 to 60,000 others there.

Usage: iotlb.py [--rounds N] [--json]. The machine may be shared and noisy: rounds are by turns, and only the ratios
mean something. Every mapping is 4 KiB, 8 KiB from the next one, and leads to one of 16 pages of memory: that these
are not in the processor's cache is not to be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

from virtiova.addr import GPA, UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import MediatedSpace

PAGE = 0x1000
PAGES = 16
RESIDENTS = (1, 2000, 60_000)
FIRST = 1 << 32
_BATCH = 2000


class Bench:
    """One table with ``residents`` mappings, and what is measured of it."""

    def __init__(self, ram: RegionRam, residents: int) -> None:
        rng = random.Random(residents)
        self.iotlb = Iotlb(ram)
        for at in range(residents):
            self.iotlb.update(FIRST + at * 2 * PAGE, PAGE, UVA(at % PAGES * PAGE), Access.RW)
        # Between two that are there, anywhere among them.
        self.holes = [FIRST + (rng.randrange(residents) * 2 + 1) * PAGE for _ in range(_BATCH)]
        self.there = [FIRST + rng.randrange(residents) * 2 * PAGE + 0x310 for _ in range(_BATCH)]
        self.native = CachedSpace(ram, self.iotlb)
        self.intervals = MediatedSpace(ram, self.iotlb)

    def pair(self) -> None:
        """UPDATE and INVALIDATE of one page."""
        update, invalidate = self.iotlb.update, self.iotlb.invalidate
        for iova in self.holes:
            update(iova, PAGE, UVA(0), Access.RW)
            invalidate(iova, PAGE)

    def lookup(self) -> None:
        """The spans of 64 bytes, from the intervals."""
        lookup = self.iotlb.lookup
        for iova in self.there:
            lookup(iova, 64, Access.READ)

    def read_intervals(self) -> None:
        """64 bytes, place by the intervals."""
        read = self.intervals.read
        for iova in self.there:
            read(iova, 64)

    def read_native(self) -> None:
        """64 bytes, place by the native table."""
        read = self.native.read
        for iova in self.there:
            read(iova, 64)


def timed(work: Callable[[], object]) -> float:
    """Nanoseconds of processor time for each of the batch: others on the machine do not count."""
    start = time.process_time()
    work()
    return (time.process_time() - start) / _BATCH * 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    fd = os.memfd_create("bench")
    os.ftruncate(fd, PAGES * PAGE)
    ram = RegionRam()
    ram.add(GPA(0), PAGES * PAGE, UVA(0), 0, fd)
    os.close(fd)
    benches = {residents: Bench(ram, residents) for residents in RESIDENTS}
    works = ("pair", "lookup", "read_intervals", "read_native")
    samples: dict[str, dict[int, list[float]]] = {work: {each: [] for each in RESIDENTS} for work in works}
    for turn in range(options.rounds + 1):
        for work in works:
            for residents in RESIDENTS:
                took = timed(getattr(benches[residents], work))
                # The first round fills caches, ours too.
                if turn:
                    samples[work][residents].append(took)
    if options.json:
        print(json.dumps({"schema": "virtiova/cost/1", "unit": "ns", "samples": samples}))
        return
    print("ns, the least of all rounds, and the median of the ratios to the row of 1 mapping in the same round\n")
    for work in works:
        alone = samples[work][RESIDENTS[0]]
        for residents in RESIDENTS:
            ratio = statistics.median(a / b for a, b in zip(samples[work][residents], alone, strict=True))
            print(f"{work:<16}{residents:>7} mappings {min(samples[work][residents]):8.0f} ns {ratio:6.2f} x")


if __name__ == "__main__":
    main()
