# SPDX-License-Identifier: Apache-2.0
"""File system (virtio 1.4, 5.11): FUSE requests, as few as make the device move bytes of one file.

Structures and numbers are those of Linux ``include/uapi/linux/fuse.h``, version 7.31. Little-endian only.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Final

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Queue, Request, segments, total
from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

FILE: Final = "virtiova.img"
"""The file that is read and written: one of ours, in the root of what is shared."""
_HIPRIO, _REQUESTS = 0, 1
_LOOKUP, _OPEN, _READ, _WRITE, _INIT = 1, 14, 15, 16, 26
_ROOT: Final = 1
_RDWR: Final = 2
_IN: Final = struct.Struct("<IIQQIIII")
"""Length, opcode, unique, node, uid, gid, pid, padding."""
_OUT: Final = struct.Struct("<IiQ")
"""Length, error, unique."""
_INIT_IN: Final = struct.Struct("<IIII")
_OPEN_IN: Final = struct.Struct("<II")
_TRANSFER: Final = struct.Struct("<QQIIQII")
"""Of a read or a write: file handle, offset, size, and what we have none of."""
_NODE: Final = struct.Struct("<Q")
_ANSWER: Final = 512
_PAGE: Final = 4096


class FsDriver(DriverBase):
    """A queue for requests, behind one for what is urgent, which is never used. `make_device_write` reads the file from
    its second page on, `make_device_read` writes to its upper half; each request somewhere else."""

    device_id = DeviceId.FS
    out_of_reach = "the files that it shares are not ours"

    def start(self) -> None:
        """Make both queues, and the pages for what goes before and behind the bytes."""
        self._open(2)
        self._request = self.ops.alloc(_PAGE)
        self._answer = self.ops.alloc(_PAGE)
        self._unique = itertools.count(1)
        self._file: tuple[int, int] | None = None
        self._next_read = _PAGE
        self._next_write = 1 << 19

    def queues(self) -> list[Queue]:
        """That of requests first."""
        return self._queues[::-1]

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A read: the device writes the file's bytes into the buffers."""
        node, handle = self._opened()
        length = total(buffers)
        offset, self._next_read = self._next_read, self._next_read + length
        head = _TRANSFER.pack(handle, offset, length, 0, 0, 0, 0)
        return self._make(_READ, node, head, segments(buffers, write=True), table)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """A write to the file: the device reads the buffers. `UsageError` if the file is not ours to look at."""
        if self.peer.reach != "own":
            raise UsageError(self.out_of_reach)
        node, handle = self._opened()
        length = total(buffers)
        offset, self._next_write = self._next_write, self._next_write + length
        head = _TRANSFER.pack(handle, offset, length, 0, 0, 0, 0)
        request = self._make(_WRITE, node, head, segments(buffers, write=False), table)
        before = self.peer.stored(offset, length)

        def arrived() -> bytes | None:
            now = self.peer.stored(offset, length)
            return None if now == before else now

        return Request(request.queue, request.after, arrived)

    def _opened(self) -> tuple[int, int]:
        """Node and handle of the file, opened with the first request that needs it."""
        if self._file is None:
            self._ask(_INIT, 0, _INIT_IN.pack(7, 31, 0, 0))
            (node,) = _NODE.unpack_from(self._ask(_LOOKUP, _ROOT, FILE.encode() + b"\0"))
            (handle,) = _NODE.unpack_from(self._ask(_OPEN, node, _OPEN_IN.pack(_RDWR, 0)))
            self._file = node, handle
        return self._file

    def _ask(self, opcode: int, node: int, body: bytes) -> bytes:
        """A request whose answer is looked at; `MachineError` if the device says no."""
        room = Segment(DmaAddr(self._answer.addr + _OUT.size), _ANSWER, True)
        used = self.run(self._make(opcode, node, body, [room], None))
        length, error, _ = _OUT.unpack(self._answer.read(0, _OUT.size))
        if error:
            raise MachineError(f"FUSE request {opcode} for {FILE}: error {-error}")
        if not _OUT.size <= length <= used.length <= _OUT.size + _ANSWER:
            raise ProtocolError(f"FUSE request {opcode}: an answer of {length} bytes, {used.length} of them written")
        return self._answer.read(_OUT.size, _ANSWER)

    def _make(
        self, opcode: int, node: int, body: bytes, buffers: Sequence[Segment], table: DmaRegion | None
    ) -> Request:
        sent = sum(buffer.length for buffer in buffers if not buffer.write)
        size = _IN.size + len(body)
        self._request.write(0, _IN.pack(size + sent, opcode, next(self._unique), node, 0, 0, 0, 0) + body)
        chain = [
            Segment(DmaAddr(self._request.addr), size, False),
            *(buffer for buffer in buffers if not buffer.write),
            Segment(DmaAddr(self._answer.addr), _OUT.size + (8 if sent else 0), True),
            *(buffer for buffer in buffers if buffer.write),
        ]
        queue = self._queues[_REQUESTS]
        queue.add(chain, table)
        return Request(queue, lambda: None, lambda: None)
