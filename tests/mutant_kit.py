# SPDX-License-Identifier: Apache-2.0
"""Back ends of ours with one planted mistake each, by the conformance case that is to find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from virtiova import _core
from virtiova.addr import Access
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace, Miss, Span
from virtiova.serve import loop
from virtiova.serve.host import Host
from virtiova.serve.session import Offer, Session

DISK = "serve blk {image} --io python --sandbox off --socket-path {socket}"
"""The usual back end: a disk, of which each request goes through the device class."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A back end's command, and what plants the mistake in it before it starts."""

    plant: Callable[[], None]
    command: str = DISK
    kind: str = "blk"
    given: Callable[[], None] | None = None
    """What is so with the mistake and without."""


MUTANTS: dict[str, Mutant] = {}
"""By the case that is to find it. A case may have several: ``case/what``."""


def mutant(
    case: str, command: str = DISK, kind: str = "blk", given: Callable[[], None] | None = None
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register what plants a mistake."""

    def register(plant: Callable[[], None]) -> Callable[[], None]:
        assert case not in MUTANTS, case
        MUTANTS[case] = Mutant(plant, command, kind, given)
        return plant

    return register


def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function by one made of it."""
    setattr(owner, name, make(getattr(owner, name)))


def offering(change: Callable[[Offer], Offer]) -> None:
    """Another offer than the device's."""
    patch(loop, "offer_of", lambda made: lambda *args, **named: change(made(*args, **named)))


def in_python(space: Callable[[Host], AddressSpace] | None = None) -> None:
    """No native end: every access goes through a space in Python, which may be a wrong one, made of the host."""

    def chosen(self: Host, behind: bool) -> tuple[AddressSpace, _core.Radix | None]:
        if not behind:
            return FlatSpace(self.ram), None
        return (MediatedSpace(self.ram, self.iotlb) if space is None else space(self)), None

    patch(Host, "_space", lambda _: chosen)


def in_words(space: Callable[[Host], AddressSpace] | None = None) -> None:
    """`in_python`, and every IOTLB message is an event by itself: also those that are otherwise taken by the run."""
    in_python(space)
    setattr(Session, "takes_runs", property(lambda _: False))  # noqa: B010 - a type checker knows it as it is


class Says:
    """A translator (`dma.space.Translator`) that is one function."""

    def __init__(self, lookup: Callable[[int, int, Access], Sequence[Span] | Miss]) -> None:
        self.lookup = lookup


def by(lookup: Callable[[Host, int, int, Access], Sequence[Span] | Miss]) -> None:
    """`in_words`, and translations by a function of host, address, length and access."""
    in_words(lambda host: MediatedSpace(host.ram, Says(lambda *asked: lookup(host, *asked))))
