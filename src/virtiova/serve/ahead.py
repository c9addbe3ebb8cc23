# SPDX-License-Identifier: Apache-2.0
"""What requests will miss: looked for ahead of their turn, so that all of it is asked for in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from virtiova.addr import Access
from virtiova.device.base import Device
from virtiova.device.host import MAX_WALKED
from virtiova.errors import AccessError, ProtocolError
from virtiova.serve.ends import End
from virtiova.serve.misses import Want
from virtiova.serve.platform import MAX_PAGES, MAX_PROBED, Platform, missing
from virtiova.serve.unfinished import Unfinished

LOOKAHEAD: Final = 32
"""Further requests whose misses are sent along with those of the first."""

_ACCESS: Final = {Access.READ.value: Access.READ, Access.WRITE.value: Access.WRITE}


def look_ahead(
    device: Device,
    index: int,
    unfinished: Unfinished,
    end: End,
    platform: Platform,
    wants: dict[Want, None],
    late: Callable[[], bool],
) -> None:
    """Add to ``wants`` what the requests behind miss: of one whose indirect table is missing too, that.

    ``end`` is left behind them: whoever calls goes back to its mark. No more are looked at once it is ``late``.
    """
    walked = 0
    missing(unfinished.needs(end, LOOKAHEAD), platform, wants)
    for _ in range(0 if device.wanted(index) else LOOKAHEAD):
        if len(wants) >= MAX_PAGES or walked >= MAX_WALKED or late():
            return
        mark = end.next_avail
        try:
            chain = end.pop()
        except AccessError as unread:
            if end.next_avail == mark:
                return
            missing([(unread.address, unread.length, Access.READ)], platform, wants)
            continue
        except ProtocolError:
            # Its turn will come, and then it will be found again.
            return
        if chain is None:
            return
        walked += chain.length
        missing(chain.buffers(), platform, wants)


def unknown(first: int, parts: Sequence[tuple[int, int, int]], platform: Platform) -> dict[Want, None]:
    """The pages to ask for of ``parts``, each an address, a length and an access, which the native table lacks.

    None if to ask is not all that has to be done about it: if the ``first`` of them, which the next request needs, are
    known, or one was refused.
    """
    iotlb, misses = platform.iotlb, platform.misses
    wants: dict[Want, None] = {}
    if iotlb is None or misses is None:
        return wants
    for number, (address, length, needed) in enumerate(parts):
        if number == first and not wants:
            return wants
        access = _ACCESS[needed]
        for page in iotlb.missing(address, min(length, MAX_PROBED), access, MAX_PAGES - len(wants)):
            wants[page, access] = None
    return {} if any(misses.refused(want) for want in wants) else wants
