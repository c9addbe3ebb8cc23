# SPDX-License-Identifier: Apache-2.0
"""What the rings of one connection stand on, and what of their buffers the front end has to be asked for. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova import _core
from virtiova.addr import Access
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import AddressSpace, Miss
from virtiova.serve.counters import Counters
from virtiova.serve.misses import Want, Wanted

MAX_PAGES: Final = 512
"""Pages that one look asks for."""
MAX_PROBED: Final = 1 << 25
"""Bytes of one piece of work's buffers that are looked at before it is handed over: more than any device takes."""


@dataclass(slots=True)
class Platform:
    """What the rings of one connection have in common."""

    ram: RegionRam
    space: AddressSpace
    iotlb: Iotlb | None
    """The answers of the front end if bit 33 was accepted: then ring addresses are IOVAs, else user addresses."""
    misses: Wanted | None
    """Where to ask; None if there is nobody."""
    ask: Callable[[Sequence[Want]], None]
    tell: Callable[[Collection[Want]], None]
    """What to do about accesses that the front end has refused, once a request has failed by them."""
    counters: Counters
    radix: _core.Radix | None = None
    """The native table of what `space` lets through, whichever way that goes; None if every access is Python's."""


def missing(parts: Iterable[tuple[int, int, Access]], platform: Platform, wants: dict[Want, None]) -> None:
    """Add to ``wants`` what of ``parts`` the address space does not let through and the front end may."""
    left = MAX_PROBED
    for address, whole, access in parts:
        length = min(whole, left)
        left -= length
        for one in (Access.READ, Access.WRITE):
            if one not in access or not length or len(wants) >= MAX_PAGES:
                continue
            if platform.radix is not None and platform.radix.covers(address, length, one.value):
                continue
            found = platform.space.translate(address, length, one)
            if not isinstance(found, Miss):
                continue
            if platform.iotlb is None:
                # Nobody could help: the device finds out by itself.
                continue
            limit = MAX_PAGES - len(wants)
            for page in platform.iotlb.missing(found.address, found.length, one, limit):
                wants[page, one] = None
