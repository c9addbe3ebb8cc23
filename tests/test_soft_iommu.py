# SPDX-License-Identifier: Apache-2.0
"""The software IOMMU: it translates, it refuses, it caches like hardware, and it hurts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ring_kit import make_ram
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import MediatedSpace, Miss, Span
from virtiova.errors import AccessError, NotPossibleError
from virtiova.iommu.none import NoIommu
from virtiova.iommu.soft import MAX_FAULTS, POISON, Reason, SoftIommu
from virtiova.ports import Fault, Iommu

RAM_PAGES = 16
PAGE = PAGE_SIZE
A = IOVA(0x10_0000_0000)


def make() -> tuple[MappedRam, SoftIommu, MediatedSpace]:
    ram = make_ram(RAM_PAGES * PAGE)
    iommu = SoftIommu(ram, source=0x0108)
    iommu.enable()
    return ram, iommu, MediatedSpace(ram, iommu)


def test_they_are_ports() -> None:
    ports: list[Iommu] = [SoftIommu(make_ram(PAGE)), NoIommu()]
    assert [(p.name, p.present, p.caches) for p in ports] == [("soft", True, True), ("none", False, False)]


def test_translates_across_two_pages_that_are_not_adjacent() -> None:
    ram, iommu, space = make()
    iommu.map(A, GPA(5 * PAGE), PAGE)
    iommu.map(IOVA(A + PAGE), GPA(2 * PAGE), PAGE)
    space.write(A + PAGE - 2, b"abcd")
    assert ram.read(GPA(6 * PAGE - 2), 2) == b"ab"
    assert ram.read(GPA(2 * PAGE), 2) == b"cd"
    assert space.read(A + PAGE - 2, 4) == b"abcd"
    assert iommu.faults() == []


def test_the_byte_past_the_end_faults_and_nothing_is_written() -> None:
    ram, iommu, space = make()
    iova = iommu.allocate(PAGE)
    iommu.map(iova, GPA(PAGE), PAGE)
    with pytest.raises(AccessError):
        space.write(iova + PAGE - 4, b"12345")
    assert ram.read(GPA(0), RAM_PAGES * PAGE) == bytes(RAM_PAGES * PAGE)
    (fault,) = iommu.faults()
    assert fault.address == iova + PAGE
    assert fault.write
    assert fault.source == 0x0108
    assert fault.reason == "not mapped"
    assert fault.raw == (iova + PAGE, 0x0108 << 16 | 1 << 8 | Reason.NOT_MAPPED)
    assert iommu.faults() == [], "reading clears"


@pytest.mark.parametrize(
    ("allowed", "tried", "reason"),
    [
        (Access.READ, Access.WRITE, "not writable"),
        (Access.WRITE, Access.READ, "not readable"),
        (Access.NONE, Access.READ, "not readable"),
        (Access.NONE, Access.WRITE, "not writable"),
    ],
)
def test_permission_is_checked(allowed: Access, tried: Access, reason: str) -> None:
    _, iommu, _ = make()
    iommu.map(A, GPA(PAGE), PAGE, allowed)
    miss = iommu.lookup(A + 8, 4, tried)
    assert isinstance(miss, Miss)
    assert reason in miss.reason
    (fault,) = iommu.faults()
    assert (fault.reason, fault.write, fault.address) == (reason, tried is Access.WRITE, A + 8)


def test_permission_is_checked_in_the_cache_too() -> None:
    ram, iommu, space = make()
    iommu.map(A, GPA(PAGE), PAGE, Access.READ)
    assert space.read(A, 4) == bytes(4)
    with pytest.raises(AccessError, match="not writable"):
        space.write(A, b"nope")
    assert ram.read(GPA(PAGE), 4) == bytes(4)


def test_enabling_starts_with_an_empty_cache() -> None:
    _, iommu, space = make()
    iommu.map(A, GPA(PAGE), PAGE)
    space.read(A, 4)
    iommu.unmap(A, PAGE)
    iommu.disable()
    iommu.enable()
    with pytest.raises(AccessError, match="not mapped"):
        space.read(A, 4)


def test_unmapped_stays_usable_until_invalidated_only_if_it_was_used() -> None:
    ram, iommu, space = make()
    used, unused = iommu.allocate(PAGE), iommu.allocate(PAGE)
    iommu.map(used, GPA(PAGE), PAGE)
    iommu.map(unused, GPA(3 * PAGE), PAGE)
    space.write(used, b"first")
    iommu.unmap(used, PAGE)
    iommu.unmap(unused, PAGE)
    space.write(used, b"stale")
    assert ram.read(GPA(PAGE), 5) == b"stale"
    with pytest.raises(AccessError):
        space.write(unused, b"never")
    iommu.invalidate()
    with pytest.raises(AccessError):
        space.write(used, b"again")
    assert ram.read(GPA(PAGE), 5) == b"stale"


def test_a_moved_mapping_is_seen_after_invalidation_only() -> None:
    ram, iommu, space = make()
    iommu.map(A, GPA(PAGE), PAGE)
    space.write(A, b"one")
    iommu.map(A, GPA(3 * PAGE), PAGE)
    space.write(A, b"two")
    assert ram.read(GPA(PAGE), 3) == b"two"
    iommu.invalidate()
    space.write(A, b"six")
    assert ram.read(GPA(PAGE), 3) == b"two"
    assert ram.read(GPA(3 * PAGE), 3) == b"six"


def test_widened_at_once_narrowed_after_invalidation() -> None:
    _, iommu, space = make()
    iommu.map(A, GPA(PAGE), PAGE, Access.READ)
    space.read(A, 1)
    iommu.map(A, GPA(PAGE), PAGE, Access.RW)
    space.write(A, b"x")
    iommu.map(A, GPA(PAGE), PAGE, Access.READ)
    space.write(A, b"y")
    iommu.invalidate()
    with pytest.raises(AccessError):
        space.write(A, b"z")
    assert space.read(A, 1) == b"y"


def test_unmap_poisons_only_what_was_mapped() -> None:
    ram, iommu, _ = make()
    ram.write(GPA(0), b"k" * RAM_PAGES * PAGE)
    iommu.map(A, GPA(PAGE), PAGE)
    iommu.map(IOVA(A + 2 * PAGE), GPA(3 * PAGE), PAGE)
    iommu.unmap(A, 4 * PAGE)
    for page in range(RAM_PAGES):
        wanted = POISON if page in (1, 3) else ord("k")
        assert ram.read(GPA(page * PAGE), PAGE) == bytes([wanted]) * PAGE, page


def test_allocate_never_gives_out_an_address_of_ram_nor_neighbours() -> None:
    high = 1 << 40
    for gpa in (0, high):
        iommu = SoftIommu(make_ram(RAM_PAGES * PAGE, gpa))
        ranges = [(iommu.allocate(PAGE * n), PAGE * n) for n in (1, 3, 1)]
        end = gpa + RAM_PAGES * PAGE
        for iova, _ in ranges:
            assert iova % PAGE == 0
            assert iova >= 2 * end
        for (first, size), (second, _) in itertools.pairwise(ranges):
            assert second > first + size, "a gap, so that the byte past the end has no mapping"


@pytest.mark.parametrize(
    ("iova", "gpa", "size"),
    [
        (A, 0, 0),
        (A, 0, -PAGE),
        (A, 0, 100),
        (A + 1, 0, PAGE),
        (A, 8, PAGE),
        (A, RAM_PAGES * PAGE, PAGE),
        (A, (RAM_PAGES - 1) * PAGE, 2 * PAGE),
        (A, -PAGE, PAGE),
        (-PAGE, 0, PAGE),
        (2**64, 0, PAGE),
        (2**64 - PAGE, 0, 2 * PAGE),
    ],
)
def test_map_refuses_and_changes_nothing(iova: int, gpa: int, size: int) -> None:
    _, iommu, _ = make()
    with pytest.raises(AccessError):
        iommu.map(IOVA(iova), GPA(gpa), size)
    assert isinstance(iommu.lookup(A, 1, Access.READ), Miss)


def test_the_last_page_of_the_address_space_can_be_mapped() -> None:
    _, iommu, space = make()
    last = IOVA(2**64 - PAGE)
    iommu.map(last, GPA(0), PAGE)
    space.write(2**64 - 1, b"x")
    with pytest.raises(AccessError, match=r"0x10000000000000000\+0x1"):
        space.write(2**64 - 1, b"xy")


@pytest.mark.parametrize(("iova", "size"), [(A, 0), (A, 100), (A + 1, PAGE), (2**64 - PAGE, 2 * PAGE)])
def test_unmap_refuses(iova: int, size: int) -> None:
    _, iommu, _ = make()
    with pytest.raises(AccessError):
        iommu.unmap(IOVA(iova), size)


@pytest.mark.parametrize("size", [0, 1, PAGE + 1, -PAGE])
def test_allocate_refuses(size: int) -> None:
    with pytest.raises(AccessError):
        SoftIommu(make_ram(PAGE)).allocate(size)


def test_faults_are_bounded_and_the_oldest_are_kept() -> None:
    _, iommu, _ = make()
    for page in range(MAX_FAULTS + 5):
        iommu.lookup(A + page * PAGE, 1, Access.READ)
    faults = iommu.faults()
    assert len(faults) == MAX_FAULTS
    assert faults[0].address == A
    assert iommu.lost_faults == 5


def test_disabled_lets_everything_through_and_records_nothing() -> None:
    ram, iommu, space = make()
    iommu.map(A, GPA(PAGE), PAGE)
    iommu.disable()
    space.write(2 * PAGE, b"direct")
    assert ram.read(GPA(2 * PAGE), 6) == b"direct"
    with pytest.raises(AccessError, match="no RAM"):
        space.write(A, b"x")
    assert iommu.faults() == []
    iommu.enable()
    space.write(A, b"mapped")
    assert ram.read(GPA(PAGE), 6) == b"mapped"


def test_it_starts_disabled() -> None:
    iommu = SoftIommu(make_ram(PAGE))
    assert iommu.lookup(0, 4, Access.RW) == [Span(GPA(0), 4)]


def test_no_iommu() -> None:
    none = NoIommu()
    none.enable()
    none.disable()
    none.map(IOVA(0), GPA(0), PAGE)
    none.unmap(IOVA(0), PAGE)
    none.invalidate()
    assert none.faults() == []
    with pytest.raises(NotPossibleError):
        none.allocate(PAGE)


page_numbers = st.integers(0, 2)
accesses = st.sampled_from([Access.READ, Access.WRITE, Access.RW])


class SoftIommuMachine(RuleBasedStateMachine):
    """Against two dicts: what the tables say, and what the device has used since the last invalidation."""

    @initialize()
    def start(self) -> None:
        self.ram, self.iommu, self.space = make()
        self.bytes = bytearray(RAM_PAGES * PAGE)
        self.table: dict[int, tuple[int, Access]] = {}
        self.used: dict[int, tuple[int, Access]] = {}
        self.enabled = True
        self.expected: list[tuple[int, bool]] = []

    @rule(iova=page_numbers, gpa=st.integers(0, RAM_PAGES - 3), count=st.integers(1, 3), access=accesses)
    def map(self, iova: int, gpa: int, count: int, access: Access) -> None:
        self.iommu.map(IOVA(A + iova * PAGE), GPA(gpa * PAGE), count * PAGE, access)
        for n in range(count):
            self.table[iova + n] = (gpa + n, access)

    @rule(iova=page_numbers, count=st.integers(1, 3))
    def unmap(self, iova: int, count: int) -> None:
        self.iommu.unmap(IOVA(A + iova * PAGE), count * PAGE)
        for n in range(iova, iova + count):
            if n in self.table:
                at = self.table.pop(n)[0] * PAGE
                self.bytes[at : at + PAGE] = bytes([POISON]) * PAGE

    @rule()
    def invalidate(self) -> None:
        self.iommu.invalidate()
        self.used.clear()

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        if on:
            self.iommu.enable()
            self.used.clear()
        else:
            self.iommu.disable()
        self.enabled = on

    @rule(page=page_numbers, offset=st.integers(0, PAGE - 1), length=st.sampled_from([1, 2, PAGE, PAGE + 1]))
    def write(self, page: int, offset: int, length: int) -> None:
        address = (A if self.enabled else 0) + page * PAGE + offset
        data = bytes([len(self.expected) % 251 + 1]) * length
        places = self.places(address, length, Access.WRITE)
        if places is None:
            with pytest.raises(AccessError):
                self.space.write(address, data)
            return
        self.space.write(address, data)
        for at, byte in zip(places, data, strict=True):
            self.bytes[at] = byte

    @rule(page=page_numbers, offset=st.integers(0, PAGE - 1), length=st.sampled_from([1, 2, PAGE, PAGE + 1]))
    def read(self, page: int, offset: int, length: int) -> None:
        address = (A if self.enabled else 0) + page * PAGE + offset
        places = self.places(address, length, Access.READ)
        if places is None:
            with pytest.raises(AccessError):
                self.space.read(address, length)
        else:
            assert self.space.read(address, length) == bytes(self.bytes[at] for at in places)

    def places(self, address: int, length: int, access: Access) -> list[int] | None:
        """Where each byte lies, or None if any is missing; keeps the model's cache and faults."""
        if not self.enabled:
            return list(range(address, address + length))
        places = []
        for byte in range(address, address + length):
            page, offset = divmod(byte - A, PAGE)
            entry = self.used.get(page)
            if entry is None or access not in entry[1]:
                entry = self.table.get(page)
                if entry is None or access not in entry[1]:
                    self.expected.append((byte, access is Access.WRITE))
                    return None
                self.used[page] = entry
            places.append(entry[0] * PAGE + offset)
        return places

    @rule()
    def faults(self) -> None:
        faults: list[Fault] = self.iommu.faults()
        assert [(f.address, f.write) for f in faults] == self.expected
        self.expected.clear()

    @invariant()
    def ram_is_as_expected(self) -> None:
        assert self.ram.read(GPA(0), len(self.bytes)) == self.bytes


TestSoftIommuMachine = SoftIommuMachine.TestCase
TestSoftIommuMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
