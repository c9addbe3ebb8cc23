# SPDX-License-Identifier: Apache-2.0
"""Cases on negotiation: bits that were not offered, bits that need others, and what a second negotiation leaves."""

from __future__ import annotations

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.stand import Stand
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, Feature, Status, has
from virtiova.machine.vhost_user.frontend import WANTED
from virtiova.probe.canary import Watch, paint
from virtiova.probe.rig import LENGTH, Watched
from virtiova.spec import spec
from virtiova.wire.vhost_user import (
    F_PROTOCOL_FEATURES,
    ConfigSpace,
    IotlbKind,
    IotlbMessage,
    ProtocolFeature,
    Request,
    VringState,
    encode_vring_fd,
    u64,
)

_TOP_BIT = 63
_RESET_SECONDS = 1.0


@case(
    "unoffered-bit",
    "a feature bit that was never offered does not take the process down",
    spec("2.2.1", "a driver takes no feature that was not offered"),
    why="Both sides then lay out rings or headers by different rules, and neither notices.",
    fix="Compare SET_FEATURES with what GET_FEATURES said, and answer anything else with a failure, or hang up.",
)
def unoffered_bit(stand: Stand) -> str:
    """Send SET_FEATURES with a bit that no device offers; then serve the next front end."""
    unoffered = [bit for bit in range(_TOP_BIT, Feature.SUSPEND, -1) if not has(stand.vhost.offered, bit)]
    if not unoffered:
        stand.skip("the back end offers all bits that there are")
    stand.asking = True
    bit = unoffered[0]
    word = 1 << bit | 1 << VIRTIO_F_VERSION_1 | stand.vhost.offered & 1 << F_PROTOCOL_FEATURES
    taken = False
    with stand.may_hang_up():
        taken = stand.front.command(Request.SET_FEATURES, u64(word))
        stand.front.barrier()
    there = stand.still_there()
    if taken and stand.acknowledges:
        stand.unclear(
            f"SET_FEATURES with bit {bit}, which was never offered, was acknowledged",
            "a bit that was not offered must not be taken, and an acknowledgement says that it was",
            "that a front end must not send it says nothing of what a back end does with it",
        )
    return f"bit {bit} is {'not acknowledged' if stand.acknowledges else 'not acted upon'}, and {there}"


@case(
    "unoffered-bit33",
    "bit 33 that was never offered is not acknowledged and then left out",
    spec("6.2", "a device offers VIRTIO_F_ACCESS_PLATFORM if its accesses are the platform's to limit or translate"),
    why="QEMU's vhost-user-rng sends the bit without looking at the offer: the driver believes that it is protected, "
    "and the device writes around the IOMMU.",
    fix="Refuse a SET_FEATURES whose bit 33 was not offered. At the least do not look for rings at bare addresses.",
)
def unoffered_bit33(stand: Stand) -> str:
    """Send bit 33 although it is not offered, hand over rings at IOVAs, and let the device write to X."""
    if has(stand.vhost.offered, VIRTIO_F_ACCESS_PLATFORM):
        stand.skip("the back end offers bit 33")
    stand.need_writes()
    stand.enable_iommu()
    stand.asking = True
    if stand.negotiate(take_unoffered=True).refused:
        return f"SET_FEATURES is refused, and {stand.still_there()}"
    # Whoever takes the bit gets IOVAs.
    stand.front.translating = True
    with stand.may_hang_up():
        stand.start()
        watched = stand.silent()
        stand.must_not_go_around(watched, "bit 33, never offered, was taken without a word")
        if watched.done:
            return f"taken, and bytes are in page {stand.pages(watched)}"
    return f"taken without a word, but no ring at an IOVA is served, and {stand.still_there()}"


@case(
    "bit33-without-version1",
    "bit 33 without VERSION_1 is refused or translated, never left out",
    spec("6.1", "a driver takes VIRTIO_F_VERSION_1 if it is offered"),
    why="Firmware and old drivers leave VERSION_1 alone; a back end that takes them for legacy and its addresses for "
    "guest-physical ones goes around the IOMMU.",
    fix="Decide by bit 33 alone who translates. Refuse the combination if it cannot be served.",
)
def bit33_without_version1(stand: Stand) -> str:
    """Negotiate bit 33 without VERSION_1; let the device write to X."""
    stand.need_bit33()
    stand.enable_iommu()
    stand.asking = True
    try:
        if stand.negotiate(version_1=False).refused:
            return "refused"
        stand.start()
    except MachineError:
        return f"the connection is closed, and {stand.still_there()}"
    watched = stand.write(seconds=1.0)
    stand.must_not_go_around(watched, "bit 33 without VERSION_1")
    if not watched.done:
        return "not refused, and nothing is served"
    stand.must_land(watched, "A", "bit 33 without VERSION_1")
    return "taken, and translated"


