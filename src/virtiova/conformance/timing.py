# SPDX-License-Identifier: Apache-2.0
"""Cases on the answer to a MISS: late, in another order, twice, a refusal, half an answer, or never."""

from __future__ import annotations

from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.moves import FAR, HALF, RING, WHILE, Going, Row, Told, give, must_be, revived, up, watched
from virtiova.conformance.stand import MISS_SECONDS, Stand, drained_first
from virtiova.driver.base import Request
from virtiova.driver.negotiate import driver_ok
from virtiova.errors import MachineError
from virtiova.machine.vhost_user.asked import Asked
from virtiova.probe.canary import TwinRegion
from virtiova.probe.rig import LENGTH, SILENT_SECONDS
from virtiova.spec import spec

_MISS: Final = vhost_user(
    "IOMMU support", "a miss is over when an UPDATE with the address and permission has come, or none ever will"
)
_ANSWER: Final = vhost_user(
    "VHOST_USER_BACKEND_IOTLB_MSG", "who asked for it gets an answer: zero once the mapping was sent, else a failure"
)
LATE: Final = 0.06
"""Seconds by which an answer is late: a front end may be busy for longer."""
OFTEN: Final = 30
"""Times that a page is asked for in a tenth of a second that are no more than a few."""
STOP_SECONDS: Final = 1.0


def ask_for(stand: Stand, page: TwinRegion) -> tuple[Going, Asked]:
    """A request to a page that the back end does not know, and its MISS, which waits."""
    stand.hold(page.addr)
    page.paint(0, LENGTH)
    going = Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH))
    asked = going.miss(page.addr)
    if asked is None:
        stand.fail(f"it never asked for a page at 0x{page.addr:x}, to which it was to write")
    return going, asked


def not_often(stand: Stand, count: int, what: str) -> None:
    """At the end of a case: it asked ``count`` times. Unclear if that is without end: no sentence bounds it."""
    if count > OFTEN:
        stand.unclear(
            f"{what}: it asked {count} times",
            "a question may be repeated: nothing is said of how often",
            "a question stands until it is answered, and each one may be a fault in the guest's log",
        )


def again_after(stand: Stand, page: TwinRegion, what: str) -> str:
    """The next request to that page works, if need be after a reset (virtio 1.4, 2.1.2). Words to add."""
    page.paint(0, LENGTH)
    going = Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH))
    if going.done(MISS_SECONDS):
        going.must_land("A", what)
        return ""
    words = revived(stand, what)
    page.paint(0, LENGTH)
    Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH)).must_land("A", f"{what}, after a reset")
    return words


@case(
    "miss-late",
    "an answer that comes late is waited for, and not asked for without end",
    _MISS,
    why="The front end may be busy, or be waiting for the guest's IOMMU. A device that gives up too early fails "
    "requests on a busy machine, and one that asks again and again keeps it busy.",
    fix="Leave the request where it is, remember what was asked, and go on when the UPDATE comes.",
)
def miss_late(stand: Stand) -> str:
    """A MISS is answered 60 ms late, while the main channel is asked something else."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    stand.pump(LATE)
    stand.front.barrier()
    going.must_not_land("a page that is asked for, before the answer")
    count = stand.misses(page.addr)
    asked.answer()
    stand.release()
    going.must_land("A", f"a page of which it heard {LATE:g} s after it asked")
    not_often(stand, count, f"no answer for {LATE:g} s")
    return f"asked {count} times in {LATE:g} s, waited, page A"


@case(
    "miss-out-of-order",
    "UPDATEs may come in another order than the MISSes that they answer",
    _MISS,
    why="An UPDATE names its own address. A back end that takes it for the answer to the oldest question swaps two "
    "pages.",
    fix="Enter each UPDATE at its own address, and look then what of the waiting can go on.",
)
def miss_out_of_order(stand: Stand) -> str:
    """A request into two unknown pages. The second one's UPDATE comes first."""
    up(stand)
    first, second = stand.ops.alloc(PAGE_SIZE), stand.ops.alloc(PAGE_SIZE)
    stand.hold(first.addr, second.addr)
    apart = 2 * LENGTH
    watches = []
    for role, page, offset in (("data", first, 0), ("data2", second, apart)):
        page.paint(offset, HALF)
        watches += page.watch(role, offset, HALF)
    going = Going(stand, [(first.addr, HALF), (second.addr + apart, HALF)], watches)
    one = going.miss(first.addr)
    two = going.miss(second.addr, 2 * WHILE)
    if one is None or two is None:
        stand.skip("it asks for one page at a time")
    give(stand, two, Row(second.addr, PAGE_SIZE, second.gpa("A")), reply=False)
    stand.front.barrier()
    going.must_not_land("the first of two pages, of which only the second one's UPDATE has come")
    give(stand, one, Row(first.addr, PAGE_SIZE, first.gpa("A")), reply=False)
    stand.front.barrier()
    # The answers have no number: they are in the order of the questions.
    one.reply(ok=True)
    two.reply(ok=True)
    stand.release()
    going.must_land("A", "the first of two pages, of which the second was answered first")
    if going.landed("data2") != "A":
        stand.fail("the second of two pages, which was answered first: its bytes are not in page A")
    return "both where they belong"


