# SPDX-License-Identifier: Apache-2.0
"""What `check_ring` asks of an end of a ring, what it gives to make one, and the steps of a history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from virtiova.addr import PAGE_SIZE, Access
from virtiova.dma.ops import RamRegion
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.ring.ends import DeviceRing, DriverRing, Segment, Used
from virtiova.ring.layout import PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.packed_driver import PackedDriver
from virtiova.ring.split_device import SplitDevice
from virtiova.ring.split_driver import SplitDriver
from virtiova.testing.ring_world import Reach, Watched, Way, World


class Chain(Protocol):
    """What `DeviceEnd.pop` gives."""

    @property
    def head(self) -> int:
        """The ring's own name for it: of a split ring the first descriptor, of a packed ring the buffer id."""

    def buffers(self) -> Iterable[tuple[int, int, Access]]:
        """Address, length and direction of each buffer, in order."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A `Chain` as data, for device ends that have none of their own."""

    head: int
    parts: Sequence[tuple[int, int, Access]]

    def buffers(self) -> Sequence[tuple[int, int, Access]]:
        """Address, length and direction of each buffer."""
        return self.parts


class DeviceEnd(Protocol):
    """A device's end of a ring, under test. A ring that means nothing raises ``ProtocolError``.

    If it has them, ``needs_interrupt()``, ``enable_notify()``, ``disable_notify()`` and ``put_back(count)`` are checked
    as well; what they mean is said in ``virtiova.ring.ends.DeviceRing``.
    """

    def pop(self) -> Chain | None:
        """The next chain; None if the driver has made none available."""

    def push(self, chain: Any, written: int, /) -> None:
        """Give back what `pop` gave; its first ``written`` bytes of room were written."""


class DriverEnd(Protocol):
    """A driver's end of a ring, under test. A device that makes something up has `poll` raise ``ProtocolError``.

    If it has it, ``add_indirect(segments, table, offset)`` is checked as well (``virtiova.ring.ends.DriverRing``).
    """

    def add(self, segments: Sequence[Segment], /) -> int:
        """Put a request into the ring, not yet visible; its head. ``ProtocolError`` if there is no room for it."""

    def publish(self) -> bool:
        """Make all that was added visible; True if the device is to be notified."""

    def poll(self) -> Used | None:
        """The next request that was used: its head, and the bytes that the device says it wrote."""


@dataclass(frozen=True, slots=True)
class Begin:
    """The ring of a history, as features and platform have it."""

    packed: bool = False
    size: int = 8
    order: ByteOrder = "little"
    event_idx: bool = False
    in_order: bool = False
    indirect: bool = True
    used_align: int = 4
    """Of a split ring: 4096 for the legacy interface (virtio 1.4, 2.7.2)."""
    start: int = 0
    """Where both ends go on from: requests before (split), or descriptors (packed)."""
    way: Way = "direct"
    reach: Reach = "mapped"

    def __str__(self) -> str:
        fields = [f"{name}={getattr(self, name)!r}" for name in self.__slots__ if getattr(self, name) != _PLAIN[name]]
        return f"ring = Begin({', '.join(fields)})"


_PLAIN: Final = {name: getattr(Begin(), name) for name in Begin.__slots__}


@dataclass(frozen=True, slots=True)
class Place:
    """What an end is made of: features, memory, and where in it the three parts are."""

    begin: Begin
    world: World
    region: RamRegion
    """The ring as the driver end has it."""
    layout: SplitLayout | PackedLayout
    space: AddressSpace
    """What the device end may touch: loads and stores by the addresses that the driver gave."""

    @property
    def parts(self) -> tuple[int, int, int]:
        """Device addresses of descriptor, driver and device area (virtio 1.4, 2.6)."""
        base, layout = self.region.addr, self.layout
        if isinstance(layout, PackedLayout):
            return base + layout.desc, base + layout.driver, base + layout.device
        return base + layout.desc, base + layout.avail, base + layout.used

    @property
    def next_index(self) -> int:
        """Where the device goes on, as vhost has it: an index; or a descriptor's, and the wrap counter in bit 15."""
        return self.layout.encode(self.begin.start) if isinstance(self.layout, PackedLayout) else self.begin.start


def place(begin: Begin, world: World, most: int | None = None) -> Place:
    """A ring in a world, as it is before the first request after `Begin.start`. ``most``: see `Watched`."""
    layout = PackedLayout(begin.size) if begin.packed else SplitLayout(begin.size, begin.used_align)
    region = world.alloc(layout.total)
    if isinstance(layout, PackedLayout):
        for at in range(max(begin.start - begin.size, 0), begin.start):
            region.store16(layout.entry(at) + 14, layout.used(at))
    else:
        # Both indices, and the device's wish to hear of the next request.
        for at in (layout.avail + 2, layout.used + 2, layout.used + layout.avail_event):
            region.store16(at, begin.start & 0xFFFF, begin.order)
    return Place(begin, world, region, layout, Watched(world.space, most))


