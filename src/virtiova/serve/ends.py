# SPDX-License-Identifier: Apache-2.0
"""The device end of a ring as a front end hands it over: what its parts are, split or packed, and where it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from virtiova import _core
from virtiova.addr import GPA, UVA, Access
from virtiova.device.base import Device
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import AddressSpace, Miss
from virtiova.errors import ProtocolError
from virtiova.features import Feature
from virtiova.ring.layout import DESC_SIZE, PackedDesc, PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.inflight import Inflight
from virtiova.serve.inflight_packed import PackedInflight
from virtiova.wire.vhost_user import VringAddr

End = SplitDevice | PackedDevice
_BEGIN: Final = 0x8000
"""Where a ring begins: index 0, wrap counter 1. It is there again after every other lap."""
Left = list[int] | list[list[PackedDesc]]
"""What an earlier back end has taken and not given back, oldest first: heads, or whole lists of descriptors."""


Part = tuple[int, int, Access]
"""Address, bytes, and what the device end does there."""


def ring_parts(address: VringAddr, size: int, ram: RegionRam | None, *, packed: bool) -> tuple[Part, Part, Part]:
    """Descriptor area, driver area and device area in the address space: user addresses in ``ram``, or as they are."""
    if packed:
        layout = PackedLayout(size)
        sizes = DESC_SIZE * layout.size, 4, 4
    else:
        split = SplitLayout(size)
        sizes = split.avail, 6 + 2 * split.size, 6 + 8 * split.size
    desc, driver, device = (
        given if ram is None else _gpa(ram, given, length)
        for given, length in zip((address.desc, address.avail, address.used), sizes, strict=True)
    )
    return (
        (desc, sizes[0], Access.RW if packed else Access.READ),
        (driver, sizes[1], Access.READ),
        (device, sizes[2], Access.RW),
    )


def _gpa(ram: RegionRam, uva: int, size: int) -> GPA:
    """Where a part of a ring is that the front end has at ``uva``."""
    spans = ram.gpa_of(UVA(uva), size)
    if isinstance(spans, Miss):
        raise ProtocolError(f"no memory of the front end at user address 0x{uva:x}+0x{size:x}")
    if len(spans) != 1:
        raise ProtocolError(f"user address 0x{uva:x}+0x{size:x} lies in more than one region")
    return spans[0].gpa


def split_end(
    space: AddressSpace,
    where: Sequence[int],
    size: int,
    base: int,
    notes: Inflight | None,
    *,
    event_idx: bool,
    indirect: bool,
) -> tuple[SplitDevice, Left]:
    """A split ring that stands at ``base``, or where ``notes`` say that somebody stood, and what is left to do."""
    desc, avail, device = where
    used = space.load16(device + 2)
    left: list[int] = []
    if notes is not None:
        left = notes.unfinished(used)
        if len(left) > (space.load16(avail + 2) - used) & 0xFFFF:
            # This driver has not offered so many: they are of another one, before a reset that nobody told us of.
            notes.forget(used)
            left = []
        else:
            base = (used + len(left)) & 0xFFFF
    layout = SplitLayout(size)
    end = SplitDevice(
        space, desc, avail, device, layout, event_idx=event_idx, indirect=indirect, next_avail=base, next_used=used
    )
    return end, left


def packed_end(
    space: AddressSpace,
    where: Sequence[int],
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
    desc, driver, device = where

    def end(avail: int, used: int) -> PackedDevice:
        return PackedDevice(
            space,
            desc,
            driver,
            device,
            layout,
            event_idx=event_idx,
            indirect=indirect,
            next_avail=avail,
            next_used=used,
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
    found = end(layout.encode(layout.decode(left.used) + taken), left.used)
    found.take_from_dead(taken)
    return found, left.lists


def native_end(
    radix: _core.Radix, where: Sequence[int], size: int, notes: Inflight | PackedInflight | None, device: Device
) -> _core.Drain:
    """The same end natively, at the addresses ``where`` of descriptors, driver area and device area, each translated by
    ``radix``; for what is well-formed and known."""
    desc, driver, used = where
    drain = _core.Drain(
        radix,
        desc,
        driver,
        used,
        size,
        packed=device.has(Feature.RING_PACKED),
        event_idx=device.has(Feature.RING_EVENT_IDX),
        indirect=device.has(Feature.RING_INDIRECT_DESC),
        in_order=device.has(Feature.IN_ORDER),
    )
    if notes is not None:
        notes.lend(drain)
    return drain
