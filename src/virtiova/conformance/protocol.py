# SPDX-License-Identifier: Apache-2.0
"""Cases on single messages that make no sense: none of them may take the back end's process down."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from virtiova.addr import GPA, UVA
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.stand import Stand
from virtiova.conformance.wrong import Fate, Wrong, fate, greet, say_all, summary, taken
from virtiova.machine.qemu.process import sealed_file
from virtiova.spec import spec
from virtiova.wire.vhost_user import (
    IotlbKind,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_table,
    encode_vring_fd,
    u64,
)

_NO_REQUEST: Final = 1000
_NO_RING: Final = 0x10000
_ROUNDS: Final = 3
_TOO_MANY: Final = 8
_CLOSE_SECONDS: Final = 1.0
_DYING: Final = (
    "A front end with a mistake, or one that was taken over by its guest, ends the device of everybody else whom the "
    "process serves."
)


@case(
    "payload-size",
    "a payload that is too short or too long does not take the process down",
    vhost_user("Header", "the size says how many bytes of payload follow"),
    why=_DYING,
    fix="Compare the size in the header with what the request has before any field is read; refuse, or hang up.",
)
def payload_size(stand: Stand) -> str:
    """Send requests with a part of their payload, with none, and with more than they have."""
    numbers = (0, 1, 4, 7)
    wrongs = [Wrong(f"with {size} bytes", Request.SET_FEATURES, bytes(size)) for size in numbers]
    wrongs += [Wrong(f"with {size} bytes", Request.SET_VRING_NUM, bytes(size)) for size in (0, 4)]
    wrongs += [Wrong(f"with {size} bytes", Request.SET_VRING_ADDR, bytes(size)) for size in (0, 8, 39)]
    wrongs += [Wrong(f"with {size} bytes", Request.SET_MEM_TABLE, bytes(size)) for size in (0, 4)]
    wrongs.append(Wrong("of 2 regions with the bytes of one", Request.SET_MEM_TABLE, _cut_table()))
    wrongs.append(Wrong("with 4000 bytes", Request.SET_VRING_NUM, bytes(4000)))
    if stand.front.speaks(ProtocolFeature.BACKEND_REQ):
        wrongs += [Wrong(f"with {size} bytes", Request.IOTLB_MSG, bytes(size)) for size in (0, 8)]
    found = say_all(stand, wrongs)
    seen = summary(stand, found)
    if what := taken(found):
        stand.unclear(
            f"{what} is acknowledged as if it were done",
            "what was not sent cannot be done, so that an acknowledgement says what is not so",
            "nothing demands that a back end compares sizes",
        )
    return seen


def _cut_table() -> bytes:
    region = MemoryRegion(GPA(0), 0x1000, UVA(0x1000), 0)
    return encode_table([region, region])[:-32]


@case(
    "message-size",
    "a header that announces gigabytes does not take the process down",
    vhost_user("Header", "the size says how many bytes of payload follow"),
    why=_DYING,
    fix="Bound the size by the longest payload that there is before room is made for it, and hang up beyond that.",
)
def message_size(stand: Stand) -> str:
    """Announce a payload of almost 4 GiB and send the first 64 KiB of it; on another connection, one of 1 MiB."""
    stand.asking = True
    for size in (0xFFFF_FFF0, 1 << 20):
        with stand.plug() as sock, contextlib.suppress(OSError):
            sock.settimeout(0.1)
            sock.sendall(_header(Request.SET_FEATURES, size) + bytes(1 << 16))
    return stand.still_there()


def _header(request: int, size: int, flags: int = 1) -> bytes:
    return request.to_bytes(4, "little") + flags.to_bytes(4, "little") + size.to_bytes(4, "little")


@case(
    "header-flags",
    "a header of another version does not take the process down",
    vhost_user("Header", "the lower two bits of the flags are the version, which is 1"),
    why=_DYING,
    fix="Look at the version of each header, and hang up over any other than 1: nothing after it can be understood.",
)
def header_flags(stand: Stand) -> str:
    """Send headers of versions 0, 2 and 3, and one with all flags that there are."""
    stand.asking = True
    for flags in (0, 2, 3, 0xFFFF_FFFF):
        with stand.plug() as sock, contextlib.suppress(OSError):
            sock.settimeout(0.02)
            sock.sendall(_header(Request.GET_FEATURES, 0, flags))
            sock.recv(64)
    return stand.still_there()


@case(
    "unknown-request",
    "a request that nobody knows is answered with a failure, or by hanging up",
    vhost_user("REPLY_ACK", "a message with need_reply is answered by success or failure"),
    why="A newer front end asks for something, hears that it was done, and relies on it.",
    fix="Answer a request of an unknown number with a failure if it has need_reply, whatever else becomes of it.",
)
def unknown_request(stand: Stand) -> str:
    """Send requests with numbers that no version of the protocol has."""
    wrongs = [
        Wrong("", number, payload) for number in (_NO_REQUEST, 0x7FFF_FFFF, 0xFFFF_FFFF) for payload in (b"", u64(1))
    ]
    found = say_all(stand, wrongs)
    seen = summary(stand, found)
    if what := taken(found):
        stand.fail(f"{what} is acknowledged as if it were done")
    return seen


@case(
    "too-many-descriptors",
    "descriptors that nobody asked for are not kept",
    vhost_user("Communication", "each message says how many descriptors come with it"),
    why="Each of them is one that the process cannot open any more; at the limit it stops serving everybody.",
    fix="Close what comes with a message beyond its own number of descriptors, also where the message is refused.",
)
def too_many_descriptors(stand: Stand) -> str:
    """Send several descriptors with messages that have one or none, again and again; count what the process holds."""
    stand.asking = True
    greet(stand, stand.front)
    before = stand.descriptors()
    with _descriptors(_TOO_MANY) as fds:
        wrongs = [
            Wrong(f"with {_TOO_MANY} descriptors", Request.SET_VRING_NUM, VringState(0, 256).encode(), fds),
            Wrong(f"with {_TOO_MANY} descriptors", Request.SET_VRING_CALL, encode_vring_fd(0, True), fds),
            Wrong(f"with {_TOO_MANY} descriptors", Request.SET_FEATURES, u64(stand.front.accepted), fds),
            Wrong(f"with {_TOO_MANY} descriptors", _NO_REQUEST, b"", fds),
        ] * _ROUNDS
        found = say_all(stand, wrongs)
    seen = summary(stand, found)
    if before and stand.again_possible:
        with stand.dial() as front:
            front.open()
            greet(stand, front)
            # Some close what is left of a connection a little later.
            stand.machine.wait(lambda: stand.descriptors() < before + _TOO_MANY, _CLOSE_SECONDS)
            after = stand.descriptors()
        if after >= before + _TOO_MANY:
            stand.fail(f"the process holds {after} descriptors after {len(wrongs)} such messages, {before} before")
    return seen


@contextlib.contextmanager
def _descriptors(count: int) -> Iterator[tuple[int, ...]]:
    fds = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count))
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@case(
    "missing-descriptors",
    "a message without the descriptors that belong to it does not take the process down",
    vhost_user("Communication", "each message says how many descriptors come with it"),
    why=_DYING,
    fix="Count the descriptors of a message before the first is looked at; there may be none.",
)
def missing_descriptors(stand: Stand) -> str:
    """Send messages without the descriptors that they need: memory, kick, call, error, the back-end channel."""
    table = encode_table(stand.memory.regions)
    wrongs = [Wrong("without descriptors", Request.SET_MEM_TABLE, table)]
    wrongs.append(Wrong("with one descriptor of three", Request.SET_MEM_TABLE, table, (stand.memory.fd,)))
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        wrongs.append(Wrong("without a descriptor, of which it says that it is there", request, u64(0)))
    if stand.front.speaks(ProtocolFeature.BACKEND_REQ):
        wrongs.append(Wrong("without a descriptor", Request.SET_BACKEND_REQ_FD))
    return summary(stand, say_all(stand, wrongs))


@case(
    "wrong-descriptors",
    "descriptors of the wrong kind do not take the process down",
    vhost_user("SET_MEM_TABLE", "a descriptor of a file that can be mapped comes with each region"),
    why=_DYING,
    fix="Take a failed mmap for a refusal, and never write to a pipe or socket with SIGPIPE in force.",
)
def wrong_descriptors(stand: Stand) -> str:
    """Share a pipe as memory, a closed pipe as call; let the device be done with a request, so that it calls."""
    stand.working()
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    nowhere = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.close(read)
        with stand.may_hang_up():
            call = encode_vring_fd(stand.driver.queues()[0].index, True)
            stand.front.command(Request.SET_VRING_CALL, call, [write])
            stand.silent()
        table = encode_table(stand.memory.regions)
        wrongs = [
            Wrong("of pipes", Request.SET_MEM_TABLE, table, (write,) * len(stand.memory.regions)),
            Wrong("of no memory", Request.SET_MEM_TABLE, table, (nowhere,) * len(stand.memory.regions)),
            Wrong("of no eventfd", Request.SET_VRING_CALL, encode_vring_fd(0, True), (nowhere,)),
            Wrong("of no eventfd", Request.SET_VRING_KICK, encode_vring_fd(0, True), (nowhere,)),
        ]
        if stand.front.speaks(ProtocolFeature.BACKEND_REQ):
            wrongs.append(Wrong("of a pipe", Request.SET_BACKEND_REQ_FD, b"", (write,)))
        if not stand.again_possible:
            return stand.still_there()
        with stand.dial() as front:
            front.open()
            greet(stand, front)
            for wrong in wrongs:
                with stand.may_hang_up():
                    fate(front, wrong)
    finally:
        os.close(write)
        os.close(nowhere)
    return stand.still_there()


@case(
    "ring-number",
    "a ring that does not exist is refused",
    vhost_user("Multiple queue support", "the back end says how many queues there are"),
    why="The number becomes an index into an array: bytes of the process are changed that are somebody else's.",
    fix="Compare the ring's number with the number of rings in every request that has one, before it is an index.",
)
def ring_number(stand: Stand) -> str:
    """Name rings far beyond the last one in all requests that have a number of 32 bits."""
    wrongs = []
    for number in (_NO_RING, 0x7FFF_FFFF, 0xFFFF_FFFF):
        wrongs += [
            Wrong(f"of ring 0x{number:x}", Request.SET_VRING_NUM, VringState(number, 256).encode()),
            Wrong(f"of ring 0x{number:x}", Request.SET_VRING_BASE, VringState(number, 0).encode()),
            Wrong(f"of ring 0x{number:x}", Request.SET_VRING_ENABLE, VringState(number, 1).encode()),
            Wrong(f"of ring 0x{number:x}", Request.SET_VRING_ADDR, VringAddr(number, 0, 0, 0, 0, 0).encode()),
            Wrong(f"of ring 0x{number:x}", Request.GET_VRING_BASE, VringState(number, 0).encode()),
        ]
    found = say_all(stand, wrongs)
    seen = summary(stand, found)
    if what := taken(found):
        stand.fail(f"{what} is acknowledged as if it were done")
    return seen


@case(
    "ring-size",
    "a ring of an impossible size does not take the process down",
    spec("2.7", "a queue size is a power of two of at most 32768"),
    why="A size of 0 divides by zero or wraps a mask; one that is too large reaches far past the ring.",
    fix="Refuse SET_VRING_NUM with 0, with more than 32768, and for split rings what is no power of two.",
)
def ring_size(stand: Stand) -> str:
    """Start a ring of size 0, 3, 65536 and 2^32-1, kick it, and let it look."""
    accepted = []
    for size in (0, 3, 0x10000, 0xFFFF_FFFF):
        if not stand.again_possible:
            stand.skip("the back end was given its only connection")
        with stand.again() as other:
            other.asking = False
            other.working()
            came = None
            with other.may_hang_up():
                index = other.driver.queues()[0].index
                other.registers.stop_queue(index)
                came = fate(other.front, Wrong(f"of {size}", Request.SET_VRING_NUM, VringState(index, size).encode()))
                other.registers.start_queue(index, size=size)
                other.driver.make_device_write([(other.data.addr, 512)]).go()
                other.pump(0.01)
            if came is Fate.TAKEN:
                accepted.append(size)
        stand.asking = True
        there = stand.still_there()
    if accepted:
        stand.unclear(
            f"sizes {', '.join(map(hex, accepted))} are acknowledged; {there}",
            "such a ring cannot be, so that it has to be refused",
            "a front end must not ask for it, and a back end may believe that it does not",
        )
    return f"each is refused; {there}"


@case(
    "region-nowhere",
    "a memory region that cannot be does not take the process down",
    vhost_user("SET_MEM_TABLE", "each region has a size, two addresses and an offset in its file"),
    why="Sums of addresses and sizes that wrap pass every later check, and whoever maps by them reaches other memory.",
    fix="Check each sum for a carry, and the offset and size against the file, before the region is mapped.",
)
def region_nowhere(stand: Stand) -> str:
    """Share regions whose guest address, user address or file offset wraps, and one of size 0."""
    top, fd = (1 << 64) - 0x1000, (stand.memory.fd,)
    wrongs = [
        Wrong(f"whose {what} wraps", Request.SET_MEM_TABLE, encode_table([region]), fd)
        for what, region in (
            ("guest address", MemoryRegion(GPA(top), 0x2000, UVA(0x1000_0000), 0)),
            ("user address", MemoryRegion(GPA(0), 0x2000, UVA(top), 0)),
            ("file offset", MemoryRegion(GPA(0), 0x2000, UVA(0x1000_0000), top)),
            ("size", MemoryRegion(GPA(0x1000), (1 << 64) - 0x1000, UVA(0x1000_0000), 0x1000)),
        )
    ]
    wrongs.append(
        Wrong("of no bytes", Request.SET_MEM_TABLE, encode_table([MemoryRegion(GPA(0), 0, UVA(0x1000), 0)]), fd)
    )
    return summary(stand, say_all(stand, wrongs))


@case(
    "region-past-file",
    "memory that is longer than its file does not take the process down",
    vhost_user("SET_MEM_TABLE", "the region is mapped from the descriptor that comes with it"),
    why="Behind the end of the file each access is a SIGBUS, and one guest's mistake ends what all others use.",
    fix="Compare size and offset with fstat when the region comes, and be prepared for a file that shrinks later.",
)
def region_past_file(stand: Stand) -> str:
    """Share memory of a file that is empty, hand over a ring in it, and kick."""
    stand.working()
    if not stand.again_possible:
        stand.skip("the back end was given its only connection")
    empty = sealed_file("virtiova-empty", 0)
    try:
        stand.registers.stop()
        with stand.may_hang_up():
            regions = stand.memory.regions
            stand.front.command(Request.SET_MEM_TABLE, encode_table(regions), [empty] * len(regions))
            stand.front.barrier()
            stand.registers.start_queue(stand.driver.queues()[0].index)
            stand.driver.make_device_write([(stand.data.addr, 512)]).go()
            stand.pump(0.05)
    finally:
        os.close(empty)
    return stand.still_there()


@case(
    "iotlb-nonsense",
    "an IOTLB message that is not the front end's to send does not take the process down",
    vhost_user("An IOTLB message", "a front end sends UPDATE and INVALIDATE, a back end MISS and ACCESS_FAIL"),
    why=_DYING,
    fix="Answer types that are not known, MISS and ACCESS_FAIL with a failure.",
)
def iotlb_nonsense(stand: Stand) -> str:
    """Send IOTLB messages of types that do not exist, the back end's own, ranges that wrap, and no memory."""
    stand.need_bit33()
    fields = {
        "of type 0": (0x1000, 0x1000, 0, 3, 0),
        "of type 9": (0x1000, 0x1000, 0, 3, 9),
        "of type 255": (0x1000, 0x1000, 0, 3, 255),
        "of type MISS": (0x1000, 0x1000, 0, 3, IotlbKind.MISS),
        "of type ACCESS_FAIL": (0x1000, 0x1000, 0, 3, IotlbKind.ACCESS_FAIL),
        "that updates beyond 2^64": ((1 << 64) - 0x1000, 0x2000, stand.memory.regions[0].uva, 3, IotlbKind.UPDATE),
        "that updates to no memory": (0x1000, 0x1000, 0x1000, 3, IotlbKind.UPDATE),
        "that updates to a user address beyond 2^64": (0x1000, 0x2000, (1 << 64) - 0x1000, 3, IotlbKind.UPDATE),
        "that updates no bytes": (0x1000, 0, stand.memory.regions[0].uva, 3, IotlbKind.UPDATE),
        "of permission 255": (0x1000, 0x1000, stand.memory.regions[0].uva, 255, IotlbKind.UPDATE),
    }
    found = say_all(stand, [Wrong(what, Request.IOTLB_MSG, _iotlb(*each)) for what, each in fields.items()])
    seen = summary(stand, found)
    if what := taken(found):
        stand.unclear(
            f"{what} is acknowledged as if it were done",
            "an acknowledgement says that something was done",
            "what makes no sense may be passed over",
        )
    return seen


def _iotlb(iova: int, size: int, uaddr: int, perm: int, kind: int) -> bytes:
    return b"".join(each.to_bytes(8, "little") for each in (iova, size, uaddr)) + bytes((perm, kind)) + bytes(6)
