# SPDX-License-Identifier: Apache-2.0
"""Mistakes about UPDATE."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from mutant_kit import in_words, mutant, patch
from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA, Access
from virtiova.dma.intervals import Interval, IntervalMap
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import Miss, Span
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

Update = Callable[[Iotlb, int, int, UVA, Access], None]


@mutant("update-replaces")
def removes_the_first_entry_only() -> None:
    """New entries go before old ones; an INVALIDATE removes the first that it finds."""
    in_words()
    under: dict[int, tuple[int, UVA, Access]] = {}
    top: dict[int, tuple[int, UVA, Access]] = {}

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            if iova in top:
                under[iova] = top[iova]
            top[iova] = (size, uva, access)
            made(self, iova, size, uva, access)

        return updating

    def invalidate(made: Callable[[Iotlb, int, int], int]) -> Callable[[Iotlb, int, int], int]:
        def invalidating(self: Iotlb, iova: int, size: int) -> int:
            count = made(self, iova, size)
            top.pop(iova, None)
            if iova in under:
                self.update(iova, *under.pop(iova))
            return count

        return invalidating

    patch(Iotlb, "update", update)
    patch(Iotlb, "invalidate", invalidate)


@mutant("update-middle")
def forgets_to_move_the_rest() -> None:
    """The piece behind a cut keeps the address of the whole."""
    in_words()

    def cut(made: Callable[[IntervalMap, int, int], int]) -> Callable[[IntervalMap, int, int], int]:
        def cutting(self: IntervalMap, start: int, end: int) -> int:
            last = self.find(end - 1)
            count = made(self, start, end)
            if last is not None and last.end > end:
                made(self, end, last.end)
                self.put(Interval(end, last.end, last.target, last.allowed))
            return count

        return cutting

    patch(IntervalMap, "cut", cut)


@mutant("update-adds-permission")
def keeps_the_first_permission() -> None:
    """Entries are used again, and only their address is set anew."""
    in_words()
    first: dict[int, Access] = {}

    def update(made: Update) -> Update:
        return lambda self, iova, size, uva, access: made(self, iova, size, uva, first.setdefault(iova, access))

    patch(Iotlb, "update", update)


@mutant("update-takes-permission")
def adds_permission_to_permission() -> None:
    """Entries are used again, and their permission is added to."""
    in_words()
    given: dict[int, Access] = {}

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            given[iova] = given.get(iova, Access.NONE) | access
            made(self, iova, size, uva, given[iova])

        return updating

    patch(Iotlb, "update", update)


@mutant("updates-contradict")
def takes_one_of_each() -> None:
    """An address that is known is kept, and the permission is the newer one."""
    in_words()

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            known = self._map.find(iova)
            made(self, iova, size, uva, access)
            if known is not None and known.start == iova and known.end == iova + size:
                self.map(iova, [Span(GPA(known.target), size)], access)

        return updating

    patch(Iotlb, "update", update)


GpaOf = Callable[[RegionRam, UVA, int], Sequence[Span] | Miss]


def _nearest_below(self: RegionRam, uva: UVA) -> GPA | None:
    below = [home for home in self.homes if home[0] <= uva]
    return GPA(below[-1][2] + (uva - below[-1][0])) if below else None


@mutant("update-outside-memory")
def takes_the_region_below() -> None:
    """It looks for where a region begins, and not for where it ends."""
    in_words()

    def gpa_of(made: GpaOf) -> GpaOf:
        def finding(self: RegionRam, uva: UVA, length: int) -> Sequence[Span] | Miss:
            gpa = _nearest_below(self, uva)
            return made(self, uva, length) if gpa is None else [Span(gpa, length)]

        return finding

    patch(RegionRam, "gpa_of", gpa_of)


@mutant("update-past-region")
def looks_at_the_first_byte() -> None:
    """Where a range begins is in a region: then all of it is."""
    in_words()

    def gpa_of(made: GpaOf) -> GpaOf:
        def finding(self: RegionRam, uva: UVA, length: int) -> Sequence[Span] | Miss:
            found = made(self, uva, 1)
            return found if isinstance(found, Miss) else [Span(found[0].gpa, length)]

        return finding

    patch(RegionRam, "gpa_of", gpa_of)


def _decoded(payload: bytes) -> IotlbMessage:
    """Without a look at the numbers."""
    iova, size, uva, perm, kind = struct.unpack_from("<QQQBB", payload)
    return IotlbMessage(IOVA(iova), size, UVA(uva), Access(perm), IotlbKind(kind))


@mutant("update-wraps")
def goes_around() -> None:
    """What does not fit before the end goes on at the beginning."""
    in_words()
    patch(IotlbMessage, "decode", lambda _: _decoded)

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            room = min(size, (1 << 64) - iova)
            made(self, iova, room, uva, access)
            if size > room:
                made(self, 0, size - room, UVA(uva + room), access)

        return updating

    patch(Iotlb, "update", update)


@mutant("update-empty")
def makes_it_a_page() -> None:
    """Less than a page is a page."""
    in_words()

    def update(made: Update) -> Update:
        return lambda self, iova, size, uva, access: made(self, iova, size or PAGE_SIZE, uva, access)

    patch(Iotlb, "update", update)
