# SPDX-License-Identifier: Apache-2.0
"""Address spaces: what a device end may touch, with permission. Device code gets only this.

Who translates is decided once, when features are negotiated, and handed to the device as one of
these: `FlatSpace` goes around any IOMMU, `MediatedSpace` asks a `Translator` for every access.

Every access is translated as a whole before its first byte moves. A write that misses anywhere
therefore writes nothing at all, and a read that misses returns nothing: all or nothing, per access.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova.addr import GPA, Access
from virtiova.dma.ram import ByteOrder, Ram, RamBlock
from virtiova.errors import AccessError

MAX_ACCESS: Final = 1 << 26
"""Bytes that one access may move. A descriptor can claim 4 GiB and alias it all to one page."""


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` bytes that the device may touch, at ``gpa`` of RAM."""

    gpa: GPA
    length: int


@dataclass(frozen=True, slots=True)
class Miss:
    """No permission, or no mapping, for ``length`` bytes at ``address``. A miss is data, not an exception."""

    address: int
    length: int
    access: Access
    reason: str

    def error(self) -> AccessError:
        """The miss as an exception, for those who cannot go on without the bytes."""
        verb = "write" if Access.WRITE in self.access else "read"
        return AccessError(self.address, self.length, f"device {verb}: {self.reason}")


class AddressSpace(Protocol):
    """What a device end may touch. `translate` never raises; the others raise `AccessError` on a miss."""

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at ``address``, in order; or the first part that is missing."""

    def read(self, address: int, length: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        """One acquire load."""

    def load_pair(self, address: int) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store."""

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store."""

    def fence(self) -> None:
        """A full fence."""


class BlockRam(Ram, Protocol):
    """RAM that can say, without being touched, which addresses it has."""

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """The blocks, in any order, not overlapping."""


class Translator(Protocol):
    """What stands between a device and RAM: an IOMMU, or a table of a vhost front end's answers."""

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at ``address``, in order; or the first part that is missing.

        Never raises. No span crosses the border of two RAM blocks. ``length`` is at most `MAX_ACCESS`.
        """


def flat_spans(ram: BlockRam, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
    """The spans of ``length`` bytes at guest-physical ``address``: one for each RAM block touched."""
    spans: list[Span] = []
    end = address + length
    while address < end:
        for block in ram.blocks:
            if block.gpa <= address < block.gpa + block.size:
                step = min(end, block.gpa + block.size) - address
                spans.append(Span(GPA(address), step))
                address += step
                break
        else:
            return Miss(address, end - address, access, "no RAM at this guest-physical address")
    return spans


def _too_long(address: int, length: int, access: Access) -> Miss | None:
    if 0 <= length <= MAX_ACCESS:
        return None
    return Miss(address, length, access, f"one access moves 0 to 0x{MAX_ACCESS:x} bytes")


class _Spans:
    """Accesses to RAM through `translate`, which a subclass provides."""

    def __init__(self, ram: Ram) -> None:
        self._ram = ram

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        raise NotImplementedError

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes at ``address``, 0 to `MAX_ACCESS`; nothing is read if any part misses."""
        spans = self.translate(address, length, Access.READ)
        if isinstance(spans, Miss):
            raise spans.error()
        if len(spans) == 1:
            return self._ram.read(spans[0].gpa, length)
        return b"".join([self._ram.read(span.gpa, span.length) for span in spans])

    def write(self, address: int, data: bytes) -> None:
        """Write ``data``, 0 to `MAX_ACCESS` bytes, at ``address``; nothing is written if any part misses."""
        spans = self.translate(address, len(data), Access.WRITE)
        if isinstance(spans, Miss):
            raise spans.error()
        if len(spans) == 1:
            self._ram.write(spans[0].gpa, data)
            return
        done = 0
        for span in spans:
            self._ram.write(span.gpa, data[done : done + span.length])
            done += span.length

    def fence(self) -> None:
        """A full fence."""
        self._ram.fence()


class FlatSpace(_Spans):
    """All of RAM, at its guest-physical addresses: the device goes around any IOMMU (bit 33 clear)."""

    def __init__(self, ram: BlockRam) -> None:
        super().__init__(ram)
        self._blocks = ram

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """The address itself, cut at the borders of RAM blocks; permission is not a question here."""
        return _too_long(address, length, access) or flat_spans(self._blocks, address, length, access)

    # RAM checks range and alignment itself, and an aligned value cannot straddle two of its blocks.

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        """One acquire load of an aligned 16-bit value."""
        return self._ram.load16(GPA(address), order)

    def load_pair(self, address: int) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""
        return self._ram.load_pair(GPA(address))

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 16-bit value."""
        self._ram.store16(GPA(address), value, order)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 32-bit value."""
        self._ram.store32(GPA(address), value, order)


class MediatedSpace(_Spans):
    """What a translator lets through: every access is looked up, with permission (bit 33 accepted)."""

    def __init__(self, ram: Ram, translator: Translator) -> None:
        super().__init__(ram)
        self._translator = translator

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """What the translator says. A look-up is a use: it may fill a cache, or record a fault."""
        return _too_long(address, length, access) or self._translator.lookup(address, length, access)

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        """One acquire load of an aligned 16-bit value."""
        return self._ram.load16(self._one(address, 2, Access.READ), order)

    def load_pair(self, address: int) -> bytes:
        """16 bytes at a 16-byte boundary, each half loaded exactly once."""
        return self._ram.load_pair(self._one(address, 16, Access.READ))

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 16-bit value."""
        self._ram.store16(self._one(address, 2, Access.WRITE), value, order)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        """One release store of an aligned 32-bit value."""
        self._ram.store32(self._one(address, 4, Access.WRITE), value, order)

    def _one(self, address: int, size: int, access: Access) -> GPA:
        """The one place of an aligned value. One in two places could not be accessed as one."""
        if address % size:
            raise AccessError(address, size, f"not aligned to {size} bytes")
        spans = self._translator.lookup(address, size, access)
        if isinstance(spans, Miss):
            raise spans.error()
        if len(spans) != 1:
            raise AccessError(address, size, "straddles two mappings, wanted one")
        return spans[0].gpa
