# SPDX-License-Identifier: Apache-2.0
"""Cases on rings that a hostile guest writes: the process survives, no other memory changes, and a reset mends it.

What a device does with a ring that makes no sense is its own: it may stop until it is reset (virtio 1.4, 2.1.2), or
hang up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from virtiova.conformance.case import case
from virtiova.conformance.fence import Fence, homes
from virtiova.conformance.stand import Stand
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Queue
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import Feature
from virtiova.probe.rig import LENGTH, SILENT_SECONDS
from virtiova.ring.layout import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, SplitLayout
from virtiova.spec import spec
from virtiova.wire.vhost_user import Request

_ANSWER_SECONDS: Final = 1.5
_FAR: Final = 0x7000_0000
"""An IOVA that nothing is mapped at."""
_WHY: Final = (
    "The ring is the guest's to write, and so is each of its bytes while it is read: one guest that takes the process "
    "down, or reaches past its memory, has everybody's."
)


class Guest:
    """A split ring as a hostile guest sees it: bytes. ``chain`` are the descriptors of the request that comes next."""

    def __init__(self, stand: Stand, queue: Queue) -> None:
        self.stand = stand
        self.region: DmaRegion = queue.region
        layout = queue.ring.layout
        if not isinstance(layout, SplitLayout):
            stand.skip("the rings are packed")
        self.layout = layout
        self.entry = layout.avail + layout.avail_entry(self.region.load16(layout.avail + 2))
        self.head = self.region.load16(self.entry)
        # Written by the driver a moment ago, but the device can write there as well.
        self.chain: list[int] = []
        at: int | None = self.head
        while at is not None:
            if at >= layout.size or at in self.chain:
                raise ProtocolError("the back end has changed descriptors, which are the driver's to write")
            self.chain.append(at)
            desc = self.desc(at)
            at = desc.next if desc.flags & DESC_F_NEXT else None

    def desc(self, index: int) -> Desc:
        """A descriptor as it is."""
        return Desc.unpack(self.region.read(self.layout.desc + DESC_SIZE * index, DESC_SIZE))

    def put(self, index: int, desc: Desc) -> None:
        """Another one."""
        self.region.write(self.layout.desc + DESC_SIZE * index, desc.pack())

    @property
    def last(self) -> int:
        """The last descriptor of the chain."""
        return self.chain[-1]

    @property
    def buffer(self) -> int:
        """The descriptor of the buffer at X."""
        for index in self.chain:
            if self.desc(index).addr == self.stand.data.addr:
                return index
        raise ProtocolError("the back end has changed descriptors, which are the driver's to write")

    @property
    def free(self) -> int:
        """A descriptor that the chain does not have."""
        for index in range(self.layout.size):
            if index not in self.chain:
                return index
        raise ProtocolError("no descriptor is left")


def _attack(stand: Stand, scribble: Callable[[Guest], None], late: Callable[[Guest], None] | None = None) -> bool:
    """Let the device look at a request that was scribbled over, ``late`` once it is visible; whether it used it.
    Fails if any memory changes that the device was not granted."""
    request = stand.driver.make_device_write([(stand.data.addr, LENGTH)])
    guest = Guest(stand, request.queue)
    scribble(guest)
    stand.paint_data()
    rest = [region for region in stand.regions() if region is not stand.data]
    fence = Fence(stand.memory, homes(stand.regions(), stand.home) | homes(rest, "AB"))
    request.queue.ring.publish()
    if late is not None:
        late(guest)
    with stand.may_hang_up():
        request.queue.kick()
        request.after()
        stand.machine.wait(request.done, SILENT_SECONDS)
    if touched := fence.touched():
        pages = ", ".join(f"0x{gpa:x}" for gpa in touched[:4])
        stand.fail(f"memory that it was not granted is written: guest-physical {pages}")
    with contextlib.suppress(ProtocolError):
        return request.done()
    return True


def _recovered(stand: Stand) -> str:
    """Fail unless the device works again after a reset, or for the next front end if it has hung up."""
    take = stand.front.translating
    front = stand.front
    try:
        front.wait(front.post(Request.GET_FEATURES, need_reply=False), _ANSWER_SECONDS)
    except (MachineError, ProtocolError) as error:
        if stand.crashed() or "did not answer" in str(error):
            raise
        return _reconnected(stand, "it hangs up")
    try:
        stand.negotiate(take=take)
        stand.start()
        watched = stand.write()
    except (MachineError, ProtocolError):
        return _reconnected(stand, "it hangs up at the next start")
    if watched.done and stand.pages(watched) == ("A" if take else "B"):
        return "after a reset it works"
    seen = _reconnected(stand, "no reset mends it")
    stand.unclear(
        seen,
        "a reset makes a device new, whatever was before",
        "a reset is not a message of its own on this connection, so that only another one makes it new",
    )


def _reconnected(stand: Stand, what: str) -> str:
    if not stand.again_possible:
        return f"{what}, and {stand.still_there()}"
    with stand.again() as other:
        try:
            other.working()
        except MachineError as error:
            stand.fail(f"{what}, and then the next front end is not served: {error}")
    return f"{what}, and the next front end is served"


def _survives(stand: Stand, *scribbles: Callable[[Guest], None]) -> str:
    """Each of them in its turn, with a reset in between."""
    seen = ""
    for scribble in scribbles:
        if seen:
            with stand.again() as other:
                other.working()
                _attack(other, scribble)
                seen = _recovered(other)
        else:
            stand.working()
            _attack(stand, scribble)
            seen = _recovered(stand)
    return seen


@case(
    "chain-loop",
    "a chain of descriptors without an end is survived",
    spec("2.7.5.2", "a chain has no loop, and no more than 2^32 bytes"),
    why=_WHY,
    fix="Count descriptors while a chain is followed, and give up at the size of the queue.",
)
def chain_loop(stand: Stand) -> str:
    """Let the last descriptor of a request lead to itself."""

    def loop(guest: Guest) -> None:
        last = guest.desc(guest.last)
        guest.put(guest.last, replace(last, flags=last.flags | DESC_F_NEXT, next=guest.last))

    return _survives(stand, loop)


@case(
    "chain-next",
    "a next descriptor beyond the table is survived",
    spec("2.7.5", "next is the index of a descriptor of the same table"),
    why=_WHY,
    fix="Compare each next with the size of the table, and load it once.",
)
def chain_next(stand: Stand) -> str:
    """Let a request go on at the descriptor just behind the table, and at 65535."""

    def behind(number: int) -> Callable[[Guest], None]:
        def scribble(guest: Guest) -> None:
            last = guest.desc(guest.last)
            following = number or guest.layout.size
            guest.put(guest.last, replace(last, flags=last.flags | DESC_F_NEXT, next=following))

        return scribble

    return _survives(stand, behind(0), behind(0xFFFF))


@case(
    "head-beyond",
    "an entry of the available ring that names no descriptor is survived",
    spec("2.7.6", "an entry of the available ring is the index of a chain's first descriptor"),
    why=_WHY,
    fix="Compare the head with the queue's size before it is an index of anything, also of your own arrays.",
)
def head_beyond(stand: Stand) -> str:
    """Make descriptors available that there are not: one just behind the table, and 65535."""

    def name(number: int) -> Callable[[Guest], None]:
        return lambda guest: guest.region.store16(guest.entry, number or guest.layout.size)

    return _survives(stand, name(0), name(0xFFFF))


@case(
    "available-jump",
    "an available index that jumps by more than the queue's size is survived",
    spec("2.7.6", "the available index counts entries, of which there are at most as many as the queue has"),
    why=_WHY,
    fix="Compare the difference of the indices with the queue's size, and stop the ring beyond that.",
)
def available_jump(stand: Stand) -> str:
    """Publish a request, and then as many as no ring has."""
    stand.working()

    def jump(guest: Guest) -> None:
        at = guest.layout.avail + 2
        guest.region.store16(at, (guest.region.load16(at) + guest.layout.size + 1000) & 0xFFFF)

    _attack(stand, lambda _: None, jump)
    return _recovered(stand)


def _table(guest: Guest, desc: Desc, length: int) -> None:
    """A request that is one indirect descriptor, of a table that begins with ``desc``."""
    table = guest.stand.ops.regions[-1]
    table.write(0, desc.pack())
    guest.put(guest.head, Desc(table.addr, length, DESC_F_INDIRECT, 0))


@case(
    "indirect-nested",
    "an indirect table inside an indirect table is survived",
    spec("2.7.5.3.1", "a table has no indirect descriptor"),
    why=_WHY,
    fix="Refuse the flag INDIRECT inside a table; a table that names itself never ends.",
)
def indirect_nested(stand: Stand) -> str:
    """Make a table available whose first descriptor is the table itself, indirect."""
    stand.need_feature(Feature.RING_INDIRECT_DESC)
    stand.working()
    table = stand.ops.alloc(DESC_SIZE)
    _attack(stand, lambda guest: _table(guest, Desc(table.addr, DESC_SIZE, DESC_F_INDIRECT, 0), DESC_SIZE))
    return _recovered(stand)


@case(
    "indirect-length",
    "an indirect table of a length that is no number of descriptors is survived",
    spec("2.7.5.3", "a table has as many descriptors as 16 bytes go into its length"),
    why=_WHY,
    fix="Refuse a table of no bytes, of a rest, and of more descriptors than the queue may have.",
)
def indirect_length(stand: Stand) -> str:
    """Make tables of 0, 8, 24 and 2^32-1 bytes available."""
    stand.need_feature(Feature.RING_INDIRECT_DESC)
    seen = ""
    for length in (24, 0, 8, 0xFFFF_FFFF):
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(stand.again()) if seen else stand
            other.working()
            other.ops.alloc(DESC_SIZE)
            whole = Desc(other.data.addr, LENGTH, DESC_F_WRITE | DESC_F_NEXT, 1)
            _attack(other, lambda guest, whole=whole, length=length: _table(guest, whole, length))  # type: ignore[misc]
            seen = _recovered(other)
    return seen


@case(
    "address-wraps",
    "a buffer that goes past 2^64 reaches nothing at 0",
    spec("2.7.5", "a descriptor is an address and a length"),
    why=_WHY,
    fix="Check address plus length for a carry before anything is translated.",
)
def address_wraps(stand: Stand) -> str:
    """Let the device write to a buffer that begins 256 bytes before 2^64, and to one that ends there."""

    def at(address: int) -> Callable[[Guest], None]:
        return lambda guest: guest.put(guest.buffer, replace(guest.desc(guest.buffer), addr=address))

    return _survives(stand, at((1 << 64) - 256), at((1 << 64) - LENGTH))


@case(
    "extreme-lengths",
    "buffers of no bytes and of 2^32-1 are survived",
    spec("2.7.5.2", "a chain has no loop, and no more than 2^32 bytes"),
    why=_WHY,
    fix="Take lengths as unsigned numbers of 32 bits, sum them in 64, and make room for no more than is needed.",
)
def extreme_lengths(stand: Stand) -> str:
    """Let a request have a buffer of 2^32-1 bytes, of which one page is mapped, and one of none."""

    def of(length: int) -> Callable[[Guest], None]:
        return lambda guest: guest.put(guest.buffer, replace(guest.desc(guest.buffer), length=length))

    return _survives(stand, of(0xFFFF_FFFF), of(0x8000_0000), of(0))


@case(
    "readable-after-writable",
    "a chain with a readable buffer after a writable one is survived",
    spec("2.7.4.2", "buffers that the device writes come after those that it reads"),
    why=_WHY,
    fix="Sort the buffers by their flags as they come, or refuse the chain; do not count on their order.",
)
def readable_after_writable(stand: Stand) -> str:
    """Append a readable buffer to a request that ends with a writable one."""

    def append(guest: Guest) -> None:
        free, last = guest.free, guest.desc(guest.last)
        guest.put(free, Desc(guest.stand.data.addr + LENGTH, 16, 0, 0))
        guest.put(guest.last, replace(last, flags=last.flags | DESC_F_NEXT, next=free))

    return _survives(stand, append)


@case(
    "header-unmapped",
    "a request whose header cannot be reached is not carried out",
    spec("5.2.6", "a block request begins with a header that says what is wanted"),
    "blk",
    why="What is not known cannot be done: bytes that were left over from somewhere decide what becomes of the disk.",
    fix="Give the request back with an error, or stop the ring, if its header is refused by the front end.",
)
def header_unmapped(stand: Stand) -> str:
    """Let the header of a request be at an address that is not mapped."""
    stand.working()
    if not stand.front.translating:
        stand.skip("without bit 33 no address is unmapped")

    def move(guest: Guest) -> None:
        guest.put(guest.head, replace(guest.desc(guest.head), addr=_FAR))

    used = _attack(stand, move)
    page = stand.data.gpa("A")
    if stand.machine.ram.read(page, 7) != b"page A ":
        stand.fail("the buffer was filled, although the header that says so was not there")
    return f"{'given back' if used else 'not given back'}; {_recovered(stand)}"
