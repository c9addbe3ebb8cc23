# SPDX-License-Identifier: Apache-2.0
"""Cases on split rings: where their parts lie, over which pages, and what becomes of them when those pages go."""

from __future__ import annotations

from typing import Final

from virtiova.addr import IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.layouts import (
    PlacedSplit,
    again_from,
    apart,
    await_miss,
    echoed,
    lay_out,
    many,
    move_page,
    straddling,
    written_queue,
    written_ring,
)
from virtiova.conformance.stand import MISS_SECONDS, Stand
from virtiova.driver.base import QUEUE_SIZE
from virtiova.probe.paths import two_splits
from virtiova.probe.rig import LENGTH, SILENT_SECONDS
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_driver import SplitDriver
from virtiova.spec import spec

LARGE: Final = 1024
_SPREAD: Final = PlacedSplit(LARGE, 4, 0, 4 * PAGE_SIZE + 3072, 7 * PAGE_SIZE)
"""Descriptors over four pages, the available ring over two, the used ring over three."""
_RINGS: Final = vhost_user("IOMMU support", "with VIRTIO_F_ACCESS_PLATFORM ring addresses are I/O addresses as well")


def _split_from(stand: Stand, page: str) -> None:
    """One request over a ring whose copies differ: fail unless all three parts are those of ``page``."""
    region, _ = written_ring(stand)
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    ring = request.queue.ring
    assert isinstance(ring, SplitDriver)
    watches = two_splits(stand, region, ring)
    watched = stand.observe(request, watches)
    stand.witnesses = watched.witnesses
    came = {role: stand.pages(watched, role) for role in ("via-A", "via-B", "via-AB", "via-BA")}
    found = ", ".join(f"{role} in {pages}" for role, pages in came.items() if pages) or "nowhere"
    if [role for role, pages in came.items() if pages] != [f"via-{page}"]:
        stand.fail(f"descriptor table and available ring of copy {page} were to be read; the buffer written is {found}")
    if not watched.done or stand.pages(watched, "ring") != page:
        stand.fail(f"the used ring was written in {stand.pages(watched, 'ring') or 'no page'}, wanted {page}")


@case(
    "ring-iova",
    "with bit 33 each part of a ring is found where its address is mapped",
    _RINGS,
    why="A back end that takes ring addresses for its front end's own, or for guest-physical ones, serves a ring that "
    "nobody filled, and writes into memory that was never given to it.",
    fix="Translate the three addresses of SET_VRING_ADDR through the IOTLB once bit 33 is negotiated. Ask for them "
    "like for any other address.",
)
def ring_iova(stand: Stand) -> str:
    """Let the two copies of a ring name different chains and buffers, and see which were used. Each of its parts has a
    page of its own."""
    stand.translating(start=False)
    lay_out(stand, apart(QUEUE_SIZE))
    stand.asking = True
    _split_from(stand, "A")
    return "descriptor table, available ring and used ring were those behind the mapping"


@case(
    "ring-user-address",
    "without bit 33 each part of a ring is found at its user address",
    vhost_user("Memory access", "a user address is looked for in the region that holds it; rings have user addresses"),
    why="A guest that does not use the bit gets no service at all, or a ring that is somewhere else in its memory.",
    fix="Without bit 33, look the addresses of SET_VRING_ADDR up among the user addresses of the memory table, not "
    "among its guest addresses.",
)
def ring_user_address(stand: Stand) -> str:
    """Leave bit 33 alone, with the IOMMU on, and see which copy of the ring was used."""
    stand.enable_iommu()
    stand.negotiate(take=False)
    lay_out(stand, apart(QUEUE_SIZE))
    stand.asking = True
    _split_from(stand, "B")
    return "descriptor table, available ring and used ring were those at the user addresses"


