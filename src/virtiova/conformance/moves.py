# SPDX-License-Identifier: Apache-2.0
"""What cases on translations are made of: a request under way, mappings past the tables, pages of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.conformance.own import own
from virtiova.conformance.stand import MISS_SECONDS, Stand
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, Driver, Queue
from virtiova.machine.vhost_user.asked import Asked
from virtiova.probe.canary import Snapshot, Watch, paint
from virtiova.probe.rig import LENGTH

RING: Final = 16
"""Entries of the rings: room for requests that wait."""
FAR: Final = 0x40_0000_0000
"""From here on there is no memory, and no page of the driver's: addresses for mappings of one's own."""
HALF: Final = LENGTH // 2
WHILE: Final = 0.02
"""Seconds after which nothing more is expected of a device that cannot go on."""
_HELPED: Final = 0.08
"""Seconds for which a request is helped along. That is done a few times only, and it may be needed later."""
_PATIENT: Final = 0.3
"""Seconds that a device gets which may go on or not, as it reads the specification: more than a busy machine needs."""
_ALIVE_SECONDS: Final = 1.0
"""Seconds that an ordinary request gets before the device is reset."""


def up(stand: Stand) -> None:
    """Bit 33 accepted, the rings started, and one request that worked."""
    stand.translating(size=RING)


def watch(stand: Stand, page: str, gpa: int, length: int = LENGTH, role: str = "data") -> Watch:
    """Paint bytes of memory as ``page``, and watch them."""
    stand.machine.ram.write(GPA(gpa), paint(page, gpa, length))
    return Watch(role, page, gpa, length)


def watched(stand: Stand, pages: Mapping[str, int], length: int = LENGTH) -> list[Watch]:
    """The same for several, by their letters."""
    return [watch(stand, page, gpa, length) for page, gpa in pages.items()]


def where(stand: Stand, iova: int, pages: Mapping[str, int], what: str) -> str:
    """Let the device write to ``iova``, and say by its letter in which of ``pages`` the bytes are: exactly one. Fail if
    it is none, or not done."""
    going = Going(stand, [(iova, LENGTH)], watched(stand, pages))
    done = going.done()
    found = going.landed()
    if not done or len(found) != 1:
        stand.fail(f"{what}: the request was {'done' if done else 'not done'}, its bytes are in {found or 'no page'}")
    return found


def must_be(stand: Stand, iova: int, page: str, pages: Mapping[str, int], what: str) -> None:
    """Let the device write to ``iova``, and fail unless the bytes are in ``page``, and in none of the others."""
    found = where(stand, iova, pages, what)
    if found != page:
        stand.fail(f"{what}: its bytes are in page {found}, wanted {page}")


@dataclass(frozen=True, slots=True)
class Row:
    """A mapping past the tables: any size, any start."""

    iova: int
    size: int
    gpa: int
    allowed: Access = Access.RW


class Told:
    """Mappings that the back end is told of past the tables, of which the last one counts. Who asks for one of them is
    told once more; who asks for anything else gets what the tables say."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self.rows: list[Row] = []
        stand.front.on_miss = self.answer

    def tell(self, iova: int, size: int, gpa: int, allowed: Access = Access.RW) -> bool:
        """UPDATE, and remember it; whether that was acknowledged."""
        self.rows.insert(0, Row(iova, size, gpa, allowed))
        return self._stand.update(iova, size, gpa, allowed)

    def change(self, iova: int, size: int, gpa: int, allowed: Access = Access.RW) -> None:
        """From now on that counts, but nobody is told who does not ask."""
        self.rows.insert(0, Row(iova, size, gpa, allowed))

    def forget(self, iova: int, size: int) -> None:
        """Nothing counts any more that has bytes there."""
        self.rows = [row for row in self.rows if row.iova >= iova + size or iova >= row.iova + row.size]

    def find(self, iova: int) -> Row | None:
        """The last mapping that has bytes of that page: nobody is told to ask for single bytes."""
        page = iova & ~PAGE_MASK
        return next((row for row in self.rows if row.iova < page + PAGE_SIZE and page < row.iova + row.size), None)

    def answer(self, asked: Asked) -> None:
        """What is told to somebody who asks."""
        row = self.find(asked.iova)
        if row is None:
            asked.answer()
        elif asked.access.value & ~row.allowed.value:
            asked.reply(ok=False)
        else:
            give(self._stand, asked, row)


def give(stand: Stand, asked: Asked, row: Row, *, reply: bool = True) -> None:
    """Answer a miss by that mapping, whatever the tables say; without the ``reply`` by the UPDATE alone."""

    def acknowledged(payload: bytes) -> None:
        if reply:
            asked.reply(ok=not any(payload))

    stand.front.post_update(row.iova, row.size, stand.memory.uva(row.gpa), row.allowed, acknowledged)


