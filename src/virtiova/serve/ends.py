# SPDX-License-Identifier: Apache-2.0
"""The device end of a ring as a front end hands it over: what its parts are, split or packed, and where it goes on."""

from __future__ import annotations

from typing import Final

from virtiova.addr import Access
from virtiova.dma.space import AddressSpace
from virtiova.ring.layout import DESC_SIZE, PackedDesc, PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.inflight_packed import PackedInflight

End = SplitDevice | PackedDevice
_BEGIN: Final = 0x8000
"""Where a ring begins: index 0, wrap counter 1. It is there again after every other lap."""
Left = list[int] | list[list[PackedDesc]]
"""What an earlier back end has taken and not given back, oldest first: heads, or whole lists of descriptors."""


def extents(size: int, *, packed: bool) -> tuple[tuple[int, Access], ...]:
    """Bytes of descriptor area, driver area and device area, and what the device end does there."""
    if packed:
        layout = PackedLayout(size)
        return (DESC_SIZE * layout.size, Access.RW), (4, Access.READ), (4, Access.RW)
    split = SplitLayout(size)
    return (split.avail, Access.READ), (6 + 2 * split.size, Access.READ), (6 + 8 * split.size, Access.RW)


def packed_end(
    space: AddressSpace,
    where: tuple[int, int, int],
    size: int,
    base: int,
    notes: PackedInflight | None,
    *,
    event_idx: bool,
    indirect: bool,
) -> tuple[PackedDevice, Left]:
    """A packed ring that stands at ``base``, or where ``notes`` say that somebody stood, and what is left to do there.

    A front end cannot know better where a back end stood that died: its own number is an old one. But the notes may be
    of a driver's ring that is no more, which nobody told us of. Raises `ProtocolError` for numbers that make no sense.
    """
    layout = PackedLayout(size)

    def end(avail: int, used: int) -> PackedDevice:
        return PackedDevice(
            space, *where, layout, event_idx=event_idx, indirect=indirect, next_avail=avail, next_used=used
        )

    found = end(base, base)
    if notes is None:
        return found, []
    left = notes.resume(size, found.is_available)
    taken = sum(map(len, left.lists))
    # Whoever was somewhere in a ring has used a descriptor of it; and what was taken last is still the driver's to get.
    same = left.used == _BEGIN or not found.untouched()
    if not notes.used_before or not same or (taken and not found.is_available(left.used)):
        notes.forget(base)
        return found, []
    return end(layout.encode(layout.decode(left.used) + taken), left.used), left.lists
