# SPDX-License-Identifier: Apache-2.0
"""Cases on mappings of many sizes, at odd places, beside one another, and many of them."""

from __future__ import annotations

import os
import struct
import time
from typing import Final

from virtiova.addr import GPA, PAGE_SIZE, UVA, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, HALF, Going, Row, Told, give, must_be, unstuck, up, watch
from virtiova.conformance.stand import Stand
from virtiova.conformance.wrong import answered_unasked
from virtiova.machine.qemu.process import sealed_file
from virtiova.machine.vhost_user.asked import Asked
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.probe.canary import paint
from virtiova.probe.rig import LENGTH
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage, MemoryRegion, Message, Request, encode_table

_SPAN: Final = vhost_user(
    "An IOTLB message", "an entry maps as many bytes as its size says, to consecutive user addresses"
)
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_TOP: Final = (1 << 64) - PAGE_SIZE
_MANY: Final = 65536
_APART: Final = 2 * PAGE_SIZE
_AT_A_TIME: Final = 4096
_MANY_SECONDS: Final = 3.0
"""The reference takes a tenth of that for all of them."""
_TELL: Final = struct.Struct("<12sQQQBB6x")


def _across(stand: Stand, first: int, second: int, behind: int, what: str) -> str:
    """Two pages with neighbouring addresses, and one buffer across both; ``behind`` is the page that follows the first
    one in memory."""
    told = Told(stand)
    told.tell(FAR, PAGE_SIZE, first)
    told.tell(FAR + PAGE_SIZE, PAGE_SIZE, second)
    start = PAGE_SIZE - HALF
    watches = [
        watch(stand, "A", first + start, HALF),
        watch(stand, "A", second, HALF, "data2"),
        watch(stand, "N", behind, HALF, "data3"),
    ]
    going = Going(stand, [(FAR + start, LENGTH)], watches)
    done = going.done()
    going.must_not_land(f"{what}: behind the first page", role="data3")
    if not done or (going.landed(), going.landed("data2")) != ("A", "A"):
        stand.fail(
            f"{what}: the request was {'done' if done else 'not done'}, and not both halves are where they belong"
        )
    return "each half is where its own mapping points"


@case(
    "neighbours-apart",
    "mappings that are neighbours by address need not be neighbours in memory",
    _SPAN,
    why="A back end that joins entries by their addresses alone writes the rest of a buffer behind the first page, in "
    "memory that belongs to others: with buffers over two pages that is every request.",
    fix="A look-up may return only as many bytes as follow one another in memory too; look the rest up by itself.",
)
def neighbours_apart(stand: Stand) -> str:
    """One buffer over two pages that are told one by one, and lie apart in memory; watch the page behind the first."""
    up(stand)
    run = stand.machine.pages.run(2)
    return _across(stand, run, stand.ops.spare("Q"), run + PAGE_SIZE, "two pages that lie apart")


@case(
    "neighbours-in-two-regions",
    "neighbours in guest memory may lie in two regions",
    _SPAN,
    why="Guest memory that looks like one run is several mappings in the back end, as above and below the hole for "
    "devices. Who adds to a pointer past the end of a region writes to whatever he has mapped there.",
    fix="Look up the region of every piece, and cut where a region ends.",
)
def neighbours_in_two_regions(stand: Stand) -> str:
    """One buffer over the last page of one memory region, and the first one of the next: the guest sees no border."""
    up(stand)
    end = REGIONS[1].gpa + REGIONS[1].size
    return _across(stand, end - PAGE_SIZE, end, end + PAGE_SIZE, "two pages of two regions")


