# SPDX-License-Identifier: Apache-2.0
"""Block (virtio 1.4, 5.2): read, write, flush, get-id. Header, data and status lie on pages of their own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Request, segments, total
from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

SECTOR: Final = 512
T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
F_FLUSH: Final = 9
F_RO: Final = 5
ID_LENGTH: Final = 20
_HEADER: Final = {"little": struct.Struct("<IIQ"), "big": struct.Struct(">IIQ")}
_STATUS: Final = {0: "OK", 1: "IOERR", 2: "UNSUPP"}
_PENDING: Final = 0xEE
_LEAST: Final = 16
_MOST: Final = 1 << 54
"""Byte offsets up to 2^63 are all that files have."""


class BlkDriver(DriverBase):
    """One request queue. `make_device_write` reads successive sectors from 1, `make_device_read` writes to
    successive sectors of the upper half of the disk, so that no two requests move the same bytes."""

    device_id = DeviceId.BLOCK
    table = 1 << F_FLUSH
    out_of_reach = "it would change somebody's disk (--write allows that)"

    def start(self) -> None:
        """Make the request queue, and the pages for header and status."""
        self._open(1)
        self._header = self.ops.alloc(SECTOR)
        self._status = self.ops.alloc(SECTOR)
        self._next_read = 1
        self._last_read = self._next_write = self.capacity() // 2

    def capacity(self) -> int:
        """Sectors of 512 bytes, as the device says; `ProtocolError` if no disk can have so many, or so few."""
        sectors = int.from_bytes(self.transport.read_config(0, 8), self.transport.byte_order)
        if not _LEAST <= sectors <= _MOST:
            raise ProtocolError(f"the device says that it has {sectors} sectors; {_LEAST} to {_MOST} make sense here")
        return sectors

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A read: the device writes sectors into the buffers."""
        count = total(buffers) // SECTOR
        if self._next_read + count > self._last_read:
            # Not past the half that is read: from its start again.
            self._next_read = 1
        sector, self._next_read = self._next_read, self._next_read + count
        return self._request(T_IN, sector, buffers, table)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A write: the device reads the buffers, and what it read shows on the disk. `UsageError` if that is out of
        reach: nobody else's disk is changed without permission."""
        if self.peer.reach == "none":
            raise UsageError(self.out_of_reach)
        length = total(buffers)
        sector, self._next_write = self._next_write, self._next_write + length // SECTOR
        if self.peer.reach == "echo":
            return self._read_back(sector, buffers, table)
        request = self._request(T_OUT, sector, buffers, table)
        before = self.peer.stored(sector * SECTOR, length)

        def arrived() -> bytes | None:
            now = self.peer.stored(sector * SECTOR, length)
            return None if now == before else now

        return Request(request.queue, request.after, arrived)

    def _read_back(self, sector: int, buffers: Sequence[Buffer], table: DmaRegion | None) -> Request:
        """A write to somebody else's disk: what is there now is read first, what came of it is read back through the
        device, and what was there is put back."""
        count = total(buffers) // SECTOR
        before = self.read(sector, count)
        # What another driver of this device has found there, if one has: its request may have been late.
        original = self.peer.kept.setdefault(sector, before)
        request = self._request(T_OUT, sector, buffers, table)
        seen: list[bytes | None] = []

        def arrived() -> bytes | None:
            if not seen and request.done():
                # Nothing that the request itself uses is written again: its pages may be under observation.
                request.queue.ring.poll()
                self._header, self._status = self.ops.alloc(SECTOR), self.ops.alloc(SECTOR)
                now = self.read(sector, count)
                seen.append(None if now == before else now)
                if now != original:
                    self._put_back(sector, original)
            return seen[0] if seen else None

        return Request(request.queue, request.after, arrived)

    def _put_back(self, sector: int, original: bytes) -> None:
        try:
            self.write(sector, original)
            if self.read(sector, len(original) // SECTOR) == original:
                return
            why = "it reads otherwise"
        except MachineError as error:
            why = str(error)
        # Nobody else has these bytes.
        raise MachineError(f"sector {sector} could not be put back ({why}); it held {original.hex()}")

    def read(self, sector: int, count: int = 1) -> bytes:
        """``count`` sectors."""
        self._check(sector, count)
        with self.memory(count * SECTOR) as region:
            self._execute(T_IN, sector, [(region.addr, count * SECTOR)])
            return region.read(0, count * SECTOR)

    def write(self, sector: int, data: bytes) -> None:
        """Whole sectors."""
        if len(data) % SECTOR or not data:
            raise UsageError(f"{len(data)} bytes are no whole number of sectors")
        self._check(sector, len(data) // SECTOR)
        with self.memory(len(data)) as region:
            region.write(0, data)
            self._execute(T_OUT, sector, [(region.addr, len(data))])

    def flush(self) -> None:
        """Until this returns, what was written is not safe."""
        self._execute(T_FLUSH, 0, [])

    def get_id(self) -> str:
        """The device's serial, up to 20 characters."""
        with self.memory(ID_LENGTH) as region:
            self._execute(T_GET_ID, 0, [(region.addr, ID_LENGTH)])
            return region.read(0, ID_LENGTH).split(b"\0")[0].decode("ascii", "replace")

    def _check(self, sector: int, count: int) -> None:
        if sector < 0 or count < 1 or sector + count > self.capacity():
            raise UsageError(f"sectors {sector}+{count} are not on this disk")

    def _execute(self, kind: int, sector: int, buffers: Sequence[Buffer]) -> None:
        self.run(self._request(kind, sector, buffers, None))
        status = self._status.read(0, 1)[0]
        if status:
            raise MachineError(f"blk request of type {kind}: {_STATUS.get(status, hex(status))}")

    def _request(self, kind: int, sector: int, buffers: Sequence[Buffer], table: DmaRegion | None) -> Request:
        self._header.write(0, _HEADER[self.transport.byte_order].pack(kind, 0, sector))
        self._status.write(0, bytes([_PENDING]))
        chain = [
            Segment(DmaAddr(self._header.addr), 16, False),
            *segments(buffers, write=kind in (T_IN, T_GET_ID)),
            Segment(DmaAddr(self._status.addr), 1, True),
        ]
        queue = self._queues[0]
        queue.add(chain, table)
        return Request(queue, lambda: None, lambda: None)
