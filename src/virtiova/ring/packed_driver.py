# SPDX-License-Identifier: Apache-2.0
"""The driver end of the packed ring (virtio 1.4, 2.8), over a DMA region.

The driver never reads back what it wrote: where it stands, and which list has which buffer id, is in private memory.
From the device it reads used descriptors, flags first and each once, and the device's event suppression.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.dma.ops import DmaRegion
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Answer, Segment, Used, check_request, room_of
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_FLAGS,
    PACKED_FLAGS,
    PackedDesc,
    PackedLayout,
)

_USED: Final = struct.Struct("<IH")
_LENGTH_AT: Final = 8
_FLAGS_AT: Final = 14
"""Offsets in a descriptor."""


@dataclass(frozen=True, slots=True)
class _List:
    """A request in the ring: its descriptors there, and the bytes that the device may write."""

    slots: int
    room: int


class PackedDriver:
    """One packed virtqueue, as its driver (`ring.ends.DriverRing`).

    ``region`` holds the ring, whose parts lie as ``layout`` says. ``in_order`` says that bit 35 was accepted: then a
    used descriptor may stand for all requests up to its own, of which the others were done completely. ``start`` is the
    place, in the first lap, of a ring that is empty.
    """

    def __init__(
        self,
        region: DmaRegion,
        layout: PackedLayout,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        start: int = 0,
    ) -> None:
        if region.size < layout.total:
            raise ProtocolError(f"a ring of {layout.total} bytes does not fit a region of {region.size}")
        self.layout = layout
        self._region = region
        self._event_idx = event_idx
        self._in_order = in_order
        self._ids = collections.deque(range(layout.size))
        self._added: dict[int, _List] = {}
        self._lists: dict[int, _List] = {}
        """What is added, and what is published, by buffer id, the oldest first."""
        self._hidden: tuple[int, int] | None = None
        """Offset and value of the flags that make visible what was added."""
        self.place = start
        """Descriptors that were written so far."""
        self._told = self._used_place = start
        self._done: collections.deque[Used] = collections.deque()
        """What one used descriptor stood for, and was not polled yet."""
        self._held: dict[int, bytes] = {}
        """The descriptors that were written last, by offset, as they are once they are published."""
        if event_idx:
            self._set_event()

    @property
    def parts(self) -> tuple[int, int, int]:
        """Device addresses of the descriptor ring, the driver's event suppression and the device's."""
        base = self._region.addr
        return base + self.layout.desc, base + self.layout.driver, base + self.layout.device

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return self.layout.size - (self.place - self._used_place)

    @property
    def newest(self) -> int:
        """The number of the request that was added last, and is not published yet."""
        return next(reversed(self._added))

    def add(self, segments: Sequence[Segment]) -> int:
        """Put a request into the ring, not yet visible to the device; its buffer id."""
        check_request(segments)
        if len(segments) > self.room:
            raise ProtocolError(f"{len(segments)} descriptors wanted, {self.room} free")
        last = len(segments) - 1
        flags = [_write(segment) | (0 if at == last else DESC_F_NEXT) for at, segment in enumerate(segments)]
        rows = [(segment.addr, segment.length, each) for segment, each in zip(segments, flags, strict=True)]
        return self._put(rows, room_of(segments))

    def add_indirect(self, segments: Sequence[Segment], table: DmaRegion, offset: int = 0) -> int:
        """The same through an indirect table, written to ``table`` at ``offset`` (virtio 1.4, 2.8.7)."""
        check_request(segments)
        if not self.room:
            raise ProtocolError("no descriptor is free")
        if len(segments) > self.layout.size:
            raise ProtocolError(f"a chain of {len(segments)} in a queue of {self.layout.size} (virtio 1.4, 2.8.17)")
        for position, segment in enumerate(segments):
            inner = PackedDesc(segment.addr, segment.length, 0, _write(segment))
            table.write(offset + DESC_SIZE * position, inner.pack())
        row = (table.addr + offset, DESC_SIZE * len(segments), DESC_F_INDIRECT)
        return self._put([row], room_of(segments))

    def _put(self, rows: Sequence[tuple[int, int, int]], room: int) -> int:
        """Write a list, all but the one word of flags without which the device sees none of what was added."""
        number = self._ids.popleft()
        for addr, length, flags in rows:
            at = self.layout.entry(self.place)
            whole = flags | self.layout.available(self.place)
            data = PackedDesc(addr, length, number, whole).pack()
            self._held[at] = data
            if self._hidden is None:
                self._hidden = at + _FLAGS_AT, whole
                data = data[:_FLAGS_AT]
            self._region.write(at, data)
            self.place += 1
        self._added[number] = _List(len(rows), room)
        return number

    def publish(self) -> bool:
        """Make all added requests visible; True if the device wants to be notified of them."""
        old, self._told = self._told, self.place
        self._lists |= self._added
        self._added.clear()
        if self._hidden is not None:
            # Release: all that was written before is visible to who sees these flags.
            self._region.store16(*self._hidden)
            self._hidden = None
        # The device writes its wish to be notified, then looks at the ring; we do it the other way round.
        self._region.fence()
        wish = self._region.load16(self.layout.device + 2) & EVENT_FLAGS
        if wish == EVENT_DESC and self._event_idx:
            return self.layout.passed(self._region.load16(self.layout.device), self.place, old)
        return wish != EVENT_DISABLE

    def poll(self) -> Used | None:
        """The next used request, or None. Raises `ProtocolError` if the device made something up."""
        if not self._done and self._moved():
            self._take()
        return self._done.popleft() if self._done else None

    def _moved(self) -> bool:
        at = self.layout.entry(self._used_place)
        # Acquire: the rest of the descriptor is visible then.
        return self._region.load16(at + _FLAGS_AT) & PACKED_FLAGS == self.layout.used(self._used_place)

    def _take(self) -> None:
        at = self.layout.entry(self._used_place)
        length, number = _USED.unpack(self._region.read(at + _LENGTH_AT, _USED.size))
        if number not in self._lists:
            raise ProtocolError(f"the device used buffer id {number}, which is of no pending request")
        if self._in_order:
            # Those before it are done as well, which the device did not care to name.
            for each in list(self._lists)[: list(self._lists).index(number)]:
                self._finish(each, self._lists[each].room)
        self._finish(number, length)
        if self._event_idx:
            self._set_event()

    def _finish(self, number: int, length: int) -> None:
        self._used_place += self._lists.pop(number).slots
        self._ids.append(number)
        self._done.append(Used(number, length))

    def used_moved(self) -> bool:
        """Has the device used more than what was polled? Trusts nothing else."""
        return bool(self._done) or self._moved()

    def answers(self) -> list[Answer]:
        """The next used descriptor, without the address that is in it."""
        at = self.layout.entry(self._used_place)
        held = self._held.get(at)
        until = None if held is None else held[_LENGTH_AT:]
        return [Answer(at + _LENGTH_AT, DESC_SIZE - _LENGTH_AT, until)]

    def own_answers(self) -> list[Answer]:
        """The device's event suppression: all else of the ring is written by both."""
        return [Answer(self.layout.device, 4)]

    def _set_event(self) -> None:
        # Ask for an interrupt at the very next used descriptor. The place before the flags that give it a meaning.
        self._region.store16(self.layout.driver, self.layout.encode(self._used_place))
        self._region.store16(self.layout.driver + 2, EVENT_DESC)


def _write(segment: Segment) -> int:
    return DESC_F_WRITE if segment.write else 0
