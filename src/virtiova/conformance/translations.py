# SPDX-License-Identifier: Apache-2.0
"""Cases on what a back end may reach: what is not mapped, what is half allowed, and what it asks for."""

from __future__ import annotations

from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, HALF, WHILE, Going, goes_on, mended, remapped, revived, unstuck, up, watch
from virtiova.conformance.stand import Stand
from virtiova.features import Feature
from virtiova.probe.canary import paint
from virtiova.probe.rig import LENGTH, SILENT_SECONDS

_IOTLB: Final = vhost_user("Memory access", "I/O addresses are translated to user addresses by the IOTLB alone")
_PERMISSION: Final = vhost_user(
    "An IOTLB message", "a mapping allows reading, writing, both or nothing, as its permission flags say"
)
_MISS: Final = vhost_user("IOMMU support", "a miss carries the I/O address and the permission that is wanted")

ARRIVES: Final = 0.5
"""Seconds within which what a device has read shows on its other side."""


@case(
    "not-mapped",
    "what is not mapped is asked for, and not reached",
    _IOTLB,
    why="A device that goes on where the front end has said no writes to memory that its driver has not lent it: what "
    "an IOMMU is there to prevent.",
    fix="Let a look-up without an entry end in a MISS, and a refused MISS in a failed request; there is no other way "
    "to an address, the bare one least of all.",
)
def unmapped(stand: Stand) -> str:
    """Take X out of the tables, tell the back end, let the device write to X; then map it, and let it write again."""
    up(stand)
    x = stand.data
    stand.unmap(x)
    before = stand.misses(x.addr)
    going = Going(stand)
    asks = going.settle(x.addr, before)
    going.must_not_land("X is not mapped")
    if not asks:
        stand.fail(f"it did not ask for 0x{x.addr:x}, of which it has no translation")
    asked = stand.misses(x.addr) - before
    words = mended(stand, going, "and it was not before")
    return f"asked {asked} times, no byte written, and once it was mapped the bytes are in page A{words}"


@case(
    "read-only-written",
    "a page that is mapped read-only is not written",
    _PERMISSION,
    why="Drivers map what a device is to send read-only. Without the check a device that goes wrong can change it, and "
    "the IOMMU's protection ends in the back end.",
    fix="Compare the permission of the entry with that of the access in every look-up, and ask for what is missing "
    "with the permission that is wanted.",
)
def read_only_written(stand: Stand) -> str:
    """Tell the back end, unasked, that X may be read; then let the device write there."""
    up(stand)
    x = stand.data
    stand.unmap(x)
    stand.ops.map(x, Access.READ)
    stand.update(x.addr, PAGE_SIZE, x.gpa("A"), Access.READ)
    going = Going(stand)
    going.settle(x.addr, stand.misses(x.addr))
    going.must_not_land("X may be read only")
    words = mended(stand, going, "and to be read only before")
    return f"no byte written, and once writing was allowed the bytes are in page A{words}"


@case(
    "read-then-written",
    "a read-only page is not written either once it was read",
    _PERMISSION,
    why="A back end that caches where a page is, and not what is allowed there, checks the permission only of the "
    "first access: any header in the same page opens it for writing.",
    fix="Keep the permission with every cached translation, in each cache there is, and compare it at each use.",
)
def read_then_written(stand: Stand) -> str:
    """Put an indirect table and the buffer that it names into one page that is mapped read-only."""
    up(stand)
    negotiated = stand.negotiated
    if negotiated is None or not negotiated.has(Feature.RING_INDIRECT_DESC):
        stand.skip("the back end does not offer indirect descriptors: nothing that all devices read can be put there")
    page = stand.ops.alloc(PAGE_SIZE)
    stand.ops.map(page, Access.READ)
    middle = PAGE_SIZE // 2
    page.paint(middle, LENGTH)
    going = Going(stand, [(page.addr + middle, LENGTH)], page.watch("data", middle, LENGTH), table=page)
    # For the table, and then for the buffer.
    going.settle(page.addr, 1)
    done = going.done(0)
    going.must_not_land("a page that was read, and may be read only")
    if not stand.asks(page.addr):
        stand.fail("it never asked for the page of the indirect table, and neither read nor wrote there")
    stand.ops.map(page)
    stand.tables.invalidate()
    if not done:
        stand.update(page.addr, PAGE_SIZE, page.gpa("A"))
        going.request.queue.kick()
        going.done(WHILE)
    words = goes_on(stand, "X, after a page that may be read only")
    return f"the table in it was read, and nothing written{words}"


