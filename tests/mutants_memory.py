# SPDX-License-Identifier: Apache-2.0
"""Mistakes about the memory table: which address is which, what is kept of a table that is gone, and where it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import in_python, in_words, mutant, patch
from virtiova.addr import GPA, UVA, Access
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import FlatSpace, Miss, Span
from virtiova.errors import ProtocolError
from virtiova.serve import events
from virtiova.serve.host import Host


def tables_taken_by(change: Callable[[Host, events.MemoryTable], events.MemoryTable | None]) -> None:
    """A memory table is changed before it is taken; None: it is acknowledged, and that is all."""

    def taking(take: Callable[..., None]) -> Callable[..., None]:
        def taken(self: Host, event: Any) -> None:
            changed = change(self, event) if isinstance(event, events.MemoryTable) else event
            if changed is not None:
                take(self, changed)

        return taken

    patch(Host, "_memory", taking)


@mutant("update-user-address")
def user_addresses_taken_for_guest_ones() -> None:
    """It looks up what an update leads to among the guest addresses first."""
    in_words()

    def looking(find: Callable[..., Sequence[Span] | Miss]) -> Callable[..., Sequence[Span] | Miss]:
        def found(self: RegionRam, uva: UVA, length: int) -> Sequence[Span] | Miss:
            for block in self.blocks:
                if block.gpa <= uva and uva + length <= block.gpa + block.size:
                    return [Span(GPA(uva), length)]
            return find(self, uva, length)

        return found

    patch(RegionRam, "gpa_of", looking)


@mutant("region-offsets")
def one_mapping_a_file() -> None:
    """All regions of a table begin where the first one's file does."""
    patch(
        RegionRam,
        "add",
        lambda add: lambda self, gpa, size, uva, offset, fd: add(self, gpa, size, uva, 0, fd),
    )


@mutant("eight-regions")
def four_regions_at_most() -> None:
    """It has room for four regions, and leaves the others out."""

    def four(_: Host, event: events.MemoryTable) -> events.MemoryTable:
        return events.MemoryTable(event.token, event.regions[:4], event.fds[:4])

    tables_taken_by(four)


@mutant("user-address-border")
def end_taken_for_a_part() -> None:
    """A region holds the address behind its last byte, too: the first region that does is taken."""
    in_words()

    def looking(find: Callable[..., Sequence[Span] | Miss]) -> Callable[..., Sequence[Span] | Miss]:
        def found(self: Any, uva: UVA, length: int) -> Sequence[Span] | Miss:
            for region in self._by_uva:
                if uva == region.uva + region.size:
                    return [Span(GPA(region.end - length), length)]
            return find(self, uva, length)

        return found

    patch(RegionRam, "gpa_of", looking)


@mutant("memory-table-again")
def what_is_there_is_left_out() -> None:
    """What was in a table before is not added once more, and all of that one is taken away."""
    known: set[int] = set()

    def fresh(_: Host, event: events.MemoryTable) -> events.MemoryTable:
        kept = [each for each in zip(event.regions, event.fds, strict=True) if each[0].gpa not in known]
        known.update(region.gpa for region, _ in kept)
        return events.MemoryTable(event.token, tuple(region for region, _ in kept), tuple(fd for _, fd in kept))

    tables_taken_by(fresh)


@mutant("memory-table-moved")
def first_table_for_ever() -> None:
    """Only the first table counts."""
    tables_taken_by(lambda self, event: None if self.ram.blocks else event)


def _kept() -> None:
    """What is in no table any more stays mapped, and translations that lead there stay."""
    add = RegionRam.add

    def added(self: RegionRam, *args: Any) -> None:
        # It may be there already.
        with contextlib.suppress(ProtocolError):
            add(self, *args)

    patch(RegionRam, "add", lambda _: added)
    patch(RegionRam, "clear", lambda _: lambda self: None)
    patch(RegionRam, "remove", lambda _: lambda self, *args: None)
    patch(Host, "forget_translations", lambda _: lambda self: self.rounds.again())


@mutant("region-gone")
def regions_kept() -> None:
    """A table adds what is new in it, and takes nothing away."""
    _kept()


@mutant("region-removed")
def removal_acknowledged() -> None:
    """REM_MEM_REG is acknowledged, and that is all."""
    _kept()


@mutant("region-added")
def added_region_instead() -> None:
    """A region that is added stands for the whole table."""

    def taking(take: Callable[..., None]) -> Callable[..., None]:
        def taken(self: Host, event: Any) -> None:
            if isinstance(event, events.RegionAdded) and event.region.gpa == 0:
                self.ram.clear()
            take(self, event)

        return taken

    patch(Host, "_memory", taking)


@mutant("outside-regions")
def pointers_computed() -> None:
    """An address that no region holds is counted from the first one on."""
    in_python()

    def looking(find: Callable[..., Sequence[Span] | Miss]) -> Callable[..., Sequence[Span] | Miss]:
        def found(self: Any, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
            spans = find(self, address, length, access)
            if isinstance(spans, Miss):
                return [Span(GPA(self._ram.blocks[0].gpa + address % self._ram.blocks[0].size // 4096 * 4096), length)]
            return spans

        return found

    patch(FlatSpace, "translate", looking)


@mutant("buffer-over-regions")
def clipped_at_the_border() -> None:
    """What goes past the end of a region is left out."""
    in_python()

    def looking(find: Callable[..., Sequence[Span] | Miss]) -> Callable[..., Sequence[Span] | Miss]:
        return lambda self, address, length, access: _first(find(self, address, length, access))

    patch(FlatSpace, "translate", looking)
    patch(
        FlatSpace,
        "write",
        lambda _: (
            lambda self, address, data: [
                self._ram.write(span.gpa, data[: span.length])
                for span in _spans(self.translate(address, len(data), Access.WRITE))
            ]
        ),
    )


def _first(found: Sequence[Span] | Miss) -> Sequence[Span] | Miss:
    return found if isinstance(found, Miss) else found[:1]


def _spans(found: Sequence[Span] | Miss) -> Sequence[Span]:
    return () if isinstance(found, Miss) else found
