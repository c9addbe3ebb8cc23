# SPDX-License-Identifier: Apache-2.0
"""Cases on a device's life: rings that stop, pause and go on, notifications that change, front ends that go."""

from __future__ import annotations

from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.fence import Fence, homes
from virtiova.conformance.stand import Stand, drained_first
from virtiova.conformance.wrong import Fate, Wrong, fate
from virtiova.driver.base import Queue, Request
from virtiova.driver.negotiate import driver_ok
from virtiova.errors import MachineError
from virtiova.machine.vhost_user.asked import Asked
from virtiova.probe.canary import Snapshot, Watch
from virtiova.probe.rig import COMPLETE_SECONDS, LENGTH, SILENT_SECONDS, twin
from virtiova.ring.layout import SplitLayout
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import encode_vring_fd

_SIZE: Final = 32
_LOAD: Final = 8
_CALL_SECONDS: Final = 0.5
_FED: Final = ("console", "net")
"""Devices that are done with a buffer only once something has come from outside."""


def used_index(queue: Queue) -> int:
    """The used index of a split ring, wherever the device has written it."""
    layout = queue.ring.layout
    assert isinstance(layout, SplitLayout)
    return queue.region.load16(layout.used + 2)


def _first(stand: Stand) -> int:
    """The number of the ring that requests go to."""
    return stand.driver.queues()[0].index


def landed(snapshot: Snapshot) -> str:
    """The letters of the pages that changed."""
    return "".join(sorted({each.page for each in snapshot.look() if each.touched}))


def stop_all(stand: Stand) -> dict[int, int]:
    """Take all rings back; where each of them is to go on."""
    return {queue.index: stand.registers.stop_queue(queue.index) for queue in stand.driver.queues()}


def go_on(stand: Stand, bases: dict[int, int]) -> None:
    """Hand the rings over again, from there on, and kick."""
    for index, base in bases.items():
        stand.registers.start_queue(index, base)
    for index in bases:
        stand.registers.notify(index)


@case(
    "reconnect",
    "another front end finds a clean device",
    vhost_user("Communication", "SET_OWNER begins a session, in which nothing of another one is left"),
    why="The memory of a virtual machine that has ended is given to somebody else; a device that still holds a "
    "mapping of it writes there.",
    fix="When a connection ends, stop its rings, unmap its memory, and empty the IOTLB before the next is accepted.",
)
def reconnect(stand: Stand) -> str:
    """Hang up with mappings alive and a request under way; come back with other memory, and X elsewhere in it."""
    stand.translating()
    stand.hold()
    stand.unmap(stand.data)
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    request.go()
    stand.await_miss(stand.data.addr)
    stand.hang_up()
    with stand.again() as other:
        # It has answered: what the connection before was worth must be over by now.
        fence = Fence(stand.memory, set())
        other.translating(start=False)
        page = other.ops.spare("C")
        other.iommu.map(IOVA(other.data.addr), page, PAGE_SIZE)
        other.start()
        watches = [*other.paint_data(), Watch("data", "C", page, LENGTH)]
        other.must_land(other.write(watches=watches), "C", "X, on another connection")
    if touched := fence.touched():
        stand.fail(f"memory of a front end that has gone is written, at guest-physical 0x{touched[0]:x}")
    return "page C of the new memory, and nothing in the old"


@case(
    "stopped-ring",
    "after GET_VRING_BASE a ring is not touched, and the index is that of what is done",
    vhost_user("Ring states", "GET_VRING_BASE stops a ring, and a ring that is stopped is not processed at all"),
    why="A front end that migrates or resets the machine reads memory after that answer; what is written later is "
    "missing there, or is in somebody else's memory.",
    fix="Finish or give up what is under way before GET_VRING_BASE is answered; answer with the next entry to take.",
)
def stopped_ring(stand: Stand) -> str:
    """Stop the rings with requests under way, make more available, kick, and look at all memory."""
    stand.working(size=_SIZE)
    queue = stand.driver.queues()[0]
    requests = _load(stand, queue)
    kick = stand.registers.kick_of(queue.index)
    for request in requests:
        request.go()
    bases = stop_all(stand)
    used = used_index(queue)
    if bases[queue.index] != used:
        stand.fail(f"GET_VRING_BASE says {bases[queue.index]}, and the used index is {used}: requests lost or repeated")
    late = _load(stand, queue, 1)[0]
    stand.paint_data()
    late.queue.ring.publish()
    # A frame that is to come back is put there by us.
    ours = [twin(each.region) for each in stand.driver.queues() if each is not queue]
    fence = Fence(stand.memory, homes(ours, "AB") if stand.machine.peer.reach == "echo" else set())
    kick()
    late.after()
    stand.pump(SILENT_SECONDS)
    if touched := fence.touched():
        stand.fail(f"it wrote after GET_VRING_BASE was answered, at guest-physical 0x{touched[0]:x}")
    go_on(stand, bases)
    whole = wanted = 1 + len(requests) + 1
    if stand.kind in _FED:
        # What came from outside while the rings stood may have been dropped: one more is what is sure.
        late.after()
        wanted = used + 1
    if not stand.machine.wait(lambda: used_index(queue) >= wanted, COMPLETE_SECONDS):
        stand.fail(f"{whole} requests were made, and started again at {used} it came to {used_index(queue)} only")
    return f"index {used}, silent after it, and it goes on from there"


