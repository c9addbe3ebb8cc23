# SPDX-License-Identifier: Apache-2.0
"""Mistakes about how far a mapping goes, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mutant_kit import by, in_words, mutant, patch
from virtiova.addr import GPA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss, Span
from virtiova.serve.host import Host

Found = Sequence[Span] | Miss


@mutant("neighbours-apart")
def joins_by_address() -> None:
    """Entries that touch are one; its user address is that of the first."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        found = host.iotlb.lookup(address, length, access)
        return found if isinstance(found, Miss) or not found else (Span(found[0].gpa, length),)

    by(lookup)


@mutant("neighbours-in-two-regions")
def joins_by_guest_address() -> None:
    """Entries that touch, and whose memory touches as the guest sees it, are one."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        found = host.iotlb.lookup(address, length, access)
        if isinstance(found, Miss) or len(found) != 2 or found[0].gpa + found[0].length != found[1].gpa:
            return found
        return (Span(found[0].gpa, length),)

    by(lookup)


def _within(mask: int) -> None:
    """Only the low bits of an address say where in its mapping it is."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        found = host.iotlb.lookup(address, length, access)
        entry = host.iotlb._map.find(address)
        if isinstance(found, Miss) or entry is None:
            return found
        return (Span(GPA(entry.target + ((address - entry.start) & mask)), length),)

    by(lookup)


@mutant("mapping-2mib")
def pages_are_small() -> None:
    """An offset has 12 bits."""
    _within(PAGE_MASK)


@mutant("mapping-1gib")
def pages_are_small_or_large() -> None:
    """An offset has 21 bits."""
    _within((2 << 20) - 1)


@mutant("mapping-odd")
def rounds_to_pages() -> None:
    """An entry is of whole pages, or is made so."""
    in_words()

    def update(
        made: Callable[[Iotlb, int, int, UVA, Access], None],
    ) -> Callable[[Iotlb, int, int, UVA, Access], None]:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            before = iova & PAGE_MASK
            made(self, iova - before, -(-(before + size) // PAGE_SIZE) * PAGE_SIZE, UVA(uva - before), access)

        return updating

    patch(Iotlb, "update", update)


@mutant("mapping-at-the-top")
def compares_with_an_end_that_wraps() -> None:
    """The address behind the last byte, in 64 bits."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        entry = host.iotlb._map.find(address)
        if entry is not None and address >= entry.end % (1 << 64):
            return Miss(address, length, access, "not below its end")
        return host.iotlb.lookup(address, length, access)

    by(lookup)


@mutant("many-mappings")
def has_no_more_room() -> None:
    """A table of fixed size, and what does not fit is left out."""
    in_words()

    def put(made: Callable[..., None]) -> Callable[..., None]:
        def mapping(self: Iotlb, iova: int, spans: Sequence[Span], access: Access) -> None:
            if len(self) < 1024:
                made(self, iova, spans, access)

        return mapping

    patch(Iotlb, "map", put)
