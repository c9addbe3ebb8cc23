# SPDX-License-Identifier: Apache-2.0
"""What bit 33 costs a back end: reads of 4 KiB from `virtiova serve blk` on memory, asked for by our own front end.

Usage: serve.py [--rounds N] [--json] [--beside DIRECTORY]. With the bit and without it by turns, each a process of its
own; DIRECTORY is another source tree (its ``src``), whose back ends take turns with those of this one. The machine may
be shared and noisy: only the ratios mean something. Every request has three descriptors and a page of its own, the
driver does nothing but move an index, and all pages are known to the back end before the clock starts. Beside other
people's back ends, and with a front end that is not Python: `virtiova bench blk`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from virtiova.addr import DmaAddr
from virtiova.driver.base import Queue
from virtiova.driver.negotiate import begin, driver_ok, finish
from virtiova.driver.open import dma_ops
from virtiova.features import Feature, mask
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.ring.ends import Segment
from virtiova.ring.layout import SplitLayout

PAGE = 4096
REQUESTS = 64
"""At a time: of a ring of 256 entries."""
_STATUS = 32
"""Where a request's status is, after its header."""
_PENDING = b"\xee"
_TURNS = 40
"""Batches that one sample is made of."""
_SECONDS = 30.0


class Disk:
    """One back end, and a driver with `REQUESTS` reads in its ring."""

    def __init__(self, machine: VhostUserMachine, *, bit: bool) -> None:
        self._machine = machine
        process = machine.running.process
        assert process is not None
        self._pid = process.pid
        assert machine.transport is not None
        wanted = mask([Feature.VERSION_1] + [Feature.ACCESS_PLATFORM] * bit)
        negotiated = finish(machine.transport, begin(machine.transport), wanted)
        machine.iommu.enable()
        ops = dma_ops(machine, negotiated)
        self._queue = Queue(machine.transport, 0, ops, negotiated, size=256)
        self._queue.enable()
        driver_ok(machine.transport)
        requests = [(ops.alloc(PAGE), ops.alloc(PAGE)) for _ in range(REQUESTS)]
        for number, (header, data) in enumerate(requests):
            header.write(0, struct.pack("<IIQ", 0, 0, number * 8))
            header.write(_STATUS, _PENDING)
            data.write(0, _PENDING * PAGE)
            chain = (header.addr, 16, False), (data.addr, PAGE, True), (header.addr + _STATUS, 1, True)
            self._queue.add([Segment(DmaAddr(address), length, write) for address, length, write in chain])
        self._queue.ring.publish()
        self._done = 0
        # What is in the available ring is right in every batch: there is room for a whole number of them.
        self.batch()
        if any(header.read(_STATUS, 1) + data.read(0, PAGE) != bytes(1 + PAGE) for header, data in requests):
            raise SystemExit("the back end has not read what is on its disk")

    def batch(self) -> None:
        """All requests once more."""
        region, layout = self._queue.region, self._queue.ring.layout
        assert isinstance(layout, SplitLayout)  # no other is taken unless it is asked for
        if not self._done:
            entries = region.read(layout.avail + 4, 2 * REQUESTS)
            region.write(layout.avail + 4, entries * (layout.size // REQUESTS))
        self._done += REQUESTS
        region.store16(layout.avail + 2, self._done & 0xFFFF)
        self._queue.kick()
        wanted = self._done & 0xFFFF
        if not self._machine.wait(lambda: region.load16(layout.used + 2) == wanted, _SECONDS):
            raise SystemExit("the back end has stopped")

    def sample(self) -> tuple[float, float]:
        """Requests a second, and requests in a second of the back end's processor time: others do not count."""
        start, before = time.perf_counter(), self._processor()
        for _ in range(_TURNS):
            self.batch()
        count = _TURNS * REQUESTS
        return count / (time.perf_counter() - start), count / (self._processor() - before)

    def _processor(self) -> float:
        # Of all threads: a queue's requests are its worker's.
        tasks = Path(f"/proc/{self._pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextlib.contextmanager
def disk(source: str, *, bit: bool) -> Iterator[Disk]:
    """A back end of the program in ``source``."""
    command = f"env PYTHONPATH={source} {sys.executable} -m virtiova serve blk --memory 1M -q --fd {{fd}}"
    with VhostUserMachine(BackEnd(spawn=command, kind="blk")) as machine:
        yield Disk(machine, bit=bit)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--beside", metavar="DIRECTORY")
    options = parser.parse_args()
    here = str(Path(__file__).parent.parent / "src")
    sources = {"": here} | ({"beside, ": os.path.abspath(options.beside)} if options.beside else {})
    samples: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        disks = {
            f"{name}bit {'on' if bit else 'off'}": stack.enter_context(disk(source, bit=bit))
            for name, source in sources.items()
            for bit in (True, False)
        }
        for _ in range(options.rounds):
            for name, each in disks.items():
                alone, processor = each.sample()
                samples.setdefault(name, []).append(alone)
                samples.setdefault(f"{name}, processor", []).append(processor)
    if options.json:
        print(json.dumps({"schema": "virtiova/cost/1", "unit": "requests/s", "samples": samples}))
        return
    print("requests/s, by the clock and by the back end's processor time: median (least..most), and the ratio of the")
    print("medians to the first row of the same kind\n")
    medians = {name: statistics.median(found) for name, found in samples.items()}
    for name, found in samples.items():
        first = medians["bit on, processor" if name.endswith("processor") else "bit on"]
        print(f"{name:<28} {medians[name]:8.0f} ({min(found):.0f}..{max(found):.0f}) {medians[name] / first:6.2f} x")


if __name__ == "__main__":
    main()
