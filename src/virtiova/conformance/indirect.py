# SPDX-License-Identifier: Apache-2.0
"""Cases on indirect descriptor tables behind the IOMMU, and on long chains."""

from __future__ import annotations

from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.layouts import Part, await_miss
from virtiova.conformance.stand import Stand
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer
from virtiova.features import Feature
from virtiova.probe.canary import TwinRegion, paint
from virtiova.probe.paths import redirected
from virtiova.probe.rig import LENGTH, SILENT_SECONDS, Watched
from virtiova.ring.layout import DESC_SIZE
from virtiova.spec import spec

_PIECES: Final = 4
_PIECE: Final = LENGTH // _PIECES
_TABLES: Final = spec("2.7.5.3", "an indirect descriptor names a table of descriptors anywhere in memory")
_LONG: Final = 32
"""Buffers of a long chain; every device has room for as many segments."""


def _need(stand: Stand) -> None:
    stand.need_feature(Feature.RING_INDIRECT_DESC)
    stand.translating()


def _pieces(region: TwinRegion) -> list[Buffer]:
    """Buffers in a page, far enough from each other."""
    return [(region.addr + index * 1024, _PIECE) for index in range(_PIECES)]


def _written(stand: Stand, page: str) -> list[int]:
    """Which of the pieces were written to in that page."""
    gpa = stand.data.gpa(page)
    held, fresh = stand.memory.at(gpa, PAGE_SIZE), paint(page, gpa, PAGE_SIZE)
    places = [slice(at, at + _PIECE) for at in range(0, _PIECES * 1024, 1024)]
    return [index for index, place in enumerate(places) if held[place] != fresh[place]]


def _ask(stand: Stand, table: DmaRegion, seconds: float) -> Watched:
    """A request through ``table`` that fills the four pieces."""
    watches = stand.paint_data(PAGE_SIZE)
    request = stand.driver.make_device_write(_pieces(stand.data), table)
    watched = stand.observe(request, watches, seconds=seconds)
    stand.witnesses = watched.witnesses
    return watched


def _table(stand: Stand) -> tuple[TwinRegion, Part]:
    """Two pages that are not adjacent, and a table in them whose third descriptor is the first on the second page."""
    region = stand.ops.alloc(2 * PAGE_SIZE)
    return region, Part(region, PAGE_SIZE - 2 * DESC_SIZE)


def _all_written(stand: Stand, watched: Watched, what: str) -> None:
    done, elsewhere = _written(stand, "A"), _written(stand, "B")
    if not watched.done or len(done) != _PIECES or elsewhere:
        stand.fail(
            f"{what}: the request was {'' if watched.done else 'not '}done, and of its {_PIECES} buffers {len(done)} "
            f"were written where they are mapped, {len(elsewhere)} at the bare address"
        )


@case(
    "indirect-iova",
    "an indirect table is found where its address is mapped",
    vhost_user("IOMMU support", "with VIRTIO_F_ACCESS_PLATFORM every address in a ring is an I/O address"),
    why="Most drivers put nearly every request behind an indirect table. One that is read at the bare address is "
    "whatever the guest's memory has there, and its buffers are written.",
    fix="Translate the address of the table like that of a buffer, with read access.",
)
def indirect_iova(stand: Stand) -> str:
    """Let the two copies of a table name different buffers, and see which one is written."""
    _need(stand)
    table = stand.ops.alloc(PAGE_SIZE)
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)], table)
    watched = stand.observe(request, redirected(stand, table))
    stand.witnesses = watched.witnesses
    if not watched.done or stand.pages(watched, "via-A") != "A" or stand.pages(watched, "via-B"):
        stand.fail(
            f"the request was {'' if watched.done else 'not '}done; by the mapped table it wrote to "
            f"{stand.pages(watched, 'via-A') or 'no page'}, by the one at the bare address to "
            f"{stand.pages(watched, 'via-B') or 'no page'}"
        )
    return "the mapped table was used"


@case(
    "indirect-two-pages",
    "an indirect table may lie over two pages that are not adjacent",
    _TABLES,
    why="What lies behind the table's first page is another table, or data: descriptors made of it name memory that "
    "the request has nothing to do with.",
    fix="Translate each descriptor of a table, or each page of it. It is contiguous for the driver, not in memory.",
)
def indirect_two_pages(stand: Stand) -> str:
    """A table whose first two descriptors end one page, and whose others begin the next."""
    _need(stand)
    _, table = _table(stand)
    _all_written(stand, _ask(stand, table, 2.0), "a table over two pages")
    return "all buffers of a table over two pages were written"


