# SPDX-License-Identifier: Apache-2.0
"""SMMUv3 as bytes: held against values read from real (emulated) ones, and a table walk written from the manual."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import PAGE_SIZE
from virtiova.wire import smmuv3
from virtiova.wire.smmuv3 import Capabilities, Event

# Registers of QEMU's SMMUv3, of 7.2 and of 10.0.
IDR0, IDR0_BOTH_STAGES, IDR1, IDR5 = 0xD40101A, 0xD44101B, 0x2730010, 0x74

words = st.integers(0, 2**32 - 1)
pages = st.integers(0, 2**36 - 1).map(lambda number: number * PAGE_SIZE)
iovas = st.integers(0, 2**27 - 1).map(lambda number: number * PAGE_SIZE)


def bit(number: int) -> int:
    return 1 << number


@pytest.mark.parametrize(("idr0", "stage2"), [(IDR0, False), (IDR0_BOTH_STAGES, True)])
def test_capabilities(idr0: int, stage2: bool) -> None:
    assert Capabilities.unpack(idr0, IDR1, IDR5) == Capabilities(
        stage1=True,
        stage2=stage2,
        output_size=4,
        granule_4k=True,
        stream_bits=16,
        command_queue_bits=19,
        event_queue_bits=19,
    )


@given(words, words, words)
def test_any_capabilities_stay_in_their_bounds(idr0: int, idr1: int, idr5: int) -> None:
    caps = Capabilities.unpack(idr0, idr1, idr5)
    assert 0 <= caps.output_size <= 5, "48 bits: what a table entry of the 4 KiB granule can hold"
    assert 0 <= caps.stream_bits < 64
    assert 0 <= caps.command_queue_bits < 32
    assert 0 <= caps.event_queue_bits < 32


def test_registers() -> None:
    assert (smmuv3.IDR0, smmuv3.IDR1, smmuv3.IDR5) == (0x00, 0x04, 0x14)
    assert (smmuv3.CR0, smmuv3.CR0ACK, smmuv3.GERROR) == (0x20, 0x24, 0x60)
    assert (smmuv3.STRTAB_BASE, smmuv3.STRTAB_BASE_CFG) == (0x80, 0x88)
    assert (smmuv3.CMDQ_BASE, smmuv3.CMDQ_PROD, smmuv3.CMDQ_CONS) == (0x90, 0x98, 0x9C)
    assert (smmuv3.EVENTQ_BASE, smmuv3.EVENTQ_PROD, smmuv3.EVENTQ_CONS) == (0xA0, 0x100A8, 0x100AC)
    assert smmuv3.CR0_SMMUEN | smmuv3.CR0_EVENTQEN | smmuv3.CR0_CMDQEN == 0xD


def test_commands() -> None:
    assert smmuv3.cfgi_all() == struct.pack("<QQ", 0x04, 31)
    assert smmuv3.tlbi_all() == struct.pack("<QQ", 0x30, 0)
    assert smmuv3.sync() == struct.pack("<QQ", 0x46, 0)


def test_stream_table_entries() -> None:
    assert smmuv3.ste_stage1(0x40210000) == struct.pack("<Q", 1 | 5 << 1 | 0x40210000) + bytes(56)
    entry = struct.unpack("<8Q", smmuv3.ste_stage2(0x40220000, 5, vmid=1))
    assert entry[:2] == (1 | 6 << 1, 0)
    # T0SZ 25 is 39 bits, which begin at level 1 (SL0 = 1); S2PS, S2AA64, S2R.
    assert entry[2] == 1 | (25 | bit(6) | 5 << 16 | bit(19) | bit(26)) << 32
    assert entry[3:] == (0x40220000, 0, 0, 0, 0)


def test_a_context_descriptor() -> None:
    low, high, table, *_ = struct.unpack("<IIQ6Q", smmuv3.context_descriptor(0x40230000, 5))
    assert low == 25 | bit(30) | bit(31)
    assert high == 5 | bit(9) | bit(13) | bit(14) | bit(16)
    assert table == 0x40230000
    assert len(smmuv3.context_descriptor(0, 0)) == 64


def test_page_table_entries() -> None:
    base = bit(10) | 3 << 8 | 3
    assert smmuv3.table_entry(0x40240000) == struct.pack("<Q", 0x40240003)
    assert smmuv3.page_stage1(0x40250000, writable=True) == struct.pack("<Q", 0x40250000 | base | 1 << 6)
    assert smmuv3.page_stage1(0x40250000, writable=False) == struct.pack("<Q", 0x40250000 | base | 3 << 6)
    for readable, writable, s2ap in ((True, False, 1), (False, True, 2), (True, True, 3)):
        entry = smmuv3.page_stage2(0x40250000, readable=readable, writable=writable)
        assert entry == struct.pack("<Q", 0x40250000 | base | s2ap << 6 | 0xF << 2)
    assert bytes(8) == smmuv3.NO_ENTRY


# -- a walk after the manual ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """What a table walk after the manual finds."""

    page: int
    read: bool
    write: bool


class Memory:
    """Tables in pages that do not exist until they are written."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def put(self, address: int, data: bytes) -> None:
        page = self.pages.setdefault(address & ~0xFFF, bytearray(PAGE_SIZE))
        page[address & 0xFFF : (address & 0xFFF) + len(data)] = data

    def quad(self, address: int) -> int:
        page = self.pages.get(address & ~0xFFF, bytearray(PAGE_SIZE))
        return int.from_bytes(page[address & 0xFFF : (address & 0xFFF) + 8], "little")


