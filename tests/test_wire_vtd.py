# SPDX-License-Identifier: Apache-2.0
"""VT-d as bytes: held against values read from a real (emulated) one, and a page walk written from the manual."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import PAGE_SIZE
from virtiova.errors import ProtocolError
from virtiova.wire import vtd
from virtiova.wire.vtd import Capabilities, FaultRecord

# Registers of QEMU's intel-iommu, by its options.
CAP, ECAP = 0xD2008C22260206, 0xF00F4A
CAP_48 = 0xD2008C222F0606
CAP_CACHING = CAP | 1 << 7
ECAP_DEVICE_IOTLB = 0xF00F4E
ECAP_SCALABLE = 0x480080F00F4A

qwords = st.integers(0, 2**64 - 1)
pages = st.integers(0, 2**40 - 1).map(lambda number: number * PAGE_SIZE)


@pytest.mark.parametrize(
    ("cap", "ecap", "levels", "caching"),
    [
        (CAP, ECAP, 3, False),
        (CAP_48, ECAP, 4, False),
        (CAP_CACHING, ECAP, 3, True),
        (CAP, ECAP_DEVICE_IOTLB, 3, False),
        (CAP, ECAP_SCALABLE, 3, False),
    ],
)
def test_capabilities(cap: int, ecap: int, levels: int, caching: bool) -> None:
    caps = Capabilities.unpack(cap, ecap)
    device_tlb = ecap == ECAP_DEVICE_IOTLB
    wanted = Capabilities(
        levels, caching, fault_offset=0x220, fault_records=1, iotlb_offset=0xF8, device_tlb=device_tlb
    )
    assert caps == wanted


@given(qwords, qwords)
def test_any_capabilities_stay_in_their_bounds(cap: int, ecap: int) -> None:
    try:
        caps = Capabilities.unpack(cap, ecap)
    except ProtocolError:
        assert not cap >> 8 & 6, "39 or 48 bits are there"
        return
    assert caps.levels in (3, 4)
    assert 1 <= caps.fault_records <= 256
    assert caps.fault_offset % 16 == 0
    assert 0 <= caps.fault_offset < 0x4000
    assert caps.iotlb_offset % 16 == 8
    assert 8 <= caps.iotlb_offset < 0x4008


def test_registers_and_commands() -> None:
    assert (vtd.CAP, vtd.ECAP, vtd.GCMD, vtd.GSTS, vtd.RTADDR) == (0x08, 0x10, 0x18, 0x1C, 0x20)
    assert (vtd.CCMD, vtd.FSTS, vtd.IQH, vtd.IQT, vtd.IQA) == (0x28, 0x34, 0x80, 0x88, 0x90)
    assert (vtd.CMD_TRANSLATE, vtd.CMD_SET_ROOT, vtd.CMD_QUEUED) == (1 << 31, 1 << 30, 1 << 26)
    assert vtd.CONTEXT_GLOBAL == 0xA000000000000000
    assert vtd.IOTLB_GLOBAL == 0x9000000000000000
    assert vtd.GSTS_KEEP == 0x96FFFFFF
    # A command is one bit beside the ones that stay: the one-shot bits of the status must not be written back.
    for one_shot in (30, 29, 27, 24):
        assert not vtd.GSTS_KEEP >> one_shot & 1
    for stays in (31, 28, 26, 25):
        assert vtd.GSTS_KEEP >> stays & 1


def test_queue_descriptors() -> None:
    assert vtd.queue_context_global() == struct.pack("<QQ", 0x11, 0)
    assert vtd.queue_iotlb_global() == struct.pack("<QQ", 0x12, 0)


def test_entries() -> None:
    assert vtd.root_entry(0x203000) == struct.pack("<QQ", 0x203001, 0)
    # AW 1 is 3 levels, AW 2 is 4; the domain begins at bit 8, the translation type (bits 3:2) is 0.
    assert vtd.context_entry(0x204000, 3, 1) == struct.pack("<QQ", 0x204001, 0x101)
    assert vtd.context_entry(0x204000, 4, 7) == struct.pack("<QQ", 0x204001, 0x702)
    assert vtd.page_entry(0x800000, vtd.READ | vtd.WRITE) == struct.pack("<Q", 0x800003)
    assert vtd.page_entry(0x800000, vtd.READ) == struct.pack("<Q", 0x800001)
    assert vtd.page_entry(0x800000, vtd.WRITE) == struct.pack("<Q", 0x800002)
    assert vtd.page_entry(0x800000, 0) == bytes(8)


@dataclass(frozen=True)
class Walk:
    """What a page walk after the manual finds."""

    page: int
    flags: int


def walk(memory: dict[int, bytes], root: int, source: int, iova: int) -> Walk | None:
    """Translate as the manual says (VT-d 3.4, 3.6 and 9.1 to 9.8): an own reading of the entries."""

    def quad(address: int) -> int:
        table, offset = address & ~0xFFF, address & 0xFFF
        (value,) = struct.unpack_from("<Q", memory.get(table, bytes(PAGE_SIZE)), offset)
        return int(value)

    low = quad(root + (source >> 8) * 16)
    if not low & 1:
        return None
    entry = (low & ~0xFFF) + (source & 0xFF) * 16
    low, high = quad(entry), quad(entry + 8)
    if not low & 1 or low >> 2 & 3:
        return None
    level = (high & 7) + 2
    if iova >> 12 + 9 * level:
        return None
    at, flags = low & ~0xFFF, 3
    while True:
        value = quad(at + 8 * (iova >> 12 + 9 * (level - 1) & 0x1FF))
        flags &= value & 3
        if not flags:
            return None
        if level == 1:
            return Walk(value & ~0xFFF, flags)
        at, level = value & ~0xFFF, level - 1


@given(
    levels=st.sampled_from([3, 4]),
    source=st.integers(0, 0xFFFF),
    number=st.integers(0, 2**36 - 1),
    page=pages,
    flags=st.integers(1, 3),
    other=st.integers(0, 2**36 - 1),
)
def test_a_walk_finds_what_was_mapped_and_nothing_else(
    levels: int, source: int, number: int, page: int, flags: int, other: int
) -> None:
    bits = 9 * levels
    iova, elsewhere = (number % 2**bits) << 12, (other % 2**bits) << 12
    tables = {level: 0x10000 * level for level in range(1, levels + 1)}
    memory = {address: bytearray(PAGE_SIZE) for address in (0x1000, 0x2000, *tables.values())}

    def put(address: int, data: bytes) -> None:
        memory[address & ~0xFFF][address & 0xFFF : (address & 0xFFF) + len(data)] = data

    put(0x1000 + 16 * (source >> 8), vtd.root_entry(0x2000))
    put(0x2000 + 16 * (source & 0xFF), vtd.context_entry(tables[levels], levels, 1))
    for level in range(levels, 1, -1):
        put(tables[level] + 8 * vtd.table_index(iova, level), vtd.page_entry(tables[level - 1], 3))
    put(tables[1] + 8 * vtd.table_index(iova, 1), vtd.page_entry(page, flags))

    frozen = {address: bytes(data) for address, data in memory.items()}
    assert walk(frozen, 0x1000, source, iova) == Walk(page, flags)
    if elsewhere != iova:
        assert walk(frozen, 0x1000, source, elsewhere) is None
    assert walk(frozen, 0x1000, source ^ 1, iova) is None
    assert walk(frozen, 0x1000, source ^ 0x100, iova) is None


@given(st.integers(0, 2**48 - 1))
def test_indices_make_up_the_address(iova: int) -> None:
    parts = [vtd.table_index(iova, level) for level in (1, 2, 3, 4)]
    assert all(0 <= part < 512 for part in parts)
    assert sum(part << 12 + 9 * at for at, part in enumerate(parts)) == iova & ~0xFFF


# -- faults -------------------------------------------------------------------------------------------------------

F, T = 1 << 63, 1 << 62
_NO_PASID = 0xFFFF << 40
"""Bits 59:40 of a record without a PASID, as QEMU leaves them: they are no part of the reason."""


def test_a_device_write_to_an_unmapped_page() -> None:
    record = FaultRecord.unpack(0x203000, F | _NO_PASID | 5 << 32 | 0x0018)
    assert record == FaultRecord(page=0x203000, write=True, source=0x0018, reason=5)
    assert record.text == "no write permission (VT-d fault 0x5)"


def test_a_device_read_behind_a_root_port() -> None:
    record = FaultRecord.unpack(0x8000204000, F | T | _NO_PASID | 6 << 32 | 0x0100)
    assert record == FaultRecord(page=0x8000204000, write=False, source=0x0100, reason=6)
    assert record.text == "no read permission (VT-d fault 0x6)"


@pytest.mark.parametrize("high", [0, T, 5 << 32, ~F & (2**64 - 1)])
def test_no_fault(high: int) -> None:
    assert FaultRecord.unpack(0x203000, high) is None


@given(qwords, qwords)
def test_any_record(low: int, high: int) -> None:
    record = FaultRecord.unpack(low, high)
    assert (record is None) is (high < F)
    if record is not None:
        assert record.page % PAGE_SIZE == 0
        assert record.page <= low
        assert 0 <= record.source <= 0xFFFF
        assert 0 <= record.reason <= 0xFF
        assert record.write is not bool(high & T)
        assert f"{record.reason:#x}" in record.text


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (1, "root entry not present"),
        (2, "context entry not present"),
        (3, "context entry invalid"),
        (4, "address beyond the address width"),
        (5, "no write permission"),
        (6, "no read permission"),
        (0xFE, "reason"),
    ],
)
def test_reasons_in_words(reason: int, words: str) -> None:
    assert FaultRecord(0, True, 0, reason).text == f"{words} (VT-d fault {reason:#x})"
