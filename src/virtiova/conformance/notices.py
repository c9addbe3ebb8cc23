# SPDX-License-Identifier: Apache-2.0
"""Cases on who tells whom: interrupts and kicks, wanted and not wanted; and on requests given back in order."""

from __future__ import annotations

from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.conformance.case import case
from virtiova.conformance.layouts import await_miss, many, written_queue, written_ring
from virtiova.conformance.stand import Stand
from virtiova.features import Feature
from virtiova.probe.rig import LENGTH, SILENT_SECONDS
from virtiova.ring.layout import AVAIL_F_NO_INTERRUPT
from virtiova.spec import spec

_CALL_SECONDS: Final = 1.0
_TOGETHER: Final = 4


def _calls(stand: Stand) -> int:
    return stand.registers.calls[written_queue(stand).index]


def _call_after(stand: Stand, before: int) -> bool:
    return stand.machine.wait(lambda: _calls(stand) > before, _CALL_SECONDS)


def _used_by(stand: Stand, count: int, *, event: int | None = None) -> None:
    """So many requests, published together, of which none is polled before all are used. ``event`` is how many of them
    may be used before the driver wants to hear of it."""
    region, layout = written_ring(stand)
    start = region.load16(layout.used + 2)
    if event is not None:
        region.store16(layout.avail + layout.used_event, (start + event) & 0xFFFF)
    requests = [stand.driver.make_device_write([(stand.data.addr, LENGTH)]) for _ in range(count)]
    for request in requests:
        request.go()
    done = stand.machine.wait(lambda: (region.load16(layout.used + 2) - start) & 0xFFFF == count, 2.0)
    if not done:
        stand.fail(f"of {count} requests {(region.load16(layout.used + 2) - start) & 0xFFFF} were used")


def _poll(stand: Stand) -> None:
    ring = written_queue(stand).ring
    while ring.poll() is not None:
        pass


@case(
    "event-idx-interrupt",
    "a used index that passes used_event is told, also in the middle of several",
    spec("2.7.7.2", "with VIRTIO_F_EVENT_IDX the device notifies when the used index goes past used_event"),
    why="A device that compares for equality only misses the mark when it uses several requests at once: the guest "
    "sleeps over a disk that is done.",
    fix="Notify if used_event lies anywhere between the old and the new used index, in 16 bits (vring_need_event).",
)
def event_idx_interrupt(stand: Stand) -> str:
    """Four requests at once, with the driver wanting to hear of the second; then four of which it wants none told."""
    stand.need_feature(Feature.RING_EVENT_IDX)
    stand.translating(size=64)
    for wanted in range(_TOGETHER):
        _poll(stand)
        stand.pump(SILENT_SECONDS / 10)
        before = _calls(stand)
        _used_by(stand, _TOGETHER, event=wanted)
        if not _call_after(stand, before):
            stand.fail(f"{_TOGETHER} requests were used, request {wanted} was to be told, and no interrupt came")
    _poll(stand)
    stand.pump(SILENT_SECONDS / 10)
    before = _calls(stand)
    _used_by(stand, _TOGETHER, event=1000)
    stand.pump(SILENT_SECONDS / 2)
    extra = _calls(stand) - before
    return "each was told" + (f"; so were {extra} that nobody wanted to hear of" if extra else ", and no other")


@case(
    "interrupt-flag",
    "without EVENT_IDX the flag of the available ring says whether interrupts are wanted, each time anew",
    spec("2.7.7.2", "without VIRTIO_F_EVENT_IDX the device notifies if the flag is 0, and does not look at used_event"),
    why="A driver that polls sets the flag and clears it again. A device that has seen it once, or goes by used_event, "
    "leaves it asleep.",
    fix="Read the flag after the used index was written, every time. Use used_event only if bit 29 is negotiated.",
)
def interrupt_flag(stand: Stand) -> str:
    """Leave EVENT_IDX alone. Requests with the flag clear, set and clear again, with used_event far away."""
    stand.translating(start=False, leave=[Feature.RING_EVENT_IDX])
    stand.start()
    stand.prove()
    region, layout = written_ring(stand)
    region.store16(layout.avail + layout.used_event, 1000)
    extra = 0
    for flag in (0, AVAIL_F_NO_INTERRUPT, 0):
        region.store16(layout.avail, flag)
        stand.pump(SILENT_SECONDS / 10)
        before = _calls(stand)
        _used_by(stand, 1)
        if not flag and not _call_after(stand, before):
            stand.fail("a request was used with the flag clear, and no interrupt came")
        if flag:
            stand.pump(SILENT_SECONDS / 2)
            extra = _calls(stand) - before
        _poll(stand)
    return "told with the flag clear" + (", and with it set as well" if extra else ", not told with it set")


@case(
    "kick-when-asked",
    "a driver that kicks only when it is asked to is served",
    spec("2.7.10", "the device says by its flag, or by avail_event, when it wants to be notified"),
    why="Drivers leave out every kick that they may. A device that does not renew its wish before it sleeps is not "
    "woken by the next request.",
    fix="Write the wish, then look once more at the available index, then sleep.",
)
def kick_when_asked(stand: Stand) -> str:
    """Requests with pauses in between, in which the device goes to sleep; kicked only as far as the ring says so."""
    stand.translating(start=False)
    stand.start(size=64)
    stand.asking = True
    for count in (1, 1, 2, 1, 3, 1):
        if many(stand, count) < count:
            stand.fail("a request was published, and not kicked for as the ring said; it was never used")
        stand.pump(SILENT_SECONDS / 10)
    stand.must_land(stand.write(), "A", "the last request")
    return "all were used"


@case(
    "in-order",
    "with IN_ORDER a request is not given back before an earlier one",
    spec("2.7.9", "with VIRTIO_F_IN_ORDER the device uses buffers in the order in which they were made available"),
    why="The driver takes whatever is used for the oldest that it has. Data of one request are then given to another.",
    fix="Hold back what is done until everything before it is, or do not offer bit 35.",
)
def in_order(stand: Stand) -> str:
    """Two requests, the first to a page that is answered late; the second could be done at once."""
    stand.need_feature(Feature.IN_ORDER)
    stand.translating()
    region, layout = written_ring(stand)
    late = stand.ops.alloc(PAGE_SIZE)
    start = region.load16(layout.used + 2)
    stand.hold(late.addr)
    first = stand.driver.make_device_write([(late.addr, LENGTH)])
    second = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    for request in (first, second):
        request.go()
    # The second may be given back before the question for the first is read.
    asked = await_miss(stand, first, late.addr) or stand.await_miss(late.addr)
    if asked is None:
        stand.skip("the device does not ask for the buffer of the first request: a network may drop what it is for")
    stand.pump(SILENT_SECONDS)
    if region.load16(layout.used + 2) != start:
        stand.fail("a request was given back while the one before it waits for its buffer")
    stand.held.append(asked)
    stand.release()
    if not stand.machine.wait(lambda: (region.load16(layout.used + 2) - start) & 0xFFFF == 2, 2.0):
        if stand.kind == "net":
            stand.skip("frames were dropped meanwhile, as a network may")
        stand.fail("not both requests were used after the answer")
    _poll(stand)
    return "the second waited for the first"
