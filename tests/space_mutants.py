# SPDX-License-Identifier: Apache-2.0
"""Address spaces with one mistake each, and the check that is made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from virtiova.addr import PAGE_SIZE, Access
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace, MediatedSpace, Miss, Span
from virtiova.dma.wrong import SPACES
from virtiova.testing import Behind, Memory, Space, Table, behind

END: Final = 1 << 64


class Mine:
    """An honest one, written as somebody would who has none of ours: pages in a dictionary, over a buffer."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pages: dict[int, tuple[int, Access]] = {}

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        for offset in range(0, size, PAGE_SIZE):
            self.pages[iova + offset] = (gpa + offset, access)

    def invalidate(self, iova: int, size: int) -> None:
        for page in [page for page in self.pages if iova <= page < iova + size]:
            del self.pages[page]

    def find(self, iova: int, access: Access) -> int | None:
        """The guest-physical address."""
        gpa, allowed = self.pages.get(iova & -PAGE_SIZE, (0, Access.NONE))
        return gpa + iova % PAGE_SIZE if access in allowed else None

    def walk(self, iova: int, length: int, access: Access) -> Iterator[tuple[int, int] | Miss]:
        """Places in the buffer, and lengths; the first that is missing ends it."""
        while length > 0:
            gpa = self.find(iova, access)
            if gpa is None:
                yield Miss(iova, length, access, "no")
                return
            step = min(length, PAGE_SIZE - iova % PAGE_SIZE)
            yield self.memory.place(gpa), step
            iova, length = iova + step, length - step

    def places(self, iova: int, length: int, access: Access) -> list[tuple[int, int]] | Miss:
        found: list[tuple[int, int]] = []
        for each in self.walk(iova, length, access):
            if isinstance(each, Miss):
                return each
            found.append(each)
        return found

    def read(self, iova: int, length: int) -> bytes | Miss:
        places = self.places(iova, length, Access.READ)
        if isinstance(places, Miss):
            return places
        return b"".join(bytes(self.memory.buffer[at : at + size]) for at, size in places)

    def write(self, iova: int, data: bytes) -> Miss | None:
        places = self.places(iova, len(data), Access.WRITE)
        if isinstance(places, Miss):
            return places
        for at, size in places:
            self.memory.buffer[at : at + size], data = data[:size], data[size:]
        return None


class Padded(Mine):
    """Writes whole words."""

    def write(self, iova: int, data: bytes) -> Miss | None:
        missed = super().write(iova, data)
        if missed is None and len(data) % 4:
            at = self.memory.place(self.find(iova + len(data) - 1, Access.WRITE) or 0) + 1
            self.memory.buffer[at : at + 4 - len(data) % 4] = bytes(4 - len(data) % 4)
        return missed


class Anyhow(Mine):
    """Whatever is mapped may be written."""

    def find(self, iova: int, access: Access) -> int | None:
        return super().find(iova, Access.READ) or super().find(iova, access)


class FirstCounts(Mine):
    """Permission is asked for where the access begins."""

    def places(self, iova: int, length: int, access: Access) -> list[tuple[int, int]] | Miss:
        if length and self.find(iova, access) is None:
            return Miss(iova, length, access, "no")
        given = {page: (gpa, Access.RW) for page, (gpa, _) in self.pages.items()}
        kept, self.pages = self.pages, given
        found = super().places(iova, length, access)
        self.pages = kept
        return found


class DeafToPermission(Mine):
    """An update that changes permission alone is taken for one that says nothing new."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        if self.pages.get(iova, (None, access))[0] != gpa:
            super().update(iova, gpa, size, access)


class Joined(Mine):
    """What is adjacent in IOVAs is taken for adjacent memory."""

    def places(self, iova: int, length: int, access: Access) -> list[tuple[int, int]] | Miss:
        found = super().places(iova, length, access)
        return [(found[0][0], length)] if isinstance(found, list) and found else found


class OneBlock(Mine):
    """Where an update begins in the buffer decides for all of it."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        super().update(iova, gpa, size, access)
        for offset in range(0, size, PAGE_SIZE):
            self.pages[iova + offset] = (gpa, access)
        self.starts = getattr(self, "starts", {}) | {
            iova + offset: self.memory.place(gpa) + offset for offset in range(0, size, PAGE_SIZE)
        }

    def walk(self, iova: int, length: int, access: Access) -> Iterator[tuple[int, int] | Miss]:
        for each in super().walk(iova, length, access):
            if isinstance(each, Miss):
                yield each
                return
            yield self.starts[iova & -PAGE_SIZE] + iova % PAGE_SIZE, each[1]
            iova += each[1]


class ByMemory(Mine):
    """An invalidation takes away whatever leads to that memory."""

    def invalidate(self, iova: int, size: int) -> None:
        gone = {gpa for page, (gpa, _) in self.pages.items() if iova <= page < iova + size}
        self.pages = {page: each for page, each in self.pages.items() if each[0] not in gone}


class FirstStays(Mine):
    """An update fills in only what is not there yet."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        kept = dict(self.pages)
        super().update(iova, gpa, size, access)
        self.pages |= kept


class Whole(Mine):
    """Mappings are known by where they begin, and go as a whole: by an update over them, too."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.sizes: dict[int, int] = {}

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        self.invalidate(iova, size)
        super().update(iova, gpa, size, access)
        self.sizes[iova] = size

    def invalidate(self, iova: int, size: int) -> None:
        for start, length in list(self.sizes.items()):
            if start < iova + size and iova < start + length:
                super().invalidate(start, self.sizes.pop(start))