@case(
    "write-only-read",
    "a page that is mapped write-only is not read",
    _PERMISSION,
    "blk",
    "net",
    "console",
    why="Drivers map what a device is to fill write-only: what was in that page before is none of its business, and "
    "must not leave the machine.",
    fix="Ask for and compare the reading permission where a buffer is read, as for writing where one is written.",
)
def write_only_read(stand: Stand) -> str:
    """Map X write-only, tell the back end unasked, let the device read X, and look at what arrives on its other
    side."""
    up(stand)
    if stand.machine.peer.reach == "none":
        stand.skip("nobody here sees what this device reads")
    x = stand.data
    stand.unmap(x)
    stand.ops.map(x, Access.WRITE)
    stand.update(x.addr, PAGE_SIZE, x.gpa("A"), Access.WRITE)
    x.paint(0, LENGTH)
    request = stand.driver.make_device_read([(x.addr, LENGTH)])
    request.go()
    done = stand.machine.wait(request.done, SILENT_SECONDS)
    stand.pump(WHILE)
    seen = request.arrived()
    for page in ("A", "B"):
        if seen is not None and seen[:LENGTH] == paint(page, x.gpa(page), LENGTH):
            stand.fail(f"X may be written only, and what page {page} held has arrived on the device's other side")
    remapped(stand)
    if done and not (stand.kind == "net" and stand.machine.peer.reach == "echo"):
        # Only a frame that is to come back is sent again by itself.
        request.queue.ring.poll()
        request = stand.driver.make_device_read([(x.addr, LENGTH)])
        request.go()
    text = paint("A", x.gpa("A"), LENGTH)
    words = ""
    if not stand.machine.wait(lambda: (request.arrived() or b"")[:LENGTH] == text, ARRIVES):
        words = revived(stand, "X may be read and written again")
        x.paint(0, LENGTH)
        request = stand.driver.make_device_read([(x.addr, LENGTH)])
        request.go()
        if not stand.machine.wait(lambda: (request.arrived() or b"")[:LENGTH] == text, ARRIVES):
            stand.fail("X may be read again, and what is in page A does not arrive on the device's other side")
    return f"nothing arrived, and once it was allowed, page A{words}"


@case(
    "update-without-permission",
    "an UPDATE without permission gives none",
    _PERMISSION,
    why="Permission 0 is one of the four values. Who takes it for a wildcard, or does not look at it, opens a page "
    "that the front end has just said is closed.",
    fix="Treat an UPDATE with permission 0 as an entry that allows nothing, or as none at all.",
)
def update_without_permission(stand: Stand) -> str:
    """X is not mapped; tell the back end of it with permission 0, and let the device write to it."""
    up(stand)
    x = stand.data
    stand.unmap(x)
    stand.update(x.addr, PAGE_SIZE, x.gpa("A"), Access.NONE)
    going = Going(stand)
    going.settle(x.addr, stand.misses(x.addr))
    going.must_not_land("X was told of with permission 0")
    words = mended(stand, going, "and told of with permission 0 before")
    return f"no byte written, and once there was permission the bytes are in page A{words}"