@case(
    "ring-many-pages",
    "a ring may lie over many pages that are not adjacent, and go round",
    spec("2.7", "the parts of a virtqueue are contiguous for the device, behind whatever translates"),
    why="Guests use rings of 256 to 1024 entries. A back end that translates the first page of each part, and counts "
    "on from there, reads and writes memory that belongs to somebody else.",
    fix="Translate each page of each part. A pointer that was computed from the part's first address is good for the "
    "first page only.",
)
def ring_many_pages(stand: Stand) -> str:
    """A ring of 1024 entries over nine pages, none next to the other; more requests than it has entries."""
    stand.translating(size=LARGE, start=False)
    lay_out(stand, _SPREAD)
    stand.asking = True
    count = LARGE + 2 * QUEUE_SIZE
    done = many(stand, count, together=32)
    if done < count and not echoed(stand):
        stand.fail(f"of {count} requests {done} were used")
    stand.must_land(stand.write(), "A", f"the request after {done}")
    region, layout = written_ring(stand)
    if any(region.homes["B"].read(layout.used, 4 + 8 * LARGE)):
        stand.fail("elements of the used ring were written at the bare address")
    around = "and round" if done >= LARGE else "not round: each frame that we send takes a page"
    return f"{done} requests over {len(region.homes['A'].gpas)} pages, {around}"


@case(
    "ring-index-wraps",
    "indices of a ring go on from 65535 to 0",
    spec("2.7.6", "the index of the available ring counts on without end, and wraps at 16 bits"),
    why="After 65,536 requests the device stands still, in the middle of a working day.",
    fix="Compare indices by their difference in 16 bits, never by less or greater.",
)
def ring_index_wraps(stand: Stand) -> str:
    """Start the ring at index 65,530, as after a migration, and make some more requests than are left to the border."""
    stand.translating()
    again_from(stand, SplitLayout(QUEUE_SIZE), 65530)
    done = many(stand, 16, together=2)
    if done < 16:
        stand.fail(f"the ring stands still after {done} requests, at index {(65530 + done) & 0xFFFF}")
    stand.must_land(stand.write(), "A", "a request after the wrap")
    return "16 requests from index 65530 on"


@case(
    "ring-alignment",
    "parts of a ring may lie at 16, 2 and 4 bytes, over the borders of pages",
    spec("2.7", "the descriptor table is aligned to 16 bytes, the available ring to 2, the used ring to 4"),
    why="Drivers that place the parts one after the other give such addresses. A back end that wants more than the "
    "specification does serves Linux, and no firmware.",
    fix="Check for 16, 2 and 4 bytes, and let entries lie on any page of their part.",
)
def ring_alignment(stand: Stand) -> str:
    """Each part at an address that is just aligned enough, a few entries before the end of a page."""
    return _odd(stand, straddling(16))


@case(
    "used-element-over-pages",
    "an element of the used ring may lie on the border of two pages that are not adjacent",
    spec("2.7", "the used ring is aligned to 4 bytes, and its elements have 8"),
    why="The second half of that element is written behind the first page: the driver finds another length or another "
    "chain than the device has done, and somebody else finds four bytes changed.",
    fix="Write each half of an element through its own translation when it lies on a border.",
)
def used_element_over_pages(stand: Stand) -> str:
    """A used ring of which one element has its number on one page and its length on the next."""
    said = _odd(stand, straddling(16, element=True))
    region, layout = written_ring(stand)
    lengths = [
        int.from_bytes(region.read(layout.used + 8 + layout.used_entry(index) - 4, 4), "little") for index in (1, 2)
    ]
    if lengths[0] != lengths[1]:
        stand.fail(
            f"element 2, on the border, says {lengths[1]} bytes of a request like that of element 1: {lengths[0]}"
        )
    return said


def _odd(stand: Stand, layout: PlacedSplit) -> str:
    stand.translating(start=False)
    lay_out(stand, layout)
    stand.asking = True
    count = 2 * layout.size
    if (done := many(stand, count, together=4)) < count and not echoed(stand):
        stand.fail(f"of {count} requests {done} were used, with parts at {_where(stand)}")
    stand.must_land(stand.write(), "A", f"parts at {_where(stand)}")
    return f"{done} requests with parts at {_where(stand)}"