def our_driver(place: Place) -> DriverRing:
    """Our driver end."""
    begin, layout = place.begin, place.layout
    event_idx, in_order = begin.event_idx, begin.in_order
    if isinstance(layout, PackedLayout):
        return PackedDriver(place.region, layout, event_idx=event_idx, in_order=in_order, start=begin.start)
    return SplitDriver(place.region, layout, begin.order, event_idx=event_idx, in_order=in_order, start=begin.start)


def our_device(place: Place) -> DeviceRing:
    """Our device end."""
    begin, layout, index = place.begin, place.layout, place.next_index
    if isinstance(layout, PackedLayout):
        return PackedDevice(
            place.space,
            *place.parts,
            layout,
            event_idx=begin.event_idx,
            indirect=begin.indirect,
            next_avail=index,
            next_used=index,
        )
    return SplitDevice(
        place.space,
        *place.parts,
        layout,
        begin.order,
        event_idx=begin.event_idx,
        indirect=begin.indirect,
        next_avail=index & 0xFFFF,
        next_used=index & 0xFFFF,
    )


MakeDriver = Callable[[Place], DriverEnd]
MakeDevice = Callable[[Place], DeviceEnd]


# -- histories, step by step


@dataclass(frozen=True, slots=True)
class Add:
    """A request of readable buffers and writable buffers of these lengths, if there is room for it."""

    parts: tuple[int, ...]
    room: tuple[int, ...]
    indirect: bool = False

    def __str__(self) -> str:
        how = "add_indirect" if self.indirect else "add"
        return f"driver.{how}(readable={list(self.parts)}, writable={list(self.room)})"


@dataclass(frozen=True, slots=True)
class Act:
    """Something without numbers: ``publish``, ``interrupt``, ``sleep``, ``stay_awake``, ``fill``, ``overfill``."""

    what: str

    def __str__(self) -> str:
        return {
            "publish": "driver.publish()",
            "interrupt": "device.needs_interrupt()",
            "sleep": "device.enable_notify()",
            "stay_awake": "device.disable_notify()",
            "fill": "driver.add(readable=[1], writable=[])  # as often as there is room",
            "overfill": "driver.add(one buffer more than there are descriptors free)",
        }[self.what]


@dataclass(frozen=True, slots=True)
class Some:
    """Up to ``count`` times ``pop``, ``poll``, ``put_back``, or ``push_together`` of so many."""

    what: str
    count: int

    def __str__(self) -> str:
        return f"{'driver' if self.what == 'poll' else 'device'}.{self.what}()  # up to {self.count} times"


@dataclass(frozen=True, slots=True)
class Push:
    """One of the chains at hand, by its number, is given back with ``fill`` bytes written, or as many as fit."""

    which: int
    fill: int

    def __str__(self) -> str:
        return f"device.push(chains[{self.which}], {self.fill})"


def simpler(step: RingStep) -> Iterator[RingStep]:
    """What may stand in place of a step where that shows the same."""
    match step:
        case Begin():
            for size in (1, 2, 4, 8):
                if size < step.size:
                    yield replace(step, size=size)
            plain = replace(Begin(), packed=step.packed, size=step.size, indirect=step.indirect)
            for name in Begin.__slots__:
                if getattr(step, name) != getattr(plain, name):
                    yield replace(step, **{name: getattr(plain, name)})
        case Add():
            small = (Add((1,), ()), Add((), (1,)), Add((1,), (1,)))
            # Only what comes before it: none leads back.
            yield from small[: small.index(step)] if step in small else small
            if step.indirect:
                yield replace(step, indirect=False)
        case Push():
            if step.which:
                yield replace(step, which=0)
            if step.fill:
                yield replace(step, fill=step.fill // 2)
        case Some() if step.count > 1:
            yield from (Some(step.what, 1), Some(step.what, step.count // 2))


RingStep = Begin | Add | Act | Some | Push
RingHistory = Sequence[RingStep]
SLOT: Final = PAGE_SIZE
"""Bytes of buffer for each request that can be under way."""


@dataclass
class Sent:
    """A request as the model knows it."""

    head: int
    slot: int
    segments: list[tuple[int, int, Access]]
    """As the device is to see them."""
    at: int
    """Where in the slots the payload lies."""
    payload: bytes
    room: list[tuple[int, int]]
    """Where in the slots the device may write: offset and length."""
    cost: int
    """Descriptors of the ring that it takes."""
    answer: bytes = b""
    order: int = 0
    """The how-manieth it was that the device took."""
