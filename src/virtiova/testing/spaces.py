# SPDX-License-Identifier: Apache-2.0
"""What `check_address_space` asks for, how an address space of virtiova's becomes that, and the steps of a history."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova.addr import GPA, PAGE_SIZE, Access
from virtiova.dma.space import AddressSpace, BlockRam, Miss, Span, Translator
from virtiova.errors import AccessError
from virtiova.testing.memory import Memory


class Space(Protocol):
    """An address space under test, with the way to fill it: four methods, which anybody's can be given.

    Addresses and sizes are in bytes. A refusal is a returned `Miss` or a raised `AccessError`; both name the first
    byte that is missing.
    """

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        """Map ``size`` bytes at ``iova`` to RAM at ``gpa``, in place of whatever was there."""

    def invalidate(self, iova: int, size: int) -> None:
        """Forget ``size`` bytes at ``iova``, which may be all 2**64: once this returns, nothing of them is used."""

    def read(self, iova: int, length: int) -> bytes | Miss:
        """What the device reads there."""

    def write(self, iova: int, data: bytes) -> Miss | None:
        """The device writes there."""


class Table:
    """A plain translator, for whoever needs one: a dictionary of pieces of ``granule`` bytes. Nothing is cached, and
    nothing is forgotten. Implements ``Translator``."""

    def __init__(self, granule: int = PAGE_SIZE, pieces: Mapping[int, tuple[int, Access]] | None = None) -> None:
        self.granule = granule
        self.pieces = dict(pieces or {})
        """GPA and permission of each piece, by its IOVA."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        """As `Space.update`; ``iova``, ``gpa`` and ``size`` are multiples of the granule."""
        for offset in range(0, size, self.granule):
            self.pieces[iova + offset] = (gpa + offset, access)

    def invalidate(self, iova: int, size: int) -> None:
        """As `Space.invalidate`."""
        end = iova + size
        self.pieces = {at: piece for at, piece in self.pieces.items() if not iova <= at < end}

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """A span for each piece, or the first part that is missing."""
        spans = []
        end = address + length
        while address < end:
            offset = address % self.granule
            gpa, allowed = self.pieces.get(address - offset, (0, Access.NONE))
            if access not in allowed:
                return Miss(address, end - address, access, "not in the table")
            step = min(end - address, self.granule - offset)
            spans.append(Span(GPA(gpa + offset), step))
            address += step
        return spans


class Behind:
    """One of virtiova's address spaces over a `Table`. Implements `Space`; made by `behind`."""

    def __init__(self, space: AddressSpace, table: Table) -> None:
        self.space = space
        """The space itself: its accesses of 2, 4 and 16 bytes and `translate` are checked, too."""
        self.table = table
        self.update: Callable[[int, int, int, Access], None] = table.update
        self.invalidate: Callable[[int, int], None] = table.invalidate

    def read(self, iova: int, length: int) -> bytes:
        """What the device reads there."""
        return self.space.read(iova, length)

    def write(self, iova: int, data: bytes) -> None:
        """The device writes there."""
        self.space.write(iova, data)


def behind(
    make: Callable[[BlockRam, Translator], AddressSpace], granule: int = PAGE_SIZE
) -> Callable[[Memory], Behind]:
    """For `check_address_space`: an ``AddressSpace`` that is made of RAM and a translator, as ``MediatedSpace`` is."""

    def made(memory: Memory) -> Behind:
        table = Table(granule)
        return Behind(make(memory.ram, table), table)

    return made


# -- histories, step by step

_BYTES: Final = random.Random(2).randbytes(1 << 16)


def payload(length: int, number: int = 0) -> bytes:
    """``length`` bytes (at most 2**15) that differ from place to place, and with each ``number``."""
    start = number * 4099 % (1 << 15)
    return _BYTES[start : start + length]


_NAMES: Final = {Access.READ: "READ", Access.WRITE: "WRITE", Access.RW: "RW"}


@dataclass(frozen=True, slots=True)
class Update:
    """`Space.update`."""

    iova: int
    gpa: int
    size: int
    access: Access

    def __str__(self) -> str:
        return f"space.update(0x{self.iova:x}, 0x{self.gpa:x}, 0x{self.size:x}, Access.{_NAMES[self.access]})"


@dataclass(frozen=True, slots=True)
class Invalidate:
    """`Space.invalidate`."""

    iova: int
    size: int

    def __str__(self) -> str:
        return f"space.invalidate(0x{self.iova:x}, 0x{self.size:x})"


@dataclass(frozen=True, slots=True)
class Read:
    """`Space.read`."""

    iova: int
    length: int

    def __str__(self) -> str:
        return f"space.read(0x{self.iova:x}, {self.length})"


@dataclass(frozen=True, slots=True)
class Write:
    """`Space.write` of ``payload(length, number)``."""

    iova: int
    length: int
    number: int

    def __str__(self) -> str:
        return f"space.write(0x{self.iova:x}, payload({self.length}, {self.number}))"


@dataclass(frozen=True, slots=True)
class Sized:
    """One access of ``verb`` (``load16``, ``load_pair``, ``store16``, ``store32``) in a byte order."""

    verb: str
    iova: int
    value: int
    big: bool

    @property
    def length(self) -> int:
        """Bytes."""
        return {"load16": 2, "store16": 2, "store32": 4, "load_pair": 16}[self.verb]

    def __str__(self) -> str:
        value = f", 0x{self.value:x}" if self.verb.startswith("store") else ""
        order = "" if self.verb == "load_pair" else f', "{"big" if self.big else "little"}"'
        return f"space.{self.verb}(0x{self.iova:x}{value}{order})"


@dataclass(frozen=True, slots=True)
class Translate:
    """`AddressSpace.translate`."""

    iova: int
    length: int
    access: Access

    def __str__(self) -> str:
        return f"space.translate(0x{self.iova:x}, {self.length}, Access.{_NAMES[self.access]})"


Step = Update | Invalidate | Read | Write | Sized | Translate
History = Sequence[Step]


@dataclass(frozen=True, slots=True)
class Refusal:
    """That an access was refused; where and for what, as far as that was said."""

    address: int
    access: Access | None = None


def attempt(call: Callable[[], object]) -> object:
    """What a call gives; a `Refusal` if that is what it gives or raises. Other exceptions go through."""
    try:
        given = call()
    except AccessError as error:
        return Refusal(error.address)
    return Refusal(given.address, given.access) if isinstance(given, Miss) else given