def _load(stand: Stand, queue: Queue, count: int = _LOAD) -> list[Request]:
    return [stand.driver.make_device_write([(stand.data.addr, LENGTH)]) for _ in range(count)]


@case(
    "stop-and-go-on",
    "a ring that is stopped while a request waits for a translation goes on with it",
    vhost_user("GET_VRING_BASE", "the answer is where the ring is to be taken up again"),
    why="The request that is lost here is a read that never ends; one that is repeated, a write that is done twice.",
    fix="Count a request as taken only once it is given back, or finish it before the ring stops.",
)
def stop_and_go_on(stand: Stand) -> str:
    """Stop the rings while a miss is not answered, start them where they stood, and count what is done."""
    stand.translating(size=_SIZE)
    queue = stand.driver.queues()[0]
    before = used_index(queue)
    stand.hold(stand.data.addr)
    stand.unmap(stand.data)
    snapshot = Snapshot(stand.machine.ram, stand.paint_data())
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    request.go()
    if not stand.machine.wait(lambda: bool(stand.held) or request.done(), COMPLETE_SECONDS) or not stand.held:
        stand.fail(f"it did not ask for 0x{stand.data.addr:x}, which was taken back")
    try:
        bases = stop_all(stand)
    except MachineError:
        stand.release()
        drained_first(stand)
    if bases[queue.index] != before:
        stand.fail(f"GET_VRING_BASE says {bases[queue.index]}, but {before} requests are done, and the next one is not")
    stand.held.clear()
    stand.front.on_miss = Asked.answer
    stand.remap(stand.data)
    go_on(stand, bases)
    if not stand.machine.wait(request.done, COMPLETE_SECONDS):
        stand.fail("the request that waited when the rings stopped is lost")
    if (pages := landed(snapshot)) != "A":
        stand.fail(f"the request that waited when the rings stopped: bytes are in {pages or 'no page'}, wanted A")
    request.queue.ring.poll()
    stand.pump(SILENT_SECONDS)
    if (used := used_index(queue)) != before + 1:
        stand.fail(f"one request was waiting, and the used index went from {before} to {used}")
    stand.must_land(stand.write(), "A", "the request after it")
    return f"index {before}, and the request was done once"


@case(
    "ring-disabled",
    "a ring that is disabled does nothing that is seen, and goes on once it is enabled",
    vhost_user("Ring states", "a disabled ring is processed without side effects: no packets are supplied"),
    why="Front ends disable rings to change the number of queues, and rely on silence.",
    fix="Look at the last SET_VRING_ENABLE before a ring is served, and again at the ring when it is enabled.",
)
def ring_disabled(stand: Stand) -> str:
    """Disable a ring that works, make a request available in it and kick; then enable it."""
    stand.working()
    if not stand.front.speaks_at_all:
        stand.skip("without protocol features rings are always enabled")
    stand.registers.enable(_first(stand), on=False)
    return _disabled(stand, always_was=False)


@case(
    "ring-never-enabled",
    "a ring begins disabled, and a kick from before it is enabled is not lost",
    vhost_user("Ring states", "with protocol features a ring begins disabled, until SET_VRING_ENABLE"),
    why="The driver kicks once: if that is forgotten while the ring waits to be enabled, the guest hangs at boot.",
    fix="Begin disabled, remember that there was a kick, and look at the ring when it is enabled.",
)
def ring_never_enabled(stand: Stand) -> str:
    """Start rings without enabling them, make a request available and kick; then enable them."""
    if stand.kind == "fs":
        stand.skip("this device's first request needs others before it")
    stand.working()
    if not stand.front.speaks_at_all:
        stand.skip("without protocol features rings are always enabled")

    stand.negotiate(take=stand.front.translating)
    stand.start(ok=False)
    stand.registers.share_memory()
    for queue in stand.driver.queues():
        stand.registers.start_queue(queue.index, enable=queue.index != _first(stand))
    driver_ok(stand.transport)
    return _disabled(stand, always_was=True)


