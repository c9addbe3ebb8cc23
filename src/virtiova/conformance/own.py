# SPDX-License-Identifier: Apache-2.0
"""A request that is told from others: one that was given up may come back late, and is not taken for the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from virtiova.driver.base import Request
from virtiova.ring.ends import Used


@dataclass(frozen=True, slots=True)
class Own(Request):
    """``inner``, which is done once the device has used *it*, by its ``head``; others that come are taken out."""

    inner: Request
    head: int
    given: list[Used] = field(default_factory=list)

    def go(self) -> None:
        """Publish it, kick, and do what makes the device use it."""
        self.inner.go()

    def done(self) -> bool:
        """Has the device used it? It is taken out of the ring then."""
        while not self.given and self.inner.done():
            used = self.queue.ring.poll()
            if used is None:
                break
            if used.head == self.head:
                self.given.append(used)
            else:
                # A buffer that was given up is filled first by what comes from outside: this one needs its own.
                self.after()
        return bool(self.given)


def own(request: Request) -> Own:
    """A request that was made last, and is not published yet."""
    return Own(request.queue, request.after, request.arrived, request, request.queue.ring.newest)
