# SPDX-License-Identifier: Apache-2.0
"""The device end of the split ring: what it takes, what it refuses, and that it looks only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from ring_kit import make_ram
from virtiova.addr import GPA
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import MAX_ACCESS, AddressSpace, FlatSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc
from virtiova.ring.split_device import SplitDevice
from virtiova.testing.raw_rings import RawRing
from virtiova.testing.ring_world import Op, Watched

BASE = 0x1000
BUF = 0x4000
TABLE = 0x6000


def device(
    ring: RawRing, space: AddressSpace | None = None, *, event_idx: bool = False, indirect: bool = True
) -> SplitDevice:
    return SplitDevice(
        space or FlatSpace(ring.ram),
        ring.desc,
        ring.avail,
        ring.used,
        ring.layout,
        ring.order,
        event_idx=event_idx,
        indirect=indirect,
    )


@pytest.fixture
def ring() -> RawRing:
    return RawRing(make_ram(0x8000), BASE)


def take(end: SplitDevice) -> Chain:
    chain = end.pop()
    assert chain is not None
    return chain


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_request_there_and_back(order: ByteOrder) -> None:
    ring = RawRing(make_ram(0x8000), BASE, order=order)
    end = device(ring)
    assert end.pop() is None
    ring.ram.write(GPA(BUF), b"hello, world")
    ring.put_chain(3, (BUF, 5, False), (BUF + 7, 5, False), (BUF + 0x100, 4, True), (BUF + 0x200, 4, True))
    ring.offer(3)
    chain = take(end)
    assert end.pop() is None
    assert (chain.readable, chain.writable, chain.written) == (10, 8, 0)
    assert chain.read(3) == b"hel"
    assert chain.read(4) == b"lowo"
    assert chain.readable == 3
    assert chain.read() == b"rld"
    assert chain.read() == b""
    chain.write(b"123456")
    assert (chain.writable, chain.written) == (2, 6)
    assert ring.ram.read(GPA(BUF + 0x100), 5) == b"1234\0"
    assert ring.ram.read(GPA(BUF + 0x200), 4) == b"56\0\0"
    assert ring.used_index == 0
    end.push(chain, chain.written)
    assert ring.used_index == 1
    assert ring.used_element(0) == (3, 6)


def test_ends_wrap_around_at_65536(ring: RawRing) -> None:
    end = device(ring)
    ring.put_chain(0, (BUF, 1, True))
    for n in range(65536 + 20):
        ring.offer(0)
        end.push(take(end), n & 0xFF)
    assert ring.used_index == 20
    assert ring.used_element(65536 + 19) == (0, (65536 + 19) & 0xFF)
    assert end.pop() is None


def test_out_of_order_completion_keeps_heads_apart(ring: RawRing) -> None:
    end = device(ring)
    ring.put_chain(0, (BUF, 1, True))
    ring.put_chain(5, (BUF, 2, True))
    ring.offer(5, 0)
    first, second = take(end), take(end)
    end.push(second, 1)
    end.push(first, 2)
    assert [ring.used_element(n) for n in (0, 1)] == [(0, 1), (5, 2)]


def test_the_whole_queue_may_be_available_and_in_one_chain(ring: RawRing) -> None:
    end = device(ring)
    ring.put_chain(0, *[(BUF, 1, False)] * 8)
    ring.offer(*[0] * 8)
    assert [take(end).readable for _ in range(8)] == [8] * 8


def test_indirect_table_unaligned_after_direct_descriptors(ring: RawRing) -> None:
    end = device(ring)
    table = TABLE + 4
    ring.put_chain(0, (BUF, 8, False), (BUF + 8, 8, True), table=table)
    ring.put_desc(0, Desc(BUF + 32, 2, DESC_F_NEXT, 1))
    # The write-only flag of the descriptor that refers to the table is to be ignored (2.7.5.3.2).
    ring.put_desc(1, Desc(table, 32, DESC_F_INDIRECT | DESC_F_WRITE, 0))
    ring.offer(0)
    chain = take(end)
    assert (chain.readable, chain.writable) == (10, 8)


def test_indirect_table_of_as_many_buffers_as_the_queue(ring: RawRing) -> None:
    end = device(ring)
    ring.put_chain(0, *[(BUF, 1, True)] * 8, table=TABLE)
    ring.put_desc(0, Desc(TABLE, 8 * 16, DESC_F_INDIRECT, 0))
    ring.offer(0)
    assert take(end).writable == 8


Broken = Callable[[RawRing], None]


def _loop(ring: RawRing) -> None:
    ring.put_desc(0, Desc(BUF, 1, DESC_F_NEXT, 1))
    ring.put_desc(1, Desc(BUF, 1, DESC_F_NEXT, 0))


def _too_many_indirect(ring: RawRing) -> None:
    ring.put_chain(0, *[(BUF, 1, True)] * 9, table=TABLE)
    ring.put_desc(0, Desc(TABLE, 9 * 16, DESC_F_INDIRECT, 0))


def _nested(ring: RawRing) -> None:
    ring.put_desc(0, Desc(TABLE, 16, DESC_F_INDIRECT, 0))
    ring.put_desc(0, Desc(TABLE, 16, DESC_F_INDIRECT, 0), TABLE)


def _readable_last(ring: RawRing) -> None:
    ring.put_chain(0, (BUF, 1, True), (BUF, 1, False))


def _next_outside_indirect(ring: RawRing) -> None:
    ring.put_desc(0, Desc(TABLE, 32, DESC_F_INDIRECT, 0))
    ring.put_desc(0, Desc(BUF, 1, DESC_F_NEXT, 2), TABLE)


def _five_gigabytes(ring: RawRing) -> None:
    ring.put_chain(0, (BUF, 0xFFFFFFFF, True), (BUF, 2, True))


def _one(desc: Desc) -> Broken:
    return lambda ring: ring.put_desc(0, desc)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (_loop, r"descriptor at 0x1000: a loop, or a chain of more than 8"),
        (_too_many_indirect, r"descriptor at 0x6080: a loop, or a chain of more than 8"),
        (_nested, r"descriptor at 0x6000: an indirect table inside"),
        (_readable_last, r"descriptor at 0x1010: readable after writable"),
        (_next_outside_indirect, r"descriptor at 0x6000: next 2, wanted less than 2"),
        (_five_gigabytes, r"descriptor at 0x1010: 0x100000001 bytes, wanted at most 2\*\*32"),
        (_one(Desc(BUF, 1, DESC_F_NEXT, 8)), r"descriptor at 0x1000: next 8, wanted less than 8"),
        (_one(Desc(TABLE, 0, DESC_F_INDIRECT, 0)), r"indirect table of 0 bytes, wanted a multiple of 16"),
        (_one(Desc(TABLE, 24, DESC_F_INDIRECT, 0)), r"indirect table of 24 bytes, wanted a multiple of 16"),
        (_one(Desc(TABLE, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1)), r"indirect table with a next descriptor"),
    ],
)
def test_refuses_a_chain_without_meaning(ring: RawRing, breaks: Broken, says: str) -> None:
    end = device(ring)
    breaks(ring)
    ring.offer(0)
    with pytest.raises(ProtocolError, match=says):
        end.pop()
    assert end.pop() is None, "the broken entry is not judged again"


def test_exactly_four_gigabytes_are_allowed(ring: RawRing) -> None:
    end = device(ring)
    ring.put_chain(0, (BUF, 0xFFFFFFFF, True), (BUF, 1, True))
    ring.offer(0)
    chain = take(end)
    assert chain.writable == 1 << 32
    end.push(chain, 1 << 32)
    assert ring.used_element(0) == (0, 0xFFFFFFFF)


def test_refuses_indirect_that_was_not_accepted(ring: RawRing) -> None:
    end = device(ring, indirect=False)
    ring.put_desc(0, Desc(TABLE, 16, DESC_F_INDIRECT, 0))
    ring.offer(0)
    with pytest.raises(ProtocolError, match="bit 28 was not accepted"):
        end.pop()


def test_refuses_a_head_outside_the_queue(ring: RawRing) -> None:
    end = device(ring)
    ring.offer(8)
    with pytest.raises(ProtocolError, match=r"available ring at 0x1084: head 8, wanted less than 8"):
        end.pop()


@pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
def test_refuses_an_index_that_jumps(ring: RawRing, index: int) -> None:
    end = device(ring)
    ring.put16(ring.avail + 2, index)
    with pytest.raises(ProtocolError, match=f"available index at 0x1082 is {index}, wanted 0"):
        end.pop()


@pytest.mark.parametrize(("part", "by"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_refuses_parts_that_are_not_aligned(ring: RawRing, part: str, by: int) -> None:
    setattr(ring, part, getattr(ring, part) + by)
    with pytest.raises(ProtocolError, match="wanted a multiple of"):
        device(ring)


def test_a_ring_that_is_not_there(ring: RawRing) -> None:
    ring.avail = 0x10_0000
    with pytest.raises(AccessError, match="0x100002"):
        device(ring).pop()


# -- looking once, in order


def test_every_index_and_descriptor_is_loaded_once(ring: RawRing) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space)
    ring.put_chain(0, (BUF, 4, False), (BUF, 4, True), table=TABLE)
    ring.put_desc(0, Desc(BUF, 4, DESC_F_NEXT, 1))
    ring.put_desc(1, Desc(TABLE, 32, DESC_F_INDIRECT, 0))
    ring.put_chain(2, (BUF, 4, True))
    ring.offer(0, 2)

    def spoil(op: Op) -> None:
        # What was loaded is overwritten with nonsense: whoever looks twice gets the nonsense.
        if op.what == "load":
            ring.ram.write(GPA(op.address), b"\xff" * op.length)

    space.after = spoil
    first, second = take(end), take(end)
    assert (first.readable, first.writable, second.writable) == (8, 4, 4)
    loads = Counter(byte for op in space.ops for byte in range(op.address, op.address + op.length))
    assert set(loads.values()) == {1}
    # One look at the index was enough for both chains.
    assert loads[ring.avail + 2] == 1


def test_used_element_before_index_and_fence_before_the_wish(ring: RawRing) -> None:
    for event_idx in (False, True):
        space = Watched(FlatSpace(ring.ram))
        end = device(ring, space, event_idx=event_idx)
        end.push(Chain(space, 1, [], []), 0)
        end.needs_interrupt()
        wish = ring.avail + (ring.layout.used_event if event_idx else 0)
        assert [(op.what, op.address) for op in space.ops] == [
            ("store", ring.used + 4),
            ("store", ring.used + 2),
            ("fence", 0),
            ("load", wish),
        ]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_comes_while_going_to_sleep_is_seen(ring: RawRing, event_idx: bool) -> None:
    space = Watched(FlatSpace(ring.ram))
    end = device(ring, space, event_idx=event_idx)
    end.disable_notify()
    assert end.pop() is None
    assert end.enable_notify() is False
    ring.put_chain(0, (BUF, 1, True))
    space.after = lambda op: ring.offer(0) if op.what == "fence" else None
    assert end.enable_notify() is True
    assert end.pop() is not None


def test_notification_flag_and_avail_event(ring: RawRing) -> None:
    end = device(ring)
    end.disable_notify()
    assert ring.get16(ring.used) == 1
    end.enable_notify()
    assert ring.get16(ring.used) == 0
    ring.put_chain(0, (BUF, 1, True))
    ring.offer(0, 0)
    end = device(ring, event_idx=True)
    end.disable_notify()
    take(end)
    take(end)
    assert end.enable_notify() is False
    assert ring.get16(ring.used + ring.layout.avail_event) == 2
    assert ring.get16(ring.used) == 0, "the flag is not used with event indices"


def test_interrupt_flag(ring: RawRing) -> None:
    end = device(ring)
    assert not end.needs_interrupt(), "nothing was pushed"
    chain = Chain(FlatSpace(ring.ram), 0, [], [])
    end.push(chain, 0)
    assert end.needs_interrupt()
    assert not end.needs_interrupt(), "said once"
    ring.put16(ring.avail, 1)
    end.push(chain, 0)
    assert not end.needs_interrupt()


def test_interrupt_at_used_event_only(ring: RawRing) -> None:
    end = device(ring, event_idx=True)
    chain = Chain(FlatSpace(ring.ram), 0, [], [])
    ring.put16(ring.avail, 1)  # not looked at with event indices
    ring.put16(ring.avail + ring.layout.used_event, 2)
    wanted = []
    for _ in range(5):
        end.push(chain, 0)
        wanted.append(end.needs_interrupt())
    assert wanted == [False, False, True, False, False]
    ring.put16(ring.avail + ring.layout.used_event, 6)
    for _ in range(4):
        end.push(chain, 0)
    assert end.needs_interrupt(), "passed within a batch"


# -- chains


def test_a_miss_moves_the_cursor_and_ends_what_was_written() -> None:
    ram = make_ram(0x2000)
    chain = Chain(FlatSpace(ram), 0, [(0x1FFF, 2), (0, 1)], [(0, 4), (0x9000, 4), (8, 4)])
    with pytest.raises(AccessError):
        chain.read(2)
    assert chain.readable == 1
    with pytest.raises(AccessError, match="0x9000"):
        chain.write(b"12345678")
    assert (chain.written, chain.writable) == (4, 4)
    chain.write(b"9")
    assert chain.written == 4, "a gap ends what may be promised"
    assert ram.read(GPA(0), 9) == b"1234\0\0\0\x009"


def test_more_than_there_is_room_for_is_not_written() -> None:
    ram = make_ram(0x1000)
    chain = Chain(FlatSpace(ram), 0, [], [(0, 4)])
    with pytest.raises(ProtocolError, match="room for 0x4 bytes, wanted 0x5"):
        chain.write(b"12345")
    assert ram.read(GPA(0), 5) == bytes(5)
    for n in (5, -1):
        with pytest.raises(ProtocolError):
            chain.skip(n)
    chain.skip(0)
    chain.write(b"12")
    assert chain.written == 2


def test_buffers_of_no_bytes_are_passed_over() -> None:
    ram = make_ram(0x1000)
    chain = Chain(FlatSpace(ram), 0, [(0x99999, 0), (0, 2), (0x99999, 0)], [(0x99999, 0), (8, 1)])
    assert chain.read() == b"\0\0"
    chain.write(b"x")
    assert (chain.written, chain.writable) == (1, 0)


def test_one_read_is_bounded() -> None:
    ram = make_ram(0x1000)
    chain = Chain(FlatSpace(ram), 0, [(0, 0x1000)] * (MAX_ACCESS // 0x1000) + [(0, 1)], [])
    with pytest.raises(AccessError, match="one read moves at most"):
        chain.read()
    assert chain.readable == 0
