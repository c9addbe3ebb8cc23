# SPDX-License-Identifier: Apache-2.0
"""Address spaces that go by a native table wherever that knows the place, and by Python wherever it does not.

Each is the space that it is made of, but for the clock: the table holds only what that would say. Accesses do not pass
through the RAM then: who has to see every write by its GPA (a log of dirty pages) takes the space without the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from virtiova import _core
from virtiova.addr import Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.ram import ByteOrder, Ram
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace, Miss, Span


class Table(Protocol):
    """Who has a native table: an `Iotlb` of what it was answered, a `RegionRam` of its regions."""

    @property
    def radix(self) -> _core.Radix:
        """The table."""

    def remember(self, address: int, length: int, /) -> None:
        """Put what is known of these bytes into it."""


class TableSpace:
    """``space``, by the native table of ``table`` wherever that knows the place."""

    def __init__(self, space: AddressSpace, table: Table) -> None:
        self._space = space
        self._radix = table.radix
        self._remember = table.remember

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """As ``space`` does."""
        return self._space.translate(address, length, access)

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes at ``address``, 0 to `MAX_ACCESS`; nothing is read if any part misses."""
        data = self._radix.read(address, length)
        if data is None:
            data = self._space.read(address, length)
            self._remember(address, length)
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write ``data``, 0 to `MAX_ACCESS` bytes, at ``address``; nothing is written if any part misses."""
        if not self._radix.write(address, data):
            self._space.write(address, data)
            self._remember(address, len(data))

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        """One acquire load of an aligned 16-bit value."""
        value = self._radix.load16(address, order == "big")
        if value is None:
            value = self._space.load16(address, order)
            self._remember(address, 2)
        return value

    def load_pair(self, address: int) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""
        pair = self._radix.load_pair(address)
        if pair is None:
            pair = self._space.load_pair(address)
            self._remember(address, 16)
        return pair

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 16-bit value."""
        if not self._radix.store16(address, value, order == "big"):
            self._space.store16(address, value, order)
            self._remember(address, 2)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 32-bit value."""
        if not self._radix.store32(address, value, order == "big"):
            self._space.store32(address, value, order)
            self._remember(address, 4)

    def fence(self) -> None:
        """A full fence."""
        _core.fence()


class CachedSpace(TableSpace):
    """What an IOTLB lets through, as `MediatedSpace` (bit 33 accepted)."""

    def __init__(self, ram: Ram, iotlb: Iotlb) -> None:
        super().__init__(MediatedSpace(ram, iotlb), iotlb)


class CachedFlatSpace(TableSpace):
    """All of the RAM of a memory table, as `FlatSpace` (bit 33 clear)."""

    def __init__(self, ram: RegionRam) -> None:
        super().__init__(FlatSpace(ram), ram)
