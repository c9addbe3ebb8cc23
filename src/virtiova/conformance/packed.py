# SPDX-License-Identifier: Apache-2.0
"""Cases on packed rings: where their parts lie, how they go round, and who tells whom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.layouts import apart, each_used, echoed, lay_out, many, written_queue
from virtiova.conformance.stand import Stand
from virtiova.driver.base import QUEUE_SIZE, Buffer
from virtiova.features import Feature, has
from virtiova.probe.paths import redirected
from virtiova.probe.rig import LENGTH, SILENT_SECONDS, twin
from virtiova.ring.layout import EVENT_DISABLE, EVENT_ENABLE, PackedLayout
from virtiova.spec import spec

_CALL_SECONDS: Final = 1.0
_LARGE: Final = 600
"""Descriptors over three pages."""
_LAPS: Final = 6


@contextlib.contextmanager
def _packed(stand: Stand) -> Iterator[Stand]:
    """Come back as a front end that takes packed rings."""
    if not has(stand.vhost.offered, Feature.RING_PACKED):
        stand.skip("the back end offers no packed rings")
    with stand.again(packed=True) as other:
        other.translating(start=False)
        yield other


def _run(stand: Stand, other: Stand, layout: PackedLayout | None = None) -> None:
    lay_out(other, layout or PackedLayout(QUEUE_SIZE))
    stand.asking = True


@case(
    "packed-iova",
    "with bit 33 each part of a packed ring is found where its address is mapped",
    vhost_user("IOMMU support", "with VIRTIO_F_ACCESS_PLATFORM ring addresses are I/O addresses as well"),
    why="The two event structures are easily forgotten: a back end that translates the ring and not them reads wishes "
    "that nobody has, and writes its own into other memory.",
    fix="Translate all three addresses of SET_VRING_ADDR: descriptor ring, driver area, device area.",
)
def packed_iova(stand: Stand) -> str:
    """The copies of the ring name different buffers; that of the driver's area at the bare address wants no
    interrupts. Each part has a page of its own."""
    with _packed(stand) as other:
        layout = apart(QUEUE_SIZE, packed=True)
        assert isinstance(layout, PackedLayout)
        _run(stand, other, layout)
        queue = written_queue(other)
        region = twin(queue.region)
        request = other.driver.make_device_write([(other.data.addr, LENGTH)])
        watches = redirected(other, region)
        region.homes["B"].store16(layout.driver + 2, EVENT_DISABLE)
        watched = other.observe(request, watches)
        other.witnesses = watched.witnesses
        if not watched.done or other.pages(watched, "via-A") != "A" or other.pages(watched, "via-B"):
            found = "".join(f"{role} " for role in ("via-A", "via-B") if other.pages(watched, role))
            stand.fail(f"the request was {'' if watched.done else 'not '}done, by copies {found or 'none'}; wanted A")
        if "B" in other.pages(watched, "ring") or "B" in other.pages(watched, "driver"):
            stand.fail("a part of the ring was written at its bare address")
        if not other.machine.wait(lambda: other.registers.calls[queue.index] > 0, _CALL_SECONDS):
            stand.fail("no interrupt came: the driver's area was read at its bare address, where none is wanted")
    return "descriptor ring, driver area and device area were those behind the mapping"


def _three(stand: Stand) -> list[Buffer]:
    """A request's buffers in three pieces."""
    return [(stand.data.addr, 172), (stand.data.addr + 172, 170), (stand.data.addr + 342, 170)]


def _go_round(stand: Stand, other: Stand, size: int) -> None:
    laps = 0
    while laps < _LAPS * size:
        ring = written_queue(other).ring
        before = ring.room
        request = other.driver.make_device_write(_three(other))
        laps += before - ring.room
        request.go()
        if not other.machine.wait(request.done, 2.0) or ring.poll() is None:
            stand.fail(f"a packed ring of {size} stands still after {laps} descriptors, {laps / size:.1f} rounds")
    other.must_land(other.write(), "A", f"a packed ring of {size} after {_LAPS} rounds")


@case(
    "packed-wrap",
    "a packed ring goes round, also within a chain",
    spec("2.8.1", "each end keeps a wrap counter that changes when it goes past the end of the ring"),
    why="A wrap counter that is lost makes the device take old descriptors for new ones, or wait for ever.",
    fix="Change the counter whenever an index goes past the end, also by a chain that begins before it; go on behind "
    "the chain's last descriptor.",
)
def packed_wrap(stand: Stand) -> str:
    """Chains of several descriptors, one after the other, for six rounds of a ring of eight."""
    with _packed(stand) as other:
        _run(stand, other)
        _go_round(stand, other, QUEUE_SIZE)
    return f"{_LAPS} rounds"


@case(
    "packed-odd-size",
    "a packed ring may have any size",
    spec("2.8.10.1", "the size of a packed ring need not be a power of two"),
    why="Hardware has rings of 255, and drivers take what they are offered. An index cut by a mask goes astray.",
    fix="Compare the index with the size and take that off. A mask serves powers of two only.",
)
def packed_odd_size(stand: Stand) -> str:
    """The same with a ring of 13."""
    with _packed(stand) as other:
        stand.asking = True
        _run(stand, other, PackedLayout(13))
        _go_round(stand, other, 13)
    return f"{_LAPS} rounds of 13 descriptors"


