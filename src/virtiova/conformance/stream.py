# SPDX-License-Identifier: Apache-2.0
"""Cases on how messages come: in pieces, half of one, too many at a time, before their time, and unread answers."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.stand import Stand
from virtiova.conformance.wrong import Fate, Wrong, answered_unasked, fate
from virtiova.errors import MachineError, ProtocolError
from virtiova.probe.canary import Watch
from virtiova.probe.rig import LENGTH
from virtiova.wire.vhost_user import (
    HEADER_SIZE,
    BackendRequest,
    IotlbKind,
    IotlbMessage,
    Message,
    Request,
    VringState,
    encode_vring_fd,
    u64,
)

_SILENCE: Final = 0.005
_AT_ONCE: Final = 200
_BURST: Final = 4000
_FLOOD_BYTES: Final = 8 << 20
_FULL_SECONDS: Final = 0.1
_FAR: Final = 0x4000_0000
"""An IOVA that nobody uses."""


@case(
    "message-in-pieces",
    "a message that comes in pieces is taken once it is whole",
    vhost_user("Communication", "messages travel over a Unix stream socket, which keeps no borders: unix(7)"),
    why="QEMU writes as much as goes and the rest later; whoever takes a piece for the whole loses the connection, and "
    "the guest its device.",
    fix="Read until header and payload are complete, each in a loop, and do not wait for the rest with all else.",
)
def message_in_pieces(stand: Stand) -> str:
    """Cut messages in two, within the header, behind it, within the payload; send the rest a little later."""
    stand.working()
    front = stand.front
    enable = Message(Request.SET_VRING_ENABLE, VringState(0, 1).encode(), need_reply=stand.acknowledges)
    update = IotlbMessage(
        IOVA(stand.data.addr), PAGE_SIZE, stand.memory.uva(stand.data.gpa("A")), Access.RW, IotlbKind.UPDATE
    )
    call = Message(Request.SET_VRING_CALL, encode_vring_fd(0, True), need_reply=stand.acknowledges)
    messages = [Message(Request.GET_FEATURES), enable, call]
    if front.translating:
        messages.append(Message(Request.IOTLB_MSG, update.encode(), need_reply=stand.acknowledges))
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        for message in messages:
            data = message.encode()
            for cut in (1, HEADER_SIZE, HEADER_SIZE + 4):
                if cut < len(data):
                    _in_two(stand, message, cut, (fd,) if message is call else ())
    finally:
        os.close(fd)
    stand.must_land(stand.write(), stand.home, "after messages in pieces")
    return f"{len(messages)} messages cut in two at up to 3 places, and the device goes on"


def _in_two(stand: Stand, message: Message, cut: int, fds: tuple[int, ...]) -> None:
    front, data = stand.front, message.encode()
    answered = message.need_reply or message.request == Request.GET_FEATURES
    try:
        pending = front.expect(message.request) if answered else None
        front.raw(data[:cut], fds)
        stand.pump(_SILENCE)
        front.raw(data[cut:])
        if pending is not None:
            front.wait(pending)
        front.barrier()
    except (MachineError, ProtocolError) as error:
        name = Request(message.request).name
        stand.fail(f"{name}, of which {cut} of {len(data)} bytes came first: {error}")


@case(
    "half-message",
    "a front end that hangs up within a message does not take the process down",
    vhost_user("Communication", "a connection may end at any time, and another may follow"),
    why="A front end that is killed stops anywhere; the next one needs the back end.",
    fix="Take the end of the stream within a message for what it is, and close the descriptors that came with it.",
)
def half_message(stand: Stand) -> str:
    """Send half of a header, a header alone, and half of a payload with a descriptor, and hang up each time."""
    stand.working()
    data = Message(Request.SET_VRING_CALL, encode_vring_fd(0, True)).encode()
    stand.front.raw(data[:5])
    with stand.may_hang_up():
        stand.pump(_SILENCE)
    there = stand.still_there()
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        for cut in (1, HEADER_SIZE, HEADER_SIZE + 4):
            if not stand.again_possible:
                break
            with stand.dial() as front:
                front.raw(data[:cut], (fd,))
    finally:
        os.close(fd)
    return f"cut at 4 places; {stand.still_there() or there}"


@case(
    "unasked-reply",
    "an answer that nobody waits for does not take the process down",
    vhost_user("Header", "bit 2 of the flags marks an answer, which follows a request"),
    why="Whoever takes the next entry of an empty list of requests reads what is not there.",
    fix="Look whether an answer is due before it is taken for one, on both channels.",
)
def unasked_reply(stand: Stand) -> str:
    """Send answers to requests that the back end never made: on the main channel, and on the back end's own."""
    stand.working()
    front = stand.front
    with stand.may_hang_up():
        front.raw(Message(BackendRequest.IOTLB_MSG, u64(0), reply=True).encode() * 3, back=True)
        front.barrier()
        stand.pump(_SILENCE)
        front.barrier()
    with stand.may_hang_up():
        front.raw(Message(Request.GET_FEATURES, u64(0), reply=True).encode())
        front.raw(Message(Request.IOTLB_MSG, u64(1), reply=True).encode())
        front.barrier()
    return stand.still_there()


