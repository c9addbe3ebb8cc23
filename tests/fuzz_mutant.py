# SPDX-License-Identifier: Apache-2.0
"""``fuzz_mutant.py NAME ARGUMENTS...``: ``virtiova ARGUMENTS...`` with a mistake in it that a fuzzer is to find."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from mutant_kit import in_python, patch
from virtiova.cli.main import main
from virtiova.dma.iotlb import Iotlb
from virtiova.ring.ends import Gathering
from virtiova.serve.host import Host
from virtiova.serve.rings import Ring
from virtiova.serve.session import Session


def crash() -> None:
    """A descriptor of more than 2 GiB overflows an integer somewhere."""
    in_python()

    def adding(add: Callable[..., None]) -> Callable[..., None]:
        def added(self: Any, where: int, address: int, length: int, flags: int) -> None:
            if length >> 31:
                os.kill(os.getpid(), signal.SIGSEGV)
            add(self, where, address, length, flags)

        return added

    patch(Gathering, "add", adding)


def hang() -> None:
    """A ring of no entries is waited for."""

    def judged(judge: Callable[..., None]) -> Callable[..., None]:
        def sized(self: Session, size: int) -> None:
            while size == 0:
                time.sleep(1)
            judge(self, size)

        return sized

    patch(Session, "_ring_of", judged)


def stray() -> None:
    """An invalidation is acknowledged, and not heard."""
    in_python()
    patch(Iotlb, "invalidate", lambda _: lambda self, iova, size: 0)
    patch(Iotlb, "take", lambda _: lambda self, messages: (0, 0, 0, 0))


def lost() -> None:
    """A ring that stops while it waits for a page forgets the request that it had taken."""

    def stopping(stop: Callable[..., int]) -> Callable[..., int]:
        def stopped(self: Ring) -> int:
            waiting = self.parked and self.kicked is False
            base = stop(self)
            self.base = base + 1 & 0xFFFF if waiting else base
            return self.base

        return stopped

    patch(Ring, "stop", stopping)


def asleep() -> None:
    """A ring that waits for a page is not woken by it if something was taken back meanwhile."""
    deaf: set[int] = set()

    def changed(made: Callable[..., None]) -> Callable[..., None]:
        def heard(self: Any, said: Any) -> None:
            for ring in self.rings:
                if ring.parked and said.kind.name == "INVALIDATE":
                    deaf.add(id(ring))
            made(self, said)

        return heard

    in_python()
    patch(Iotlb, "take", lambda _: lambda self, messages: (0, 0, 0, 0))
    patch(Host, "_changed", changed)
    patch(Ring, "again", lambda made: lambda self: None if id(self) in deaf else made(self))


MISTAKES: Final[dict[str, tuple[str, Callable[[], None]]]] = {
    "crash": ("crash", crash),
    "hang": ("hang", hang),
    "stray": ("stray", stray),
    "lost": ("lost", asleep),
}
"""What is to be found, and what plants it."""

if __name__ == "__main__":
    MISTAKES[sys.argv[1]][1]()
    sys.exit(main(sys.argv[2:]))