@case(
    "miss-answered-twice",
    "an answer may come twice, and is one",
    _MISS,
    why="QEMU repeats UPDATEs: of the used ring at each start, and for each queue that asked. Refused doubles stop the "
    "device; kept ones come back when the page is invalidated.",
    fix="Let an UPDATE of what is known already be none, or take its place.",
)
def miss_answered_twice(stand: Stand) -> str:
    """Two UPDATEs and one answer for one MISS; later the page is invalidated once, and leads elsewhere."""
    up(stand)
    page, told = stand.ops.alloc(PAGE_SIZE), Told(stand)
    going, asked = ask_for(stand, page)
    uva = stand.memory.uva(page.gpa("A"))
    answers = [stand.front.post_update(page.addr, PAGE_SIZE, uva, Access.RW) for _ in range(2)]
    stand.front.barrier()
    if any(answer is not None and not answer.ok for answer in answers):
        stand.fail("an UPDATE that came twice was answered with a failure")
    asked.reply(ok=True)
    stand.front.on_miss = told.answer
    going.must_land("A", "a page that it was told of twice")
    pages = {"A": int(page.gpa("A")), "B": int(page.gpa("B")), "C": int(stand.ops.spare("C"))}
    told.change(page.addr, PAGE_SIZE, pages["C"])
    stand.invalidate(page.addr, PAGE_SIZE)
    must_be(stand, page.addr, "C", pages, "a page that was told of twice, and invalidated once")
    return "once told, once invalidated"


@case(
    "miss-refused",
    "a refused MISS gives no access, and the device goes on",
    _ANSWER,
    why="Each MISS for an address that the guest has not mapped is a fault in the guest's log. A back end that asks "
    "in a loop fills it, and keeps the front end from everything else.",
    fix="Fail the request, or park it until an UPDATE or a kick comes.",
)
def miss_refused(stand: Stand) -> str:
    """A page that is not mapped: the MISS is refused. See how often it is asked for in 0.1 s, and whether a request
    behind it goes on."""
    up(stand)
    x = stand.data
    page = stand.ops.alloc(PAGE_SIZE)
    stand.tables.unmap(IOVA(page.addr), PAGE_SIZE)
    page.paint(0, LENGTH)
    going = Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH))
    if not going.settle(page.addr, 0):
        stand.fail(f"it never asked for 0x{page.addr:x}")
    stand.pump(2 * SILENT_SECONDS)
    going.must_not_land("a page that was refused")
    count = stand.misses(page.addr)
    stand.front.barrier()
    failed = going.done(0)
    other = Going(stand, [(x.addr, LENGTH)])
    went_on = other.done(SILENT_SECONDS)
    words = ""
    if went_on:
        other.must_land("A", "X, after a page that was refused")
    else:
        stand.ops.map(page)
        stand.invalidate(page.addr, PAGE_SIZE)
        stand.update(page.addr, PAGE_SIZE, page.gpa("A"))
        other.request.queue.kick()
        if not stand.machine.wait(other.request.done, 1.0):
            words = revived(stand, "a page was refused, and even once it is mapped nothing is done any more")
    not_often(stand, count, "refused, in 0.1 s")
    what = "failed the request" if failed else "kept the request"
    return f"asked {count} times, {what}, {'went on with others' if went_on else 'others waited for it'}{words}"


