# SPDX-License-Identifier: Apache-2.0
"""Cases on INVALIDATE: acknowledged, and then no access through the old mapping, whatever its range is."""

from __future__ import annotations

from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, Going, Told, mended, must_be, up
from virtiova.conformance.stand import Stand
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage, Request

_INVALIDATE: Final = vhost_user(
    "IOMMU support", "an INVALIDATE takes the entries of its range back, and is answered with zero once that is done"
)
_END: Final = 1 << 64
_HIGH: Final = 0xFFFF_E000
_WINDOW: Final = (0xFEE0_0000, 0xFEF0_0000)
"""Where a PC has its interrupt messages: QEMU leaves it out when it invalidates everything."""


@case(
    "invalidate",
    "once an INVALIDATE is acknowledged, the old mapping is not used any more",
    _INVALIDATE,
    why="The guest's driver gives the page to somebody else as soon as the IOMMU says that it is unmapped. Bytes that "
    "arrive later are in the wrong hands, or destroy what is there by then.",
    fix="Remove the entry from every cache there is, wait for whoever may still be using it, and only then answer.",
)
def invalidate(stand: Stand) -> str:
    """X is used; then it is unmapped, and invalidated; then it is to be used again."""
    up(stand)
    x = stand.data
    stand.tables.unmap(IOVA(x.addr), PAGE_SIZE)
    if not stand.invalidate(x.addr, PAGE_SIZE):
        stand.fail("INVALIDATE of one page was answered with a failure")
    before = stand.misses(x.addr)
    going = Going(stand)
    asks = going.settle(x.addr, before)
    going.must_not_land("X was invalidated")
    if not asks:
        stand.fail("X was invalidated, and it does not ask for it")
    words = mended(stand, going, "after it was invalidated")
    return f"not reached, and asked for again{words}"


@case(
    "invalidate-then-new",
    "after an INVALIDATE the new mapping is used",
    _INVALIDATE,
    why="The same address is used again at once, for another page. A back end that remembers anything of the old one "
    "sends it the new one's bytes.",
    fix="Take the user address from the new UPDATE: an entry that was invalidated is no entry.",
)
def invalidate_then_new(stand: Stand) -> str:
    """X leads to page A and is used; then it leads to page C, and is invalidated; then it is used again."""
    up(stand)
    x = stand.data
    pages = {"A": int(x.gpa("A")), "B": int(x.gpa("B")), "C": int(stand.ops.spare("C"))}
    stand.tables.map(IOVA(x.addr), GPA(pages["C"]), PAGE_SIZE)
    stand.tables.invalidate()
    must_be(stand, x.addr, "C", pages, "X, which leads to page C now")
    return "page C"


def _renewed(stand: Stand, told: Told, mappings: dict[int, str], pages: dict[str, int], what: str) -> None:
    """Each of ``mappings`` leads elsewhere now, which nobody was told but by the INVALIDATE."""
    for iova, page in mappings.items():
        told.change(iova, PAGE_SIZE, pages[page])
    for iova, page in mappings.items():
        must_be(stand, iova, page, pages, f"0x{iova:x}, after {what}")


@case(
    "invalidate-part",
    "an INVALIDATE of a part of a mapping takes that part back",
    _INVALIDATE,
    why="Front ends invalidate by the guest's pages, whatever they told before. A back end that looks for an entry of "
    "exactly that range finds none, and goes on with the old one.",
    fix="Remove or cut every entry that the range overlaps; to forget more than was asked for costs a MISS only.",
)
def invalidate_part(stand: Stand) -> str:
    """Three pages in one mapping; the middle one is invalidated, and leads elsewhere; then all three are used."""
    up(stand)
    told = Told(stand)
    run = int(stand.machine.pages.run(3))
    pages = {"P": run, "Q": run + PAGE_SIZE, "R": run + 2 * PAGE_SIZE, "D": int(stand.ops.spare("D"))}
    told.tell(FAR, 3 * PAGE_SIZE, run)
    must_be(stand, FAR + PAGE_SIZE, "Q", pages, "the second of three pages in one mapping")
    told.forget(FAR, 3 * PAGE_SIZE)
    stand.invalidate(FAR + PAGE_SIZE, PAGE_SIZE)
    mappings = {FAR: "P", FAR + PAGE_SIZE: "D", FAR + 2 * PAGE_SIZE: "R"}
    _renewed(stand, told, mappings, pages, "the middle of the mapping was invalidated")
    return "the middle is gone, the rest is where it was"


def _two(stand: Stand, told: Told, first: int, second: int) -> dict[str, int]:
    """Two mappings that are used, to pages P and Q; the pages, with D and E to come."""
    pages = {page: int(stand.ops.spare(page)) for page in "PQDE"}
    for iova, page in ((first, "P"), (second, "Q")):
        told.tell(iova, PAGE_SIZE, pages[page])
        must_be(stand, iova, page, pages, f"0x{iova:x}, before it is invalidated")
    return pages


