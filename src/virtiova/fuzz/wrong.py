# SPDX-License-Identifier: Apache-2.0
"""The steps that no good front end or driver makes: what is in rings and messages is anything, and many of it is near
to what makes sense. After them nothing is promised but that the back end lives, answers, and stays where it may be."""

from __future__ import annotations

import random
from typing import Final

from virtiova.addr import GPA, PAGE_SIZE, UVA
from virtiova.fuzz.steps import Numbers, step
from virtiova.fuzz.world import World
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.ring.layout import DESC_SIZE, PACKED_FLAGS, Desc, PackedDesc, PackedLayout, SplitLayout
from virtiova.ring.packed_driver import PackedDriver
from virtiova.wire.vhost_user import MemoryRegion, Request, VringAddr, VringState, encode_table, u64

EDGES: Final = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 255, 256, 511, 512, 1023, 1024, 4095, 4096, 4097, 0x7FFF, 0x8000, 0xFFFF),
    *(0x10000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 40, 1 << 47, (1 << 48) - 1, 1 << 62, 1 << 63),
    *((1 << 64) - 0x10000, (1 << 64) - 4096, (1 << 64) - 1),
)
"""Numbers at which programs go wrong."""
_U64: Final = (1 << 64) - 1
_PLACES: Final = 16


def edge(rng: random.Random, bits: int = 64) -> int:
    """A number of so many bits, that is often one of those, or near it."""
    pick = rng.random()
    if pick < 0.6:
        return rng.choice(EDGES) & (1 << bits) - 1
    if pick < 0.8:
        return rng.choice(EDGES) + rng.randrange(-2, 3) & (1 << bits) - 1
    return rng.getrandbits(bits)


def _address(rng: random.Random) -> tuple[int, int]:
    """A place, and what is added to it: `_resolved` makes an address of them."""
    return rng.randrange(_PLACES), rng.choice([0, 0, 0, 1, 8, PAGE_SIZE - 1, PAGE_SIZE - 8, edge(rng)])


def _resolved(world: World, place: int, offset: int) -> int:
    """An address: in a page of the driver's, in guest memory that is not its, in a hole, or just a number."""
    known = (0, 0xA0000, 0x50000, 0x7FF000, 0x800000, UVA(REGIONS[1].uva), (1 << 64) - PAGE_SIZE)
    base = known[place] if place < len(known) else world.page(place - len(known))
    return base + offset & _U64


def _desc(rng: random.Random) -> Numbers:
    flags = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 0x80, 0x82, 0x8080, 0x8083, rng.getrandbits(16)])
    length = rng.choice([0, 1, 16, 512, 4096, 8192, 0x10000, 0x8000_0000, 0xFFFF_FFFF, edge(rng, 32)])
    following = rng.choice([0, 1, 2, 3, 7, 8, 0xFFFF, rng.getrandbits(16)])
    return (rng.randrange(4), rng.randrange(16), *_address(rng), length, flags, following)


@step("desc", 6, _desc, good=False)
def desc(
    world: World, queue: int, index: int, place: int, offset: int, length: int, flags: int, following: int
) -> None:
    """Any descriptor anywhere in a ring's table."""
    region, layout = world.ring_region(queue), world.queues[queue % len(world.queues)].ring.layout
    at = DESC_SIZE * (index % layout.size)
    address = _resolved(world, place, offset)
    if isinstance(layout, PackedLayout):
        region.write(layout.desc + at, PackedDesc(address, length, following, flags).pack())
    elif isinstance(layout, SplitLayout):
        region.write(layout.desc + at, Desc(address, length, flags, following).pack())


def _offer(rng: random.Random) -> Numbers:
    queue, _, *numbers = _desc(rng)
    return (queue, *numbers)


@step("offer", 8, _offer, good=False)
def offer(world: World, queue: int, place: int, offset: int, length: int, flags: int, following: int) -> None:
    """Any descriptor, made available as a request of its own, with a kick."""
    one = world.queues[queue % len(world.queues)]
    region, layout = world.ring_region(queue), one.ring.layout
    address = _resolved(world, place, offset)
    if isinstance(one.ring, PackedDriver):
        at = one.ring.place
        flags = flags & ~PACKED_FLAGS | one.ring.layout.available(at)
        region.write(one.ring.layout.entry(at), PackedDesc(address, length, following, flags).pack())
    elif isinstance(layout, SplitLayout):
        head, index = layout.size - 1, region.load16(layout.avail + 2)
        region.write(layout.desc + DESC_SIZE * head, Desc(address, length, flags, following).pack())
        region.store16(layout.avail + layout.avail_entry(index), head)
        region.store16(layout.avail + 2, index + 1 & 0xFFFF)
    one.kick()


@step("avail", 6, lambda rng: (rng.randrange(4), rng.choice([1, 1, 2, 8, 9, 0x8000, edge(rng, 16)])), good=False)
def avail(world: World, queue: int, more: int) -> None:
    """Move the available index of a split ring, and kick."""
    one = world.queues[queue % len(world.queues)]
    region, layout = world.ring_region(queue), one.ring.layout
    if isinstance(layout, SplitLayout):
        region.store16(layout.avail + 2, region.load16(layout.avail + 2) + more & 0xFFFF)
    one.kick()


@step("poke", 6, lambda rng: (rng.randrange(4), rng.randrange(0, 4096, 2), edge(rng, 16)), good=False)
def poke(world: World, queue: int, offset: int, value: int) -> None:
    """Any 16 bits anywhere in a ring."""
    region = world.ring_region(queue)
    region.store16(min(offset & ~1, region.size - 2), value & 0xFFFF)