@case(
    "miss-refused-then-mapped",
    "what was refused can be mapped later",
    _MISS,
    why="A driver that runs into a fault maps the page and tries again. A back end that remembers refusals for ever "
    "never works for that page any more.",
    fix="Forget a refusal with the request that it was for, at the latest with the next UPDATE of the page.",
)
def miss_refused_then_mapped(stand: Stand) -> str:
    """A MISS is refused; then comes an UPDATE of the same page, and a kick; then the next request."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    asked.reply(ok=False)
    stand.pump(WHILE)
    early = going.done(0)
    going.must_not_land("a page that was refused")
    stand.update(page.addr, PAGE_SIZE, page.gpa("A"))
    stand.release()
    going.request.queue.kick()
    late = not early and going.patiently()
    if late and going.landed() != "A":
        stand.fail("a page that was refused and then mapped: the request was done, and its bytes are not in page A")
    words = again_after(stand, page, "a page that was refused and then mapped, by the next request")
    if words and not early:
        return f"the request was failed with its ring{words}"
    if not (early or late):
        stand.unclear(
            "the request that waited goes on with the next one only",
            "a MISS that was refused is over, and so is the request",
            "the request goes on as soon as the page is mapped",
        )
    return f"the request failed, the next one works{words}" if early else "the request went on"


@case(
    "miss-update-alone",
    "once the UPDATE is there, the request is not failed for want of an answer",
    _MISS,
    why="The UPDATE is what the back end needs; the answer behind it says only that it was sent. Who fails a request "
    "whose mapping is there has mistaken the one for the other.",
    fix="When a wait for the answer is over, look the address up once more before the request is failed.",
)
def miss_update_alone(stand: Stand) -> str:
    """A MISS is answered by the UPDATE, and much later by the word that it was sent."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    give(stand, asked, Row(page.addr, PAGE_SIZE, page.gpa("A")), reply=False)
    done = going.patiently()
    if done and going.landed() != "A":
        stand.fail("the UPDATE has come, and the request was failed")
    count = stand.misses(page.addr)
    asked.reply(ok=True)
    stand.release()
    going.must_land("A", "a page of which the UPDATE came long before the answer")
    not_often(stand, count, "the UPDATE has come, and no answer")
    if not done:
        stand.unclear(
            "it waits for the answer",
            "an UPDATE with the address ends the miss",
            "who asks for an answer may wait for it",
        )
    return "went on with the UPDATE"


