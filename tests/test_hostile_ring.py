# SPDX-License-Identifier: Apache-2.0
"""A hostile driver: whatever lies in the ring, the device end touches nothing outside of its space.

It raises nothing but `ProtocolError` and `AccessError` either.
"""

from __future__ import annotations

import contextlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from virtiova.addr import GPA, IOVA, Access
from virtiova.dma.ram import MappedRam, RamBlock
from virtiova.dma.space import FlatSpace, MediatedSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.iommu.soft import SoftIommu
from virtiova.ring.layout import Desc, SplitLayout
from virtiova.ring.split_device import SplitDevice

SIZE = 4
GUARD = b"\xa5" * 0x1000
PAGES = 4


def guarded() -> tuple[bytearray, MappedRam]:
    """RAM of four pages with a guard before and after it in the backing buffer."""
    backing = bytearray(GUARD + bytes(PAGES * 0x1000) + GUARD)
    return backing, MappedRam(backing, [RamBlock(GPA(0), PAGES * 0x1000, len(GUARD))])


addresses = st.one_of(
    st.integers(0, PAGES * 0x1000 + 64),
    st.sampled_from([0, 0x100, 0x1000, 0x1FF8, 0x2000, 0x3FFF, 1 << 36, (1 << 64) - 16, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
descriptors = st.builds(
    Desc,
    addresses,
    st.one_of(st.sampled_from([0, 1, 16, 32, 64, 0x1000, 0x2001, 0xFFFFFFFF]), st.integers(0, (1 << 32) - 1)),
    st.integers(0, 7),
    st.integers(0, 5),
)
tables = st.lists(descriptors, min_size=SIZE, max_size=SIZE).map(lambda d: b"".join(x.pack() for x in d))
rings = st.one_of(
    st.binary(min_size=16 * SIZE + 14, max_size=16 * SIZE + 14),
    st.builds(
        lambda table, flags, index, heads, event: table + struct.pack("<7H", flags, index, *heads, event),
        tables,
        st.integers(0, 1),
        st.integers(0, SIZE + 1),
        st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
        st.integers(0, 0xFFFF),
    ),
)


def drive(end: SplitDevice) -> None:
    """What a device does, whatever the chains say."""
    try:
        for _ in range(2 * SIZE):
            chain = end.pop()
            if chain is None:
                break
            with contextlib.suppress(AccessError):
                chain.read(64)
            with contextlib.suppress(AccessError):
                chain.write(b"w" * min(chain.writable, 0x2800))
            end.push(chain, chain.written)
            end.needs_interrupt()
        end.enable_notify()
    except ProtocolError:
        pass


@settings(max_examples=400, deadline=None)
@given(ring=rings, table=tables, event_idx=st.booleans(), indirect=st.booleans())
def test_hostile_ring_over_flat_memory(ring: bytes, table: bytes, event_idx: bool, indirect: bool) -> None:
    backing, ram = guarded()
    layout = SplitLayout(SIZE)
    ram.write(GPA(0), ring)
    ram.write(GPA(0x100), table)
    space = FlatSpace(ram)
    drive(SplitDevice(space, 0, layout.avail, layout.used, layout, event_idx=event_idx, indirect=indirect))
    assert backing[:0x1000] == GUARD
    assert backing[-0x1000:] == GUARD


@settings(max_examples=400, deadline=None)
@given(ring=rings, table=tables, event_idx=st.booleans(), indirect=st.booleans())
def test_hostile_ring_behind_an_iommu(ring: bytes, table: bytes, event_idx: bool, indirect: bool) -> None:
    backing, ram = guarded()
    iommu = SoftIommu(ram)
    # Ring and table read-write at page 0, a page that may only be read at 1; the others are out of reach.
    iommu.map(IOVA(0), GPA(0x2000), 0x1000)
    iommu.map(IOVA(0x1000), GPA(0x1000), 0x1000, Access.READ)
    iommu.enable()
    layout = SplitLayout(SIZE)
    ram.write(GPA(0x2000), ring)
    ram.write(GPA(0x2100), table)
    space = MediatedSpace(ram, iommu)
    drive(SplitDevice(space, 0, layout.avail, layout.used, layout, event_idx=event_idx, indirect=indirect))
    for page in (0, 1, 3):
        assert ram.read(GPA(page * 0x1000), 0x1000) == bytes(0x1000), (
            f"page {page} is not the device's to write"
        )
    assert backing[:0x1000] == GUARD
    assert backing[-0x1000:] == GUARD