@case(
    "invalidate-more",
    "an INVALIDATE of more than there is takes all of it back",
    _INVALIDATE,
    why="One message for a range that holds several entries, and gaps, is what a guest sends that unmaps in batches. "
    "Whoever stops at the first entry leaves the others usable.",
    fix="Go through all entries up to the end of the range.",
)
def invalidate_more(stand: Stand) -> str:
    """Two mappings with a gap between them are used, invalidated by one message that begins before the first and ends
    behind the second, and lead elsewhere then."""
    up(stand)
    told = Told(stand)
    first, second = FAR + PAGE_SIZE, FAR + 3 * PAGE_SIZE
    pages = _two(stand, told, first, second)
    stand.invalidate(FAR, 6 * PAGE_SIZE)
    _renewed(stand, told, {second: "E", first: "D"}, pages, "a range around it was invalidated")
    return "both are gone"


@case(
    "invalidate-everything",
    "an INVALIDATE of the whole address space leaves nothing",
    _INVALIDATE,
    why="A domain that is switched off is taken back in one message. Its size has the sign bit set, and nearly does "
    "not fit: a comparison that overflows leaves everything as it was.",
    fix="Compute with unsigned numbers, and treat a range that ends at the top as one that ends there.",
)
def invalidate_everything(stand: Stand) -> str:
    """Two mappings are used; all but the last byte of the address space is invalidated; they lead elsewhere then."""
    up(stand)
    told = Told(stand)
    pages = _two(stand, told, FAR, _HIGH)
    stand.invalidate(0, _END - 1)
    _renewed(stand, told, {_HIGH: "E", FAR: "D"}, pages, "everything was invalidated")
    stand.must_land(stand.write(), "A", "X, after everything was invalidated")
    return "nothing is left, the rings included"


@case(
    "invalidate-as-qemu",
    "an INVALIDATE that ends at the top of the address space is one",
    _INVALIDATE,
    why="QEMU takes everything back in two messages, around the window of interrupt messages; the first one ends at "
    "2^64 exactly. A back end that adds start and size gets 0 there, and removes nothing.",
    fix="Compare with the last byte of the range; it fits in 64 bits where the address behind it does not.",
)
def invalidate_as_qemu(stand: Stand) -> str:
    """A mapping below the interrupt window and one above it are used; then come QEMU's two messages; then both lead
    elsewhere."""
    up(stand)
    told = Told(stand)
    low, high = 0x8000_0000, _HIGH
    pages = _two(stand, told, low, high)
    below, above = _WINDOW
    stand.invalidate(above, _END - above)
    stand.invalidate(0, below)
    _renewed(stand, told, {high: "E", low: "D"}, pages, "everything was invalidated in two pieces")
    return "nothing is left in either piece"


@case(
    "invalidate-unknown",
    "an INVALIDATE of what the back end does not know is acknowledged",
    _INVALIDATE,
    why="Front ends invalidate what the guest unmaps, whether or not it was ever asked for: a failure, or a closed "
    "connection, takes the device away for nothing.",
    fix="What is not there is gone already: answer zero.",
)
def invalidate_unknown(stand: Stand) -> str:
    """INVALIDATE of pages that were never mapped; then of no bytes at all; then the ordinary."""
    up(stand)
    if not stand.invalidate(FAR, 16 * PAGE_SIZE):
        stand.fail("INVALIDATE of pages that it does not know was answered with a failure")
    stand.must_land(stand.write(), "A", "X, after others were invalidated")
    none = False
    with stand.may_hang_up():
        none = stand.invalidate(stand.data.addr, 0)
    if not none:
        stand.unclear(
            "INVALIDATE of no bytes was refused",
            "no bytes are a range as any other, and nothing is to be done",
            "a range without bytes makes no sense",
        )
    stand.must_land(stand.write(), "A", "X, after no bytes were invalidated")
    return "acknowledged, and all else works"


@case(
    "invalidate-rubbish",
    "an INVALIDATE counts whatever its user address and permission are",
    vhost_user("IOMMU support", "an INVALIDATE has to have address and size; no other field is named"),
    why="QEMU 7.2 sends there what happens to be on its stack. A back end that looks refuses the one message on which "
    "the protection of the guest rests.",
    fix="Read address and size of an INVALIDATE, and nothing else.",
)
def invalidate_rubbish(stand: Stand) -> str:
    """X leads to page A and is used; then it leads to page C, and is invalidated with permission 0xb2 and a user
    address that is nobody's; then it is used again."""
    up(stand)
    x, told = stand.data, Told(stand)
    pages = {"A": int(x.gpa("A")), "B": int(x.gpa("B")), "C": int(stand.ops.spare("C"))}
    message = IotlbMessage(IOVA(x.addr), PAGE_SIZE, UVA(0x7FFC_1234_5678), Access.NONE, IotlbKind.INVALIDATE)
    payload = bytearray(message.encode())
    payload[24] = 0xB2
    pending = stand.front.post(Request.IOTLB_MSG, bytes(payload))
    stand.front.wait(pending)
    if not pending.ok:
        stand.fail("INVALIDATE with permission 0xb2 was answered with a failure")
    told.change(x.addr, PAGE_SIZE, pages["C"])
    must_be(stand, x.addr, "C", pages, "X, invalidated with permission 0xb2")
    return "acknowledged, and done"