@case(
    "indirect-page-late",
    "a request waits for a page of its indirect table",
    vhost_user("IOMMU support", "a miss is answered by an update, at the front end's leisure"),
    why="A request that goes on with half of its table is done half, or with descriptors of the page before.",
    fix="Read all of a table before anything of the request is done. Leave the ring as it is until a page has come.",
)
def indirect_page_late(stand: Stand) -> str:
    """Answer the question for the table's second page after a while."""
    _need(stand)
    region, table = _table(stand)
    stand.hold(region.addr, region.addr + PAGE_SIZE)
    stand.paint_data(PAGE_SIZE)
    request = stand.driver.make_device_write(_pieces(stand.data), table)
    request.go()
    first = await_miss(stand, request, region.addr)
    if first is not None:
        first.answer()
    second = await_miss(stand, request, region.addr + PAGE_SIZE)
    if second is None:
        stand.fail("the second page of the table was not asked for")
    stand.pump(SILENT_SECONDS / 2)
    if request.done():
        stand.fail("the request was used, without the second page of its table")
    if early := [index for index in _written(stand, "A") + _written(stand, "B") if index >= 2]:
        stand.fail(f"buffer {early[0]} was written, without the page of the table that names it")
    stand.held.append(second)
    stand.release()
    done = stand.machine.wait(request.done, 2.0)
    _all_written(stand, Watched(done, [], [], [], 0), "after the answer")
    return "nothing before the answer, all after it"


@case(
    "indirect-page-refused",
    "a page of an indirect table that is not mapped is not read",
    vhost_user("IOMMU support", "a miss of an address that is not mapped gets no update"),
    why="A device that reads its descriptors around the IOMMU lets whoever fills that memory choose what it writes to.",
    fix="A table of which a page is refused makes the request impossible: answer it with an error if that can be done, "
    "else stop the ring.",
)
def indirect_page_refused(stand: Stand) -> str:
    """Leave the table's second page unmapped; both of its homes hold descriptors that would work."""
    _need(stand)
    region, table = _table(stand)
    page = IOVA(region.addr + PAGE_SIZE)
    stand.tables.unmap(page, PAGE_SIZE)
    before = stand.misses(page)
    # Taking the page out of the tables spoils it, so what it holds is written after that.
    _ask(stand, table, SILENT_SECONDS)
    wrong = [index for index in _written(stand, "A") if index >= 2] + _written(stand, "B")
    if wrong:
        stand.fail(f"buffer {wrong[0]} was written, which only the page that is not mapped names")
    if stand.misses(page) == before:
        stand.unclear(
            "the page was not asked for, and none of its descriptors was used",
            "a back end may give up a table before it gets as far",
            "it has to ask for what it misses",
        )
    return "it was asked for, refused, and not read"


@case(
    "indirect-read-only",
    "an indirect table needs no permission to write",
    spec("2.7.5.3.2", "the device reads the table; the write flag of the descriptor that names it is ignored"),
    why="Drivers map a table for the device to read. A back end that asks for more is refused, and the guest's disk "
    "stands still.",
    fix="Ask for read access to an indirect table, whatever the flags of its descriptor say.",
)
def indirect_read_only(stand: Stand) -> str:
    """Map the table's page read-only."""
    _need(stand)
    table = stand.ops.alloc(PAGE_SIZE)
    stand.ops.map(table, Access.READ)
    _all_written(stand, _ask(stand, table, 1.0), "a table that is mapped read-only")
    return "read access was enough"


@case(
    "long-chain",
    "a chain of many descriptors over many pages is done whole",
    spec("2.7.4.1", "a device makes no assumptions on how a message is cut into descriptors"),
    why="Requests of a fragmented guest have dozens of buffers. One that is cut short, or written at the wrong place "
    "from some buffer on, is silent corruption.",
    fix="Walk a chain to its end, up to the queue's size, and translate each buffer.",
)
def long_chain(stand: Stand) -> str:
    """32 buffers of 16 bytes, each on another page than the one before, four pages in turn."""
    stand.translating(size=64)
    region = stand.ops.alloc(4 * PAGE_SIZE)
    piece = LENGTH // _LONG
    places = [(index % 4) * PAGE_SIZE + 64 * (index // 4) for index in range(_LONG)]
    for home in region.homes.values():
        home.write(0, b"\xa5" * region.size)
    request = stand.driver.make_device_write([(region.addr + place, piece) for place in places])
    watched = stand.observe(request, [])
    held = {page: home.read(0, region.size) for page, home in region.homes.items()}
    fresh = b"\xa5" * piece
    done = [place for place in places if held["A"][place : place + piece] != fresh]
    if not watched.done or len(done) != _LONG:
        stand.fail(
            f"the request was {'' if watched.done else 'not '}done, {len(done)} of its {_LONG} buffers are written"
        )
    expected = bytearray(b"\xa5" * region.size)
    for place in places:
        expected[place : place + piece] = held["A"][place : place + piece]
    if held["A"] != expected or held["B"] != b"\xa5" * region.size:
        stand.fail("bytes were written between the buffers, or at the bare addresses")
    return f"{_LONG} buffers, and nothing beside them"
