# SPDX-License-Identifier: Apache-2.0
"""Socket device (virtio 1.4, 5.10): one stream connection, which the host makes to a port of ours."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Request, segments, total
from virtiova.errors import ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

GUEST_PORT: Final = 4033
"""Where we listen: the other side connects there."""
RX: Final = 0
TX: Final = 1
_HOST_CID: Final = 2
_STREAM: Final = 1
_ROOM: Final = 1 << 20
"""What we say that we can take before we say that it was taken (``buf_alloc``)."""
_HANDSHAKE_SECONDS: Final = 1.0
_HEADER: Final = struct.Struct("<QQIIIHHIII")


class Op(IntEnum):
    """What a packet is (``enum virtio_vsock_op``)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


@dataclass(frozen=True, slots=True)
class Header:
    """``struct virtio_vsock_hdr``, 44 bytes, little-endian (virtio 1.4, 5.10.6)."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    kind: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    def encode(self) -> bytes:
        """The bytes."""
        fields = (self.src_cid, self.dst_cid, self.src_port, self.dst_port, self.length)
        return _HEADER.pack(*fields, self.kind, self.op, self.flags, self.buf_alloc, self.fwd_cnt)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From the first 44 bytes; `ProtocolError` for fewer."""
        if len(data) < _HEADER.size:
            raise ProtocolError(f"a vsock packet of {len(data)} bytes, wanted {_HEADER.size} at least")
        return cls(*_HEADER.unpack_from(data))


HEADER_SIZE: Final = _HEADER.size


class VsockDriver(DriverBase):
    """`make_device_write` posts a buffer, and lets the other side send what fills it, header included;
    `make_device_read` sends the buffers as one packet. Both over one connection, made with the first of them."""

    device_id = DeviceId.VSOCK
    out_of_reach = "nobody here is at the other end of this device's connections"

    def start(self) -> None:
        """Make the queues for receiving and sending, and the pages for packets without a payload."""
        (self._cid,) = struct.unpack("<Q", self.transport.read_config(0, 8))
        self._open(2)
        self._received = self.ops.alloc(HEADER_SIZE)
        self._sent = self.ops.alloc(HEADER_SIZE)
        self._port: int | None = None
        self._asked_for = self._told = 0
        """Bytes of payload that were sent to us, and how many of them we have said that we took."""

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Post a buffer; once it is published, the other side sends as much as fills it behind the header."""
        length = total(buffers) - HEADER_SIZE
        connected = self._connect()
        if connected and self._asked_for + length - self._told > _ROOM:
            self._tell(Op.CREDIT_UPDATE)
        self._asked_for += length
        data = (b"vsock %08d " % self._asked_for * (length // 15 + 1))[:length]
        queue = self._queues[RX]
        queue.add(segments(buffers, write=True), table)
        # Without a connection there is nothing more to be had from the device than that it looks for the buffer.
        return Request(queue, (lambda: self.peer.send(data)) if connected else queue.kick, lambda: None)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Send the buffers; what was read arrives at the other side. `UsageError` if that is out of reach."""
        if self.peer.reach != "own":
            raise UsageError(self.out_of_reach)
        self._connect()
        wanted = total(buffers)
        self._sent.write(0, self._header(Op.RW, wanted).encode())
        self._queues[TX].add(
            [Segment(DmaAddr(self._sent.addr), HEADER_SIZE, False), *segments(buffers, write=False)], table
        )
        self.peer.received()
        stream = bytearray()

        def arrived() -> bytes | None:
            stream.extend(b"".join(self.peer.received()))
            return bytes(stream) if len(stream) >= wanted else None

        return Request(self._queues[TX], lambda: None, arrived)

    # -- the connection

    def _connect(self) -> bool:
        """Let the other side connect, if it has not. False if it does not come through in time."""
        if self._port is not None:
            return True
        if self.peer.reach != "own":
            raise UsageError(self.out_of_reach)
        queue = self._queues[RX]
        queue.add([Segment(DmaAddr(self._received.addr), HEADER_SIZE, True)])
        request = Request(queue, lambda: self.peer.send(b""), lambda: None)
        request.go()
        if not self._wait(request.done, _HANDSHAKE_SECONDS):
            return False
        used = queue.ring.poll()
        header = Header.decode(self._received.read(0, 0 if used is None else min(used.length, HEADER_SIZE)))
        if (header.op, header.dst_cid, header.dst_port) != (Op.REQUEST, self._cid, GUEST_PORT):
            raise ProtocolError(f"wanted a connection to port {GUEST_PORT} of CID {self._cid}, got {header}")
        self._port = header.src_port
        self._tell(Op.RESPONSE)
        return True

    def _tell(self, op: Op) -> None:
        """Send a packet without a payload."""
        self._sent.write(0, self._header(op, 0).encode())
        queue = self._queues[TX]
        queue.add([Segment(DmaAddr(self._sent.addr), HEADER_SIZE, False)])
        self.run(Request(queue, lambda: None, lambda: None))

    def _header(self, op: Op, length: int) -> Header:
        self._told = self._asked_for
        port = self._port or 0
        return Header(
            *(self._cid, _HOST_CID, GUEST_PORT, port, length, _STREAM, op, 0, _ROOM, self._told & 0xFFFF_FFFF)
        )
