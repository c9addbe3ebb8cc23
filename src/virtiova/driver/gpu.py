# SPDX-License-Identifier: Apache-2.0
"""GPU (virtio 1.4, 5.7), two-dimensional: resources in memory that requests name, and one screen to show them on."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from virtiova.addr import PAGE_SIZE, DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import Buffer, DriverBase, Request, segments
from virtiova.errors import ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.ring.ends import Segment

CONTROL: Final = 0
F_EDID: Final = 1
GET_DISPLAY_INFO: Final = 0x100
RESOURCE_CREATE_2D: Final = 0x101
SET_SCANOUT: Final = 0x103
RESOURCE_FLUSH: Final = 0x104
TRANSFER_TO_HOST_2D: Final = 0x105
RESOURCE_ATTACH_BACKING: Final = 0x106
GET_EDID: Final = 0x10A
OK_NODATA: Final = 0x1100
B8G8R8X8: Final = 2
"""Pixels of four bytes: blue, green, red, and one that is not shown."""
PIXEL: Final = 4
SIDE: Final = 16
"""Pixels of a side of the pictures here, the least that a screen takes."""
PICTURE: Final = SIDE * SIDE * PIXEL
"""Bytes of a picture."""
COLOURS: Final = SIDE * SIDE * 3
"""Bytes of a picture as a screen shows it."""
RESOURCE: Final = 1
_HEADER: Final = struct.Struct("<IIQII")
_MAX_PICTURE: Final = 1 << 16
_WHOLE: Final = struct.pack("<IIII", 0, 0, SIDE, SIDE)


class GpuDriver(DriverBase):
    """The control queue. `make_device_write` asks for the screen's EDID; pixels are read by way of a resource's
    backing entries only, so that there is no payload of a descriptor that the device would show."""

    device_id = DeviceId.GPU
    reads = False
    table = 1 << F_EDID

    def start(self) -> None:
        """Make the control queue, and the pages for requests and answers."""
        self._open(1)
        self._request = self.ops.alloc(PAGE_SIZE)
        self._answer = self.ops.alloc(PAGE_SIZE)

    def make_device_write(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """Ask for the EDID (without that feature: for what screens there are), to be written into the buffers."""
        edid = self.negotiated.has(F_EDID)
        body = struct.pack("<II", 0, 0) if edid else b""
        return self._request_of(GET_EDID if edid else GET_DISPLAY_INFO, body, segments(buffers, write=True), table)

    def make_device_read(self, buffers: Sequence[Buffer], table: DmaRegion | None = None) -> Request:
        """There is no such request: pixels travel by backing entries."""
        raise UsageError("a GPU shows no buffers of its requests; see make_attach")

    def create(self, resource: int = RESOURCE) -> int:
        """A resource of `SIDE` x `SIDE` pixels; the type of the device's answer (`OK_NODATA`)."""
        return self.command(RESOURCE_CREATE_2D, struct.pack("<IIII", resource, B8G8R8X8, SIDE, SIDE))

    def make_attach(self, entries: Sequence[Buffer], resource: int = RESOURCE) -> Request:
        """A request that backs the resource with memory: each entry's address and length travel in the request, not
        in a descriptor. What arrived is what the screen shows once the device was told to read that memory: red,
        green and blue of each pixel, or nothing if it would not."""
        body = struct.pack("<II", resource, len(entries))
        body += b"".join(struct.pack("<QII", *entry, 0) for entry in entries)
        request = self._request_of(RESOURCE_ATTACH_BACKING, body, self._place_of_answer(), None)
        return self._showing(request, resource, transfer=True)

    def make_transfer(self, resource: int = RESOURCE) -> Request:
        """A request that makes the device read the backing that the resource has; arrived is as in `make_attach`."""
        request = self._request_of(TRANSFER_TO_HOST_2D, _transfer(resource), self._place_of_answer(), None)
        return self._showing(request, resource, transfer=False)

    def _showing(self, request: Request, resource: int, *, transfer: bool) -> Request:
        pictures: list[bytes] = []

        def arrived() -> bytes | None:
            # It takes requests to see something: they are made once.
            if not pictures and request.done():
                # The used entry has to be taken before the queue is used again.
                request.queue.ring.poll()
                if transfer:
                    self.command(TRANSFER_TO_HOST_2D, _transfer(resource))
                pictures.append(self.show(resource))
            return pictures[0] if pictures else None

        return Request(request.queue, request.after, arrived)

    def show(self, resource: int = RESOURCE) -> bytes:
        """Put the resource onto the first screen, and take a picture of that, three bytes a pixel; nothing if the
        device has no memory for the resource."""
        if self.command(SET_SCANOUT, _WHOLE + struct.pack("<II", 0, resource)) != OK_NODATA:
            return b""
        self.command(RESOURCE_FLUSH, _WHOLE + struct.pack("<II", resource, 0))
        return picture(self.peer.shown())

    def command(self, kind: int, body: bytes) -> int:
        """Send a command and wait; the type of the answer."""
        self.run(self._request_of(kind, body, self._place_of_answer(), None))
        return int.from_bytes(self._answer.read(0, 4), "little")

    def _place_of_answer(self) -> list[Segment]:
        self._answer.write(0, bytes(_HEADER.size))
        return [Segment(DmaAddr(self._answer.addr), _HEADER.size, True)]

    def _request_of(self, kind: int, body: bytes, answer: list[Segment], table: DmaRegion | None) -> Request:
        text = _HEADER.pack(kind, 0, 0, 0, 0) + body
        self._request.write(0, text)
        queue = self._queues[CONTROL]
        queue.add([Segment(DmaAddr(self._request.addr), len(text), False), *answer], table)
        return Request(queue, lambda: None, lambda: None)


def _transfer(resource: int) -> bytes:
    return _WHOLE + struct.pack("<QII", 0, resource, 0)


def pixels(colours: bytes) -> bytes:
    """Memory that shows as ``colours``: red, green and blue of each pixel, which are four bytes in memory."""
    return b"".join(colours[at : at + 3][::-1] + b"\0" for at in range(0, len(colours), 3))


def picture(pixmap: bytes) -> bytes:
    """The pixels of a portable pixmap, up to 64 KiB of it; `ProtocolError` if it is none of our size."""
    head = b"P6\n%d %d\n255\n" % (SIDE, SIDE)
    if len(pixmap) > _MAX_PICTURE or not pixmap.startswith(head) or len(pixmap) != len(head) + COLOURS:
        raise ProtocolError(f"no picture of {SIDE}x{SIDE} pixels: {len(pixmap)} bytes, {pixmap[:16]!r}")
    return pixmap[len(head) :]