def walk(memory: Memory, streams: int, stream: int, iova: int) -> Walk | None:
    """Translate as the manual says (IHI 0070, 5.2 and 5.4; Arm ARM, D8): an own reading of the entries."""
    entry = [memory.quad(streams + 64 * stream + 8 * at) for at in range(4)]
    config = entry[0] >> 1 & 7
    if not entry[0] & 1 or config not in (5, 6):
        return None
    if config == 5:
        context = entry[0] & (1 << 52) - 1 & ~0x3F
        word = memory.quad(context)
        if not word >> 31 & 1 or not word >> 41 & 1:
            return None
        size, table, level = word & 0x3F, memory.quad(context + 8), 1
    else:
        size, table, level = entry[2] >> 32 & 0x3F, entry[3], 2 - (entry[2] >> 38 & 3)
    if iova >> 64 - size:
        return None
    while True:
        value = memory.quad(table + 8 * (iova >> 39 - 9 * level & 0x1FF))
        if value & 3 != 3:
            return None
        target = value & (1 << 48) - 1 & ~0xFFF
        if level == 3:
            break
        table, level = target, level + 1
    if not value >> 10 & 1:
        return None
    if config == 5:
        return Walk(target, bool(value >> 6 & 1), not value >> 7 & 1)
    return Walk(target, bool(value >> 6 & 1), bool(value >> 7 & 1))


@given(
    stage=st.sampled_from([1, 2]),
    stream=st.integers(0, 511),
    iova=iovas,
    page=pages,
    access=st.sampled_from([(True, True), (True, False), (False, True)]),
    other=iovas,
)
def test_a_walk_finds_what_was_mapped_and_nothing_else(
    stage: int, stream: int, iova: int, page: int, access: tuple[bool, bool], other: int
) -> None:
    read, write = access
    # Write-only is a word that only stage 2 has.
    read = read or stage == 1
    memory, streams, context, tables = Memory(), 0x40000, 0x2000, {1: 0x10000, 2: 0x20000, 3: 0x30000}
    if stage == 1:
        memory.put(streams + 64 * stream, smmuv3.ste_stage1(context))
        memory.put(context, smmuv3.context_descriptor(tables[1], 4))
        leaf = smmuv3.page_stage1(page, writable=write)
    else:
        memory.put(streams + 64 * stream, smmuv3.ste_stage2(tables[1], 4))
        leaf = smmuv3.page_stage2(page, readable=read, writable=write)
    for level in (1, 2):
        entry = smmuv3.table_entry(tables[level + 1])
        memory.put(tables[level] + 8 * smmuv3.table_index(iova, level), entry)
    memory.put(tables[3] + 8 * smmuv3.table_index(iova, 3), leaf)

    assert walk(memory, streams, stream, iova) == Walk(page, read, write)
    if other != iova:
        assert walk(memory, streams, stream, other) is None
    assert walk(memory, streams, stream, iova + (1 << 39)) is None
    assert walk(memory, streams, stream ^ 1, iova) is None
    assert walk(memory, streams, stream ^ 0x100, iova) is None


