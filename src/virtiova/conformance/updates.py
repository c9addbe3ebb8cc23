# SPDX-License-Identifier: Apache-2.0
"""Cases on UPDATE: over a mapping that is live, with more or less permission, and with ranges that cannot be."""

from __future__ import annotations

from typing import Final

from virtiova.addr import PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, Going, Told, mended, must_be, unstuck, up, watched, where
from virtiova.conformance.stand import Stand
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.probe.rig import LENGTH

_UPDATE: Final = vhost_user("IOMMU support", "an UPDATE carries address, size, user address and permission of an entry")
_WITHIN: Final = vhost_user("IOMMU support", "addresses and size of an UPDATE lie within the memory regions set before")
_END: Final = 1 << 64
REPLACED: Final = "an UPDATE replaces what it overlaps"
INVALIDATED_FIRST: Final = "an entry has to be invalidated before it can be another one"


@case(
    "update-replaces",
    "an UPDATE over a live mapping takes its place, and nothing comes back once it is invalidated",
    _UPDATE,
    why="Front ends repeat UPDATEs, and change them. A back end that keeps both entries finds one of them again after "
    "the other was invalidated: access to a page that the front end believes is closed.",
    fix="Remove all that a new entry overlaps before it is put in, or at least remove every entry that an INVALIDATE "
    "overlaps, not the first one that is found.",
)
def update_replaces(stand: Stand) -> str:
    """X leads to page C and is used; then, by another UPDATE, to page A, and is used; then it is invalidated."""
    up(stand)
    x, told = stand.data, Told(stand)
    pages = {"A": x.gpa("A"), "B": x.gpa("B"), "C": stand.ops.spare("C")}
    stand.unmap(x)
    told.tell(x.addr, PAGE_SIZE, pages["C"])
    must_be(stand, x.addr, "C", pages, "X, told to be page C")
    told.tell(x.addr, PAGE_SIZE, pages["A"])
    found = where(stand, x.addr, pages, "X, told to be page A where it was page C")
    if found == "B":
        stand.fail("X, told to be page A where it was page C: its bytes are in page B")
    told.forget(x.addr, PAGE_SIZE)
    stand.invalidate(x.addr, PAGE_SIZE)
    before = stand.misses(x.addr)
    going = Going(stand, watches=watched(stand, pages))
    asks = going.settle(x.addr, before)
    going.must_not_land("X was told twice and invalidated once")
    if not asks:
        stand.fail("X was told twice and invalidated once, and it does not ask for it")
    words = mended(stand, going, "after it was invalidated")
    if found == "C":
        stand.unclear("the second UPDATE changed nothing", REPLACED, INVALIDATED_FIRST)
    return f"page C, then page A, then nothing{words}"


@case(
    "update-middle",
    "an UPDATE over a part of a mapping leaves the rest as it was",
    _UPDATE,
    why="When an entry is cut into pieces, the piece behind the cut has to lead to another address than before. With a "
    "mistake there, bytes go to a page of the right mapping, but not to the right one.",
    fix="Advance the user address of the piece behind by as many bytes as lie before it, and keep its permission.",
)
def update_middle(stand: Stand) -> str:
    """Three pages in one mapping; then the middle one leads elsewhere; then all three are used."""
    up(stand)
    told = Told(stand)
    run = stand.machine.pages.run(3)
    pages = {"P": run, "Q": run + PAGE_SIZE, "R": run + 2 * PAGE_SIZE, "D": stand.ops.spare("D")}
    told.tell(FAR, 3 * PAGE_SIZE, run)
    must_be(stand, FAR + PAGE_SIZE, "Q", pages, "the second of three pages in one mapping")
    told.tell(FAR + PAGE_SIZE, PAGE_SIZE, pages["D"])
    must_be(stand, FAR, "P", pages, "the first page of a mapping whose second page was changed")
    must_be(stand, FAR + 2 * PAGE_SIZE, "R", pages, "the third page of a mapping whose second page was changed")
    found = where(stand, FAR + PAGE_SIZE, pages, "the second page, told to be another one")
    if found == "Q":
        stand.unclear("the UPDATE of the second page changed nothing", REPLACED, INVALIDATED_FIRST)
    if found != "D":
        stand.fail(f"the second page, told to be page D: its bytes are in page {found}")
    return "the middle leads elsewhere, the rest where it did"