def _where(stand: Stand) -> str:
    return ", ".join(f"0x{part:x}" for part in written_queue(stand).ring.parts)


def _parts(stand: Stand) -> dict[str, int]:
    """The first page of each part of the ring."""
    names = ("descriptor table", "available ring", "used ring")
    return {name: at & ~PAGE_MASK for name, at in zip(names, written_queue(stand).ring.parts, strict=True)}


def _running(stand: Stand) -> None:
    """A ring with each part on a page of its own, that works."""
    stand.translating(start=False)
    lay_out(stand, apart(QUEUE_SIZE))
    stand.prove()


@case(
    "ring-page-invalidated",
    "a page of a running ring is asked for again once it was taken back",
    vhost_user("IOMMU support", "an invalidation takes back what an update said of these addresses"),
    why="A ring that is translated once, when it starts, is used at its old place for ever: whatever is there after "
    "the guest has moved it is overwritten.",
    fix="Drop what is remembered of a ring whenever an invalidation touches it. Stop using it, ask again, go on.",
)
def ring_page_invalidated(stand: Stand) -> str:
    """Invalidate the page of each part in turn, and all at once, with the ring running."""
    _running(stand)
    parts = _parts(stand)
    for name, page in parts.items():
        before = stand.misses(page)
        stand.invalidate(page, PAGE_SIZE)
        stand.must_land(stand.write(), "A", f"after the {name} was invalidated")
        if stand.misses(page) == before:
            stand.fail(f"the {name} was invalidated, and used without being asked for again")
    for page in parts.values():
        stand.invalidate(page, PAGE_SIZE)
    stand.must_land(stand.write(), "A", "after all parts were invalidated")
    return "each part was asked for again, and the ring went on"


@case(
    "ring-page-moved",
    "a page of a running ring that is mapped elsewhere is used there, and the old one never again",
    vhost_user("IOMMU support", "after an invalidation the addresses have to be asked for anew"),
    why="The page that a guest has taken back is somebody else's. A used element written there is corruption, and the "
    "guest waits for a request that was long done.",
    fix="Keep no pointer into a ring beyond the life of its translation.",
)
def ring_page_moved(stand: Stand) -> str:
    """Point the page of each part in turn at another page that holds the same, with nonsense left behind in the old."""
    _running(stand)
    region, layout = written_ring(stand)
    for name, offset in (
        ("descriptor table", layout.desc),
        ("available ring", layout.avail),
        ("used ring", layout.used),
    ):
        old = move_page(stand, region, offset)
        watched = stand.write()
        stand.must_land(watched, "A", f"after the {name} was moved")
        if set(stand.memory.at(old.gpa, PAGE_SIZE)) != {0xFF}:
            stand.fail(f"the old page of the {name} was written to")
    return "each part was used at its new place, and the old one stayed as it was"


@case(
    "used-page-late",
    "a request is not lost when the page of the used ring has to be asked for first",
    spec("2.7.8", "each chain that was made available is given back by one element of the used ring"),
    why="The device has done the work and has nowhere to say so. A back end that drops the element then costs the "
    "guest a request, and with it a file system.",
    fix="Ask for the used ring before a request is begun, or keep what is done until it can be said.",
)
def used_page_late(stand: Stand) -> str:
    """Take the used ring's page away, make two requests, and answer the question for it only after a while."""
    _running(stand)
    page = IOVA(_parts(stand)["used ring"])
    region, layout = written_ring(stand)
    stand.hold(page)
    stand.invalidate(page, PAGE_SIZE)
    before = region.load16(layout.used + 2)
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    stand.driver.make_device_write([(stand.data.addr + LENGTH, LENGTH)])
    request.go()
    request.after()
    asked = await_miss(stand, request, page)
    if request.done() or region.load16(layout.used + 2) != before:
        stand.fail("the used ring was written after it was taken away")
    if asked is None:
        stand.fail(f"the used ring at 0x{page:x} is needed, and was not asked for within {MISS_SECONDS:g} s")
    stand.pump(SILENT_SECONDS / 2)
    stand.held.append(asked)
    stand.release()
    ring = request.queue.ring
    used = 0
    while used < 2 and stand.machine.wait(request.done, 2.0):
        used += ring.poll() is not None
    stand.pump(SILENT_SECONDS / 5)
    extra = (region.load16(layout.used + 2) - before - 2) & 0xFFFF
    if used < 2 or extra:
        stand.fail(f"of two requests {used} were used, {extra} too many, once the used ring was mapped again")
    stand.must_land(stand.write(), "A", "the next request")
    return "both requests were used once, after the answer"


