# SPDX-License-Identifier: Apache-2.0
"""Mistakes about rings: where their parts are, over which pages they lie, and when they are looked for again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import in_python, in_words, mutant, patch
from virtiova.addr import GPA, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace, Miss, Span
from virtiova.dma.wrong import stale
from virtiova.errors import AccessError
from virtiova.ring.split_device import SplitDevice
from virtiova.serve import rings
from virtiova.serve.rings import Ring


class Replaced(MediatedSpace):
    """A space whose look-up is done by somebody else, who is given the honest one."""

    def __init__(self, host: Any, lookup: Callable[..., Sequence[Span] | Miss]) -> None:
        super().__init__(host.ram, host.iotlb)
        self.lookup = lookup

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        return self.lookup(super().translate, address, length, access)

    def _one(self, address: int, size: int, access: Access) -> Any:
        found = self.translate(address, size, access)
        if isinstance(found, Miss):
            raise found.error()
        return found[0].gpa


def looking_up(lookup: Callable[..., Sequence[Span] | Miss]) -> None:
    """All addresses of devices are looked up by ``lookup``."""
    in_python(lambda host: Replaced(host, lookup))


def rings_over(space: Callable[[Any, Sequence[int]], AddressSpace]) -> None:
    """Rings are over another space than the one that they are looked for in; made of the connection's platform, and
    of the addresses of their parts."""
    in_python()

    def make(made: Callable[..., Any]) -> Callable[..., Any]:
        def remade(self: Ring, where: Sequence[int], platform: Any) -> Any:
            end = made(self, where, platform)
            end._space = space(platform, where)
            return end

        return remade

    patch(Ring, "_make", make)


def found_once() -> None:
    """A ring is looked for when it starts, and never again."""
    patch(
        Ring,
        "_find",
        lambda find: lambda self, platform: self._end if self._end is not None else find(self, platform),
    )


@mutant("ring-iova")
def used_ring_at_the_bare_address() -> None:
    """It reads the ring through the IOTLB, and writes what it has used around it."""
    in_python()

    def around(push: Callable[..., None]) -> Callable[..., None]:
        def pushed(self: Any, chains: Any) -> None:
            space = self._space
            self._space = FlatSpace(space._ram)
            try:
                push(self, chains)
            finally:
                self._space = space

        return pushed

    patch(SplitDevice, "push_all", around)


@mutant("ring-user-address")
def ring_addresses_as_they_are() -> None:
    """It takes ring addresses for guest-physical ones when bit 33 is left alone."""
    patch(
        rings, "ring_parts", lambda made: lambda address, size, ram, *, packed: made(address, size, None, packed=packed)
    )


@mutant("ring-many-pages")
def first_page_and_on() -> None:
    """It translates where a part begins, and counts on from there."""

    def counted(platform: Any, where: Sequence[int]) -> AddressSpace:
        def lookup(honest: Any, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
            base = max((at for at in where if at <= address < at + 0x5000), default=None)
            first = None if base is None else honest(base, 1, access)
            if base is None or first is None or isinstance(first, Miss):
                return honest(address, length, access)  # type: ignore[no-any-return]
            return [Span(GPA(first[0].gpa + address - base), length)]

        return Replaced(platform, lookup)

    rings_over(counted)


@mutant("ring-index-wraps")
def indices_compared_as_numbers() -> None:
    """There is more if the index is greater."""
    in_python()

    def look(self: Any) -> bool:
        index = self._space.load16(self._avail + 2, self._order)
        if index > self._next_avail:
            self._seen_avail = index
        return bool(index > self._next_avail)

    patch(SplitDevice, "_look", lambda _: look)


@mutant("ring-alignment")
def wants_the_used_ring_at_eight_bytes() -> None:
    """It rounds the used ring's address down to a multiple of 8, as its elements have 8 bytes."""

    def rounded(made: Callable[..., None]) -> Callable[..., None]:
        def begin(self: Any, space: Any, desc: int, avail: int, used: int, *args: Any, **named: Any) -> None:
            made(self, space, desc, avail, used & ~7, *args, **named)

        return begin

    in_python()
    patch(SplitDevice, "__init__", rounded)


@mutant("used-element-over-pages")
def element_in_one_piece() -> None:
    """It translates where an element begins, and writes all of it there."""

    def lookup(honest: Any, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        if length != 8 or access is not Access.WRITE:
            return honest(address, length, access)  # type: ignore[no-any-return]
        first = honest(address, 1, access)
        return first if isinstance(first, Miss) else [Span(first[0].gpa, length)]

    looking_up(lookup)


@mutant("ring-page-invalidated")
def ring_translated_at_its_start() -> None:
    """It translates a ring when it starts, and does not hear of invalidations."""
    rings_over(lambda platform, _: stale(platform.ram, platform.iotlb))
    found_once()
    patch(
        Ring,
        "rebuild",
        lambda made: lambda self, **named: None if self._end is not None and self.started else made(self, **named),
    )


@mutant("ring-page-moved")
def ring_kept_at_its_old_place() -> None:
    """The same: what it has found it keeps."""
    ring_translated_at_its_start()


@mutant("used-page-late")
def element_dropped() -> None:
    """It serves without looking whether it can say so, and drops what it cannot say."""
    in_python()
    found_once()

    def dropped(push: Callable[..., None]) -> Callable[..., None]:
        def pushed(self: Any, chains: Sequence[Any]) -> None:
            try:
                push(self, chains)
            except AccessError:
                self._next_used = (self._next_used + len(chains)) & 0xFFFF

        return pushed

    patch(SplitDevice, "push_all", dropped)
    for name in ("disable_notify", "enable_notify"):
        patch(SplitDevice, name, lambda _: lambda *args, **named: False)


@mutant("used-ring-read-only")
def permissions_ignored() -> None:
    """Whatever is mapped may be written."""
    in_words()
    patch(
        Iotlb, "update", lambda update: lambda self, iova, size, uva, access: update(self, iova, size, uva, Access.RW)
    )


@mutant("ring-read-only-parts")
def hears_only_of_what_may_be_written() -> None:
    """An entry that may only be read is taken for a refusal."""
    in_words()

    def update(made: Callable[..., None]) -> Callable[..., None]:
        def updating(self: Iotlb, iova: int, size: int, uva: Any, access: Access) -> None:
            if Access.WRITE in access:
                made(self, iova, size, uva, access)

        return updating

    patch(Iotlb, "update", update)