@case(
    "update-adds-permission",
    "an UPDATE that allows more is heard",
    _UPDATE,
    why="A MISS for writing to a page that is known for reading is answered by an UPDATE of the same page. A back end "
    "that drops it as a double asks again, and again, and the request never ends.",
    fix="Let an UPDATE of a range that is known take the place of the entry, or widen its permission.",
)
def update_adds_permission(stand: Stand) -> str:
    """The back end is told that a page may be read. Then the device is to write there, and its MISS is answered by
    an UPDATE that allows both."""
    up(stand)
    page, told = stand.ops.alloc(LENGTH), Told(stand)
    told.tell(page.addr, PAGE_SIZE, page.gpa("A"), Access.READ)
    told.change(page.addr, PAGE_SIZE, page.gpa("A"))
    page.paint(0, LENGTH)
    going = Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH))
    done = going.patiently()
    asked = stand.misses(page.addr)
    if not asked:
        stand.fail("a page may be read only, as far as it knows, and it does not ask for more")
    if not done:
        stand.invalidate(page.addr, PAGE_SIZE)
        told.tell(page.addr, PAGE_SIZE, page.gpa("A"))
    if going.done() and not going.landed():
        stand.unclear(f"it asked {asked} times, and failed the request", REPLACED, INVALIDATED_FIRST)
    going.must_land("A", "a page that is first to be read and then to be written")
    if not done:
        stand.unclear(f"it asked {asked} times, and heard no answer before an INVALIDATE", REPLACED, INVALIDATED_FIRST)
    return f"asked {asked} times, then page A"


@case(
    "update-takes-permission",
    "an UPDATE that allows less is heard, at the latest once the page was invalidated",
    _UPDATE,
    why="Permission that is only ever added to an entry outlives the mapping that it was given for.",
    fix="Store the permission of an UPDATE as it is; an INVALIDATE ends an entry with all that it allowed.",
)
def update_takes_permission(stand: Stand) -> str:
    """X may be written, and is; then the back end is told, with and then without an INVALIDATE before it, that X may be
    read only."""
    up(stand)
    x, told = stand.data, Told(stand)
    stand.unmap(x)
    told.tell(x.addr, PAGE_SIZE, x.gpa("A"))
    stand.must_land(stand.write(), "A", "X, to be read and written")
    told.tell(x.addr, PAGE_SIZE, x.gpa("A"), Access.READ)
    going = Going(stand)
    going.settle(x.addr, stand.misses(x.addr))
    going.must_not_land("X, told to be read only", "B")
    kept = going.landed()
    if kept:
        going.done()
        stand.invalidate(x.addr, PAGE_SIZE)
        told.tell(x.addr, PAGE_SIZE, x.gpa("A"), Access.READ)
        going = Going(stand)
        going.settle(x.addr, stand.misses(x.addr))
        going.must_not_land("X, invalidated and then told to be read only")
    told.forget(x.addr, PAGE_SIZE)
    words = mended(stand, going, "and to be read only before")
    if kept:
        stand.unclear("it was written until it was invalidated", REPLACED, INVALIDATED_FIRST)
    return f"not written any more{words}"


@case(
    "updates-contradict",
    "of two UPDATEs that contradict one another, one counts as a whole",
    _UPDATE,
    why="Who takes the address of one and the permission of the other allows what neither of them did.",
    fix="Replace an entry as a whole: user address and permission together, under one lock.",
)
def updates_contradict(stand: Stand) -> str:
    """X is told to be page C, to be read; and at once to be page A, to be read and written. Then it is written."""
    up(stand)
    x, told = stand.data, Told(stand)
    pages = {"A": x.gpa("A"), "B": x.gpa("B"), "C": stand.ops.spare("C")}
    stand.unmap(x)
    told.tell(x.addr, PAGE_SIZE, pages["C"], Access.READ)
    told.tell(x.addr, PAGE_SIZE, pages["A"])
    going = Going(stand, watches=watched(stand, pages))
    done = going.patiently()
    going.must_not_land("page C was to be read only, and page A to be written", "BC")
    if not done:
        stand.invalidate(x.addr, PAGE_SIZE)
        told.tell(x.addr, PAGE_SIZE, pages["A"])
    if going.done() and not going.landed():
        stand.unclear("the request was failed", REPLACED, INVALIDATED_FIRST)
    going.must_land("A", "X, told to be page A at last")
    if not done:
        stand.unclear("the second UPDATE was not heard before an INVALIDATE", REPLACED, INVALIDATED_FIRST)
    return "the last one"