@case(
    "used-ring-read-only",
    "a used ring that is mapped read-only is not written",
    vhost_user("IOMMU support", "an update says what the device may do: read, write or both"),
    why="A page that a guest has mapped for reading only may be its page cache, or shared with others.",
    fix="Look at the permission of the entry, for rings as for buffers, and ask again for one that allows to write.",
)
def used_ring_read_only(stand: Stand) -> str:
    """Map the used ring's page read-only, and make a request; then allow it to be written."""
    _running(stand)
    page = _parts(stand)["used ring"]
    region, layout = written_ring(stand)
    gpa = region.gpa("A", layout.used & ~PAGE_MASK)
    stand.tables.map(IOVA(page), gpa, PAGE_SIZE, Access.READ)
    stand.tables.invalidate()
    kept = stand.memory.at(gpa, PAGE_SIZE)
    asked = len(stand.front.asked)
    watched = stand.silent()
    if stand.memory.at(gpa, PAGE_SIZE) != kept:
        stand.fail("the used ring was written, although its page is mapped read-only")
    wrote = [each for each in list(stand.front.asked)[asked:] if each.iova & ~PAGE_MASK == page and each.perm.value & 2]
    stand.tables.map(IOVA(page), gpa, PAGE_SIZE)
    stand.update(page, PAGE_SIZE, gpa)
    queue = written_queue(stand)
    queue.kick()
    if not watched.done and not stand.machine.wait(queue.ring.used_moved, MISS_SECONDS):
        if not wrote:
            stand.fail("it did not ask to write the used ring, and does not go on once it may")
        return "it asked to write, was refused, and waits for a reset"
    return "it was not written until it was allowed, and then the request was used"


@case(
    "ring-read-only-parts",
    "descriptor table and available ring need no permission to write",
    spec(
        "2.7.6", "the available ring is written by the driver and only read by the device; so is the descriptor table"
    ),
    why="A guest that maps them for reading only, as it may, gets no service: every question for more is refused.",
    fix="Ask for read access to descriptor table and available ring, for write access to the used ring.",
)
def ring_read_only_parts(stand: Stand) -> str:
    """Map the pages of descriptor table and available ring read-only, and make requests."""
    _running(stand)
    region, layout = written_ring(stand)
    for name, offset in (("descriptor table", layout.desc), ("available ring", layout.avail)):
        page = IOVA(_parts(stand)[name])
        stand.tables.map(page, region.gpa("A", offset & ~PAGE_MASK), PAGE_SIZE, Access.READ)
        stand.tables.invalidate()
        watched = stand.write()
        # Whoever wants both asks so when the ring starts, and may not ask again.
        wrote = any(each.iova & ~PAGE_MASK == page and each.perm.value & 2 for each in stand.front.asked)
        if not watched.done and not stand.pages(watched) and wrote:
            stand.unclear(
                f"with the {name} mapped read-only it stopped: it asks to write there",
                "the device only reads it: permission to read is enough",
                "a driver maps a ring for both, and nothing is said of its parts",
            )
        stand.must_land(watched, "A", f"with the {name} mapped read-only")
    return "read access to both was enough"