@case(
    "miss-says-what",
    "a MISS names the page that is missed, and the permission that is wanted",
    _MISS,
    why="The front end looks up exactly what it is asked for: with a wrong address or the permission of another access "
    "the answer is a refusal, or a mapping that does not help.",
    fix="Fill iova with the address of the access (or the start of its page) and perm with what is about to be done.",
)
def miss_says_what(stand: Stand) -> str:
    """Let the device write into the middle of a page that it does not know yet, and look at what it asks."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    start = 0x234
    stand.hold(page.addr)
    page.paint(start, LENGTH)
    going = Going(stand, [(page.addr + start, LENGTH)], page.watch("data", start, LENGTH))
    asked = going.miss(page.addr)
    if asked is None:
        stand.fail(f"it never asked for a page at 0x{page.addr:x}, to which it was to write")
    if Access.WRITE not in asked.access:
        stand.fail(f"it is to write to 0x{page.addr + start:x}, and asks: {asked}")
    going.must_not_land("a page that is asked for, before the answer")
    said = str(asked)
    asked.answer()
    stand.release()
    going.must_land("A", "a page that was asked for")
    return said


@case(
    "chain-misses",
    "of a chain each buffer is translated, and each that is missed is waited for",
    _IOTLB,
    why="A request has several buffers, on pages of their own. Who translates the first one only, or waits for the "
    "first miss only, puts the rest where nobody said.",
    fix="Translate every descriptor of a chain by itself, and go on only when none of them is missing.",
)
def chain_misses(stand: Stand) -> str:
    """One request into two buffers on two unknown pages; the second is answered a while after the first."""
    up(stand)
    first, second = stand.ops.alloc(LENGTH), stand.ops.alloc(LENGTH)
    stand.hold(first.addr, second.addr)
    watches = []
    for role, page in (("data", first), ("data2", second)):
        page.paint(0, HALF)
        watches += page.watch(role, 0, HALF)
    going = Going(stand, [(first.addr, HALF), (second.addr, HALF)], watches)
    one = going.miss(first.addr)
    if one is None:
        stand.fail(f"it never asked for 0x{first.addr:x}, the first buffer's page")
    going.must_not_land("the first buffer's page is asked for, before the answer")
    one.answer()
    two = going.miss(second.addr)
    if two is None:
        stand.fail(f"it never asked for 0x{second.addr:x}, the second buffer's page")
    stand.pump(WHILE)
    going.must_not_land("the second buffer's page is asked for, before the answer", role="data2")
    two.answer()
    stand.release()
    going.must_land("A", "the second buffer", role="data2")
    if going.landed() != "A":
        stand.fail(f"the first buffer: its bytes are in page {going.landed() or 'none'}, wanted A")
    return "both pages were asked for, and both have their bytes"


@case(
    "second-page-unmapped",
    "a buffer that runs past what is mapped does not reach past it",
    _IOTLB,
    why="Behind the first page of a buffer, in memory, lies anybody's page. Who translates only a buffer's start "
    "writes there as soon as it is longer than its mapping.",
    fix="Let the look-up say how many bytes from the address on are mapped, and look up the rest anew.",
)
def second_page_unmapped(stand: Stand) -> str:
    """A buffer of which the second half lies on a page that is not mapped; watch what lies behind the first page in
    memory."""
    up(stand)
    pages = stand.machine.pages.run(2)
    behind = pages + PAGE_SIZE
    iova = FAR
    stand.tables.map(IOVA(iova), pages, PAGE_SIZE)
    start = PAGE_SIZE - HALF
    watches = [watch(stand, "A", pages + start, HALF), watch(stand, "N", behind, HALF, "data2")]
    going = Going(stand, [(iova + start, LENGTH)], watches)
    asks = going.settle(iova + PAGE_SIZE, 0)
    going.must_not_land("behind the end of what is mapped", role="data2")
    if not asks:
        stand.fail(f"it never asked for 0x{iova + PAGE_SIZE:x}, where the buffer's second half is")
    half = going.landed()
    words = unstuck(stand, going, iova + PAGE_SIZE, "after a buffer that ran past its mapping")
    if half:
        stand.unclear(
            "the mapped half of the buffer was written, the other one was asked for and not reached",
            "a request of which a part is not mapped fails as a whole: nothing is written",
            "what is mapped may be written before the rest is found to be missing",
        )
    return f"asked for, and nothing written{words}"
