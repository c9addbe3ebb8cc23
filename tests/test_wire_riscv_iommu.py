# SPDX-License-Identifier: Apache-2.0
"""The RISC-V IOMMU's bytes, against the layouts of the specification written out by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.wire import riscv_iommu as wire

pages = st.integers(0, (1 << 44) - 1).map(lambda number: number << 12)


def test_the_capabilities_that_qemu_shows() -> None:
    caps = wire.Capabilities.unpack(0x78E2CF0F10)
    assert (caps.version, caps.context_size, caps.leaf_bits) == (0x10, 64, 6)
    assert caps.pagings == {"sv39", "sv48", "sv39x4"}
    base = wire.Capabilities.unpack(0x78E2CF0F10 & ~(1 << 22) & ~(1 << 17) & ~(1 << 10))
    assert (base.context_size, base.leaf_bits) == (32, 7)
    assert base.pagings == {"sv39"}


def test_registers_as_observed() -> None:
    """ddtp = (table >> 12) << 10 | mode; a queue of 256 entries says 7."""
    assert wire.ddtp(wire.ONE_LEVEL, 0x80201000) == 0x80201 << 10 | 2
    assert wire.ddtp(wire.BARE) == 1
    assert wire.queue_base(0x80202000, 8) == 0x80202 << 10 | 7


def test_device_contexts() -> None:
    """tc, iohgatp, ta, fsc; the rest of an extended one is zero."""
    first = wire.context(0x80204000, wire.SV39, 64)
    assert struct.unpack("<8Q", first) == (1, 0, 1 << 12, 8 << 60 | 0x80204, 0, 0, 0, 0)
    assert struct.unpack("<4Q", wire.context(0x80204000, wire.SV48, 32))[3] == 9 << 60 | 0x80204
    second = wire.context(0x80204000, wire.SV39X4, 32, ident=5)
    assert struct.unpack("<4Q", second) == (1, 8 << 60 | 5 << 44 | 0x80204, 0, 0)


@given(pages)
def test_entries_point_where_they_should(page: int) -> None:
    for entry, flags in (
        (wire.page_entry(page, writable=True), 0xD7),
        (wire.page_entry(page, writable=False), 0x53),
        (wire.table_entry(page), 1),
        (wire.directory_entry(page), 1),
    ):
        (word,) = struct.unpack("<Q", entry)
        assert word >> 10 << 12 == page
        assert word & 0x3FF == flags


@pytest.mark.parametrize("paging", wire.PAGINGS.values(), ids=lambda paging: paging.name)
@given(data=st.data())
def test_indices_take_every_bit_of_an_address_once(paging: wire.Paging, data: st.DataObject) -> None:
    iova = data.draw(st.integers(0, paging.end - 1))
    again = iova & 0xFFF
    for level in range(paging.levels):
        index = paging.index(iova, level)
        assert index < (paging.root_size // 8 if level == paging.levels - 1 else 512)
        again |= index << 12 + 9 * level
    assert again == iova


def test_how_far_addresses_go() -> None:
    """Half of what Sv39 and Sv48 have is for sign-extended addresses; Sv39x4 has 41 bits and a root of 16 KiB."""
    assert [paging.end for paging in wire.PAGINGS.values()] == [1 << 38, 1 << 47, 1 << 41]
    assert [paging.root_size for paging in wire.PAGINGS.values()] == [4096, 4096, 16384]


def test_commands() -> None:
    """Opcode in bits 6:0, function in bits 9:7; nothing is named, so that everything is meant."""
    words = [
        struct.unpack("<QQ", command)
        for command in (wire.iotinval_vma(), wire.iotinval_gvma(), wire.iodir_inval(), wire.iofence())
    ]
    assert [(low & 0x7F, low >> 7 & 7) for low, _ in words] == [(1, 0), (1, 1), (3, 0), (2, 0)]
    assert [low >> 10 for low, _ in words] == [0, 0, 0, 0b1100]
    assert {high for _, high in words} == {0}


def record(cause: int, transaction: int, device: int = 8, address: int = 0x80A00000) -> wire.Record:
    return wire.Record.unpack(struct.pack("<4Q", cause | transaction << 34 | device << 40 | 1 << 32, 0, address, 0))


def test_a_record_as_observed() -> None:
    """``02 01 00 00 09 08 00 00``: context not valid, device id 8, an untranslated read with PV set."""
    seen = wire.Record.unpack(bytes.fromhex("0201000009080000").ljust(32, b"\0"))
    assert (seen.cause, seen.transaction, seen.device, seen.address) == (258, 2, 8, 0)
    assert seen.text == "device context not valid (RISC-V IOMMU cause 258)"
    assert seen.write is False


@pytest.mark.parametrize(
    ("cause", "transaction", "write"),
    [(13, 2, False), (13, 3, False), (15, 3, True), (21, 3, False), (23, 3, True), (256, 3, True), (256, 0, None)],
)
def test_a_page_fault_says_itself_whether_it_was_a_write(cause: int, transaction: int, write: bool | None) -> None:
    assert record(cause, transaction).write is write


@given(st.binary(min_size=wire.RECORD_SIZE, max_size=wire.RECORD_SIZE))
def test_any_record_is_read(data: bytes) -> None:
    seen = wire.Record.unpack(data)
    assert seen.cause < 1 << 12
    assert seen.device < 1 << 24
    assert f"cause {seen.cause})" in seen.text
