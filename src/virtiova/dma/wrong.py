# SPDX-License-Identifier: Apache-2.0
"""Address spaces that are wrong on purpose, for testing whoever has to notice. The device behind them is the same.

A host gives a device that took bit 33 one of `SPACES`, made from all of RAM and from what should stand in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from virtiova.addr import GPA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.space import AddressSpace, BlockRam, FlatSpace, MediatedSpace, Miss, Span, Translator

MAX_PAGES: Final = 1 << 16
"""Pages that `StaleTranslator` keeps; then it starts all over again. 256 MiB: more than any test uses."""

SpaceMaker = Callable[[BlockRam, Translator], AddressSpace]
"""From RAM and the translator in front of it to what the device gets."""


def honest(ram: BlockRam, translator: Translator) -> AddressSpace:
    """Every access is looked up: what bit 33 promises."""
    return MediatedSpace(ram, translator)


def leaky(ram: BlockRam, translator: Translator) -> AddressSpace:
    """The bare address is used as it is, although bit 33 was accepted: data, rings and tables go around."""
    return FlatSpace(ram)


def stale(ram: BlockRam, translator: Translator) -> AddressSpace:
    """Whatever was translated once stays: invalidations are not heard."""
    return MediatedSpace(ram, StaleTranslator(ram, translator))


SPACES: Final[dict[str, SpaceMaker]] = {"honest": honest, "leaky": leaky, "stale": stale}


class StaleTranslator:
    """A translator that asks another one once for each page and kind of access, and never again.

    What it keeps are places in RAM. One that is not RAM any more (a region was taken away) is asked for again, so
    that nothing outside of the memory that its host has is touched.
    """

    def __init__(self, ram: BlockRam, translator: Translator) -> None:
        self._ram = ram
        self._translator = translator
        self._kept: dict[tuple[int, int], GPA] = {}

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """One span for each page, from the private cache as far as that goes; or the other one's first miss."""
        spans: list[Span] = []
        end = address + length
        while address < end:
            offset = address & PAGE_MASK
            step = min(end - address, PAGE_SIZE - offset)
            gpa = self._page(address - offset, access)
            if gpa is None:
                found = self._translator.lookup(address, step, access)
                if isinstance(found, Miss):
                    return Miss(address, end - address, access, found.reason)
                spans += found
                self._keep(address, found, access)
            else:
                spans.append(Span(GPA(gpa + offset), step))
            address += step
        return spans

    def _page(self, page: int, access: Access) -> GPA | None:
        gpa = self._kept.get((page, access.value))
        if gpa is None or any(b.gpa <= gpa and gpa + PAGE_SIZE <= b.gpa + b.size for b in self._ram.blocks):
            return gpa
        del self._kept[page, access.value]
        return None

    def _keep(self, address: int, spans: Sequence[Span], access: Access) -> None:
        """Keep the page of an answer, if that page is whole: in one piece, and aligned as its address is."""
        offset = address & PAGE_MASK
        if len(spans) != 1 or (spans[0].gpa & PAGE_MASK) != offset:
            return
        if len(self._kept) >= MAX_PAGES:
            self._kept.clear()
        self._kept[address - offset, access.value] = GPA(spans[0].gpa - offset)