@case(
    "iotlb-before-bit33",
    "an IOTLB message that comes before bit 33 has no effect on who goes without it",
    vhost_user("IOTLB_MSG", "IOTLB messages are sent only once VIRTIO_F_ACCESS_PLATFORM was negotiated"),
    why="A translation from before the negotiation leads the next driver's accesses where nobody wants them.",
    fix="Refuse IOTLB messages while bit 33 is not accepted, and begin with an empty IOTLB when it is.",
)
def iotlb_before_bit33(stand: Stand) -> str:
    """Tell of a mapping of X before any SET_FEATURES; then go on without bit 33, and then with it."""
    stand.need_bit33()
    stand.asking = True
    stand.registers.share_memory()
    update = IotlbMessage(
        IOVA(stand.data.addr), PAGE_SIZE, stand.memory.uva(stand.data.gpa("A")), Access.RW, IotlbKind.UPDATE
    )
    came = fate(stand.front, Wrong("before SET_FEATURES", Request.IOTLB_MSG, update.encode()))
    if came is Fate.SILENT:
        stand.fail("an UPDATE before SET_FEATURES is not answered at all")
    if came is Fate.CLOSED:
        return f"{came}; {stand.still_there()}"
    if stand.negotiate(take=False).refused:
        return f"{came}, and without bit 33 nothing is served; {stand.still_there()}"
    stand.start()
    stand.must_land(stand.write(), "B", "X without bit 33, of which an UPDATE told before")
    stand.enable_iommu()
    stand.negotiate()
    page = stand.ops.spare("C")
    stand.iommu.map(IOVA(stand.data.addr), page, PAGE_SIZE)
    stand.start()
    watched = stand.write(watches=[*stand.paint_data(), Watch("data", "C", page, LENGTH)])
    stand.must_not_go_around(watched, "with bit 33, after an UPDATE before it")
    if stand.pages(watched) != "C":
        stand.unclear(
            f"with bit 33 bytes are in {stand.pages(watched) or 'no page'}, where X was said to be before",
            "what is said before bit 33 is negotiated has no meaning",
            "a front end must not say it, and a back end may keep what it is told",
        )
    return f"{came}, and of no effect with bit 33 and without"


@case(
    "burst",
    "thousands of messages at a time are all taken, in their order",
    vhost_user("Communication", "each message is taken in the order in which it was sent"),
    why="A guest that unmaps a gigabyte is thousands of messages in a millisecond; one that is lost is a stale page.",
    fix="Read on until the socket is empty, let no fixed buffer drop what does not fit, and keep the order.",
)
def burst(stand: Stand) -> str:
    """Send 4,000 IOTLB messages at once, the last of which move X elsewhere, then 200 requests in one write."""
    stand.working()
    page = stand.ops.spare("C") if stand.front.translating else 0
    home = stand.home
    if stand.front.translating:
        stand.iommu.map(IOVA(stand.data.addr), GPA(page), PAGE_SIZE)
        uva, there = stand.memory.uva(stand.data.gpa("A")), IOVA(stand.data.addr)
        messages = [
            IotlbMessage(IOVA(_FAR + at * PAGE_SIZE), PAGE_SIZE, uva, Access.RW, IotlbKind.UPDATE)
            for at in range(_BURST)
        ]
        messages.append(IotlbMessage(there, PAGE_SIZE, uva, Access.NONE, IotlbKind.INVALIDATE))
        messages.append(IotlbMessage(there, PAGE_SIZE, stand.memory.uva(page), Access.RW, IotlbKind.UPDATE))
        told = b"".join(Message(Request.IOTLB_MSG, each.encode()).encode() for each in messages)
        answered_unasked(stand, lambda: stand.front.stream(told))
        answered_unasked(stand, stand.front.barrier)
        home = "C"
    answers = [stand.front.expect(Request.GET_FEATURES) for _ in range(_AT_ONCE)]
    stand.front.raw(Message(Request.GET_FEATURES).encode() * _AT_ONCE)
    stand.front.wait(answers[-1])
    watches = stand.paint_data()
    if page:
        watches.append(Watch("data", "C", page, LENGTH))
    stand.must_land(stand.write(watches=watches), home, "after a burst of messages")
    return f"page {home}, after {_BURST if page else 0} IOTLB messages and {_AT_ONCE} requests at once"


@case(
    "never-reads",
    "a front end that never reads its answers does not take the process down",
    vhost_user("Communication", "a connection may end at any time, and another may follow"),
    why="A front end that hangs must not make the back end wait for ever, nor fill its memory.",
    fix="Write answers without blocking, bound what is kept of them, and hang up on who does not read.",
)
def never_reads(stand: Stand) -> str:
    """Send GET_FEATURES until no more is taken, without ever reading an answer; then hang up."""
    stand.asking = True
    data = Message(Request.GET_FEATURES).encode() * 1000
    sent, since = 0, time.monotonic()
    with stand.plug() as sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        while sent < _FLOOD_BYTES:
            try:
                # Whole messages or none: a rest would be taken for the next one's beginning.
                sent += sock.send(data[sent % HEADER_SIZE :])
                since = time.monotonic()
            except BlockingIOError:
                if time.monotonic() - since > _FULL_SECONDS:
                    break
                time.sleep(_SILENCE)
    return f"{sent // HEADER_SIZE} requests were taken, none of whose answers was read; {stand.still_there()}"
