# SPDX-License-Identifier: Apache-2.0
"""Mistakes about packed rings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import in_python, mutant, patch
from mutants_rings import Replaced, found_once, rings_over
from virtiova.addr import GPA, Access
from virtiova.dma.space import FlatSpace, Miss, Span
from virtiova.dma.wrong import stale
from virtiova.ring.layout import DESC_SIZE, EVENT_DISABLE, PackedLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.serve import ends
from virtiova.serve.rings import Ring


def around(name: str) -> None:
    """What `PackedDevice` does under that name it does around the IOMMU."""
    in_python()

    def made(do: Callable[..., Any]) -> Callable[..., Any]:
        def done(self: Any, *args: Any, **named: Any) -> Any:
            space = self._space
            self._space = FlatSpace(space._ram)
            try:
                return do(self, *args, **named)
            finally:
                self._space = space

        return done

    patch(PackedDevice, name, made)


@mutant("packed-iova")
def wishes_at_the_bare_address() -> None:
    """It translates the ring, and reads the driver's wishes around the IOMMU."""
    around("needs_interrupt")


@mutant("packed-wrap")
def one_counter_for_ever() -> None:
    """The wrap counter stays as it was in the first round, and in the second."""
    in_python()

    class Lap(PackedLayout):
        __slots__ = ()

        def wrap(self, place: int) -> bool:
            return place // self.size % 4 in (0, 3)

    patch(ends, "PackedLayout", lambda _: Lap)


@mutant("packed-odd-size")
def powers_of_two_only() -> None:
    """It takes the index by a mask."""
    in_python()

    class Masked(PackedLayout):
        __slots__ = ()

        def entry(self, place: int) -> int:
            return DESC_SIZE * (place & (1 << (self.size - 1).bit_length()) - 1)

    patch(ends, "PackedLayout", lambda _: Masked)


@mutant("packed-many-pages")
def first_page_and_on() -> None:
    """It translates where the ring begins, and counts on from there."""

    def counted(platform: Any, where: Sequence[int]) -> Any:
        def lookup(honest: Any, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
            first = honest(where[0], 1, access)
            if isinstance(first, Miss) or not where[0] <= address < where[0] + 0x2580:
                return honest(address, length, access)  # type: ignore[no-any-return]
            return [Span(GPA(first[0].gpa + address - where[0]), length)]

        return Replaced(platform, lookup)

    rings_over(counted)


@mutant("packed-page-invalidated")
def found_at_its_start() -> None:
    """It translates a ring when it starts, and does not hear of invalidations."""
    rings_over(lambda platform, _: stale(platform.ram, platform.iotlb))
    found_once()
    patch(
        Ring,
        "rebuild",
        lambda made: lambda self, **named: None if self._end is not None and self.started else made(self, **named),
    )


@mutant("packed-interrupt-flag")
def wish_seen_once() -> None:
    """Once interrupts were turned off it tells of nothing any more."""
    in_python()
    quiet: set[int] = set()

    def asked(made: Callable[..., bool]) -> Callable[..., bool]:
        def wanted(self: Any) -> bool:
            if self._space.load16(self._driver + 2) == EVENT_DISABLE:
                quiet.add(id(self))
            return made(self) and id(self) not in quiet

        return wanted

    patch(PackedDevice, "needs_interrupt", asked)


@mutant("packed-indirect")
def table_at_the_bare_address() -> None:
    """It reads tables around the IOMMU."""
    around("_gather_table")
