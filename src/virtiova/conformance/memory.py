# SPDX-License-Identifier: Apache-2.0
"""Cases on the memory table: which memory is meant, what becomes of it when the table changes, and where it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import Going, goes_on, revived
from virtiova.conformance.stand import Stand
from virtiova.machine.vhost_user.frontend import WANTED
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.probe.canary import paint
from virtiova.probe.rig import LENGTH, SILENT_SECONDS
from virtiova.spec import spec
from virtiova.wire.vhost_user import MemoryRegion, ProtocolFeature, Request

_LOW, _MIDDLE, _HIGH = REGIONS
SPARE: Final = GPA(0x50000)
"""A page in the lowest region, which nothing else uses."""
_ENDS: Final = (GPA(0), GPA(0x9F000), GPA(0x100000), GPA(0x3FF000), GPA(0x401000), GPA(0x7FF000))
"""First and last pages of the regions, as far as nothing else uses them."""
_OUTSIDE: Final = (0xC0000, 0x800000, 1 << 40, (1 << 64) - PAGE_SIZE)
"""Between two regions, behind the last one, far away, at the end of all addresses."""
_TABLE: Final = vhost_user(
    "Memory access", "a user address is looked for in the region of the memory table that holds it"
)
_SLOTS: Final = vhost_user("ADD_MEM_REG", "with CONFIGURE_MEM_SLOTS regions are added and removed one at a time")


def _point_to(stand: Stand, gpa: GPA) -> None:
    """Let X lead to that page, and tell the back end, which may hold another answer."""
    stand.tables.map(IOVA(stand.data.addr), gpa, PAGE_SIZE)
    stand.tables.invalidate()


def _reach(stand: Stand, gpa: GPA, what: str) -> None:
    """Fail unless a request to X, which leads to that page, writes there."""
    fresh = paint("C", gpa, LENGTH)
    stand.memory.ram.write(gpa, fresh)
    watched = stand.write()
    if not watched.done or stand.memory.at(gpa, LENGTH) == fresh:
        landed = stand.pages(watched)
        done = "done" if watched.done else "not done"
        where = f"its bytes are in page {landed}" if landed else "its bytes are not where they belong"
        stand.fail(f"{what}: the request was {done}, {where}")


def _forsake(stand: Stand) -> None:
    """Take X out of the tables, without a word to the back end: it may still hold what it was told. Before there are
    fewer regions: nobody is told of memory that is not there."""
    stand.tables.unmap(IOVA(stand.data.addr), PAGE_SIZE)


def _not_reached(stand: Stand, what: str) -> str:
    """Fail if a request to X, which led to the page that is spare (`_forsake`), still writes there; then mend it."""
    fresh = paint("C", SPARE, PAGE_SIZE)
    stand.memory.ram.write(SPARE, fresh)
    stand.silent()
    if stand.memory.at(SPARE, PAGE_SIZE) != fresh:
        stand.fail(f"{what}: it was written to all the same")
    stand.remap(stand.data)
    stand.invalidate(stand.data.addr, PAGE_SIZE)
    # What was refused need not be asked for again.
    stand.update(stand.data.addr, PAGE_SIZE, stand.data.gpa("A"))
    queue = stand.driver.queues()[0]
    stand.machine.wait(queue.ring.used_moved, SILENT_SECONDS)
    while queue.ring.poll() is not None:
        pass
    return goes_on(stand, f"{what}; a request to memory that is still there")


@case(
    "update-user-address",
    "what an update leads to is a user address, also where it looks like a guest-physical one",
    _TABLE,
    why="A back end that looks it up among the guest addresses finds nothing with most front ends, and other memory of "
    "the guest with some: it then corrupts the guest in silence.",
    fix="Look the address of an update up among the user addresses of the table.",
)
def update_user_address(stand: Stand) -> str:
    """A table whose user addresses are numbers that are guest-physical addresses of other regions."""
    stand.translating(start=False)
    bases = (UVA(0x100000), UVA(0x400000), UVA(0x800000))
    stand.memory.regions = tuple(replace(region, uva=uva) for region, uva in zip(REGIONS, bases, strict=True))
    stand.start()
    stand.asking = True
    stand.must_land(stand.write(), "A", "with user addresses that are guest-physical ones elsewhere")
    return "page A, by its user address"


@case(
    "region-offsets",
    "several regions of one file lie where their offsets say, from their first to their last page",
    vhost_user("Memory regions description", "each region has an offset into the file that comes with it"),
    why="Machine monitors have all of memory in one file, with a hole below 4 GiB: the part above lies at an offset.",
    fix="Map size and offset bytes, or map at the offset; keep it for each region, also if the files are the same.",
)
def region_offsets(stand: Stand) -> str:
    """Let X lead to the first and the last page of each of three regions of one file, none of which begins where the
    file does."""
    stand.translating(start=False)
    stand.asking = True
    stand.start()
    stand.must_land(stand.write(), "A", "three regions of one file")
    for gpa in _ENDS:
        _point_to(stand, gpa)
        _reach(stand, gpa, f"the page at guest-physical 0x{gpa:x}")
    return f"{len(_ENDS)} pages at the ends of three regions of one file"


@case(
    "eight-regions",
    "a table of eight regions is taken",
    vhost_user("SET_MEM_TABLE", "a table without CONFIGURE_MEM_SLOTS has up to eight regions"),
    why="A guest with memory that was plugged in has several regions. One that the back end leaves out is a hole.",
    fix="Take all regions of the table, and as many descriptors as come with it in one message.",
)
def eight_regions(stand: Stand) -> str:
    """The same memory in eight regions, each with user addresses of its own; a request to a page of each."""
    stand.translating(start=False)
    regions = [*_cut(_LOW, 2), *_cut(_MIDDLE, 3), *_cut(_HIGH, 3)]
    stand.memory.regions = tuple(regions)
    stand.asking = True
    stand.start()
    stand.must_land(stand.write(), "A", "a table of eight regions")
    for region in regions:
        gpa = GPA(region.gpa + region.size - PAGE_SIZE)
        _point_to(stand, gpa)
        _reach(stand, gpa, f"the region at guest-physical 0x{region.gpa:x}")
    return "each of them was reached"


def _cut(region: MemoryRegion, pieces: int) -> Iterator[MemoryRegion]:
    """A region in several, whose user addresses are far from each other."""
    step = region.size // pieces & -PAGE_SIZE
    for index in range(pieces):
        at = index * step
        size = region.size - at if index == pieces - 1 else step
        uva = UVA(region.uva + (index << 32) + at)
        yield MemoryRegion(GPA(region.gpa + at), size, uva, region.offset + at)


@case(
    "user-address-border",
    "where the user addresses of one region end, those of the next one begin",
    _TABLE,
    why="A look-up that takes the end of a region for a part of it leads to the bytes behind it in the file: another "
    "guest's, or nobody's.",
    fix="A region reaches from its user address up to, and not including, that plus its size.",
)
def user_address_border(stand: Stand) -> str:
    """Two regions with adjacent user addresses, apart in the file; a buffer over the border, page by page and then by
    one update over both."""
    stand.translating(start=False)
    base = UVA(0x7E60_0000_0000)
    middle, high = replace(_MIDDLE, uva=base), replace(_HIGH, uva=UVA(base + _MIDDLE.size))
    stand.memory.regions = (_LOW, middle, high)
    stand.start()
    stand.prove()
    region = stand.ops.alloc(2 * PAGE_SIZE)
    border = GPA(_HIGH.gpa)
    for index in range(2):
        stand.tables.map(IOVA(region.addr + index * PAGE_SIZE), GPA(border + (index - 1) * PAGE_SIZE), PAGE_SIZE)
    if not _over_border(stand, region.addr, border):
        stand.fail("a buffer over the border, mapped page by page, was not written")
    stand.invalidate(region.addr, 2 * PAGE_SIZE)
    if not stand.update(region.addr, 2 * PAGE_SIZE, border - PAGE_SIZE) or not _over_border(stand, region.addr, border):
        stand.unclear(
            "page by page the border is right; one update over both regions is not taken",
            "the addresses of an update lie within regions, in the plural",
            "an update is of memory in one region",
        )
    return "both sides of the border, by two updates and by one"


def _over_border(stand: Stand, address: int, border: GPA) -> bool:
    """Whether a buffer that ends half in the page before ``border`` and half behind it was written; fail if bytes went
    elsewhere, or only one half is and the request is done."""
    half = LENGTH // 2
    sides = [GPA(border - half), border]
    for gpa in sides:
        stand.memory.ram.write(gpa, b"\xa5" * half)
    before = stand.memory.bytes_of_file()
    going = Going(stand, [(address + PAGE_SIZE - half, LENGTH)], [])
    done = going.done(1.0)
    written = [stand.memory.at(gpa, half) != b"\xa5" * half for gpa in sides]
    if page := _strayed(stand, before, sides):
        stand.fail(f"bytes were written at offset 0x{page:x} of the memory file, which the request does not name")
    if any(written) and not all(written):
        seen = f"of a buffer over a border only the {'first' if written[0] else 'second'} half was written"
        if done and going.request.given[0].length >= LENGTH:
            stand.fail(f"{seen}, and it says that all was")
        stand.unclear(
            f"{seen}, and the request was {'failed' if done else 'not done'}",
            "a request that fails may have been done in part",
            "a buffer is in memory that the device was told of, and has to be reached whole",
        )
    return done and all(written)


def _strayed(stand: Stand, before: bytes, allowed: list[GPA]) -> int | None:
    """Where in the file a page has changed that is none of the driver's, and none of those."""
    after = stand.memory.bytes_of_file()
    known = {stand.memory.offset(gpa) // PAGE_SIZE for gpa in allowed}
    for region in stand.ops.regions:
        for home in region.homes.values():
            known.update(stand.memory.offset(gpa) // PAGE_SIZE for gpa in home.gpas)
    for at in range(0, len(after), PAGE_SIZE):
        if after[at : at + PAGE_SIZE] != before[at : at + PAGE_SIZE] and at // PAGE_SIZE not in known:
            return at
    return None


@case(
    "memory-table-again",
    "the same memory table once more, while rings run, changes nothing",
    vhost_user("Ring states", "while rings are processed, some of the configuration may change"),
    why="Machine monitors send the table whenever memory is plugged or a device is mapped. A ring that stops then, or "
    "pointers that lead into the mapping from before, end the guest's disk or the back end.",
    fix="Finish what is under way, change the map, and find rings and translations anew.",
)
def memory_table_again(stand: Stand) -> str:
    """Send the same table while the ring runs, some times, with a request after each."""
    stand.translating()
    for _ in range(4):
        stand.registers.share_memory()
        watched = stand.write(seconds=1.0)
        if not watched.done:
            revived(stand, "after the same memory table once more")
            stand.unclear(
                "the ring stood still from then on, until a reset",
                "the memory table is a part of the configuration that may change while rings are processed",
                "only some of it may, and it is not said that the memory table does",
            )
        stand.must_land(watched, "A", "after the same memory table once more")
    return "the ring went on after each of four tables"


@case(
    "memory-table-moved",
    "after a memory table with other user addresses, updates are of these",
    _TABLE,
    why="After a table has changed, an old one that is still looked at leads to memory that is mapped no more.",
    fix="Replace the table as a whole, and forget translations that were made by means of the old one.",
)
def memory_table_moved(stand: Stand) -> str:
    """The same memory at other user addresses, told while the ring runs and while translations are known."""
    stand.translating()
    stand.memory.regions = tuple(replace(region, uva=UVA(region.uva + (1 << 36))) for region in REGIONS)
    stand.registers.share_memory()
    watched = stand.write(seconds=0.5)
    stand.must_not_land(watched, "B", "after a table with other user addresses")
    if watched.done and stand.pages(watched) == "A":
        stand.invalidate(stand.data.addr, PAGE_SIZE)
        stand.must_land(stand.write(), "A", "asked for again, and answered by a user address of the new table")
        return "the ring went on, with the new user addresses"
    for region in stand.ops.regions:
        stand.invalidate(region.addr, region.size)
    stand.driver.queues()[0].kick()
    stand.must_land(stand.write(), "A", "after a table with other user addresses, and an invalidation of all")
    stand.unclear(
        "the ring stood still until all translations were invalidated",
        "a table that replaces another takes back what was translated by means of it",
        "it is the front end's to invalidate what it has told",
    )


@case(
    "region-gone",
    "memory that is in no region any more is not touched, although a translation led there",
    vhost_user("IOMMU support", "what an update leads to lies within regions of the memory table"),
    why="The front end has given that memory to somebody else. A back end that keeps it mapped goes on writing there.",
    fix="Unmap what is not in the table any more, and forget every translation that leads there.",
)
def region_gone(stand: Stand) -> str:
    """Use a page of a region, then send a table without it; the translation is not invalidated."""
    stand.translating()
    _point_to(stand, SPARE)
    _reach(stand, SPARE, "a page in the lowest region")
    _forsake(stand)
    stand.memory.regions = (_MIDDLE, _HIGH)
    stand.registers.share_memory()
    words = _not_reached(stand, "a page of a region that is not in the table any more")
    return f"it was not touched any more, and the ring goes on{words}"


@case(
    "region-added",
    "a region that is added can be used, and those before it as well",
    _SLOTS,
    why="Memory that is plugged into a running guest is used at once. A back end that forgets the other regions over "
    "it, or does not find the new one, stops there.",
    fix="ADD_MEM_REG adds one region to those that there are.",
)
def region_added(stand: Stand) -> str:
    """Two regions by ADD_MEM_REG, a ring over them, then a third one while it runs."""
    with _slots(stand) as other:
        other.registers.add_region(_LOW)
        other.memory.regions = REGIONS
        _point_to(other, SPARE)
        _reach(other, SPARE, "a page of the region that was added")
        other.remap(other.data)
        other.must_land(other.write(), "A", "a region that was there before")
    return "the new region and the old ones"


@case(
    "region-removed",
    "memory of a region that was removed is not touched, although a translation led there",
    vhost_user("REM_MEM_REG", "the back end unmaps the region that is named by its addresses and size"),
    why="Memory that was unplugged belongs to the host again. A back end that keeps it keeps it from being given back, "
    "and may write to it.",
    fix="Unmap the region whose guest address, user address and size are those of the message, and forget every "
    "translation that leads there.",
)
def region_removed(stand: Stand) -> str:
    """Use a page of a region, then remove it; the translation is not invalidated."""
    with _slots(stand) as other:
        other.registers.add_region(_LOW)
        other.memory.regions = REGIONS
        _point_to(other, SPARE)
        _reach(other, SPARE, "a page of the region that was added")
        _forsake(other)
        other.memory.regions = (_MIDDLE, _HIGH)
        other.front.must(Request.REM_MEM_REG, _LOW.encode_single())
        words = _not_reached(other, "a page of a region that was removed")
    return f"it was not touched any more, and the ring goes on{words}"


@contextlib.contextmanager
def _slots(stand: Stand) -> Iterator[Stand]:
    """Come back with CONFIGURE_MEM_SLOTS, and bring the device up with two regions that were added one by one."""
    with stand.again(wanted=(*WANTED, ProtocolFeature.CONFIGURE_MEM_SLOTS)) as other:
        other.need(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        other.memory.regions = (_MIDDLE, _HIGH)
        other.registers.one_by_one = True
        other.translating()
        stand.asking = True
        yield other


@case(
    "outside-regions",
    "an address outside of all regions is not accessed, and is not the end of the back end",
    spec("2.7.13", "buffers lie in memory that the driver gave to the device"),
    why="A guest can put any number into a descriptor. A back end that computes a pointer from it gives the guest the "
    "host's memory.",
    fix="Look every guest address up with its length, and fail the request, or stop the ring, if no region holds it.",
)
def outside_regions(stand: Stand) -> str:
    """Without bit 33, let descriptors name addresses between, behind and far away from all regions."""
    for address in _OUTSIDE:
        with stand.again() as other:
            other.plain()
            stand.asking = True
            before = other.memory.bytes_of_file()
            with other.may_hang_up():
                other.write([(address, LENGTH)], [], seconds=SILENT_SECONDS)
            if page := _strayed(other, before, []):
                stand.fail(
                    f"a buffer at 0x{address:x} is in no region; offset 0x{page:x} of the file was written instead"
                )
    return f"nothing was touched at {len(_OUTSIDE)} such addresses; {stand.still_there()}"


@case(
    "buffer-over-regions",
    "a buffer may lie over two regions that are adjacent for the guest and nowhere else",
    vhost_user("Memory access", "a guest address is looked for in the region that holds it"),
    why="For the guest it is one run of memory. What is written behind the first region's mapping is another region's, "
    "or nobody's.",
    fix="Look up how much of a buffer the region holds, and go on with the next region for the rest.",
)
def buffer_over_regions(stand: Stand) -> str:
    """Without bit 33, a buffer of which half ends one region, and half begins the next, elsewhere in the file."""
    stand.plain()
    if not _over_border(stand, _HIGH.gpa - PAGE_SIZE, GPA(_HIGH.gpa)):
        stand.unclear(
            "the buffer was not written, and nothing else either",
            "guest memory is one range of addresses, however it was cut into regions",
            "a buffer that no single region holds is no buffer",
        )
    return "both halves, each in its region"
