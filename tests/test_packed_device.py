# SPDX-License-Identifier: Apache-2.0
"""The device end of the packed ring: what it takes, what it refuses, that it looks only once; and a hostile driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from ring_kit import make_ram
from virtiova.addr import GPA
from virtiova.dma.space import AddressSpace, FlatSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    PACKED_F_AVAIL,
    PACKED_F_USED,
    PackedDesc,
)
from virtiova.ring.packed_device import PackedDevice
from virtiova.testing.raw_rings import RawPackedRing
from virtiova.testing.ring_world import Op, Watched

BASE = 0x1000
BUF = 0x4000
TABLE = 0x6000


def device(
    ring: RawPackedRing,
    space: AddressSpace | None = None,
    *,
    event_idx: bool = False,
    indirect: bool = True,
    avail: int = 0x8000,
    used: int = 0x8000,
) -> PackedDevice:
    return PackedDevice(
        space or FlatSpace(ring.ram),
        ring.desc,
        ring.driver,
        ring.device,
        ring.layout,
        event_idx=event_idx,
        indirect=indirect,
        next_avail=avail,
        next_used=used,
    )


@pytest.fixture
def ring() -> RawPackedRing:
    return RawPackedRing(make_ram(0x8000), BASE)


def take(end: PackedDevice) -> Chain:
    chain = end.pop()
    assert chain is not None
    return chain


def table(ring: RawPackedRing, *buffers: tuple[int, int, int], at: int = TABLE) -> None:
    """An indirect table of address, length and flags; every id is nonsense."""
    for n, (address, length, flags) in enumerate(buffers):
        ring.ram.write(GPA(at + 16 * n), PackedDesc(address, length, 0xAAAA, flags).pack())


def test_a_request_there_and_back(ring: RawPackedRing) -> None:
    end = device(ring)
    assert end.pop() is None
    ring.ram.write(GPA(BUF), b"hello, world")
    ring.offer((BUF, 5, False), (BUF + 7, 5, False), (BUF + 0x100, 4, True), number=77)
    chain = take(end)
    assert end.pop() is None
    assert (chain.head, chain.slots, chain.readable, chain.writable) == (77, 4 - 1, 10, 4)
    assert chain.read() == b"hello" + b"world"
    chain.write(b"abc")
    assert (end.next_avail, end.next_used) == (0x8003, 0x8000)
    end.push(chain, chain.written)
    used = ring.get_desc(0)
    assert (used.length, used.id) == (3, 77)
    assert used.flags == PACKED_F_AVAIL | PACKED_F_USED | DESC_F_WRITE
    assert (end.next_avail, end.next_used) == (0x8003, 0x8003)
    ring.offer((BUF, 5, False), number=5)
    end.push(take(end), 0)
    assert ring.get_desc(3).flags == PACKED_F_AVAIL | PACKED_F_USED, "nothing was written"


def test_a_list_over_the_end_of_the_ring(ring: RawPackedRing) -> None:
    end = device(ring)
    for n in range(6):
        ring.offer((BUF, 1, True), number=n)
        end.push(take(end), 1)
    ring.offer((BUF, 1, False), (BUF, 1, False), (BUF, 2, True), number=9)
    chain = take(end)
    assert (chain.readable, chain.writable) == (2, 2)
    assert (end.next_avail, end.next_used) == (0x0001, 0x8006)
    end.push(chain, 2)
    assert end.next_used == 0x0001
    ring.offer((BUF, 1, True), number=4)
    end.push(take(end), 1)
    assert ring.get_desc(1).flags == DESC_F_WRITE, "in the second lap a used descriptor has neither flag"


def test_it_goes_on_where_somebody_stood(ring: RawPackedRing) -> None:
    ring.place = 13
    ring.offer((BUF, 1, True), number=3)
    end = device(ring, avail=0x0005, used=0x0005)
    end.push(take(end), 1)
    assert (end.next_avail, end.next_used) == (0x0006, 0x0006)


@pytest.mark.parametrize(("avail", "used"), [(0x8000, 0x8001), (0x0001, 0x8000)])
def test_two_places_that_cannot_be(ring: RawPackedRing, avail: int, used: int) -> None:
    with pytest.raises(ProtocolError, match="lie more than a lap apart"):
        device(ring, avail=avail, used=used)


def test_places_outside_of_the_ring(ring: RawPackedRing) -> None:
    with pytest.raises(ProtocolError, match="descriptor 8 of a packed ring, wanted less than 8"):
        device(ring, avail=8, used=8)


def test_several_are_used_all_at_once(ring: RawPackedRing) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space)
    for n in range(3):
        ring.offer((BUF, 1, True), number=n)
    chains = [take(end) for _ in range(3)]
    space.ops.clear()
    end.push_all([(chain, 1) for chain in chains])
    stores = [op.address for op in space.ops]
    # All lengths and ids first; the flags of the first descriptor, which the driver looks at, last.
    assert stores == [ring.desc + at for at in (8, 24, 40, 46, 30, 14)]


def test_out_of_order_completion(ring: RawPackedRing) -> None:
    end = device(ring)
    ring.offer((BUF, 1, False), (BUF, 1, True), number=1)
    ring.offer((BUF, 2, True), number=2)
    first, second = take(end), take(end)
    end.push(second, 1)
    end.push(first, 2)
    # The second request has one descriptor, so the first one's used descriptor comes right behind its own.
    assert [(ring.get_desc(n).id, ring.get_desc(n).length) for n in (0, 1)] == [(2, 1), (1, 2)]


def test_put_back_and_back_to(ring: RawPackedRing) -> None:
    end = device(ring)
    ring.offer((BUF, 1, False), (BUF, 1, True), number=1)
    ring.offer((BUF, 2, True), number=2)
    mark = end.next_avail
    undoings: list[Callable[[], None]] = [lambda: end.put_back(2), *2 * [lambda: end.back_to(mark)]]
    for undo in undoings:
        assert [take(end).head, take(end).head] == [1, 2]
        undo()
        assert end.next_avail == mark
    table(ring, (BUF, 1, 0))
    take(end)
    take(end)
    end.back_to(end.next_avail)
    ring.offer_rows((0x10_0000, 16, 3, DESC_F_INDIRECT))
    mark = end.next_avail
    with pytest.raises(AccessError):
        end.pop()
    end.back_to(mark)
    assert end.next_avail == mark


def test_indirect_table_unaligned_of_which_only_the_write_flag_counts(ring: RawPackedRing) -> None:
    end = device(ring)
    table(ring, (BUF, 8, DESC_F_NEXT | DESC_F_INDIRECT), (BUF + 8, 8, DESC_F_WRITE | 0x7F80), at=TABLE + 4)
    ring.offer_rows((TABLE + 4, 32, 6, DESC_F_INDIRECT | DESC_F_WRITE))
    chain = take(end)
    assert (chain.head, chain.slots, chain.readable, chain.writable) == (6, 1, 8, 8)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(BUF, 1, 0, DESC_F_WRITE | DESC_F_NEXT), (BUF, 1, 0, 0)], "0x1010: readable after writable"),
        ([(BUF, 0xFFFFFFFF, 0, DESC_F_NEXT), (BUF, 2, 0, 0)], r"0x1010: 0x100000001 bytes, wanted at most 2\*\*32"),
        ([(TABLE, 0, 0, DESC_F_INDIRECT)], "0x1000: an indirect table of 0 bytes"),
        ([(TABLE, 24, 0, DESC_F_INDIRECT)], "0x1000: an indirect table of 24 bytes, wanted a multiple of 16"),
        ([(TABLE, 9 * 16, 0, DESC_F_INDIRECT)], "0x1000: a chain of more than 8 buffers"),
        ([(TABLE, 16, 0, DESC_F_INDIRECT | DESC_F_NEXT), (BUF, 1, 0, 0)], "0x1000: an indirect table in a list"),
        ([(BUF, 1, 0, DESC_F_NEXT), (TABLE, 16, 0, DESC_F_INDIRECT)], "0x1010: an indirect table in a list"),
        ([(BUF, 1, 0, DESC_F_NEXT)], "0x1010: not available, but the one before it goes on there"),
        ([(BUF, 1, 0, DESC_F_NEXT)] * 8, "0x1000: available again, but it was not given back"),
    ],
)
def test_refuses_a_chain_without_meaning(ring: RawPackedRing, rows: list[tuple[int, int, int, int]], says: str) -> None:
    end = device(ring)
    ring.offer_rows(*rows)
    with pytest.raises(ProtocolError, match=says):
        end.pop()


def test_refuses_what_was_not_given_back_and_is_available_again(ring: RawPackedRing) -> None:
    end = device(ring)
    for n in range(8):
        ring.offer((BUF, 1, True), number=n)
        take(end)
    assert end.pop() is None
    ring.offer((BUF, 1, True), number=9)
    with pytest.raises(ProtocolError, match="0x1000: available again"):
        end.pop()


def test_refuses_indirect_that_was_not_accepted(ring: RawPackedRing) -> None:
    end = device(ring, indirect=False)
    ring.offer_rows((TABLE, 16, 0, DESC_F_INDIRECT))
    with pytest.raises(ProtocolError, match="bit 28 was not accepted"):
        end.pop()


@pytest.mark.parametrize("part", ["desc", "driver", "device"])
def test_refuses_parts_that_are_not_aligned(ring: RawPackedRing, part: str) -> None:
    setattr(ring, part, getattr(ring, part) + 2)
    with pytest.raises(ProtocolError, match="wanted a multiple of"):
        device(ring)


def test_a_chain_of_what_was_kept(ring: RawPackedRing) -> None:
    end = device(ring)
    chain = end.chain_of([PackedDesc(BUF, 3, 0, DESC_F_NEXT), PackedDesc(BUF, 5, 4, DESC_F_WRITE)])
    assert (chain.head, chain.slots, chain.readable, chain.writable) == (4, 2, 3, 5)
    for descs in ([], [PackedDesc(BUF, 1, 0, 0)] * 9):
        with pytest.raises(ProtocolError, match="wanted 1 to 8"):
            end.chain_of(descs)


# -- looking once, in order


def test_nothing_that_changes_after_it_was_loaded_is_used(ring: RawPackedRing) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space)
    table(ring, (BUF, 4, 0), (BUF, 4, DESC_F_WRITE))
    ring.offer_rows((TABLE, 32, 1, DESC_F_INDIRECT))
    ring.offer((BUF, 4, False), (BUF, 3, True), number=2)

    def spoil(op: Op) -> None:
        if op.what == "load":
            ring.ram.write(GPA(op.address), b"\xff" * op.length)

    space.after = spoil
    first, second = take(end), take(end)
    assert [(chain.head, chain.readable, chain.writable) for chain in (first, second)] == [(1, 4, 4), (2, 4, 3)]
    loads = Counter(byte for op in space.ops for byte in range(op.address, op.address + op.length))
    # The flags of a list's first descriptor come along once more with the rest of it, and are not looked at.
    heads = {ring.desc + at + byte for at in (0, 16) for byte in (14, 15)}
    assert {byte for byte, count in loads.items() if count != 1} == heads


def test_flags_come_before_the_rest_and_go_after_it(ring: RawPackedRing) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space, event_idx=True)
    ring.offer((BUF, 1, True))
    ring.wish(EVENT_DESC)
    end.push(take(end), 1)
    assert end.needs_interrupt()
    desc, driver = ring.desc, ring.driver
    assert [(op.what, op.address) for op in space.ops] == [
        ("load", desc + 14),
        ("load", desc),
        ("store", desc + 8),
        ("store", desc + 14),
        ("fence", 0),
        ("load", driver + 2),
        ("load", driver),
    ]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_comes_while_going_to_sleep_is_seen(ring: RawPackedRing, event_idx: bool) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space, event_idx=event_idx)
    end.disable_notify()
    assert ring.device_wish()[1] == EVENT_DISABLE
    assert end.pop() is None
    assert end.enable_notify() is False
    assert ring.device_wish() == ((0x8000, EVENT_DESC) if event_idx else (0, EVENT_ENABLE))
    space.after = lambda op: ring.offer((BUF, 1, True)) if op.what == "fence" else None
    assert end.enable_notify() is True
    assert end.pop() is not None


def test_waiting_for_more_than_there_is(ring: RawPackedRing) -> None:
    end = device(ring, event_idx=True)
    ring.offer((BUF, 1, True), number=1)
    take(end)
    assert end.pop() is None
    end.put_back()
    assert end.enable_notify(waiting=True) is False
    assert ring.device_wish() == (0x8001, EVENT_DESC)
    assert end.enable_notify() is True
    ring.offer((BUF, 1, True), number=2)
    assert end.enable_notify(waiting=True) is True


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_the_driver_wishes(ring: RawPackedRing, event_idx: bool) -> None:
    end = device(ring, event_idx=event_idx)
    wanted = []
    for wish, place in ((EVENT_ENABLE, 0), (EVENT_DISABLE, 0), (EVENT_DESC, 2), (EVENT_DESC, 9), (3, 0)):
        ring.wish(wish, place)
        ring.offer((BUF, 1, True))
        end.push(take(end), 1)
        wanted.append(end.needs_interrupt())
        assert not end.needs_interrupt(), "said once"
    # Without bit 29 the value that names a descriptor has no meaning: better told than not.
    assert wanted == [True, False, True, not event_idx, True]
    ring.wish(EVENT_DESC, 4)
    end.tell_again()
    assert end.needs_interrupt()
