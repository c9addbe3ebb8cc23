# SPDX-License-Identifier: Apache-2.0
"""Mistakes about INVALIDATE."""

from __future__ import annotations

from collections.abc import Callable

from mutant_kit import in_words, mutant, patch
from virtiova.addr import PAGE_SIZE, UVA, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

Invalidate = Callable[[Iotlb, int, int], int]
_WORD = 1 << 64


def _instead(change: Callable[[Invalidate, Iotlb, int, int], int]) -> None:
    """What becomes of an INVALIDATE."""
    in_words()
    patch(Iotlb, "invalidate", lambda made: lambda self, iova, size: change(made, self, iova, size))


@mutant("invalidate")
def acknowledges_and_forgets_nothing() -> None:
    """It is answered, and that is all."""
    _instead(lambda made, self, iova, size: 0)


@mutant("invalidate-then-new")
def keeps_the_first_address() -> None:
    """An entry is closed, and opened again by the next UPDATE."""
    in_words()
    first: dict[int, UVA] = {}

    def update(made: Callable[[Iotlb, int, int, UVA, Access], None]) -> Callable[..., None]:
        return lambda self, iova, size, uva, access: made(self, iova, size, first.setdefault(iova, uva), access)

    patch(Iotlb, "update", update)


@mutant("invalidate-part")
def looks_for_an_exact_match() -> None:
    """An entry goes if the range is its own."""

    def exact(made: Invalidate, self: Iotlb, iova: int, size: int) -> int:
        entry = self._map.find(iova)
        return made(self, iova, size) if entry is not None and entry.end <= iova + size else 0

    _instead(exact)


@mutant("invalidate-more")
def stops_at_the_first() -> None:
    """One entry for one message."""

    def first(made: Invalidate, self: Iotlb, iova: int, size: int) -> int:
        entry = next((each for each in self._map if each.end > iova), None)
        return 0 if entry is None or entry.start >= iova + size else made(self, entry.start, PAGE_SIZE)

    _instead(first)


@mutant("invalidate-everything")
def takes_the_size_for_signed() -> None:
    """A size with the top bit set is less than none."""
    _instead(lambda made, self, iova, size: made(self, iova, size) if size < _WORD // 2 else 0)


@mutant("invalidate-as-qemu")
def adds_in_64_bits() -> None:
    """The end of a range that ends at the top is 0, and nothing is before it."""
    _instead(lambda made, self, iova, size: made(self, iova, size) if iova < (iova + size) % _WORD else 0)


@mutant("invalidate-unknown")
def refuses_what_it_does_not_know() -> None:
    """There is no such entry: that must be an error."""

    def known(made: Invalidate, self: Iotlb, iova: int, size: int) -> int:
        if not any(each.start < iova + size and iova < each.end for each in self._map):
            raise ProtocolError("no such entry")
        return made(self, iova, size)

    _instead(known)


@mutant("invalidate-rubbish")
def reads_what_nobody_wrote() -> None:
    """Permission and user address are judged in every message."""
    in_words()

    def decode(made: Callable[[bytes], IotlbMessage]) -> Callable[[bytes], IotlbMessage]:
        def decoding(payload: bytes) -> IotlbMessage:
            if payload[24] > Access.RW.value:
                raise ProtocolError("no such permission")
            message = made(payload)
            assert message.kind in IotlbKind
            return message

        return decoding

    patch(IotlbMessage, "decode", decode)