def _wrong(stand: Stand, iova: int, size: int, uva: int) -> str:
    """UPDATE with numbers that cannot be; what was said to that, or nothing if the connection is over."""
    answer = ""
    with stand.may_hang_up():
        pending = stand.front.post_update(iova, size, uva, Access.RW)
        if pending is not None:
            stand.front.wait(pending)
            answer = "acknowledged" if pending.ok else "refused"
        stand.front.barrier()
        return answer
    return ""


def _not_followed(stand: Stand, iova: int, pages: dict[str, int], said: str, what: str) -> str:
    """Let the device write to ``iova``, of which it was told nonsense, and watch ``pages``."""
    if not said:
        return f"the connection was closed over it; {stand.still_there()}"
    going = Going(stand, [(iova, LENGTH)], watched(stand, pages))
    going.settle(iova, stand.misses(iova))
    going.must_not_land(f"{what}, {said}")
    words = unstuck(stand, going, iova, f"after {what}")
    return f"{said}, and not followed{words}"


@case(
    "update-outside-memory",
    "an UPDATE whose user address is in no memory region is not followed",
    _WITHIN,
    why="The user address is the front end's, and means nothing in the back end's process but by the memory table: "
    "whoever uses it otherwise writes to his own heap.",
    fix="Look the whole range up in the memory table when the UPDATE comes, and refuse it if it is not there.",
)
def update_outside_memory(stand: Stand) -> str:
    """UPDATEs of a page behind the end of one region, and of one that is nowhere near; then a request there, watching
    the page that follows for the guest."""
    up(stand)
    region = REGIONS[1]
    behind = {"N": region.gpa + region.size}
    first = _wrong(stand, FAR, PAGE_SIZE, region.uva + region.size)
    said = first and _wrong(stand, FAR + 2 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)
    return _not_followed(stand, FAR, behind, said and first, "an UPDATE to a user address behind a region")


@case(
    "update-past-region",
    "an UPDATE that runs past the end of a memory region is not followed past it",
    _WITHIN,
    why="Regions lie anywhere in the back end's address space: behind the end of one is somebody else's memory.",
    fix="Check the last byte of the range as well as the first, and refuse the UPDATE or cut it off there.",
)
def update_past_region(stand: Stand) -> str:
    """UPDATE of two pages, of which the second lies behind the end of the region; then a request to the second,
    watching the page that follows for the guest."""
    up(stand)
    region = REGIONS[1]
    behind = {"N": region.gpa + region.size}
    said = _wrong(stand, FAR, 2 * PAGE_SIZE, region.uva + region.size - PAGE_SIZE)
    return _not_followed(stand, FAR + PAGE_SIZE, behind, said, "an UPDATE that runs past its region")


@case(
    "update-wraps",
    "an UPDATE whose addresses wrap around is not followed around",
    _UPDATE,
    why="The sum of address and size is computed in 64 bits nearly everywhere; when it wraps, the check that follows "
    "lets anything through, or an entry covers what it never should.",
    fix="Compare size with the distance to the end, not the sum with the address, and refuse what does not fit.",
)
def update_wraps(stand: Stand) -> str:
    """UPDATE of two pages of which the second would be at address 0; then a request there."""
    up(stand)
    run = stand.machine.pages.run(2)
    said = _wrong(stand, _END - PAGE_SIZE, 2 * PAGE_SIZE, stand.memory.uva(run))
    pages = {"P": run + PAGE_SIZE, "B": 0}
    return _not_followed(stand, 0, pages, said, "an UPDATE that wraps around")


@case(
    "update-empty",
    "an UPDATE of no bytes maps none",
    _UPDATE,
    why="A size of 0 is where back ends subtract one and get the largest number there is, or round up to a page.",
    fix="Refuse or ignore an UPDATE of size 0.",
)
def update_empty(stand: Stand) -> str:
    """UPDATE of size 0; then a request to its address."""
    up(stand)
    page = stand.ops.spare("P")
    said = _wrong(stand, FAR, 0, stand.memory.uva(page))
    return _not_followed(stand, FAR, {"P": page}, said, "an UPDATE of no bytes")