@case(
    "bit33-without-channel",
    "bit 33 without a back-end channel does not become a way around",
    vhost_user("IOMMU support", "misses travel on the back-end channel"),
    why="A back end that cannot ask may not guess: at the bare address is somebody else's memory.",
    fix="Refuse bit 33 without BACKEND_REQ, or serve only what the front end has told of by itself.",
)
def bit33_without_channel(stand: Stand) -> str:
    """Take bit 33 on a connection without BACKEND_REQ. First nothing is mapped; then all is told of by UPDATEs."""
    stand.need_bit33()
    wanted = [feature for feature in WANTED if feature is not ProtocolFeature.BACKEND_REQ]
    with stand.again(wanted=wanted) as other:
        return _without(other, "bit 33 without a back-end channel")


@case(
    "bit33-without-reply-ack",
    "bit 33 without REPLY_ACK is refused or translated, never left out",
    vhost_user("IOMMU support", "a back end may rely on REPLY_ACK, and need not"),
    why="QEMU refuses such a back end, other front ends may not: then a bare address must not be the answer.",
    fix="Without REPLY_ACK a MISS has no answer but its UPDATE: wait for that, with a limit, or refuse bit 33.",
)
def bit33_without_reply_ack(stand: Stand) -> str:
    """Take bit 33 on a connection without REPLY_ACK; answer misses by UPDATEs alone."""
    stand.need_bit33()
    wanted = [feature for feature in WANTED if feature is not ProtocolFeature.REPLY_ACK]
    with stand.again(wanted=wanted) as other:
        return _without(other, "bit 33 without REPLY_ACK")


def _without(stand: Stand, what: str) -> str:
    """Bit 33 on a connection that lacks something: whatever comes of it, no byte may be at the bare address."""
    stand.registers.insists = True
    stand.enable_iommu()
    stand.asking = True
    try:
        if stand.negotiate().refused or not stand.front.translating:
            return "refused"
        stand.start()
    except MachineError:
        return f"the connection is closed, and {stand.still_there()}"
    watched = stand.silent()
    stand.must_not_go_around(watched, what)
    if watched.done:
        stand.must_land(watched, "A", what)
        return "taken, and translated"
    with stand.may_hang_up():
        for region in stand.regions():
            for at in range(0, region.size, PAGE_SIZE):
                stand.front.post_update(region.addr + at, PAGE_SIZE, stand.memory.uva(region.gpa("A", at)), Access.RW)
        stand.pump(0.01)
    served = stand.machine.wait(stand.driver.queues()[0].ring.used_moved, 0.25)
    bare = stand.data.gpa("B")
    if stand.machine.ram.read(bare, LENGTH) != paint("B", bare, LENGTH):
        stand.fail(f"{what}: bytes are in page B")
    return "taken, and served once it is told of the mappings" if served else "taken, and nothing is served"


@case(
    "features-twice",
    "SET_FEATURES may come twice",
    vhost_user("Migration", "SET_FEATURES is sent again to start and stop the log"),
    why="QEMU sends it at every start, some devices twice, and again while rings run when a migration begins.",
    fix="Take the same word a second time for what it is: no change, so that rings and translations stay.",
)
def features_twice(stand: Stand) -> str:
    """Send the same SET_FEATURES twice before the rings start, and once more while they run."""
    stand.need_bit33()
    stand.enable_iommu()
    stand.negotiate()
    if not stand.front.translating:
        raise MachineError("the back end does not take bit 33")
    word = stand.front.accepted
    stand.asking = True
    if not stand.front.set_features(word, translating=True):
        stand.fail("the same SET_FEATURES was refused the second time")
    stand.start()
    stand.must_land(stand.write(), "A", "after a second SET_FEATURES")
    if not stand.front.set_features(word, translating=True):
        stand.fail("the same SET_FEATURES was refused while rings run")
    stand.must_land(stand.write(), "A", "after a SET_FEATURES while the rings run")
    return "page A, after the second and after the third"