@case(
    "miss-reply-first",
    "an answer without a mapping is not taken for one",
    _MISS,
    why="Main channel and back-end channel are two sockets, and what was sent first need not be read first. Who takes "
    "the word for the mapping goes on with an address that he does not have.",
    fix="After the answer, look the address up; if it is not there, wait for the UPDATE, ask again or fail the "
    "request.",
)
def miss_reply_first(stand: Stand) -> str:
    """A MISS is answered with success, and the UPDATE follows later."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    asked.reply(ok=True)
    stand.pump(WHILE)
    going.must_not_land("there was an answer, and no mapping")
    failed = going.done(0)
    count = stand.misses(page.addr)
    stand.update(page.addr, PAGE_SIZE, page.gpa("A"))
    stand.release()
    going.request.queue.kick()
    what = "a page of which the answer came before the UPDATE"
    words = ""
    if failed or not going.done():
        words = again_after(stand, page, what)
    else:
        going.must_land("A", what)
    not_often(stand, count, "answered without a mapping")
    if failed or words:
        stand.unclear(
            f"the request was failed{words}",
            "an answer without an UPDATE says that there is no such mapping",
            "success says that the UPDATE was sent: it will come",
        )
    return "waited for the UPDATE, or asked again"


@case(
    "miss-no-deadlock",
    "while a MISS waits for its answer, the main channel is served",
    _ANSWER,
    why="QEMU sends the UPDATE and waits for its acknowledgement before it answers the MISS. Who waits for that answer "
    "without reading the main channel waits for ever, and the guest with him.",
    fix="Never wait on the back-end channel alone: take both channels into one loop, or give each a thread.",
)
def miss_no_deadlock(stand: Stand) -> str:
    """Every MISS of the start and of the first request is answered only after its UPDATE was acknowledged, as QEMU
    does."""
    stand.translating(start=False)
    stand.asking = True
    stand.start(size=RING)
    stand.must_land(stand.write(), "A", "X, with each MISS answered after the acknowledgement of its UPDATE")
    counters = stand.front.counters
    return f"{counters.misses} MISS, {counters.updates} UPDATE, each acknowledged first"


@case(
    "miss-other-queue",
    "a queue that waits for a translation does not hold up another",
    spec("2.6", "a device can have any number of virtqueues, each with requests of its own"),
    why="One buffer that is not mapped, by mistake or on purpose, must not stop the whole device: each queue may "
    "belong to another processor, or another process.",
    fix="Park the queue that misses something, and go on with those that do not.",
)
def miss_other_queue(stand: Stand) -> str:
    """A MISS of one queue is never answered; meanwhile a request of another one is made."""
    pair = stand.kind in ("net", "console")
    each = 0 if pair else stand.need_second_queue()
    if pair and stand.machine.peer.reach == "none":
        stand.skip("nobody here sees what this device sends")
    stand.translating(start=False)
    stand.start(ok=False, size=RING)
    other = None if pair else stand.second(each, size=RING)
    driver_ok(stand.transport)
    stand.prove()
    page, payload = stand.ops.alloc(PAGE_SIZE), stand.ops.alloc(LENGTH)
    going, asked = ask_for(stand, page)
    if other is not None:
        payload.paint(0, LENGTH)
        second = Going(stand, [(payload.addr, LENGTH)], payload.watch("data", 0, LENGTH), driver=other)
        request: Request = second.request
    else:
        request = stand.driver.make_device_read([(payload.addr, LENGTH)])
        request.go()
    went_on = stand.machine.wait(request.done, MISS_SECONDS)
    going.must_not_land("a page that is asked for, before the answer")
    asked.answer()
    stand.release()
    if other is not None:
        going.must_land("A", "the request of queue 0")
        second.must_land("A", "a request of queue 1, while queue 0 waited and after that")
    elif not stand.machine.wait(request.done, 2.0):
        stand.fail("a request of the transmit queue was not done, although the receive queue has its translation")
    if not went_on:
        stand.unclear(
            "the other queue waited until the question was answered",
            "nothing is said of how the queues of a device depend on one another",
            "each queue has requests of its own, and nothing that another one waits for",
        )
    return "the other queue went on"


@case(
    "miss-then-stop",
    "a queue that waits for a translation can be stopped, and goes on where it was",
    vhost_user("Ring states", "a ring is stopped by GET_VRING_BASE, which says where to go on from"),
    why="A guest is reset or migrated while its device waits for a translation. Who waits for the answer first keeps "
    "the machine from stopping; who has taken the request by then has lost it.",
    fix="Answer GET_VRING_BASE at once, with the index of the request that waits.",
)
def miss_then_stop(stand: Stand) -> str:
    """A MISS is not answered; the ring is stopped, and started again where the back end says; then all is answered."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    going, asked = ask_for(stand, page)
    first = going.request.queue
    # All of them: some take a device of which one ring is stopped for stopped.
    try:
        bases = {queue.index: stand.registers.stop_queue(queue.index, STOP_SECONDS) for queue in stand.driver.queues()}
    except MachineError:
        asked.answer()
        drained_first(stand)
    base = bases[first.index]
    going.must_not_land("a ring that was stopped")
    asked.reply(ok=False)
    stand.release()
    for index, at in bases.items():
        stand.registers.start_queue(index, at)
    first.kick()
    going.must_land("A", f"the request that waited when its ring was stopped, and started again from {base}")
    return f"stopped, and done from {base} on"