@step("table-poke", 3, lambda rng: (rng.randrange(0, 256, 2), edge(rng, 16)), good=False)
def table_poke(world: World, offset: int, value: int) -> None:
    """Any 16 bits in an indirect table."""
    world.table.store16(min(offset & ~1, world.table.size - 2), value & 0xFFFF)


@step("refuse", 3, lambda rng: (rng.randrange(8),), good=False)
def refuse(world: World, number: int) -> None:
    """Refuse one of the misses that wait."""
    if world.held:
        world.held.pop(number % len(world.held)).reply(ok=False)


@step("forget", 2, lambda rng: (rng.randrange(8),), good=False)
def forget(world: World, number: int) -> None:
    """Never answer one of them."""
    if world.held:
        world.held.pop(number % len(world.held))


def _iotlb(rng: random.Random) -> Numbers:
    size = rng.choice([0, 1, 512, 4096, 4096, 8192, 1 << 21, 1 << 30, edge(rng)])
    further = rng.choice([0, 0, 4096, 0x9F000, 0xA0000, 0x2FF000, edge(rng, 24)])
    return (*_address(rng), size, rng.randrange(6), further, rng.randrange(4), rng.choice([0, 1, 1, 2, 3]))


@step("iotlb", 5, _iotlb, good=False)
def iotlb(world: World, place: int, offset: int, size: int, where: int, further: int, perm: int, kind: int) -> None:
    """Any IOTLB message: to the driver's pages, to memory that was never granted before, to no memory at all."""
    if not world.front.translating:
        return
    uaddr = [*(int(each.uva) for each in REGIONS), 0, 0x7E5A_0000_0000 - 4096, _U64 - 4095][where % 6]
    world.iotlb(_resolved(world, place, offset), size, uaddr + further & _U64, perm, kind)


def _message(rng: random.Random) -> Numbers:
    request = rng.choice([*range(1, 42), 5, 8, 9, 10, 11, 12, 18, 22, 37, 38, rng.getrandbits(8)])
    payload, fds = _payload(rng, request)
    if rng.random() < 0.2:
        payload = _mangled(rng, payload)
    if rng.random() < 0.15:
        fds = rng.randrange(4)
    return (request, payload.hex(), fds, int(rng.random() < 0.4))


@step("message", 10, _message, good=False)
def message(world: World, request: int, payload: str, fds: int, need_reply: int) -> None:
    """Any message, with any payload, and descriptors that may have nothing to do with it."""
    request = int(request)
    if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG):
        numbers = [world.memory.fd] * min(fds, 8)
    elif request in (Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD):
        numbers = [world.scratch() for _ in range(min(fds, 8))]
    else:
        numbers = [world.eventfd() for _ in range(min(fds, 8))]
    world.message(request, bytes.fromhex(payload), numbers, need_reply=bool(need_reply))


def _payload(rng: random.Random, request: int) -> tuple[bytes, int]:
    """A payload of the right form, mostly, and how many descriptors go with it."""
    if request in (8, 10, 11, 18):
        value = rng.choice([0, 1, 3, 8, 0x8000, 0x10000, edge(rng, 32)])
        return VringState(rng.choice([0, 0, 0, 1, 2, edge(rng, 32)]), value).encode(), 0
    if request == 9:
        where = [rng.choice([0, 0x400000, REGIONS[1].uva, REGIONS[2].uva, edge(rng)]) & ~15 for _ in range(3)]
        desc_at, used_at, avail_at = where
        index = rng.choice([0, 1, edge(rng, 32)])
        return VringAddr(index, rng.getrandbits(2), desc_at, used_at, avail_at, edge(rng)).encode(), 0
    if request in (12, 13, 14):
        return u64(rng.choice([0, 1, 2, 255, 0x100, 0x101, edge(rng)])), rng.randrange(2)
    if request == 5:
        regions = [_region(rng) for _ in range(rng.choice([0, 1, 2, 3, 8]))]
        return encode_table(regions), len(regions)
    if request in (37, 38):
        return _region(rng).encode_single(), 1
    if request in (24, 25):
        length = rng.choice([0, 1, 8, 60, 256, 300])
        return b"".join(edge(rng, 32).to_bytes(4, "little") for _ in range(3)) + bytes(length), 0
    if request in (6, 31, 32):
        return edge(rng).to_bytes(8, "little") + edge(rng).to_bytes(8, "little") + bytes(rng.choice([0, 4, 8])), 1
    if request == 21:
        return b"", 1
    return rng.choice([b"", u64(edge(rng))]), 0


def _region(rng: random.Random) -> MemoryRegion:
    """A region of the machine's, or one that is like it."""
    true = rng.choice(REGIONS)
    if rng.random() < 0.5:
        return true
    gpa, uva = rng.choice([true.gpa, 0, edge(rng)]), rng.choice([true.uva, 0, edge(rng)])
    size = rng.choice([true.size, PAGE_SIZE, 0, 1, true.size // 2])
    return MemoryRegion(GPA(gpa), size, UVA(uva), true.offset)


def _mangled(rng: random.Random, payload: bytes) -> bytes:
    data = bytearray(payload)
    pick = rng.randrange(3)
    if pick == 0 and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif pick == 1:
        data += rng.randbytes(rng.choice([1, 8, 64]))
    else:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


@step("bytes", 1, lambda rng: (rng.randbytes(rng.choice([1, 4, 11, 12, 13, 64])).hex(),), good=False)
def some_bytes(world: World, data: str) -> None:
    """Anything at all, on the main channel."""
    world.front.send_bytes(bytes.fromhex(data))


@step("back", 1, lambda rng: (rng.randbytes(rng.choice([1, 12, 20, 64])).hex(),), good=False)
def back(world: World, data: str) -> None:
    """Anything at all, on the back-end channel."""
    world.front.send_back(bytes.fromhex(data))