@case(
    "bit33-renegotiated",
    "after a reset the bit counts that was taken last",
    vhost_user("Memory access", "guest addresses are IOVAs exactly if VIRTIO_F_ACCESS_PLATFORM was negotiated"),
    why="Firmware drives the device with the bit or without, and the kernel then the other way: whoever keeps the "
    "first answer translates too much or too little.",
    fix="Derive who translates from the last SET_FEATURES, and forget it at a reset.",
)
def renegotiate(stand: Stand) -> str:
    """Take bit 33, reset, go on without it, reset, take it again; let the device write to X each time."""
    stand.translating()
    if stand.negotiate(take=False).refused:
        stand.unclear(
            "renegotiated without bit 33, the features were refused",
            "a device that offers bit 33 may insist on it",
            "what works without bit 33 at first has to work without it later",
        )
    stand.start()
    misses = stand.front.counters.misses
    stand.must_land(stand.write(), "B", "renegotiated without bit 33")
    if stand.front.counters.misses != misses:
        stand.fail("it asked for a translation after it was renegotiated without bit 33")
    stand.negotiate()
    stand.start()
    stand.must_land(stand.write(), "A", "renegotiated with bit 33 again")
    return "page A, then B, then A"


@case(
    "old-translations",
    "translations of the driver before are not used by the next one",
    vhost_user("IOMMU support", "a translation that was taken back is not used any more"),
    why="Firmware leaves the addresses of its own rings behind; the kernel maps the same addresses elsewhere.",
    fix="Act on INVALIDATE also while no ring runs. Empty the IOTLB at SET_FEATURES and GET_VRING_BASE as well.",
)
def old_translations(stand: Stand) -> str:
    """Stop a driver and start another: X was pointed elsewhere in between, first with INVALIDATE, then without."""
    stand.translating()
    stand.registers.stop()
    page = _repoint(stand)
    stand.iommu.invalidate()
    watched = _next_driver(stand, page)
    stand.must_land(watched, "C", "X, which was taken back while no ring ran")
    stand.registers.stop()
    page = _repoint(stand)
    watched = _next_driver(stand, page)
    if stand.pages(watched) != "C":
        stand.unclear(
            f"the next driver's bytes are in {stand.pages(watched) or 'no page'}, where X was mapped for the last one",
            "a front end takes back each translation that changes, also between two drivers",
            "translations end with the driver that they were made for: at GET_VRING_BASE, SET_FEATURES or a reset",
        )
    return "page C, with an INVALIDATE and without"


def _repoint(stand: Stand) -> GPA:
    """Point X at a page that nothing pointed to."""
    page = stand.ops.spare("C")
    stand.iommu.map(IOVA(stand.data.addr), page, PAGE_SIZE)
    return page


def _next_driver(stand: Stand, page: GPA) -> Watched:
    stand.negotiate()
    stand.start()
    watches = [*stand.paint_data(), Watch("data", "C", page, LENGTH)]
    return stand.write([(stand.data.addr, LENGTH)], watches)


@case(
    "reply-ack",
    "each message that asks for an acknowledgement gets one, and no other does",
    vhost_user("REPLY_ACK", "a message with need_reply is answered by 0 for success, unless it has a reply of its own"),
    why="One answer too few, and QEMU waits for ever; one too many is taken for the answer to the next request.",
    fix="Look at bit 3 of the flags of each message, whatever the message is, and at nothing else.",
)
def reply_ack(stand: Stand) -> str:
    """Send messages with need_reply and without it to a device that works; count the answers."""
    stand.need(ProtocolFeature.REPLY_ACK)
    stand.working()
    front = stand.front
    messages: list[tuple[Request, bytes]] = [
        (Request.SET_FEATURES, u64(front.accepted)),
        (Request.SET_VRING_ENABLE, VringState(0, 1).encode()),
        (Request.SET_VRING_CALL, encode_vring_fd(0, False)),
        (Request.SET_VRING_ERR, encode_vring_fd(0, False)),
    ]
    for request, payload in messages:
        if not front.command(request, payload):
            stand.fail(f"{request.name} with need_reply was answered with a failure")
    for request, payload in messages:
        front.tell(request, payload)
        front.barrier()
    if not front.translating:
        return f"{len(messages)} messages acknowledged, and none that did not ask"
    if not stand.update(stand.data.addr, PAGE_SIZE, stand.data.gpa("A")):
        stand.fail("an UPDATE with need_reply was answered with a failure")
    update = IotlbMessage(
        IOVA(stand.data.addr), PAGE_SIZE, stand.memory.uva(stand.data.gpa("A")), Access.RW, IotlbKind.UPDATE
    )
    front.tell(Request.IOTLB_MSG, update.encode())
    try:
        front.barrier()
    except ProtocolError as error:
        stand.unclear(
            f"an UPDATE without need_reply was answered: {error}",
            "an IOTLB message has a reply of its own, whether it is asked for or not",
            "an IOTLB message is answered where need_reply is set, as QEMU and DPDK have it",
        )
    return f"{len(messages) + 1} messages acknowledged, and none that did not ask"


