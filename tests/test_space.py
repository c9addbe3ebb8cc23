# SPDX-License-Identifier: Apache-2.0
"""Address spaces: what `check_address_space` does not ask (that it is asked: test_testing_spaces.py)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_kit import make_ram
from virtiova.addr import GPA, Access
from virtiova.dma.ram import MappedRam, RamBlock
from virtiova.dma.space import MAX_ACCESS, FlatSpace, MediatedSpace, Miss, Span
from virtiova.errors import AccessError
from virtiova.testing import Memory, Table, memory_maps

CHUNK = 8
"""Pieces that a sized access could straddle."""


def two_blocks() -> MappedRam:
    """Adjacent in the guest, swapped in the buffer; then a hole."""
    buffer = bytearray(b"B" * 0x1000 + b"A" * 0x1000)
    return MappedRam(buffer, [RamBlock(GPA(0x1000), 0x1000, 0x1000), RamBlock(GPA(0x2000), 0x1000, 0)])


def test_flat_reads_and_writes_across_blocks() -> None:
    space = FlatSpace(two_blocks())
    assert space.read(0x1FFE, 4) == b"AABB"
    space.write(0x1FFE, b"wxyz")
    assert space.read(0x1FFD, 6) == b"AwxyzB"
    assert space.translate(0x1FFE, 4, Access.RW) == [Span(GPA(0x1FFE), 2), Span(GPA(0x2000), 2)]


@pytest.mark.parametrize(
    ("address", "length", "miss_at", "missing"),
    [(0xFFF, 2, 0xFFF, 2), (0x2FFF, 3, 0x3000, 2), (0x5000, 1, 0x5000, 1), (2**64 - 1, 2, 2**64 - 1, 2)],
)
def test_flat_names_the_part_that_is_missing(address: int, length: int, miss_at: int, missing: int) -> None:
    space = FlatSpace(two_blocks())
    miss = space.translate(address, length, Access.WRITE)
    assert isinstance(miss, Miss)
    assert (miss.address, miss.length, miss.access) == (miss_at, missing, Access.WRITE)
    with pytest.raises(AccessError, match=f"0x{miss_at:x}\\+0x{missing:x}: device write"):
        space.write(address, b"x" * length)
    with pytest.raises(AccessError, match="device read"):
        space.read(address, length)


def test_flat_write_that_misses_writes_nothing() -> None:
    space = FlatSpace(two_blocks())
    with pytest.raises(AccessError):
        space.write(0x2FFE, b"1234")
    assert space.read(0x2FFE, 2) == b"BB"


def test_flat_sized_accesses() -> None:
    space = FlatSpace(make_ram(0x1000))
    space.store16(2, 0x1234)
    space.store32(4, 0x89ABCDEF, "big")
    assert space.read(0, 8) == b"\0\0\x34\x12\x89\xab\xcd\xef"
    assert space.load16(4, "big") == 0x89AB
    assert space.load_pair(0) == space.read(0, 16)
    for call in (lambda: space.load16(1), lambda: space.load_pair(8), lambda: space.store32(2, 0)):
        with pytest.raises(AccessError, match="aligned"):
            call()
    space.fence()


def test_mediated_follows_spans_that_are_not_adjacent() -> None:
    ram = make_ram(0x100)
    ram.write(GPA(0), bytes(range(256)))
    space = MediatedSpace(ram, Table(CHUNK, {0x100: (0x80, Access.RW), 0x108: (0x10, Access.RW)}))
    assert space.read(0x106, 4) == b"\x86\x87\x10\x11"
    space.write(0x106, b"abcd")
    assert ram.read(GPA(0x86), 2) == b"ab"
    assert ram.read(GPA(0x10), 2) == b"cd"
    assert ram.read(GPA(0x88), 1) == b"\x88", "the byte after the first span is not touched"


def test_mediated_write_is_all_or_nothing() -> None:
    ram = make_ram(0x100)
    space = MediatedSpace(ram, Table(CHUNK, {0x100: (0, Access.RW), 0x108: (0x10, Access.READ)}))
    with pytest.raises(AccessError, match=r"0x108\+0x4: device write"):
        space.write(0x104, b"12345678")
    assert ram.read(GPA(0), 0x100) == bytes(0x100)
    assert space.read(0x104, 8) == bytes(8), "reading is allowed"


def test_mediated_sized_accesses_must_not_straddle() -> None:
    ram = make_ram(0x100)
    # 16 bytes in two places that are not one: a descriptor could not be loaded from there.
    space = MediatedSpace(ram, Table(CHUNK, {0x100: (0, Access.RW), 0x108: (0x40, Access.RW)}))
    with pytest.raises(AccessError, match="straddles"):
        space.load_pair(0x100)
    with pytest.raises(AccessError, match="aligned"):
        space.load16(0x107)
    space.store16(0x10A, 0xBEEF)
    assert ram.load16(GPA(0x42)) == 0xBEEF
    assert space.load16(0x10A) == 0xBEEF
    space.store32(0x10C, 1, "big")
    assert ram.load32(GPA(0x44), "big") == 1


def test_mediated_sized_accesses_need_permission() -> None:
    space = MediatedSpace(
        make_ram(0x100), Table(CHUNK, {0x0: (0, Access.READ), 0x8: (8, Access.READ), 0x10: (0, Access.WRITE)})
    )
    assert space.load16(0) == 0
    for call in (
        lambda: space.store16(0, 1),
        lambda: space.store32(0, 1),
        lambda: space.load16(0x10),
        lambda: space.load16(0x20),
        lambda: space.load_pair(0x10),
    ):
        with pytest.raises(AccessError, match="not in the table"):
            call()


class Endless:
    """Translates all there is to the same 4096 bytes, as a hostile front end might."""

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        return [Span(GPA(0), min(4096, length - done)) for done in range(0, length, 4096)]


@pytest.mark.parametrize("length", [MAX_ACCESS + 1, 1 << 32, 1 << 62, -1])
def test_lengths_are_bounded_before_anything_is_looked_up(length: int) -> None:
    ram = make_ram(0x1000)
    for space in (MediatedSpace(ram, Endless()), FlatSpace(ram)):
        assert isinstance(space.translate(0, length, Access.READ), Miss)
        with pytest.raises(AccessError, match="one access moves"):
            space.read(0, length)


def test_nothing_is_always_allowed() -> None:
    ram = make_ram(0x1000)
    for space in (MediatedSpace(ram, Table(CHUNK, {})), FlatSpace(ram)):
        assert space.read(0x7777_0000, 0) == b""
        space.write(0x7777_0000, b"")


@given(blocks=memory_maps(), data=st.data())
def test_flat_against_bytes_one_by_one(blocks: tuple[RamBlock, ...], data: st.DataObject) -> None:
    memory = Memory(blocks)
    space = FlatSpace(memory.ram)
    first = data.draw(st.sampled_from(blocks)).gpa
    address, length = data.draw(st.integers(max(first - 8, 0), first + 0x2000)), data.draw(st.integers(0, 0x1800))
    known = {block.gpa + at for block in blocks for at in range(block.size)}
    missing = next((at for at in range(address, address + length) if at not in known), None)
    if missing is None:
        assert space.read(address, length) == bytes(memory.buffer[memory.place(address + at)] for at in range(length))
    else:
        with pytest.raises(AccessError) as caught:
            space.read(address, length)
        assert caught.value.address == missing
