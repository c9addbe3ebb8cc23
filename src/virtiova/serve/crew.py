# SPDX-License-Identifier: Apache-2.0
"""A thread for each queue of a device that is served natively, and the gate that keeps them out of what is changed.

A ring is lent to its worker while nothing about it is odd, and comes back when the worker asks for help, or when a
message of the front end concerns more than translations. Who has the ring is the only one who touches it. Threads
are made before anything is given up, and live as long as the server: a connection only borrows them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.serve.counters import Counters

AUTO_SECONDS: Final = 0.0002
"""How long work is looked out for at most, where nobody says otherwise: a few times what it takes to be woken up."""
MOST_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Spin:
    """How long to look out for work before sleeping. ``fixed``: always so long, else as long as has been of use."""

    seconds: float = AUTO_SECONDS
    fixed: bool = False


class Crew:
    """The workers of ``device``. One for a queue, for as many queues as the system has threads for."""

    def __init__(self, device: Device, spin: Spin, say: Callable[[str], None]) -> None:
        self.gate = _core.Gate()
        self.help = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when a worker has asked for help."""
        self.workers: list[_core.Worker] = []
        self._counted: list[dict[str, int]] = []
        try:
            for queue in range(device.queues):
                # What it opens it has to open now.
                device.engine(queue)
                worker = _core.Worker(self.gate, self.help)
                self.workers.append(worker)
                worker.spin(int(spin.seconds * 1e9), spin.fixed)
        except OSError as error:
            say(f"{len(self.workers)} of {device.queues} queues have a thread of their own: {error.strerror}")
        self._counted = [worker.tally for worker in self.workers]

    @staticmethod
    def of(device: Device, spin: Spin, say: Callable[[str], None]) -> Crew | None:
        """Workers for a device that has engines at all."""
        return Crew(device, spin, say) if device.native else None

    def heard(self) -> None:
        """Whoever asked is looked at next."""
        try:
            os.eventfd_read(self.help)
        except BlockingIOError:
            return

    def collect(self, counters: Counters) -> None:
        """Add what was done since the last time."""
        for at, worker in enumerate(self.workers):
            now, before = worker.tally, self._counted[at]
            self._counted[at] = now
            counters.requests += now["requests"] - before["requests"]
            counters.native += now["requests"] - before["requests"]
            counters.helps += now["helps"] - before["helps"]
            counters.bytes += now["bytes"] - before["bytes"]
            counters.kicks += now["kicks"] - before["kicks"]
            counters.calls += now["calls"] - before["calls"]

    def close(self) -> None:
        """End all threads. May be called more than once."""
        for worker in self.workers:
            worker.close()
        self.workers = []
        if self.help >= 0:
            os.close(self.help)
            self.help = -1
