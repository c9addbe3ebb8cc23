# SPDX-License-Identifier: Apache-2.0
"""Requests that come out of the native end of a ring, and devices that are served with them."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Sequence

import pytest

from native_kit import PLACES, RIGHTS, TAME, Touch, World
from ring_storm import BASE, PAGE, RING, SHARED
from virtiova import _core
from virtiova.addr import UVA, Access
from virtiova.device.base import Device
from virtiova.device.host import Drained, drain_queue
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, PackedLayout, SplitLayout

SIZE = 8
READ, ROOM = 24, 40
"""Bytes of each request that `offered` makes: from the driver, and for it."""


def world(*, native: bool = True, event_idx: bool = True) -> World:
    made = World(SplitLayout(SIZE), RING, 0, event_idx=event_idx, indirect=True, native=native)
    for place in PLACES:
        made.answer(place, RIGHTS.get(place, Access.RW))
    return made


def offered(count: int) -> tuple[World, _core.Drain]:
    """A world where ``count`` requests, of two buffers each, are available, and its native end."""
    made = world()
    at = SHARED + PAGE - 8  # both buffers of the first one lie in two pages
    table = b"".join(
        Desc(at + 64 * head, READ, DESC_F_NEXT, head + 4).pack() if head < 4 else
        Desc(at + 64 * (head - 4) + READ, ROOM, DESC_F_WRITE, 0).pack()
        for head in range(SIZE)
    )  # fmt: skip
    made.offer(table, [0, 1, 2, 3, 0, 0, 0, 0], count, 0, b"")
    for head in range(4):
        made.put(at + 64 * head, bytes(range(head, head + READ)) + b"." * ROOM)
    assert made.drain is not None
    return made, made.drain


def seen(made: World) -> list[tuple[int, int]]:
    """The used elements that the driver sees: head and length of each."""
    space = made.space
    layout = SplitLayout(SIZE)
    used = RING + layout.used
    count = space.load16(used + 2)
    return [struct.unpack("<II", space.read(used + layout.used_entry(at), 8)) for at in range(count)]


def test_a_request_there_and_back() -> None:
    made, drain = offered(1)
    (request,) = drain.pop(4)
    assert (request.head, request.length, request.readable, request.writable) == (0, 2, READ, ROOM)
    assert request.read(5) == bytes(range(5))
    assert request.read() == bytes(range(5, READ))
    assert request.read(9) == b""
    assert request.read(-1) == b""
    request.write(b"abc")
    request.skip(2)
    request.write(b"d")
    assert (request.readable, request.writable, request.written, request.moved) == (0, ROOM - 6, 3, READ + 4)
    assert not drain.needs_help
    assert drain.taken == 1
    assert seen(made) == []
    drain.push(request, request.written)
    assert seen(made) == [(0, 3)]
    assert made.space.read(SHARED + PAGE - 8 + READ, 8) == b"abc..d.."


def test_more_than_there_is_room_for() -> None:
    _, drain = offered(1)
    (request,) = drain.pop(1)
    with pytest.raises(ProtocolError, match="room for 0x28 bytes, wanted 0x29"):
        request.write(bytes(ROOM + 1))
    for wrong in (ROOM + 1, -1):
        with pytest.raises(ProtocolError, match="room for 0x28 bytes, wanted to skip"):
            request.skip(wrong)
    assert request.writable == ROOM


def test_a_request_is_over_when_it_was_given_back() -> None:
    _, drain = offered(2)
    first, second = drain.pop(2)
    drain.push(first, 0)
    for use in (first.read, lambda: first.write(b""), lambda: first.skip(0), lambda: drain.push(first, 0)):
        with pytest.raises(ValueError, match="given back"):
            use()
    with pytest.raises(ValueError, match="not a request of this ring"):
        offered(1)[1].push(second, 0)
    drain.put_back([second])
    with pytest.raises(ValueError, match="given back"):
        second.read()
    with pytest.raises(ValueError, match="given back"):
        _core.Request.__new__(_core.Request).read()


def test_no_request_outlives_what_its_addresses_meant() -> None:
    made, drain = offered(2)
    first, second = drain.pop(2)
    made.iotlb.invalidate(SHARED, PAGE)
    for use in (first.read, lambda: first.write(b""), lambda: first.skip(0)):
        with pytest.raises(ValueError, match="has changed"):
            use()
    # The ring is where it was, so they can be given back; and nothing more comes out before the page is known again.
    drain.push_all([(first, 0), (second, 0)])
    assert seen(made) == [(0, 0), (1, 0)]
    made.offer(b"", [0] * SIZE, 1, 0, b"")


def test_no_used_ring_to_push_to() -> None:
    made, drain = offered(1)
    (request,) = drain.pop(1)
    made.iotlb.invalidate(RING, PAGE)
    with pytest.raises(AccessError, match="the used ring is out of reach"):
        drain.push(request, 0)
    assert drain.state == (1, 0, 0)
    assert drain.taken == 1
    made.answer(RING, Access.RW)
    drain.push(request, 0)
    assert seen(made) == [(0, 0)]
    assert drain.state == (1, 1, 1)


def test_put_back_means_popped_again() -> None:
    _, drain = offered(3)
    requests = drain.pop(3)
    drain.put_back(requests[1:])
    assert (drain.state[0], drain.taken) == (1, 1)
    assert [request.head for request in drain.pop(9)] == [1, 2]
    assert not drain.needs_help


def test_what_is_not_known_is_left_as_it_was() -> None:
    made, drain = offered(3)
    made.iotlb.invalidate(SHARED + PAGE, PAGE)
    assert drain.pop(4) == []
    assert drain.needs_help
    assert drain.state == (0, 0, 0)
    assert made.twin.pop() is not None


def test_what_it_goes_on_from_is_checked() -> None:
    made, _ = offered(0)
    assert made.drain is not None
    made.drain.state = 5, 7, 9
    assert made.drain.state == (5, 7, 9)
    with pytest.raises(OverflowError):
        made.drain.state = 0x10000, 0, 0
    packed = _core.Drain(made.iotlb.radix, RING, RING + 128, RING + 132, 7, packed=True, event_idx=True, indirect=True)
    assert packed.state == (0x8000, 0x8000, 0)
    for wrong in ((0x8007, 0x8000, 0), (0x8000, 0x8001, 0), (2, 0x8001, 0)):
        with pytest.raises(ValueError, match="place"):
            packed.state = wrong
    packed.state = 1, 0x8001, 2
    assert packed.state == (1, 0x8001, 2)


@pytest.mark.parametrize("parts", [(8, 0, 0), (0, 1, 0), (0, 0, 2), (1 << 48, 0, 0), (0, 0, 1 << 63)])
def test_nothing_comes_out_of_a_ring_that_is_not_aligned_or_too_far(parts: tuple[int, int, int]) -> None:
    radix = world().iotlb.radix
    layout = SplitLayout(SIZE)
    desc, avail, used = (
        RING + offset + part for offset, part in zip((0, layout.avail, layout.used), parts, strict=True)
    )
    drain = _core.Drain(radix, desc, avail, used, SIZE, event_idx=False, indirect=False)
    drain.disable_notify()
    assert drain.pop(1) == []
    assert drain.needs_help
    assert drain.enable_notify()
    assert not drain.needs_interrupt()


def test_notes_keep_their_memory() -> None:
    made, drain = offered(1)
    assert made.inflight is not None
    window = made.inflight._memory
    with pytest.raises(BufferError):
        window.release()
    drain.note_in(None)
    window.release()


def test_a_packed_ring_that_is_available_again_before_it_was_given_back() -> None:
    made = World(PackedLayout(2), RING, 0x8000, event_idx=False, indirect=False, native=True)
    for place in PLACES:
        made.answer(place, RIGHTS.get(place, Access.RW))
    table = Desc(SHARED, 4, 0, 0).pack() * 2
    made.offer(table, [0, 1], 2, 0, b"")
    assert made.drain is not None
    assert [request.head for request in made.drain.pop(4)] == [0, 1]
    assert (made.drain.needs_help, made.drain.state) == (False, (0, 0x8000, 0))
    assert [made.twin.pop() is not None for _ in range(2)] == [True, True]
    made.offer(table, [0, 1], 2, 0, b"")
    assert made.drain.pop(4) == []
    assert made.drain.needs_help
    for _ in range(2):
        with pytest.raises(ProtocolError, match="available again"):
            made.twin.pop()
        made.drain.state = made.twin.state  # a lap apart, and no more


def test_enough_of_it_is_done_natively() -> None:
    """The comparison with Python would find nothing if Python did all, or nothing."""
    rng = random.Random(3)
    made = world()
    for _ in range(300):
        made.offer(b"".join(rng.choices(TAME, k=SIZE)), [rng.randrange(SIZE) for _ in range(SIZE)], 4, 0, b"")
        made.serve(Touch(16, 5, 100), 4)
    assert made.natively > 200
    assert made.helped > 200


@pytest.mark.parametrize(("buffers", "native"), [(512, True), (513, False), (1024, False)])
def test_as_many_pieces_as_it_has_room_for(buffers: int, native: bool) -> None:
    memory = mmap.mmap(-1, 1 << 21)
    radix = _core.Radix(1 << 26)
    # From one page to the next the other way round: no two pages that follow each other do so in memory.
    window = _core.Window(memoryview(memory))
    for page in range(512):
        assert radix.fill(page << 12, page << 12, (page << 12) + 4095, window, (511 - page) << 12, 3)
    layout = SplitLayout(1024)
    data = 0x10000
    ring = b"".join(Desc(data + 16 * at, 16, DESC_F_NEXT * (at + 1 < buffers), at + 1).pack() for at in range(1024))
    ring += struct.pack("<HHH", 0, 1, 0)
    for at in range(0, len(ring), 4096):
        assert radix.write(at, ring[at : at + 4096])
    for at in range(buffers):
        assert radix.write(data + 16 * at, bytes([at & 255]) * 16)
    drain = _core.Drain(radix, 0, layout.avail, layout.used, 1024, event_idx=True, indirect=True)
    requests = drain.pop(1)
    assert (len(requests), drain.needs_help) == (native, not native)
    for request in requests:
        assert request.read() == b"".join(bytes([at & 255]) * 16 for at in range(buffers))
    radix.clear()


# -- devices


class Doubler(Device):
    """Answers with what it was sent."""

    broken = False

    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read()
        if self.broken:
            raise ProtocolError("no such request")
        if data[0] == 1:
            raise AccessError(0, 1, "of the device's own")
        chain.write(data)


class Many(Doubler):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def handle_batch(self, queue: int, chains: Sequence[Chain]) -> None:
        self.sizes.append(len(chains))
        super().handle_batch(queue, chains)


@pytest.mark.parametrize("device", [Doubler(), Many()], ids=["one by one", "together"])
def test_a_device_gets_all_that_is_there(device: Doubler) -> None:
    made, drain = offered(4)
    total = Drained()
    assert drain_queue(device, 0, drain, 32, lambda: False, total) is True
    assert seen(made) == [(0, READ), (1, 0), (2, READ), (3, READ)], "one that is refused does not keep the others"
    assert (total.chains, total.bytes) == (4, 4 * READ + 3 * READ)
    assert not isinstance(device, Many) or device.sizes == [4]


def test_no_more_than_the_limit_and_none_once_it_is_late() -> None:
    made, drain = offered(4)
    total = Drained()
    assert drain_queue(Doubler(), 0, drain, 2, lambda: False, total) is False
    assert total.chains == 2
    assert drain_queue(Doubler(), 0, drain, 2, lambda: True, total) is False
    assert total.chains == 3
    assert len(seen(made)) == 3
    assert drain.state[0] == 3
    assert drain.taken == 0


def test_a_request_without_meaning_takes_nothing_along() -> None:
    made, drain = offered(3)
    device, total = Doubler(), Drained()
    device.broken = True
    with pytest.raises(ProtocolError, match="no such request"):
        drain_queue(device, 0, drain, 32, lambda: False, total)
    assert seen(made) == []
    assert drain.state[0] == 1
    assert total.chains == 0


def test_a_device_that_waits_for_the_world_gets_no_more_than_it_wants() -> None:
    class Once(Doubler):
        left = 2

        def pending(self, queue: int) -> bool:
            return self.left > 0

        def handle(self, queue: int, chain: Chain) -> None:
            self.left -= 1

    made, drain = offered(4)
    total = Drained()
    assert drain_queue(Once(), 0, drain, 32, lambda: False, total) is False
    assert (total.chains, drain.state[0], len(seen(made))) == (2, 2, 2)


def test_help_is_asked_for_where_the_requests_end() -> None:
    made, drain = offered(4)
    made.put(RING + 16 * 2, Desc(SHARED, 0, 0, 0).pack())  # an empty buffer
    total = Drained()
    assert drain_queue(Doubler(), 0, drain, 32, lambda: False, total) is None
    assert total.chains == 2


def test_an_answer_that_replaces_another_one_ends_requests() -> None:
    made, drain = offered(1)
    (request,) = drain.pop(1)
    made.iotlb.update(SHARED, PAGE, UVA(BASE), Access.RW)
    with pytest.raises(ValueError, match="has changed"):
        request.read()