class Exact(Mine):
    """An invalidation is heard if it is of what an update was of."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.known: set[tuple[int, int]] = {(0, END)}

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        super().update(iova, gpa, size, access)
        self.known.add((iova, size))

    def invalidate(self, iova: int, size: int) -> None:
        if (iova, size) in self.known or size >= END >> 1:
            super().invalidate(iova, size)


class Truncated(Mine):
    """2**64 is 0 in 64 bits."""

    def invalidate(self, iova: int, size: int) -> None:
        super().invalidate(iova, size % END)


class NotTheLast(Mine):
    """A mapping has to end before the end of the space, as its end is a number of 64 bits."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        if (iova + size) % END:
            super().update(iova, gpa, size, access)


class Wrapping(Mine):
    """Addresses are numbers of 64 bits."""

    def find(self, iova: int, access: Access) -> int | None:
        return super().find(iova % END, access)


class FromTheStart(Mine):
    """A refusal names where the access begins."""

    def places(self, iova: int, length: int, access: Access) -> list[tuple[int, int]] | Miss:
        found = super().places(iova, length, access)
        return Miss(iova, length, access, "no") if isinstance(found, Miss) else found


class ForReading(Mine):
    """A refusal always asks for permission to read."""

    def write(self, iova: int, data: bytes) -> Miss | None:
        missed = super().write(iova, data)
        return missed and Miss(missed.address, missed.length, Access.READ, "no")


class AsFarAsItGoes(Mine):
    """A write moves bytes until it misses."""

    def write(self, iova: int, data: bytes) -> Miss | None:
        for each in self.walk(iova, len(data), Access.WRITE):
            if isinstance(each, Miss):
                return each
            at, size = each
            self.memory.buffer[at : at + size], data = data[:size], data[size:]
        return None


class LooksAnyway(Mine):
    """An access of no bytes needs a mapping."""

    def places(self, iova: int, length: int, access: Access) -> list[tuple[int, int]] | Miss:
        return super().places(iova, max(length, 1), access) if not length else super().places(iova, length, access)


class Clipped(Mine):
    """A read gives what there is."""

    def read(self, iova: int, length: int) -> bytes | Miss:
        places = [each for each in self.walk(iova, length, Access.READ) if not isinstance(each, Miss)]
        if length < 1 << 20 or not places:
            return super().read(iova, length)
        return b"".join(bytes(self.memory.buffer[at : at + size]) for at, size in places)


class Raises(Mine):
    """Not found is a KeyError."""

    def find(self, iova: int, access: Access) -> int | None:
        self.pages[iova & -PAGE_SIZE]
        return super().find(iova, access)


class Four(Mine):
    """There is room for four pages; what is one too many is lost."""

    def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
        super().update(iova, gpa, size, access)
        self.pages = dict(list(self.pages.items())[:4])


class Unaligned(MediatedSpace):
    """Loads 16 bits wherever."""

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        return int.from_bytes(self.read(address, 2), order)


class Little(MediatedSpace):
    """Stores in one byte order."""

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        super().store32(address, value, "little")


class LooksOnly(MediatedSpace):
    """A look-up asks for permission to read."""

    def translate(self, address: int, length: int, access: Access) -> list[Span] | Miss:
        found = super().translate(address, length, Access.READ)
        return found if isinstance(found, Miss) else list(found)


class Shifted:
    """A space of ours with a mistake of one byte in a long read."""

    def __init__(self, inner: AddressSpace) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def read(self, address: int, length: int) -> bytes:
        data = self.inner.read(address, length)
        return data if length < 64 else data[1:] + data[:1]


def shifted(memory: Memory) -> Behind:
    table = Table()
    return Behind(Shifted(MediatedSpace(memory.ram, table)), table)  # type: ignore[arg-type]


class Flickers(Mine):
    """Does something else each time."""

    calls = 0

    def read(self, iova: int, length: int) -> bytes | Miss:
        Flickers.calls += 1
        found = super().read(iova, length)
        return bytes(length) if Flickers.calls % 7 == 0 else found


MUTANTS: Final[list[tuple[str, Callable[[Memory], Space], str]]] = [
    ("padded", Padded, "moves"),
    ("shifted", shifted, "moves"),
    ("leaky", behind(SPACES["leaky"]), "unmapped"),
    ("anyhow", Anyhow, "permission"),
    ("first counts", FirstCounts, "mixed"),
    ("deaf to permission", DeafToPermission, "upgrade"),
    ("joined", Joined, "neighbours"),
    ("one block", OneBlock, "blocks"),
    ("by memory", ByMemory, "aliases"),
    ("first stays", FirstStays, "replaces"),
    ("whole", Whole, "replaces"),
    ("stale", behind(SPACES["stale"]), "invalidate"),
    ("exact", Exact, "invalidate"),
    ("whole", Whole, "invalidate"),
    ("truncated", Truncated, "invalidate-all"),
    ("not the last", NotTheLast, "top"),
    ("wrapping", Wrapping, "wrap"),
    ("from the start", FromTheStart, "miss"),
    ("for reading", ForReading, "miss"),
    ("as far as it goes", AsFarAsItGoes, "all-or-nothing"),
    ("looks anyway", LooksAnyway, "nothing"),
    ("clipped", Clipped, "bounded"),
    ("raises", Raises, "unmapped"),
    ("unaligned", behind(Unaligned), "sized"),
    ("little", behind(Little), "sized"),
    ("looks only", behind(LooksOnly), "translate"),
    ("four", Four, "any-history"),
]
"""Name, how it is made, and the check that has to find it."""
