# SPDX-License-Identifier: Apache-2.0
"""Mistakes about the answer to a MISS."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mutant_kit import by, in_words, mutant, patch
from mutants_sizes import rounds_to_pages
from virtiova.addr import PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import Miss, Span, flat_spans
from virtiova.errors import ProtocolError
from virtiova.serve import loop, misses
from virtiova.serve.host import Host
from virtiova.serve.misses import Misses, Want
from virtiova.serve.platform import Platform
from virtiova.serve.rings import Ring

Found = Sequence[Span] | Miss
Update = Callable[[Iotlb, int, int, UVA, Access], None]
TWO = "serve blk {image} --num-queues 2 --io python --sandbox off --socket-path {socket}"

_ASKED: list[int] = []
"""Pages that were asked for, oldest first."""


def _asking(made: Callable[..., list[bytes]]) -> Callable[..., list[bytes]]:
    """`Misses.ask` that notes the pages."""

    def ask(self: Misses, wants: Iterable[Want], now: float) -> list[bytes]:
        wants = list(wants)
        _ASKED.extend(page for page, _ in wants if page not in _ASKED)
        return made(self, wants, now)

    return ask


@mutant("miss-late")
def gives_up_after_a_moment() -> None:
    """An answer is there within 20 ms, or there is none."""
    misses.ANSWER_SECONDS = 0.02  # type: ignore[misc]


@mutant("miss-out-of-order")
def takes_each_answer_for_the_oldest_question() -> None:
    """The address in an UPDATE is not looked at."""
    in_words()
    patch(Misses, "ask", _asking)

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            made(self, _ASKED.pop(0) if _ASKED else iova, size, uva, access)

        return updating

    patch(Iotlb, "update", update)


@mutant("miss-answered-twice")
def refuses_what_it_knows() -> None:
    """There is such an entry already: that must be an error."""
    in_words()

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            if self.knows(iova):
                raise ProtocolError("there is such an entry already")
            made(self, iova, size, uva, access)

        return updating

    patch(Iotlb, "update", update)


@mutant("miss-refused")
def goes_around_a_refusal() -> None:
    """What the front end does not translate is taken as it is."""
    bad: set[Want] = set()

    def refuse(made: Callable[..., None]) -> Callable[..., None]:
        def refusing(self: Misses, wants: Iterable[Want]) -> None:
            bad.update(wants)
            made(self, list(wants))

        return refusing

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        if (address & ~PAGE_MASK, access) in bad:
            return flat_spans(host.ram, address, length, access)
        return host.iotlb.lookup(address, length, access)

    by(lookup)
    patch(Misses, "refuse", refuse)


def _never_again() -> None:
    """Pages that were refused once are refused for ever."""
    bad: set[Want] = set()

    def refuse(made: Callable[..., None]) -> Callable[..., None]:
        def refusing(self: Misses, wants: Iterable[Want]) -> None:
            bad.update(wants)
            made(self, list(wants))

        return refusing

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        if (address & ~PAGE_MASK, access) in bad:
            return Miss(address, length, access, "refused before")
        return host.iotlb.lookup(address, length, access)

    by(lookup)
    patch(Misses, "refuse", refuse)


@mutant("miss-refused-then-mapped")
def remembers_refusals_for_ever() -> None:
    """A list of bad pages, from which none is ever taken."""
    _never_again()


@mutant("miss-update-alone")
def hears_only_the_answer() -> None:
    """A mapping counts only once its question was answered; and that is waited for 20 ms."""
    misses.ANSWER_SECONDS = 0.02  # type: ignore[misc]
    _never_again()
    patch(Misses, "changed", lambda _: lambda self, start, size: None)


@mutant("miss-reply-first")
def takes_the_word_for_the_mapping() -> None:
    """After a success there is no look-up."""
    granted: set[int] = set()

    def receive(made: Callable[..., int]) -> Callable[..., int]:
        def receiving(self: Misses, data: bytes, fds: tuple[int, ...] = ()) -> int:
            before = {want[0] for want in self._asked}
            count = made(self, data, fds)
            granted.update(before - {want[0] for want in self._asked} - {want[0] for want in self._refused})
            return count

        return receiving

    def lookup(host: Host, address: int, length: int, access: Access) -> Found:
        found = host.iotlb.lookup(address, length, access)
        said = (address & ~PAGE_MASK) in granted
        return flat_spans(host.ram, address, length, access) if isinstance(found, Miss) and said else found

    by(lookup)
    patch(Misses, "receive", receive)


@mutant("miss-no-deadlock")
def waits_for_the_answer_where_it_asks() -> None:
    """Ask, and read the answer: the main channel has to wait."""

    def send(made: Callable[[Any], None]) -> Callable[[Any], None]:
        def sending(self: Any) -> None:
            asked = bool(self.host.outbox)
            made(self)
            if asked and self._channel is not None:
                select.select([self._channel], [], [], 4.0)

        return sending

    patch(loop.Connection, "_send", send)


@mutant("miss-other-queue", TWO)
def forgets_a_kick_while_it_waits() -> None:
    """One place where it waits; who is kicked meanwhile, and is not the first queue, is forgotten."""
    waiting: set[Ring] = set()
    forgotten: set[Ring] = set()

    def park(made: Callable[..., None]) -> Callable[..., None]:
        def parking(self: Ring, wants: Iterable[Want], platform: Platform) -> None:
            waiting.add(self)
            made(self, wants, platform)

        return parking

    def again(made: Callable[[Ring], None]) -> Callable[[Ring], None]:
        def looking(self: Ring) -> None:
            waiting.discard(self)
            made(self)

        return looking

    def look(made: Callable[..., int]) -> Callable[..., int]:
        def looking(self: Ring, *args: Any, **named: Any) -> int:
            if waiting - {self} and self.index:
                forgotten.add(self)
            return 0 if self in forgotten else made(self, *args, **named)

        return looking

    patch(Ring, "_park", park)
    patch(Ring, "again", again)
    patch(Ring, "look", look)


@mutant("miss-then-stop")
def goes_on_behind_what_waits() -> None:
    """It says that it goes on behind the request that waits."""

    def stop(made: Callable[[Ring], int]) -> Callable[[Ring], int]:
        def stopping(self: Ring) -> int:
            waiting = int(self.parked)
            self.base = made(self) + waiting
            return self.base

        return stopping

    patch(Ring, "stop", stop)


@mutant("update-larger")
def takes_the_address_for_that_of_the_question() -> None:
    """The user address in an answer is taken for that of the page that was asked for."""
    in_words()
    patch(Misses, "ask", _asking)

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            page = next((page for page in _ASKED if iova < page < iova + size), None)
            if page is None:
                made(self, iova, size, uva, access)
            else:
                made(self, page, PAGE_SIZE, uva, access)

        return updating

    patch(Iotlb, "update", update)


mutant("update-smaller")(rounds_to_pages)


@mutant("update-unasked")
def refuses_what_it_did_not_ask_for() -> None:
    """An answer without a question: that must be an error."""
    in_words()
    patch(Misses, "ask", _asking)

    def update(made: Update) -> Update:
        def updating(self: Iotlb, iova: int, size: int, uva: UVA, access: Access) -> None:
            if iova & ~PAGE_MASK not in _ASKED:
                raise ProtocolError("nobody has asked for that")
            made(self, iova, size, uva, access)

        return updating

    patch(Iotlb, "update", update)