@given(st.integers(0, 2**39 - 1))
def test_indices_make_up_the_address(iova: int) -> None:
    parts = {level: smmuv3.table_index(iova, level) for level in (1, 2, 3)}
    assert all(0 <= part < 512 for part in parts.values())
    assert sum(part << 39 - 9 * level for level, part in parts.items()) == iova & ~0xFFF


# -- queues --------------------------------------------------------------------------------------------------------


@given(bits=st.integers(0, 19), start=st.integers(0, 2**20 - 1), count=st.integers(0, 600))
def test_an_index_wraps_and_remembers_it(bits: int, start: int, count: int) -> None:
    size = 1 << bits
    index = start = start % (2 * size)
    for step in range(count):
        assert smmuv3.slot(index, bits) == (start + step) % size
        index = smmuv3.advance(index, bits)
    assert index == (start + count) % (2 * size)


def test_full_and_empty_are_told_apart() -> None:
    index = 0
    for _ in range(256):
        index = smmuv3.advance(index, 8)
    assert (smmuv3.slot(index, 8), index) == (0, 0x100)


# -- events --------------------------------------------------------------------------------------------------------


def record(*words: int) -> bytes:
    return struct.pack("<8I", *words)


@pytest.mark.parametrize(
    ("raw", "event", "text"),
    [
        # As recorded by QEMU 7.2: a write, and a read.
        (
            record(0x10, 0x100, 0, 0, 0x6000, 1, 0, 0),
            Event(id=0x10, stream=0x100, write=True, stage2=False, address=0x100006000),
            "no page-table entry (F_TRANSLATION) (SMMUv3 event 0x10)",
        ),
        (
            record(0x10, 0x100, 0, 8, 0x6000, 1, 0, 0),
            Event(id=0x10, stream=0x100, write=False, stage2=False, address=0x100006000),
            "no page-table entry (F_TRANSLATION) (SMMUv3 event 0x10)",
        ),
        # By QEMU 10.0, which says the class of the access as well; at stage 1, and at stage 2.
        (
            record(0x13, 0x100, 0, 0x200, 0x6000, 1, 0, 0),
            Event(id=0x13, stream=0x100, write=True, stage2=False, address=0x100006000),
            "no permission (F_PERMISSION) (SMMUv3 event 0x13)",
        ),
        (
            record(0x13, 0x100, 0, 0x288, 0x6000, 1, 0x6000, 1),
            Event(id=0x13, stream=0x100, write=False, stage2=True, address=0x100006000),
            "no permission (F_PERMISSION) at stage 2 (SMMUv3 event 0x13)",
        ),
        (
            record(0x04, 0x008, 0, 0, 0, 0, 0, 0),
            Event(id=0x04, stream=8, write=False, stage2=False, address=0),
            "stream table entry invalid (C_BAD_STE) (SMMUv3 event 0x4)",
        ),
    ],
)
def test_events(raw: bytes, event: Event, text: str) -> None:
    assert Event.unpack(raw) == event
    assert event.text == text


@given(st.binary(min_size=32, max_size=32))
def test_any_event(raw: bytes) -> None:
    event = Event.unpack(raw)
    assert 0 <= event.id <= 0xFF
    assert event.stream == int.from_bytes(raw[4:8], "little")
    assert event.address in (0, int.from_bytes(raw[16:24], "little"))
    assert f"{event.id:#x}" in event.text
