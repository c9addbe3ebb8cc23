# SPDX-License-Identifier: Apache-2.0
"""The driver end of the split ring (virtio 1.4, 2.7), over a DMA region, in either byte order.

The driver never reads back what it wrote: descriptors, the free list and the available index live in
private memory, and the ring holds copies. From the device it reads the used index, the used elements
and ``avail_event``, each once.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

from virtiova.dma.ops import DmaRegion
from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Answer, Segment, Used, check_request, room_of
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    Desc,
    SplitLayout,
    need_event,
)


@dataclass(frozen=True, slots=True)
class _Chain:
    """A request in the ring: its descriptors, and the bytes that the device may write."""

    descs: list[int]
    room: int


class SplitDriver:
    """One split virtqueue, as its driver (`ring.ends.DriverRing`).

    ``region`` holds the ring, whose parts lie as ``layout`` says. ``in_order`` says that bit 35 was accepted: then a
    used element may stand for all requests up to its own, of which the others were done completely. ``start`` is the
    index (free-running, 16 bits) of a ring that was in use before and is empty.
    """

    def __init__(
        self,
        region: DmaRegion,
        layout: SplitLayout,
        order: ByteOrder = "little",
        *,
        event_idx: bool = False,
        in_order: bool = False,
        start: int = 0,
    ) -> None:
        if region.size < layout.total:
            raise ProtocolError(f"a ring of {layout.total} bytes does not fit a region of {region.size}")
        self.layout = layout
        self._region = region
        self._order = order
        self._event_idx = event_idx
        self._in_order = in_order
        self._free = [(start + index) % layout.size for index in range(layout.size)]
        self._added: dict[int, _Chain] = {}
        self._chains: dict[int, _Chain] = {}
        """What is added, and what is published, by head, the oldest first."""
        self._avail_idx = self._published = self._used_idx = start
        self._done: collections.deque[Used] = collections.deque()
        """What one used element stood for, and was not polled yet."""
        if start:
            for index in (layout.avail + 2, layout.used + 2):
                region.store16(index, start & 0xFFFF, order)
        if event_idx:
            self._set_used_event()

    @property
    def desc(self) -> int:
        """Device address of the descriptor table."""
        return self._region.addr + self.layout.desc

    @property
    def avail(self) -> int:
        """Device address of the available ring."""
        return self._region.addr + self.layout.avail

    @property
    def used(self) -> int:
        """Device address of the used ring."""
        return self._region.addr + self.layout.used

    @property
    def parts(self) -> tuple[int, int, int]:
        """Device addresses of descriptor table, available and used ring."""
        return self.desc, self.avail, self.used

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return len(self._free)

    @property
    def free(self) -> list[int]:
        """Which those are."""
        return list(self._free)

    @property
    def last_added(self) -> tuple[int, list[int]]:
        """Of the request that was added last, and is not published: its slot of the available ring, its descriptors."""
        return (self._avail_idx - 1) & 0xFFFF, list(next(reversed(self._added.values())).descs)

    @property
    def newest(self) -> int:
        """The number of the request that was added last, and is not published yet."""
        return next(reversed(self._added))

    def add(self, segments: Sequence[Segment]) -> int:
        """Put a request into the ring, not yet visible to the device; its head descriptor."""
        check_request(segments)
        if len(segments) > len(self._free):
            raise ProtocolError(f"{len(segments)} descriptors wanted, {len(self._free)} free")
        chain = [self._free.pop(0) for _ in segments]
        for position, (index, segment) in enumerate(zip(chain, segments, strict=True)):
            last = position == len(chain) - 1
            self._write_desc(index, _desc(segment, None if last else chain[position + 1]))
        return self._offer(chain, segments)

    def add_indirect(self, segments: Sequence[Segment], table: DmaRegion, offset: int = 0) -> int:
        """The same through an indirect table, written to ``table`` at ``offset`` (virtio 1.4, 2.7.5.3)."""
        check_request(segments)
        if not self._free:
            raise ProtocolError("no descriptor is free")
        if len(segments) > self.layout.size:
            raise ProtocolError(f"a chain of {len(segments)} in a queue of {self.layout.size} (virtio 1.4, 2.7.5.3.1)")
        for position, segment in enumerate(segments):
            last = position == len(segments) - 1
            desc = _desc(segment, None if last else position + 1)
            table.write(offset + DESC_SIZE * position, desc.pack(self._order))
        index = self._free.pop(0)
        length = DESC_SIZE * len(segments)
        self._write_desc(index, Desc(table.addr + offset, length, DESC_F_INDIRECT, 0))
        return self._offer([index], segments)

    def publish(self) -> bool:
        """Make all added requests visible; True if the device wants to be notified of them."""
        old, self._published = self._published, self._avail_idx
        self._chains |= self._added
        self._added.clear()
        self._region.store16(self.layout.avail + 2, self._avail_idx & 0xFFFF, self._order)
        # The device clears its wish to be notified, then looks at the index; we do it the other way round.
        self._region.fence()
        if self._event_idx:
            event = self._region.load16(self.layout.used + self.layout.avail_event, self._order)
            return need_event(event, self._avail_idx & 0xFFFF, old & 0xFFFF)
        return not self._region.load16(self.layout.used, self._order) & 1

    def poll(self) -> Used | None:
        """The next used request, or None. Raises `ProtocolError` if the device made something up."""
        if not self._done:
            self._take()
        return self._done.popleft() if self._done else None

    def _take(self) -> None:
        index = self._region.load16(self.layout.used + 2, self._order)
        fresh = (index - self._used_idx) & 0xFFFF
        if not fresh:
            return
        if fresh > self._published - self._used_idx:
            pending = self._published - self._used_idx
            raise ProtocolError(f"used index jumped from {self._used_idx & 0xFFFF} to {index}, {pending} are pending")
        at = self.layout.used + self.layout.used_entry(self._used_idx)
        head = self._region.load32(at, self._order)
        length = self._region.load32(at + 4, self._order)
        if head not in self._chains:
            raise ProtocolError(f"the device used descriptor {head}, which heads no pending request")
        before = list(self._chains)[: list(self._chains).index(head)] if self._in_order else []
        if len(before) >= fresh:
            raise ProtocolError(f"the device used descriptor {head} in order, with {fresh} of {len(before) + 1} done")
        for each in before:
            # The device did not care to name it.
            self._finish(each, self._chains[each].room)
        self._finish(head, length)
        if self._event_idx:
            self._set_used_event()

    def _finish(self, head: int, length: int) -> None:
        self._free.extend(self._chains.pop(head).descs)
        self._used_idx += 1
        self._done.append(Used(head, length))

    def used_moved(self) -> bool:
        """Has the device moved the used index past what was polled? Trusts nothing else."""
        if self._done:
            return True
        index = self._region.load16(self.layout.used + 2, self._order)
        return bool((index - self._used_idx) & 0xFFFF)

    def answers(self) -> list[Answer]:
        """The used ring, as far as its first element."""
        return [Answer(self.layout.used, 12)]

    def own_answers(self) -> list[Answer]:
        """The same: the driver writes none of the used ring."""
        return self.answers()

    def _write_desc(self, index: int, desc: Desc) -> None:
        self._region.write(self.layout.desc + DESC_SIZE * index, desc.pack(self._order))

    def _offer(self, chain: list[int], segments: Sequence[Segment]) -> int:
        self._added[chain[0]] = _Chain(chain, room_of(segments))
        entry = self.layout.avail + self.layout.avail_entry(self._avail_idx)
        self._region.store16(entry, chain[0], self._order)
        self._avail_idx += 1
        return chain[0]

    def _set_used_event(self) -> None:
        # Ask for an interrupt at the very next used element.
        offset = self.layout.avail + self.layout.used_event
        self._region.store16(offset, self._used_idx & 0xFFFF, self._order)


def _desc(segment: Segment, following: int | None) -> Desc:
    flags = (DESC_F_WRITE if segment.write else 0) | (0 if following is None else DESC_F_NEXT)
    return Desc(segment.addr, segment.length, flags, following or 0)
