# SPDX-License-Identifier: Apache-2.0
"""Cases on INVALIDATE at a bad moment: while a page is asked for, between two requests, and under load."""

from __future__ import annotations

import time
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, Going, up, watched
from virtiova.conformance.stand import Stand
from virtiova.conformance.timing import ask_for
from virtiova.driver.base import Request
from virtiova.machine.vhost_user.asked import Pending
from virtiova.probe.canary import paint
from virtiova.probe.rig import LENGTH
from virtiova.wire.vhost_user import ProtocolFeature

_INVALIDATE: Final = vhost_user(
    "IOMMU support", "an INVALIDATE takes the entries of its range back, and is answered with zero once that is done"
)
_SECONDS: Final = 1.0
"""How long an acknowledgement may take: a request that is under way may have to end first."""
_ROUNDS: Final = 20
_AFTER: Final = 0.002
"""Seconds for which an old page is looked at, once it was taken back."""
_DEPTH: Final = 4
_BURST: Final = 64
_UNREAD: Final = 0.03


def _acknowledged(stand: Stand, pending: Pending | None, what: str) -> None:
    if pending is not None:
        stand.front.wait(pending, _SECONDS)
        if not pending.ok:
            stand.fail(f"{what} was answered with a failure")


@case(
    "invalidate-while-missing",
    "an INVALIDATE of a page that is being asked for is acknowledged, and the answer is used",
    _INVALIDATE,
    why="A guest unmaps and maps a page while the back end waits for it. Who waits with the acknowledgement, or drops "
    "what comes afterwards, has stopped for good.",
    fix="An INVALIDATE takes away what is there; a question that is open stays open, or is asked again.",
)
def invalidate_while_missing(stand: Stand) -> str:
    """A page is asked for; before the answer it is invalidated; then comes the answer."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    _acknowledged(stand, stand.front.post_invalidate(page.addr, PAGE_SIZE), "INVALIDATE of a page that is asked for")
    going.must_not_land("a page that is asked for, before the answer")
    asked.answer()
    stand.release()
    going.must_land("A", "a page that was invalidated while it was asked for")
    return "acknowledged at once, and the answer used"


@case(
    "invalidate-between",
    "an INVALIDATE counts for requests that lie in the ring already",
    _INVALIDATE,
    why="Requests are fetched in batches, and looked up ahead. What was found ahead is out of date once the page was "
    "invalidated, although no request was under way yet.",
    fix="Look addresses up when they are used, or throw away what was looked up ahead with every INVALIDATE.",
)
def invalidate_between(stand: Stand) -> str:
    """Two requests in the ring: the first waits for a page, the second one's is known. That one is invalidated, and
    leads elsewhere; then the first one's answer comes."""
    up(stand)
    x, page = stand.data, stand.ops.alloc(PAGE_SIZE)
    pages = {"A": int(x.gpa("A")), "B": int(x.gpa("B")), "C": int(stand.ops.spare("C"))}
    first, asked = ask_for(stand, page)
    second = Going(stand, [(x.addr, LENGTH)], watched(stand, pages))
    stand.front.barrier()
    second.must_not_land("a request behind one that waits, before any answer", "BC")
    early = second.landed()
    stand.tables.map(IOVA(x.addr), GPA(pages["C"]), PAGE_SIZE)
    stand.tables.invalidate()
    # It may have begun with it meanwhile: by the old page, which it could use until it had acknowledged.
    early = early or second.landed() or ("A" if second.done(0) else "")
    second.look(watched(stand, pages))
    asked.answer()
    stand.release()
    first.must_land("A", "the first of two requests")
    if early:
        return "the second request did not wait for the first"
    second.must_land("C", "the second of two requests, whose page was invalidated before it began")
    return "the first in page A, the second in page C"


