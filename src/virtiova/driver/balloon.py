# SPDX-License-Identifier: Apache-2.0
"""Memory balloon (virtio 1.4, 5.5): pages given away by number, and free pages reported by descriptor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.driver.base import Buffer, PayloadDriver, Queue, Request, segments
from virtiova.errors import UsageError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

INFLATE: Final = 0
DEFLATE: Final = 1
F_REPORTING: Final = 5
PFN_SHIFT: Final = 12
"""A page number is an address divided by 4096, whatever pages the guest has (5.5.6)."""
_NUMBER: Final = 4
# The text numbers the queues whether they exist or not (5.5.2); where free page hinting is not offered, QEMU and
# Linux number those that do.
_REPORTING: Final = (4, 3)


class BalloonDriver(PayloadDriver):
    """The queues for inflating, for deflating and, if that was negotiated, for reporting."""

    device_id = DeviceId.BALLOON
    table = 1 << F_REPORTING

    def start(self) -> None:
        """Make the queues, and the page for page numbers."""
        self._open(2)
        self._numbers = self.ops.alloc(PAGE_SIZE)
        self._reporting: Queue | None = None
        if self.reports:
            index = next(index for index in _REPORTING if self.transport.queue_size(index))
            self._reporting = Queue(self.transport, index, self.ops, self.negotiated, self._vector)
            self._reporting.enable()
            self._queues.append(self._reporting)

    @property
    def reports(self) -> bool:
        """Can free pages be reported?"""
        return self.negotiated.has(F_REPORTING) and any(map(self.transport.queue_size, _REPORTING))

    def make_inflate(self, addresses: Sequence[int]) -> Request:
        """Give the pages at these addresses to the host: it may take them away at once. Their numbers are 32 bits."""
        return self._by_number(INFLATE, addresses)

    def make_deflate(self, addresses: Sequence[int]) -> Request:
        """Take the pages back."""
        return self._by_number(DEFLATE, addresses)

    def make_report(self, buffers: Sequence[Buffer]) -> Request:
        """Tell the host that these pages are free, by descriptors that the device may write to."""
        if self._reporting is None:
            raise UsageError("page reporting was not negotiated")
        self._reporting.add(segments(buffers, write=True))
        return Request(self._reporting, lambda: None, lambda: None)

    def _by_number(self, index: int, addresses: Sequence[int]) -> Request:
        numbers = b""
        for address in addresses:
            number, rest = divmod(address, 1 << PFN_SHIFT)
            if rest or number >> 32:
                raise UsageError(f"0x{address:x} is not the address of a page that 32 bits can number")
            numbers += number.to_bytes(_NUMBER, self.transport.byte_order)
        self._numbers.write(0, numbers)
        queue = self._queues[index]
        queue.add([Segment(DmaAddr(self._numbers.addr), len(numbers), False)])
        return Request(queue, lambda: None, lambda: None)
