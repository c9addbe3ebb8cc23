# SPDX-License-Identifier: Apache-2.0
"""Mistakes about INVALIDATE at a bad moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import by, in_words, mutant, patch
from virtiova.addr import PAGE_MASK, UVA, Access
from virtiova.dma.intervals import Interval
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss, Span
from virtiova.serve.events import Event, IotlbInvalidated, Refused
from virtiova.serve.host import Host
from virtiova.serve.misses import Misses
from virtiova.serve.rounds import Rounds
from virtiova.wire.vhost_user import IotlbMessage

LAZY_SECONDS = 0.003


@mutant("invalidate-while-missing")
def takes_the_answer_for_a_stale_one() -> None:
    """A page that was invalidated while it was asked for: what is said of it later must be old."""
    in_words()
    stale: set[int] = set()
    asked: set[int] = set()

    def ask(made: Callable[..., list[bytes]]) -> Callable[..., list[bytes]]:
        def asking(self: Misses, wants: Any, now: float) -> list[bytes]:
            wants = list(wants)
            asked.update(page for page, _ in wants)
            return made(self, wants, now)

        return asking

    def invalidate(made: Callable[[Iotlb, int, int], int]) -> Callable[[Iotlb, int, int], int]:
        def invalidating(self: Iotlb, iova: int, size: int) -> int:
            stale.update(page for page in asked if iova <= page < iova + size)
            return made(self, iova, size)

        return invalidating

    def update(made: Callable[..., None]) -> Callable[..., None]:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            if iova & ~PAGE_MASK not in stale:
                asked.discard(iova & ~PAGE_MASK)
                made(self, iova, size, uva, access)

        return updating

    patch(Misses, "ask", ask)
    patch(Iotlb, "invalidate", invalidate)
    patch(Iotlb, "update", update)


@mutant("invalidate-between")
def invalidates_once_the_batch_is_done() -> None:
    """While there is something begun, an INVALIDATE is acknowledged and put aside."""
    in_words()
    later: list[IotlbMessage] = []

    def perform(made: Callable[[Host, Event], bool]) -> Callable[[Host, Event], bool]:
        def performing(self: Host, event: Event) -> bool:
            if isinstance(event, IotlbInvalidated) and any(ring.parked for ring in self.rings):
                later.append(event.message)
                return False
            return made(self, event)

        return performing

    def work(made: Callable[..., bool]) -> Callable[..., bool]:
        def working(self: Any, *, arm: bool = True) -> bool:
            more = made(self, arm=arm)
            if not any(ring.parked for ring in self.rings):
                for message in later:
                    self._ground.iotlb.invalidate(message.iova, message.size)
                later.clear()
            return more

        return working

    patch(Host, "_perform", perform)
    patch(Rounds, "work", work)


@mutant("invalidate-under-load")
def invalidates_a_little_later() -> None:
    """What was translated just now is good for a moment more."""
    old: list[tuple[float, Interval]] = []

    def invalidate(made: Callable[[Iotlb, int, int], int]) -> Callable[[Iotlb, int, int], int]:
        def invalidating(self: Iotlb, iova: int, size: int) -> int:
            entry = self._map.find(iova)
            if entry is not None:
                old[:] = [(time.monotonic() + LAZY_SECONDS, entry)]
            return made(self, iova, size)

        return invalidating

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        for until, entry in old:
            if time.monotonic() < until and entry.start <= address and address + length <= entry.end:
                return (Span(entry.target + (address - entry.start), length),)  # type: ignore[arg-type]
        return host.iotlb.lookup(address, length, access)

    by(lookup)
    patch(Iotlb, "invalidate", invalidate)


@mutant("acknowledgements-late")
def answers_once_for_several() -> None:
    """INVALIDATEs that come one right after the other get one answer."""
    in_words()
    last = [0.0]

    def handle(made: Callable[[Host, Event | Refused], None]) -> Callable[[Host, Event | Refused], None]:
        def handling(self: Host, event: Event | Refused) -> None:
            if not isinstance(event, IotlbInvalidated):
                made(self, event)
                return
            if time.monotonic() - last[0] < LAZY_SECONDS:
                self._perform(event)
            else:
                made(self, event)
            last[0] = time.monotonic()

        return handling

    patch(Host, "handle", handle)