def _disabled(stand: Stand, *, always_was: bool) -> str:
    """A request in a disabled ring, and what becomes of it; then in the ring once it is enabled."""
    home = stand.home
    snapshot = Snapshot(stand.machine.ram, stand.paint_data())
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    request.go()
    stand.machine.wait(request.done, SILENT_SECONDS)
    seen = ""
    if pages := landed(snapshot):
        seen = f"a disabled ring was served: bytes are in page {pages}"
        if stand.kind == "net" and not always_was:
            stand.fail(seen)
        stand.unclear(
            seen,
            "whatever a device puts into memory is an effect that a disabled ring must not have",
            "a disabled ring is processed, and an effect is one on the world outside"
            if stand.kind != "net"
            else "the first pair of a network device begins enabled, as it has always done",
        )
    discarded = request.done()
    stand.registers.enable(_first(stand))
    if discarded:
        request.queue.ring.poll()
        stand.must_land(stand.write(), home, "after the ring was enabled")
        return "requests are given back undone while it is disabled, and served once it is enabled"
    if not stand.machine.wait(request.done, SILENT_SECONDS):
        # What came from outside meanwhile may have been dropped; it comes again.
        request.after()
    if not stand.machine.wait(request.done, COMPLETE_SECONDS):
        stand.fail("a request that was made available while the ring was disabled is not done once it is enabled")
    if (pages := landed(snapshot)) != home:
        stand.fail(f"after the ring was enabled bytes are in {pages or 'no page'}, wanted {home}")
    return "silent while it is disabled, and the request is done once it is enabled"


@case(
    "call-replaced",
    "a call descriptor that is replaced while the ring runs is used from then on",
    vhost_user("Ring states", "while rings are processed some of their configuration may change"),
    why="QEMU replaces it whenever a guest masks an interrupt; calls by the old one reach nobody, and the guest hangs.",
    fix="Take the descriptor of the last SET_VRING_CALL for each call, and close the one before.",
)
def call_replaced(stand: Stand) -> str:
    """Replace the call descriptor of a ring that works; let the device be done with a request."""
    stand.working()
    calls = stand.registers.replace_call(_first(stand))
    stand.front.barrier()
    calls()
    stand.must_land(stand.write(), stand.home, "after the call descriptor was replaced")
    seen = {"old": False, "new": False}

    def called() -> bool:
        old, new = calls()
        seen["old"] |= old
        seen["new"] |= new
        return seen["new"]

    stand.machine.wait(called, _CALL_SECONDS)
    if not seen["new"]:
        stand.fail(f"no call by the new descriptor{', but one by the old' if seen['old'] else ''}")
    return "called by the new one" + (", and by the old one too" if seen["old"] else "")


@case(
    "kick-without-descriptor",
    "SET_VRING_KICK without a descriptor is understood",
    vhost_user("SET_VRING_KICK", "bit 8 says that there is no descriptor: the ring is polled"),
    why="Front ends that poll pass none; whoever takes the first of no descriptors ends there.",
    fix="Look at bit 8 before a descriptor is taken; poll the ring, or refuse the message.",
)
def kick_without_descriptor(stand: Stand) -> str:
    """Take the kick descriptor away from a ring that works; make a request available without a kick."""
    stand.working()
    came = fate(
        stand.front, Wrong("without a descriptor", wire.Request.SET_VRING_KICK, encode_vring_fd(_first(stand), False))
    )
    if came is Fate.SILENT:
        stand.fail("SET_VRING_KICK without a descriptor is not answered")
    done = False
    if came in (Fate.TAKEN, Fate.IGNORED):
        snapshot = Snapshot(stand.machine.ram, stand.paint_data())
        request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
        request.queue.ring.publish()
        request.after()
        done = stand.machine.wait(request.done, _CALL_SECONDS)
        if done and (pages := landed(snapshot)) != stand.home:
            stand.fail(f"polled, bytes are in {pages or 'no page'}, wanted {stand.home}")
    there = stand.still_there()
    if not done:
        stand.unclear(
            f"SET_VRING_KICK without a descriptor is {came}, and the ring is not polled; {there}",
            "without a descriptor the back end should look at the ring by itself",
            "that it should does not say that it must",
        )
    return "polled"
