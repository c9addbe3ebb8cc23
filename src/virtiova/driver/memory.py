# SPDX-License-Identifier: Apache-2.0
"""Memory devices: blocks that are plugged and unplugged (virtio 1.4, 5.15), persistent memory (5.19)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.driver.base import PayloadDriver, Request
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

F_UNPLUGGED_INACCESSIBLE: Final = 1
PLUG: Final = 0
UNPLUG: Final = 1
STATE: Final = 3
_ACK: Final = 0
_REQUEST: Final = struct.Struct("<HHHHQHHHH")
_ANSWER: Final = 16
_PENDING: Final = 0xEE
_LARGEST: Final = 1 << 52
_AT: Final = 64
"""Where the answers lie in their page: apart from what is only read."""


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """``struct virtio_mem_config`` (5.15.4), as far as it matters here. Bytes, and a guest-physical address."""

    block_size: int
    addr: int
    region_size: int
    plugged_size: int
    requested_size: int


class MemDriver(PayloadDriver):
    """The one queue of requests to plug and unplug blocks, which are named by guest-physical address."""

    device_id = DeviceId.MEMORY
    table = 1 << F_UNPLUGGED_INACCESSIBLE

    def start(self) -> None:
        """Make the queue, and the page for a request and its answer."""
        self._open(1)
        self._page = self.ops.alloc(PAGE_SIZE)

    @property
    def config(self) -> MemoryConfig:
        """What the device says of itself; `ProtocolError` if that cannot be."""
        words = struct.unpack("<Q8xQQ8xQQ", self.transport.read_config(0, 56))
        config = MemoryConfig(*words)
        block = config.block_size
        if block < PAGE_SIZE or block & (block - 1) or max(words) > _LARGEST or config.region_size < block:
            raise ProtocolError(f"the memory device says that it has blocks of 0x{block:x} at 0x{config.addr:x}")
        return config

    def plug(self, address: int, blocks: int) -> None:
        """Plug blocks from ``address`` on; `MachineError` if the device does not."""
        self.run(self._make(PLUG, address, blocks))
        status = int.from_bytes(self._page.read(_AT, 2), "little")
        if status != _ACK:
            raise MachineError(f"the memory device did not plug 0x{address:x}: answer {status}")

    def make_unplug(self, address: int, blocks: int) -> Request:
        """A request to unplug blocks: what they hold is lost."""
        return self._make(UNPLUG, address, blocks)

    def make_state(self, address: int, blocks: int, answer: int) -> Request:
        """Ask whether blocks are plugged, and let the device write the answer to ``answer``."""
        return self._make(STATE, address, blocks, answer)

    def _make(self, kind: int, address: int, blocks: int, answer: int | None = None) -> Request:
        self._page.write(0, _REQUEST.pack(kind, 0, 0, 0, address, blocks, 0, 0, 0))
        self._page.write(_AT, bytes([_PENDING]) * _ANSWER)
        queue = self._queues[0]
        readable = Segment(DmaAddr(self._page.addr), _REQUEST.size, False)
        to = self._page.addr + _AT if answer is None else answer
        queue.add([readable, Segment(DmaAddr(to), _ANSWER, True)])
        return Request(queue, lambda: None, lambda: None)


class PmemDriver(PayloadDriver):
    """The one queue of flush requests, which carry no address: the region is in the configuration."""

    device_id = DeviceId.PMEM

    def start(self) -> None:
        """Make the queue, and the page for a request and its answer."""
        self._open(1)
        self._page = self.ops.alloc(PAGE_SIZE)

    @property
    def region(self) -> tuple[int, int]:
        """Guest-physical address and size of the persistent memory (5.19.4)."""
        start, size = struct.unpack("<QQ", self.transport.read_config(0, 16))
        if start % PAGE_SIZE or size < PAGE_SIZE or max(start, size) > _LARGEST:
            raise ProtocolError(f"the device says that it has 0x{size:x} bytes at 0x{start:x}")
        return start, size

    def make_flush(self, offset: int, length: int, answer: int | None = None) -> Request:
        """A flush of everything; what arrived is what is then stored of the bytes at ``offset`` of the region.
        ``answer``: where the device is to write its answer of 4 bytes, if not to a page of the driver's own."""
        self._page.write(0, bytes(4))
        self._page.write(_AT, bytes([_PENDING]) * 4)
        queue = self._queues[0]
        readable = Segment(DmaAddr(self._page.addr), 4, False)
        to = self._page.addr + _AT if answer is None else answer
        queue.add([readable, Segment(DmaAddr(to), 4, True)])
        return Request(queue, lambda: None, lambda: self.peer.stored(offset, length))
