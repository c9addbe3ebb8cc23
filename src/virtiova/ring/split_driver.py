# SPDX-License-Identifier: Apache-2.0
"""The driver end of the split ring (virtio 1.4, 2.7), over a DMA region, in either byte order.

The driver never reads back what it wrote: descriptors, the free list and the available index live in
private memory, and the ring holds copies. From the device it reads the used index, the used elements
and ``avail_event``, each once.
"""

from __future__ import annotations

from collections.abc import Sequence

from virtiova.dma.ops import DmaRegion
from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError
from virtiova.ring.ends import Answer, Segment, Used, check_request
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    Desc,
    SplitLayout,
    need_event,
)


class SplitDriver:
    """One split virtqueue, as its driver (`ring.ends.DriverRing`).

    ``region`` holds the ring, whose parts lie as ``layout`` says.
    """

    def __init__(
        self, region: DmaRegion, layout: SplitLayout, order: ByteOrder = "little", *, event_idx: bool = False
    ) -> None:
        if region.size < layout.total:
            raise ProtocolError(f"a ring of {layout.total} bytes does not fit a region of {region.size}")
        self.layout = layout
        self._region = region
        self._order = order
        self._event_idx = event_idx
        self._free = list(range(layout.size))
        self._added: dict[int, list[int]] = {}
        self._chains: dict[int, list[int]] = {}
        self._avail_idx = 0
        self._published = 0
        self._used_idx = 0
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

    def add(self, segments: Sequence[Segment]) -> int:
        """Put a request into the ring, not yet visible to the device; its head descriptor."""
        check_request(segments)
        if len(segments) > len(self._free):
            raise ProtocolError(f"{len(segments)} descriptors wanted, {len(self._free)} free")
        chain = [self._free.pop(0) for _ in segments]
        for position, (index, segment) in enumerate(zip(chain, segments, strict=True)):
            last = position == len(chain) - 1
            self._write_desc(index, _desc(segment, None if last else chain[position + 1]))
        return self._offer(chain)

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
        return self._offer([index])

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
        """The next used element, or None. Raises `ProtocolError` if the device made something up."""
        index = self._region.load16(self.layout.used + 2, self._order)
        fresh = (index - self._used_idx) & 0xFFFF
        if not fresh:
            return None
        if fresh > self._published - self._used_idx:
            pending = self._published - self._used_idx
            raise ProtocolError(f"used index jumped from {self._used_idx & 0xFFFF} to {index}, {pending} are pending")
        at = self.layout.used + self.layout.used_entry(self._used_idx)
        head = self._region.load32(at, self._order)
        length = self._region.load32(at + 4, self._order)
        chain = self._chains.pop(head, None)
        if chain is None:
            raise ProtocolError(f"the device used descriptor {head}, which heads no pending request")
        self._free.extend(chain)
        self._used_idx += 1
        if self._event_idx:
            self._set_used_event()
        return Used(head, length)

    def used_moved(self) -> bool:
        """Has the device moved the used index past what was polled? Trusts nothing else."""
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

    def _offer(self, chain: list[int]) -> int:
        self._added[chain[0]] = chain
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
