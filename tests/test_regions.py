# SPDX-License-Identifier: Apache-2.0
"""A front end's memory table as RAM: what is mapped, what is refused, and what is let go of."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from leaks import descriptors
from virtiova.addr import GPA, UVA
from virtiova.dma.ram import RamBlock
from virtiova.dma.regions import MAX_REGIONS, RegionRam
from virtiova.dma.space import FlatSpace, Miss, Span
from virtiova.errors import AccessError, ProtocolError

PAGE = 0x1000
LOW, HIGH = UVA(0x7000_0000_0000), UVA(0x7100_0000_0000)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("regions")
    os.ftruncate(made, 16 * PAGE)
    yield made
    os.close(made)


@pytest.fixture
def ram(fd: int) -> Iterator[RegionRam]:
    """GPA 0 and 0x8000, four pages each, in the other order in the file and in the front end."""
    made = RegionRam()
    made.add(GPA(0), 4 * PAGE, HIGH, 8 * PAGE, fd)
    made.add(GPA(8 * PAGE), 4 * PAGE, LOW, PAGE, fd)
    yield made
    made.clear()


def test_bytes_lie_where_the_table_says(ram: RegionRam, fd: int) -> None:
    ram.write(GPA(0x10), b"first")
    ram.write(GPA(8 * PAGE), b"second")
    assert os.pread(fd, 5, 8 * PAGE + 0x10) == b"first"
    assert os.pread(fd, 6, PAGE) == b"second"
    os.pwrite(fd, b"theirs", 12 * PAGE - 6)
    assert ram.read(GPA(4 * PAGE - 6), 6) == b"theirs"
    assert ram.blocks == (RamBlock(GPA(0), 4 * PAGE, 8 * PAGE), RamBlock(GPA(8 * PAGE), 4 * PAGE, PAGE))


def test_sized_accesses(ram: RegionRam) -> None:
    ram.store16(GPA(2), 0x1234)
    ram.store32(GPA(4), 0x89ABCDEF, "big")
    ram.fence()
    assert ram.load_pair(GPA(0)) == bytes.fromhex("0000341289abcdef") + bytes(8)
    assert (ram.load16(GPA(2)), ram.load16(GPA(2), "big"), ram.load32(GPA(4), "big")) == (0x1234, 0x3412, 0x89ABCDEF)
    with pytest.raises(AccessError, match="not aligned to 2"):
        ram.load16(GPA(1))
    with pytest.raises(AccessError, match="not aligned to 16"):
        ram.load_pair(GPA(8))


@pytest.mark.parametrize(("gpa", "length"), [(4 * PAGE, 1), (4 * PAGE - 1, 2), (8 * PAGE - 1, 1), (12 * PAGE, 1)])
def test_nothing_outside(ram: RegionRam, gpa: int, length: int) -> None:
    with pytest.raises(AccessError):
        ram.read(GPA(gpa), length)
    with pytest.raises(AccessError):
        ram.write(GPA(gpa), bytes(length))


def test_user_addresses_become_guest_physical(ram: RegionRam) -> None:
    assert ram.gpa_of(UVA(HIGH + 0x123), 8) == [Span(GPA(0x123), 8)]
    assert ram.gpa_of(UVA(LOW + 4 * PAGE - 1), 1) == [Span(GPA(12 * PAGE - 1), 1)]
    miss = ram.gpa_of(UVA(LOW + 4 * PAGE - 1), 3)
    assert isinstance(miss, Miss)
    assert (miss.address, miss.length) == (LOW + 4 * PAGE, 2)
    for nowhere in (0, LOW - 1, (1 << 64) - 1):
        assert isinstance(ram.gpa_of(UVA(nowhere), 1), Miss)


def test_adjacent_user_addresses_with_memory_that_is_not(fd: int) -> None:
    ram = RegionRam()
    ram.add(GPA(PAGE), PAGE, UVA(0x20000), 0, fd)
    ram.add(GPA(0x9000), PAGE, UVA(0x21000), 5 * PAGE, fd)
    assert ram.gpa_of(UVA(0x20FFC), 8) == [Span(GPA(0x1FFC), 4), Span(GPA(0x9000), 4)]
    ram.clear()


def test_adjacent_regions_through_an_address_space(fd: int) -> None:
    """Adjacent in the guest, not in the file: an access over the border is two copies."""
    ram = RegionRam()
    ram.add(GPA(0), PAGE, UVA(0x20000), 8 * PAGE, fd)
    ram.add(GPA(PAGE), PAGE, UVA(0x30000), 0, fd)
    FlatSpace(ram).write(PAGE - 2, b"abcd")
    assert (os.pread(fd, 2, 9 * PAGE - 2), os.pread(fd, 2, 0)) == (b"ab", b"cd")
    with pytest.raises(AccessError, match="not in one alone"):
        ram.read(GPA(PAGE - 2), 4)
    ram.clear()


@pytest.mark.parametrize(
    ("gpa", "size", "uva", "offset", "says"),
    [
        (4 * PAGE, 0, 0, 0, "some bytes"),
        (4 * PAGE, -PAGE, 0, 0, "some bytes"),
        (4 * PAGE + 1, PAGE, 0, 0, "multiples"),
        (4 * PAGE, PAGE + 1, 0, 0, "multiples"),
        (4 * PAGE, PAGE, 8, 0, "multiples"),
        (4 * PAGE, PAGE, 0, 8, "multiples"),
        ((1 << 64) - PAGE, 2 * PAGE, 0, 0, "guest-physical address .* wrap"),
        (4 * PAGE, 2 * PAGE, (1 << 64) - PAGE, 0, "user address .* wrap"),
        (4 * PAGE, 2 * PAGE, 0, (1 << 64) - PAGE, "file address .* wrap"),
        (4 * PAGE, 2 * PAGE, 0, 15 * PAGE, "in its file"),
        (4 * PAGE, 1 << 62, 0, 0, "overlap"),
        (4 * PAGE, PAGE, 0, 1 << 62, "in its file"),
        (3 * PAGE, 2 * PAGE, 0, 0, "overlaps the one at 0x0"),
        (7 * PAGE, 2 * PAGE, 0, 0, "overlaps the one at 0x8000"),
        (9 * PAGE, PAGE, 0, 0, "overlaps the one at 0x8000"),
        (4 * PAGE, 2 * PAGE, LOW - PAGE, 0, "user addresses overlap"),
        (4 * PAGE, PAGE, HIGH + 3 * PAGE, 0, "user addresses overlap"),
    ],
)
def test_refused(ram: RegionRam, fd: int, gpa: int, size: int, uva: int, offset: int, says: str) -> None:
    before = ram.blocks
    with pytest.raises(ProtocolError, match=says):
        ram.add(GPA(gpa), size, UVA(uva), offset, fd)
    assert ram.blocks == before


def test_a_descriptor_that_is_no_memory(fd: int) -> None:
    ram = RegionRam()
    reader, writer = os.pipe()
    only_read = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(ProtocolError, match="no file of memory"):
            ram.add(GPA(0), PAGE, UVA(0), 0, reader)
        with pytest.raises(ProtocolError, match="cannot map"):
            ram.add(GPA(0), PAGE, UVA(0), 0, only_read)
        os.close(only_read)
        with pytest.raises(ProtocolError, match="not open"):
            ram.add(GPA(0), PAGE, UVA(0), 0, only_read)
    finally:
        os.close(reader)
        os.close(writer)
    assert ram.blocks == ()


def test_at_most_so_many(fd: int) -> None:
    ram = RegionRam()
    for at in range(MAX_REGIONS):
        ram.add(GPA(at * PAGE), PAGE, UVA(at * PAGE), 0, fd)
    with pytest.raises(ProtocolError, match="509 already"):
        ram.add(GPA(MAX_REGIONS * PAGE), PAGE, UVA(MAX_REGIONS * PAGE), 0, fd)
    ram.remove(GPA(0), PAGE, UVA(0))
    ram.add(GPA(MAX_REGIONS * PAGE), PAGE, UVA(MAX_REGIONS * PAGE), 0, fd)
    ram.clear()


def test_removed_with_exactly_its_numbers(ram: RegionRam, fd: int) -> None:
    for numbers in ((0, 3 * PAGE, HIGH), (PAGE, 4 * PAGE, HIGH), (0, 4 * PAGE, LOW)):
        with pytest.raises(ProtocolError, match="no region at"):
            ram.remove(GPA(numbers[0]), numbers[1], UVA(numbers[2]))
    ram.remove(GPA(0), 4 * PAGE, HIGH)
    with pytest.raises(AccessError):
        ram.read(GPA(0), 1)
    assert isinstance(ram.gpa_of(HIGH, 1), Miss)
    assert ram.read(GPA(8 * PAGE), 1) == b"\0"
    ram.add(GPA(0), PAGE, HIGH, 0, fd)
    assert ram.gpa_of(HIGH, 1) == [Span(GPA(0), 1)]


def test_watchers_hear_of_it_while_the_memory_is_there(ram: RegionRam) -> None:
    heard: list[int] = []
    ram.watch(lambda: heard.append(len(ram.blocks)))
    ram.remove(GPA(0), 4 * PAGE, HIGH)
    ram.clear()
    ram.clear()
    assert heard == [1, 0], "once for each time that something went"


def test_nothing_stays_mapped_or_open() -> None:
    before = (descriptors(), maps())
    fd = os.memfd_create("regions-gone")
    os.ftruncate(fd, PAGE)
    ram = RegionRam()
    ram.add(GPA(0), PAGE, UVA(0), 0, fd)
    os.close(fd)
    ram.write(GPA(0), b"x")
    assert maps() == before[1] + 1
    ram.clear()
    assert (descriptors(), maps()) == before


def maps() -> int:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        return file.read().count("regions-gone")