@case(
    "packed-many-pages",
    "a packed ring may lie over pages that are not adjacent",
    spec("2.8", "the descriptor ring is contiguous for the device, behind whatever translates"),
    why="What is behind the first page is other memory: the device takes it for requests, and writes there.",
    fix="Translate each page of the ring.",
)
def packed_many_pages(stand: Stand) -> str:
    """A ring of 600 descriptors over three pages, which goes round."""
    with _packed(stand) as other:
        _run(stand, other, PackedLayout(_LARGE))
        ring = written_queue(other).ring
        slots = _slots(other)
        count = _LARGE // slots + 2
        done = many(other, count)
        if done < count and not echoed(other):
            stand.fail(f"of {count} requests {done} were used")
        other.must_land(other.write(), "A", f"the request after {done}")
        pages = ring.layout.total // PAGE_SIZE + 1
    return f"{done + 1} requests of {slots} descriptors over {pages} pages"


def _slots(stand: Stand) -> int:
    """How many descriptors a request takes; it is made, and used."""
    ring = written_queue(stand).ring
    room = ring.room
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    taken = room - ring.room
    request.go()
    stand.machine.wait(request.done, 2.0)
    ring.poll()
    return taken


@case(
    "packed-page-invalidated",
    "a page of a running packed ring is asked for again once it was taken back",
    vhost_user("IOMMU support", "an invalidation takes back what an update said of these addresses"),
    why="A ring that is translated once is used at its old place for ever, whatever is there now.",
    fix="Drop what is remembered of all three parts whenever an invalidation touches them.",
)
def packed_page_invalidated(stand: Stand) -> str:
    """Invalidate the page of each part in turn, with the ring running."""
    with _packed(stand) as other:
        _run(stand, other, _apart())
        other.must_land(other.write(), "A", "the first request")
        for name, page in zip(("descriptor ring", "driver area", "device area"), _pages(other), strict=True):
            before = other.misses(page)
            other.invalidate(page, PAGE_SIZE)
            other.must_land(other.write(), "A", f"after the {name} was invalidated")
            # The areas it may do without: it then tells, and is told, once too often.
            if name == "descriptor ring" and other.misses(page) == before:
                stand.fail("the descriptor ring was invalidated, and used without being asked for again")
        asked = sum(other.misses(page) for page in _pages(other))
    return f"{asked} questions for its pages, and the ring went on"


def _called_again(stand: Stand, index: int, before: int, seconds: float) -> bool:
    return stand.machine.wait(lambda: stand.registers.calls[index] > before, seconds)


def _apart() -> PackedLayout:
    layout = apart(QUEUE_SIZE, packed=True)
    assert isinstance(layout, PackedLayout)
    return layout


def _pages(stand: Stand) -> list[int]:
    return [part & -PAGE_SIZE for part in written_queue(stand).ring.parts]


@case(
    "packed-interrupt-flag",
    "of a packed ring the driver's area says whether interrupts are wanted, each time anew",
    spec("2.8.10", "the driver's event suppression structure turns notifications off and on"),
    why="A driver that polls turns them off and on again. One that is not told any more sleeps over what is done.",
    fix="Read the driver's area after the used descriptor was written, every time.",
)
def packed_interrupt_flag(stand: Stand) -> str:
    """Requests with interrupts wanted, not wanted, and wanted again."""
    with _packed(stand) as other:
        _run(stand, other, _apart())
        queue = written_queue(other)
        region, layout = twin(queue.region), _apart()
        extra = 0
        for flag in (EVENT_ENABLE, EVENT_DISABLE, EVENT_ENABLE):
            region.store16(layout.driver + 2, flag)
            before = other.registers.calls[queue.index]
            request = other.driver.make_device_write([(other.data.addr, LENGTH)])
            request.go()
            if not other.machine.wait(request.done, 2.0):
                stand.fail("a request was not used")
            seconds = _CALL_SECONDS if flag == EVENT_ENABLE else SILENT_SECONDS / 2
            came = _called_again(other, queue.index, before, seconds)
            if flag == EVENT_ENABLE and not came:
                stand.fail("a request was used, interrupts were wanted, and none came")
            extra += came and flag == EVENT_DISABLE
            queue.ring.poll()
    return "told when it was wanted" + (", and when it was not as well" if extra else ", and not else")


@case(
    "packed-indirect",
    "an indirect table of a packed ring is found where its address is mapped",
    spec("2.8.7", "an indirect descriptor of a packed ring names a table of descriptors anywhere in memory"),
    why="A table read at the bare address is whatever the guest's memory has there, and its buffers are written.",
    fix="Translate the address of the table like that of a buffer, with read access.",
)
def packed_indirect(stand: Stand) -> str:
    """Let the two copies of a table name different buffers, and see which one is written."""
    with _packed(stand) as other:
        other.need_feature(Feature.RING_INDIRECT_DESC)
        _run(stand, other)
        if not each_used(other, 1):
            stand.fail("an ordinary request was not used")
        table = other.ops.alloc(PAGE_SIZE)
        request = other.driver.make_device_write([(other.data.addr, LENGTH)], table)
        watched = other.observe(request, redirected(other, table))
        other.witnesses = watched.witnesses
        if not watched.done or other.pages(watched, "via-A") != "A" or other.pages(watched, "via-B"):
            where = "".join(f"{role} " for role in ("via-A", "via-B") if other.pages(watched, role))
            stand.fail(f"the request was {'' if watched.done else 'not '}done, by copies {where or 'none'}; wanted A")
    return "the mapped table was used"