@case(
    "mapping-2mib",
    "in a mapping of 2 MiB every byte is where it belongs",
    _SPAN,
    why="Guests map large pages, and front ends tell of them as one entry. A back end that takes its offset in a 4 KiB "
    "page puts everything into the first one.",
    fix="Add the distance from the start of the entry, not the low bits of the address, to the user address.",
)
def mapping_2mib(stand: Stand) -> str:
    """One UPDATE of 2 MiB; then requests at its start, in its middle and at its end."""
    up(stand)
    told = Told(stand)
    size = 2 * _MIB
    run = stand.machine.pages.run(size // PAGE_SIZE, align=size)
    told.tell(FAR, size, run)
    offsets = {"P": 0, "Q": _MIB + 0x5010, "R": size - LENGTH}
    for page, offset in offsets.items():
        pages = {each: run + at for each, at in offsets.items()}
        must_be(stand, FAR + offset, page, pages, f"0x{offset:x} bytes into a mapping of 2 MiB")
    return "start, middle and end"


@case(
    "mapping-1gib",
    "in a mapping of 1 GiB every byte is where it belongs",
    _SPAN,
    why="With large pages, or an IOMMU that is switched off, one entry covers gigabytes: offsets then no longer fit "
    "what was good for a page.",
    fix="Keep addresses, sizes and the difference of both in 64 bits, and use no page size that nobody has named.",
)
def mapping_1gib(stand: Stand) -> str:
    """A memory region of 1 GiB more, and one UPDATE of all of it; then requests at its start, in it and at its end."""
    up(stand)
    region = MemoryRegion(GPA(4 * _GIB), _GIB, UVA(0x7E40_0000_0000), 0)
    fd = sealed_file("virtiova-large", _GIB)
    try:
        regions = (*stand.memory.regions, region)
        fds = [stand.memory.fd] * len(stand.memory.regions) + [fd]
        stand.front.must(Request.SET_MEM_TABLE, encode_table(regions), fds)
        stand.front.on_miss = lambda asked: _large(stand, asked, region)
        stand.front.post_update(FAR, _GIB, region.uva, Access.RW)
        stand.front.barrier()
        for offset in (0, 0x123_4560, _GIB - LENGTH):
            text = paint("L", offset, LENGTH)
            os.pwrite(fd, text, offset)
            going = Going(stand, [(FAR + offset, LENGTH)], [])
            done = going.done()
            if not done or os.pread(fd, LENGTH, offset) == text:
                stand.fail(
                    f"0x{offset:x} bytes into a mapping of 1 GiB: the request was {'done' if done else 'not done'}, "
                    f"its bytes are elsewhere"
                )
    finally:
        os.close(fd)
    return "start, middle and end"


def _large(stand: Stand, asked: Asked, region: MemoryRegion) -> None:
    if FAR <= asked.iova < FAR + _GIB:
        stand.front.post_update(FAR, _GIB, region.uva, Access.RW, lambda payload: asked.reply(ok=not any(payload)))
    else:
        asked.answer()


@case(
    "mapping-odd",
    "a mapping may begin and end anywhere",
    _SPAN,
    why="Neither the protocol nor this back end's front end has a page size. Who rounds an entry to pages opens what "
    "lies beside it, or misses what is in it.",
    fix="Compare addresses with start and end of the entry as they are; if entries have to be whole pages, refuse "
    "others when they come.",
)
def mapping_odd(stand: Stand) -> str:
    """An UPDATE of 0x777 bytes from 0x123 on, to a user address that has other low bits; then a request in it, and one
    past its end."""
    up(stand)
    told = Told(stand)
    start, size = FAR + 0x123, 0x777
    page = stand.ops.spare("P")
    gpa = page + 0x345
    said = told.tell(start, size, gpa)
    inside = Going(stand, [(start + 0x100, LENGTH)], [watch(stand, "P", gpa + 0x100)])
    done = inside.patiently()
    found = inside.landed()
    if done and not found:
        stand.fail("a request in a mapping of 0x777 bytes: done, and its bytes are not where the mapping points")
    watches = [watch(stand, "N", gpa + size, HALF)]
    past = Going(stand, [(start + size - HALF, LENGTH)], watches)
    past.settle(FAR, stand.misses(FAR))
    past.must_not_land("past the end of a mapping of 0x777 bytes")
    told.forget(start, size)
    words = unstuck(stand, past, FAR, "after a mapping of 0x777 bytes")
    if not found:
        stand.unclear(
            f"the UPDATE was {'acknowledged' if said else 'refused'}, and not followed",
            "an entry may be of any size and at any address",
            "an entry is of whole pages: the front end has to split or refuse what is not",
        )
    return f"reached, and not past its end{words}"


@case(
    "mapping-at-the-top",
    "the last page of the address space is a page as any other",
    _SPAN,
    why="A range that ends at 2^64 has an end that reads 0. Who compares with that never finds the entry, or never "
    "removes it: invalidations of all addresses end there, too.",
    fix="Keep the last byte of a range, or its size, instead of the address behind it.",
)
def mapping_at_the_top(stand: Stand) -> str:
    """UPDATE of the last 4 KiB below 2^64; then a request in the middle of them."""
    up(stand)
    told = Told(stand)
    page = stand.ops.spare("P")
    told.tell(_TOP, PAGE_SIZE, page)
    must_be(stand, _TOP + 0x400, "P", {"P": page + 0x400, "N": page}, "the last page below 2^64")
    return "reached"


@case(
    "many-mappings",
    "with 65,536 mappings each of them can be used, and within reasonable time",
    vhost_user("IOMMU support", "what is not in the IOTLB any more is asked for again"),
    why="Drivers of fast devices keep tens of thousands of buffers mapped. A table that is full, and gives nothing up, "
    "stops the device; one that is searched from end to end stops the machine.",
    fix="Throw out an old entry for a new one, or make room; look up by a tree, not by a list.",
)
def many_mappings(stand: Stand) -> str:
    """UPDATE of 65,536 pages, one by one; then requests to the last, the first and one in the middle."""
    up(stand)
    pages = {page: int(stand.ops.spare(page)) for page in "PQRSTUV"}
    homes = list(pages.values())

    def row(number: int) -> Row:
        return Row(FAR + number * _APART, PAGE_SIZE, homes[number % len(homes)])

    def answer(asked: Asked) -> None:
        number, offset = divmod(asked.iova - FAR, _APART)
        if 0 <= number < _MANY and offset < PAGE_SIZE:
            give(stand, asked, row(number))
        else:
            asked.answer()

    stand.front.on_miss = answer
    uvas = [stand.memory.uva(gpa) for gpa in homes]
    blank = IotlbMessage(0, 0, 0, Access.RW, IotlbKind.UPDATE)  # type: ignore[arg-type]
    head = Message(Request.IOTLB_MSG, blank.encode()).encode()[:12]
    count, began = 0, time.monotonic()
    while count < _MANY and time.monotonic() - began < _MANY_SECONDS:
        told = [
            _TELL.pack(head, FAR + each * _APART, PAGE_SIZE, uvas[each % len(uvas)], Access.RW.value, IotlbKind.UPDATE)
            for each in range(count, count + _AT_A_TIME)
        ]
        answered_unasked(stand, lambda told=told: _tell(stand, b"".join(told)))  # type: ignore[misc]
        count += _AT_A_TIME
    took = time.monotonic() - began
    for number in (count - 1, 0, count // 2):
        page = "PQRSTUV"[number % len(homes)]
        must_be(stand, FAR + number * _APART, page, pages, f"mapping {number + 1} of {count}")
    if count < _MANY:
        stand.unclear(
            f"{count} mappings took {took:.1f} s; {_MANY} were not waited for",
            "nothing is said of how long an UPDATE may take",
            "the guest waits for it: what it maps has to be there at once, however much there is",
        )
    return "first, middle and last"


def _tell(stand: Stand, messages: bytes) -> None:
    """Send them, and wait until they are taken."""
    stand.front.stream(messages)
    stand.front.wait(stand.front.post(Request.GET_FEATURES, need_reply=False), 2 * _MANY_SECONDS)
