# SPDX-License-Identifier: Apache-2.0
"""Mistakes about what a back end may reach, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mutant_kit import by, in_words, mutant, patch
from virtiova.addr import PAGE_MASK, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss, Span, flat_spans
from virtiova.serve import rings
from virtiova.serve.host import Host
from virtiova.serve.misses import Misses, Want
from virtiova.serve.platform import Platform


@mutant("not-mapped")
def takes_no_for_the_bare_address() -> None:
    """A refused MISS: then the address must be a physical one."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        found = host.iotlb.lookup(address, length, access)
        refused = host.misses is not None and host.misses.refused((address & ~PAGE_MASK, access))
        return flat_spans(host.ram, address, length, access) if isinstance(found, Miss) and refused else found

    by(lookup)


@mutant("read-only-written")
def does_not_look_at_permissions() -> None:
    """What is mapped is mapped."""
    in_words()
    patch(Iotlb, "update", lambda made: lambda self, iova, size, uva, _: made(self, iova, size, uva, Access.RW))


@mutant("read-then-written")
def remembers_where_and_not_what() -> None:
    """A small cache in front of the IOTLB, of pages by their addresses."""
    used: set[int] = set()

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        page = address & ~PAGE_MASK
        found = host.iotlb.lookup(address, length, access)
        if isinstance(found, Miss) and page in used and host.iotlb.knows(page):
            found = host.iotlb.lookup(address, length, Access.READ)
        if not isinstance(found, Miss):
            used.add(page)
        return found

    by(lookup)


@mutant("write-only-read")
def checks_writes_only() -> None:
    """A read does no harm."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        found = host.iotlb.lookup(address, length, access)
        return host.iotlb.lookup(address, length, Access.WRITE) if isinstance(found, Miss) else found

    by(lookup)


@mutant("update-without-permission")
def takes_nothing_for_everything() -> None:
    """Permission 0 is taken for one that was left out."""
    in_words()

    def update(made: Callable[..., None]) -> Callable[..., None]:
        return lambda self, iova, size, uva, access: made(self, iova, size, uva, access or Access.RW)

    patch(Iotlb, "update", update)


@mutant("miss-says-what")
def asks_for_reading_whatever_it_does() -> None:
    """The permission of a MISS is a constant."""

    def ask(made: Callable[..., list[bytes]]) -> Callable[..., list[bytes]]:
        def asking(self: Misses, wants: Iterable[Want], now: float) -> list[bytes]:
            return made(self, [(page, Access.READ) for page, _ in wants], now)

        return asking

    patch(Misses, "ask", ask)


@mutant("chain-misses")
def waits_for_the_first_buffer_to_be_filled() -> None:
    """The buffers of one request are taken to be of one kind: what holds for the first one holds for all."""
    waited: list[tuple[int, int, Access]] = []

    def missing(made: Callable[..., None]) -> Callable[..., None]:
        def first(parts: Iterable[tuple[int, int, Access]], platform: Platform, wants: dict[Want, None]) -> None:
            parts = list(parts)
            written = [part for part in parts if part[2] is Access.WRITE][:1]
            waited[:] = [part for part in parts if part[2] is not Access.WRITE] + written
            made(waited, platform, wants)

        return first

    patch(rings, "missing", missing)

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        found = host.iotlb.lookup(address, length, access)
        known = any(part[0] == address for part in waited)
        return flat_spans(host.ram, address, length, access) if isinstance(found, Miss) and not known else found

    by(lookup)


@mutant("second-page-unmapped")
def translates_the_start_of_a_buffer() -> None:
    """Where the first byte is, there the others are as well."""

    def lookup(host: Host, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        found: Any = host.iotlb.lookup(address, 1, access)
        return found if isinstance(found, Miss) else (Span(found[0].gpa, length),)

    by(lookup)