class Going:
    """A request that is published, and looked at while it is under way."""

    def __init__(
        self,
        stand: Stand,
        buffers: Sequence[Buffer] | None = None,
        watches: Sequence[Watch] | None = None,
        *,
        table: DmaRegion | None = None,
        driver: Driver | None = None,
    ) -> None:
        painted = stand.paint_data() if watches is None else watches
        self._stand = stand
        self.request = own((driver or stand.driver).make_device_write(buffers or [(stand.data.addr, LENGTH)], table))
        self._before = Snapshot(stand.machine.ram, painted)
        self.request.go()

    def look(self, watches: Sequence[Watch]) -> None:
        """Look at these from now on, as they are now."""
        self._before = Snapshot(self._stand.machine.ram, watches)

    def miss(self, page: int, seconds: float = MISS_SECONDS) -> Asked | None:
        """The first miss in that page that waits, taken out; None if none comes in time. Meanwhile the request is
        helped along, where it is of the kind that gets lost."""
        held = self._stand.held

        def find() -> Asked | None:
            return next((asked for asked in held if asked.iova // PAGE_SIZE == page // PAGE_SIZE), None)

        self._stand.machine.wait(lambda: find() is not None or self.request.done(), seconds)
        found = find()
        if found is not None:
            held.remove(found)
        return found

    def done(self, seconds: float = 2.0) -> bool:
        """Whether the device has used it, within so long."""
        return self._stand.machine.wait(self.request.done, seconds)

    @property
    def used(self) -> bool:
        """It was seen to be used."""
        return bool(self.request.given)

    def patiently(self) -> bool:
        """Whether the device has used it after a good while, in which it may have gone on or not."""
        if not self.done(_HELPED):
            self._stand.machine.wait(self.request.queue.ring.used_moved, _PATIENT - _HELPED)
        return self.done(0)

    def settle(self, page: int, before: int) -> bool:
        """Let the device come to where it cannot go on: it asks for ``page`` more than ``before`` times, or is done.
        Whether it asked."""
        stand, moved = self._stand, self.request.queue.ring.used_moved

        def asked() -> bool:
            return stand.misses(page) > before

        if not stand.machine.wait(lambda: asked() or self.request.done(), _HELPED):
            stand.machine.wait(lambda: asked() or moved(), MISS_SECONDS - _HELPED)
        stand.machine.wait(moved, WHILE)
        return asked()

    def landed(self, role: str = "data") -> str:
        """The letters of the pages in that role in which there are bytes by now."""
        self._stand.witnesses = self._before.look()
        return "".join(sorted({w.page for w in self._stand.witnesses if w.touched and w.role == role}))

    def must_land(self, page: str, what: str, role: str = "data") -> None:
        """Fail unless it is done, and its bytes in that page and no other."""
        done = self.done()
        found = self.landed(role)
        if not done or found != page:
            state = "done" if done else "not done"
            self._stand.fail(f"{what}: the request was {state}, its bytes are in {found or 'no page'}, wanted {page}")

    def must_not_land(self, what: str, pages: str = "", role: str = "data") -> None:
        """Fail if there are bytes in one of ``pages``; if none are named, anywhere."""
        if found := "".join(page for page in self.landed(role) if not pages or page in pages):
            self._stand.fail(f"{what}: bytes are in page {found}")


def remapped(stand: Stand, *, waits: Queue | None = None) -> None:
    """X is mapped to page A, and the back end is told; a request of the queue ``waits`` may go on."""
    stand.remap(stand.data)
    # Some keep what they were told until it is taken back.
    stand.invalidate(stand.data.addr, PAGE_SIZE)
    stand.update(stand.data.addr, PAGE_SIZE, stand.data.gpa("A"))
    if waits is not None:
        # Who has waited until now goes first.
        waits.kick()
        if stand.machine.wait(waits.ring.used_moved, WHILE):
            waits.ring.poll()


def goes_on(stand: Stand, what: str) -> str:
    """X works as before; if the ring stands still, it does after a reset: a device may need that once a translation
    has failed (virtio 1.4, 2.1.2). Words to add to what was seen."""
    watched = stand.write(seconds=_ALIVE_SECONDS)
    if watched.done:
        stand.must_land(watched, "A", what)
        return ""
    return revived(stand, what)


def revived(stand: Stand, what: str) -> str:
    """The ring stands still: reset the device, and see whether X works then. Words to add to what was seen."""
    stand.release()
    stand.negotiate()
    stand.start(size=RING)
    stand.must_land(stand.write(), "A", f"{what}; its ring stood still, and the device was reset")
    return "; its ring stood still from then on, until a reset"


def unstuck(stand: Stand, going: Going, iova: int, what: str) -> str:
    """The page at ``iova``, for which ``going`` may still wait, is mapped to a page that does not matter, and the
    back end is told; then X works as before, or after a reset. Words to add to what was seen."""
    gpa = stand.ops.spare("Z")
    page = iova & ~PAGE_MASK
    stand.tables.map(IOVA(page), gpa, PAGE_SIZE)
    if not going.used:
        stand.invalidate(page, PAGE_SIZE)
        stand.update(page, PAGE_SIZE, gpa)
        going.request.queue.kick()
        going.done(WHILE)
    return goes_on(stand, f"X, {what}, and with 0x{page:x} mapped again")


def mended(stand: Stand, going: Going, what: str) -> str:
    """X is mapped to page A, the back end is told, and the next request works, if need be after a reset: it was there
    all the time. Words to add to what was seen."""
    remapped(stand, waits=None if going.done(0) else going.request.queue)
    return goes_on(stand, f"X mapped to A again, {what}")