class _Load:
    """Requests to one page, a few at a time, one after the other."""

    def __init__(self, stand: Stand, iova: int) -> None:
        self._stand = stand
        self._iova = iova
        self._under_way: list[Request] = []
        self.done = 0

    def go_on(self, *, more: bool = True) -> None:
        """Take what is done out of the ring, and publish as many anew."""
        if self._under_way and self._under_way[0].done():
            while self._under_way and self._under_way[0].queue.ring.poll() is not None:
                del self._under_way[0]
                self.done += 1
        while more and len(self._under_way) < _DEPTH:
            request = self._stand.driver.make_device_write([(self._iova, LENGTH)])
            request.go()
            self._under_way.append(request)

    def until(self, count: int) -> bool:
        """Go on until so many are done."""

        def enough() -> bool:
            self.go_on()
            return self.done >= count

        return self._stand.machine.wait(enough, _SECONDS)

    def end(self) -> int:
        """No more; how many were never done."""

        def over() -> bool:
            self.go_on(more=False)
            return not self._under_way

        self._stand.machine.wait(over, _SECONDS)
        return len(self._under_way)


@case(
    "invalidate-under-load",
    "under load, too, no byte arrives in the old page once the INVALIDATE is acknowledged",
    _INVALIDATE,
    why="The moment between the look-up and the write is short, and with many requests somebody is always in it. An "
    "acknowledgement that does not wait for him is a promise that is broken a few times a day.",
    fix="Take the entry away, wait until all that were found through it are done or given up, and only then answer.",
)
def invalidate_under_load(stand: Stand) -> str:
    """Requests to X without a pause. X leads to two pages by turns: each time it is invalidated, the old page is
    painted anew after the acknowledgement, and looked at a while later."""
    stand.translating(size=64)
    x = stand.data
    pages = [int(x.gpa("A")), int(stand.ops.spare("C"))]
    load = _Load(stand, x.addr)
    ram = stand.machine.ram
    for number in range(_ROUNDS):
        old, new = pages[number % 2], pages[(number + 1) % 2]
        if not load.until(load.done + 2):
            stand.fail(f"round {number}: requests are not done any more")
        stand.tables.map(IOVA(x.addr), GPA(new), PAGE_SIZE)
        pending = stand.front.post_invalidate(x.addr, PAGE_SIZE)
        deadline = time.monotonic() + _SECONDS
        while pending is not None and not pending.done and time.monotonic() < deadline:
            load.go_on()
            stand.front.pump(0.0)
        _acknowledged(stand, pending, "INVALIDATE under load")
        text = paint("O", old, LENGTH)
        ram.write(GPA(old), text)
        end = time.monotonic() + _AFTER
        while time.monotonic() < end:
            load.go_on()
            stand.front.pump(0.0002)
        if ram.read(GPA(old), LENGTH) != text:
            stand.fail(f"round {number}: bytes in the old page after the INVALIDATE was acknowledged")
    if left := load.end():
        stand.fail(f"{left} of {load.done + left} requests were never done")
    return f"{_ROUNDS} times, {load.done} requests"


@case(
    "acknowledgements-late",
    "each IOTLB message is acknowledged by itself, also if nobody reads for a while",
    vhost_user("VHOST_USER_IOTLB_MSG", "the back end acknowledges each request, with zero for success"),
    why="Front ends count answers: one too few, and the next answer is taken for another question's.",
    fix="Queue one answer for each message that wants one, in order, and send them as the socket takes them.",
)
def acknowledgements_late(stand: Stand) -> str:
    """64 UPDATEs and 64 INVALIDATEs are sent without reading anything; the answers are counted 30 ms later."""
    up(stand)
    stand.need(ProtocolFeature.REPLY_ACK)
    uva = stand.memory.uva(stand.ops.spare("P"))
    pending: list[Pending | None] = []
    for number in range(_BURST):
        iova = FAR + 2 * number * PAGE_SIZE
        pending.append(stand.front.post_update(iova, PAGE_SIZE, uva, Access.RW))
        pending.append(stand.front.post_invalidate(iova, PAGE_SIZE))
    time.sleep(_UNREAD)
    for number, each in enumerate(pending):
        _acknowledged(stand, each, f"message {number + 1} of {len(pending)}")
    stand.must_land(stand.write(), "A", "X, after answers that were read late")
    return f"{len(pending)} answers"