@case(
    "reset-device",
    "after RESET_DEVICE nothing is done, and the device can be set up anew",
    vhost_user("RESET_DEVICE", "all rings are disabled, and the device is as at the beginning"),
    why="The next driver's memory is where the last one's rings were.",
    fix="Stop all rings at RESET_DEVICE before it is acknowledged; what concerns the connection stays.",
)
def reset_device(stand: Stand) -> str:
    """Reset a device that works, make a request available in its ring and kick; then set it up anew."""
    stand.need(ProtocolFeature.RESET_DEVICE)
    stand.working()
    stand.front.must(Request.RESET_DEVICE)
    stand.front.barrier()
    watched = stand.silent()
    if touched := sorted({w.role for w in watched.witnesses if w.touched}):
        stand.fail(f"after RESET_DEVICE was acknowledged it wrote to memory ({', '.join(touched)})")
    take = stand.front.translating
    # There are no rings any more to take back.
    stand.registers.close()
    stand.negotiate(take=take)
    stand.start()
    stand.must_land(stand.write(), "A" if take else "B", "set up anew after RESET_DEVICE")
    return "silent after the reset, and working after the next start"


@case(
    "status",
    "the device status reads as it was written, and 0 clears it",
    vhost_user("SET_STATUS", "the device status as the virtio specification defines it"),
    why="QEMU reads FEATURES_OK back: a status that is not kept looks like a refusal, one that is not cleared like a "
    "device that needs a reset.",
    fix="Keep what SET_STATUS brings, take bits out only to refuse, and clear all of it at 0.",
)
def status(stand: Stand) -> str:
    """Write and read the status along a driver's way, and after 0."""
    stand.need(ProtocolFeature.STATUS)
    stand.asking = True
    front, word = stand.front, 0
    for bit in (Status.ACKNOWLEDGE, Status.DRIVER):
        word |= bit
        front.must(Request.SET_STATUS, u64(word))
        if (seen := front.ask(Request.GET_STATUS)) & word != word:
            stand.fail(f"the status reads 0x{seen:x} after 0x{word:x} was written")
    front.must(Request.SET_STATUS, u64(0))
    # A reset may take a while: 0 is read once it is over.
    stand.machine.wait(lambda: not front.ask(Request.GET_STATUS), _RESET_SECONDS)
    if seen := front.ask(Request.GET_STATUS):
        stand.fail(f"the status reads 0x{seen:x} after 0 was written")
    stand.asking = False
    stand.working()
    if not (seen := front.ask(Request.GET_STATUS)) & Status.DRIVER_OK:
        stand.fail(f"the status of a device that works reads 0x{seen:x}, without DRIVER_OK")
    return f"kept, cleared by 0, and 0x{seen:x} of a device that works"


@case(
    "config-read",
    "a piece of the configuration has the size and the offset that were asked for",
    vhost_user("GET_CONFIG", "the payload is as long as the request's, from the offset that it names"),
    "blk",
    "console",
    "fs",
    "net",
    why="A front end that reads one field gets another one: a size, a MAC address or a number of queues.",
    fix="Cut the answer from the offset of the request on, and say no (an empty payload) to what does not exist.",
)
def config_read(stand: Stand) -> str:
    """Ask for the first bytes in several sizes, and for some of them by their offset."""
    stand.need(ProtocolFeature.CONFIG)
    stand.asking = True
    whole = _config(stand, 0, 8)
    if not whole:
        stand.skip("the back end says that it has no configuration")
    if len(whole) != 8:
        stand.fail(f"asked for 8 bytes of configuration, got {len(whole)}")
    for size in (1, 4):
        if (data := _config(stand, 0, size)) != whole[:size]:
            stand.fail(f"{size} bytes at 0 are {data.hex()}, but of 8 the first are {whole[:size].hex()}")
    for offset in (2, 4):
        data = _config(stand, offset, 2)
        if data and data != whole[offset : offset + 2]:
            stand.fail(f"2 bytes at offset {offset} are {data.hex()}, wanted {whole[offset : offset + 2].hex()}")
    return f"{whole.hex()} in pieces of 8, 4, 2 and 1"


def _config(stand: Stand, offset: int, size: int) -> bytes:
    reply = stand.front.exchange(Request.GET_CONFIG, ConfigSpace(offset, 0, bytes(size)).encode())
    return ConfigSpace.decode(reply).data if reply else b""
