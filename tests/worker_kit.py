# SPDX-License-Identifier: Apache-2.0
"""A front end before a disk whose queues have threads of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Self

from serve_kit import FrontEnd
from virtiova.device.blk import SECTOR, Bit, Blk
from virtiova.serve.crew import Crew, Spin
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Request

SECTORS = 64
FLUSH = 1 << Bit.FLUSH
IMAGE = b"".join(bytes([n % 251 + 1]) * SECTOR for n in range(SECTORS))
SECONDS = 5.0


class Kit(FrontEnd):
    """A front end before a disk with workers, and kicks of its own."""

    def __init__(self, device: Blk, spin: Spin | None = None) -> None:
        self.crew = Crew(device, spin or Spin(0.00005), lambda line: self.said.append(line))  # noqa: PLW0108 - there is none yet
        super().__init__(device, crew=self.crew)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(device.queues)]
        self._fds += self.kicks

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.crew.close()

    def begin(self, features: int, index: int = 0) -> Self:
        """A ring that its worker has."""
        self.negotiate(features | FLUSH)
        self.start(index)
        self.send(Request.SET_VRING_KICK, wire.encode_vring_fd(index, True), (self.kicks[index],))
        if self.bit:
            for page in range(0, 0x40000, 0x1000):
                self.map(page)
        self.until(lambda: self.lent(index))
        return self

    def lent(self, index: int = 0) -> bool:
        return self.host.rings[index].lent

    def until(self, done: Callable[[], bool]) -> None:
        """Do the main thread's part until then."""
        end = time.monotonic() + SECONDS
        while not done():
            self.host.rounds.work()
            assert time.monotonic() < end, self.said
            time.sleep(0)

    def kick(self, index: int = 0) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def tally(self, index: int = 0) -> dict[str, int]:
        return self.crew.workers[index].tally