@case(
    "update-larger",
    "an answer may be larger than the question",
    vhost_user("IOMMU support", "the UPDATE contains the address that was asked for"),
    why="A front end with large pages answers with the whole of one. Its user address is that of the entry's start, "
    "not that of the address in the question.",
    fix="Enter what the UPDATE says, address and size, whatever was asked.",
)
def update_larger(stand: Stand) -> str:
    """A page is asked for, and answered by a mapping of three pages, of which it is the second."""
    up(stand)
    told = Told(stand)
    run = int(stand.machine.pages.run(3))
    pages = {"P": run, "Q": run + PAGE_SIZE, "R": run + 2 * PAGE_SIZE}
    told.change(FAR, 3 * PAGE_SIZE, run)
    must_be(stand, FAR + PAGE_SIZE, "Q", pages, "the second page of an answer of three")
    must_be(stand, FAR + 2 * PAGE_SIZE, "R", pages, "the third page of an answer of three")
    must_be(stand, FAR, "P", pages, "the first page of an answer of three")
    return "each page where the answer says"


@case(
    "update-smaller",
    "an answer without the address is none",
    vhost_user("IOMMU support", "a miss is over when an UPDATE has come that contains the address"),
    why="A page may be mapped in parts. Who rounds a part up to a page writes where nobody has said that he may.",
    fix="Look the address up after an UPDATE, as it is, and ask again or wait if it is not there.",
)
def update_smaller(stand: Stand) -> str:
    """The second half of a page is asked for, and answered by a mapping of its first half, to page C; and then by all
    of it, to page D."""
    up(stand)
    told = Told(stand)
    offset = PAGE_SIZE // 2 + 0x100
    homes = {page: int(stand.ops.spare(page)) for page in "CD"}
    stand.hold(FAR)
    pages = {page: home + offset for page, home in homes.items()}
    going = Going(stand, [(FAR + offset, LENGTH)], watched(stand, pages))
    asked = going.miss(FAR)
    if asked is None:
        stand.fail(f"it never asked for 0x{FAR:x}, to which it was to write")
    give(stand, asked, Row(FAR, PAGE_SIZE // 2, homes["C"]))
    again = going.miss(FAR, SILENT_SECONDS)
    going.must_not_land("only the first half of a page was told of, and the second was to be written")
    if going.used:
        stand.unclear(
            "the request was failed after an UPDATE of half a page",
            "an UPDATE has any address and size: what it does not contain is asked for again",
            "entries are of whole pages, and one that is not is refused",
        )
    count = stand.misses(FAR)
    stand.front.on_miss = told.answer
    stand.invalidate(FAR, PAGE_SIZE)
    told.tell(FAR, PAGE_SIZE, homes["D"])
    if again is not None:
        again.reply(ok=True)
    going.must_land("D", "a page of which first one half was told of, and then all")
    not_often(stand, count, "answered with the other half")
    return "asked again" if again is not None else "waited for the rest"


@case(
    "update-unasked",
    "an UPDATE that nobody asked for is taken",
    _MISS,
    why="QEMU tells of the used rings at each start without being asked. A refusal there is the end of the device.",
    fix="Enter it like any other; whether it was asked for makes no difference.",
)
def update_unasked(stand: Stand) -> str:
    """UPDATE of a page that no request has named yet; then a request to it."""
    up(stand)
    page = stand.ops.alloc(PAGE_SIZE)
    if not stand.update(page.addr, PAGE_SIZE, page.gpa("A")):
        stand.fail("an UPDATE that was not asked for was answered with a failure")
    page.paint(0, LENGTH)
    going = Going(stand, [(page.addr, LENGTH)], page.watch("data", 0, LENGTH))
    going.must_land("A", "a page that it was told of before it was used")
    return f"used, after {stand.misses(page.addr)} MISS"
