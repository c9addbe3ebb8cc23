# SPDX-License-Identifier: Apache-2.0
"""A driver of packed rings beside `serve_kit.FrontEnd`, in the same file of memory."""

from __future__ import annotations

import os

from serve_kit import RING, UVA_BASE, FrontEnd
from virtiova.addr import DmaAddr
from virtiova.dma.ram import ByteOrder
from virtiova.features import Feature
from virtiova.ring.ends import Segment
from virtiova.ring.layout import PackedLayout
from virtiova.ring.packed_driver import PackedDriver
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Request, VringAddr, VringState

PACKED = 1 << Feature.RING_PACKED
INITIAL = 0x8000_8000
"""Where a packed ring begins: index 0 and wrap counter 1, available and used."""


class FileRegion:
    """Part of a file as memory of a driver's (`DmaRegion`)."""

    def __init__(self, file: int, offset: int, size: int, addr: int) -> None:
        self.addr = DmaAddr(addr)
        self.size = size
        self._file, self._offset = file, offset

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, self._offset + offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._file, data, self._offset + offset)

    def load16(self, offset: int, order: ByteOrder = "little") -> int:
        return int.from_bytes(self.read(offset, 2), order)

    def load32(self, offset: int, order: ByteOrder = "little") -> int:
        return int.from_bytes(self.read(offset, 4), order)

    def store16(self, offset: int, value: int, order: ByteOrder = "little") -> None:
        self.write(offset, value.to_bytes(2, order))

    def fence(self) -> None:
        """System calls are in order."""


def driver_of(end: FrontEnd, size: int, features: int, at: int = RING, file: int | None = None) -> PackedDriver:
    """A driver's end of a ring at an offset of the front end's memory, or of another file with the same bytes."""
    layout = PackedLayout(size)
    region = FileRegion(end.file if file is None else file, at, layout.total, end.dma(at))
    event_idx, in_order = bool(features >> Feature.RING_EVENT_IDX & 1), bool(features >> Feature.IN_ORDER & 1)
    return PackedDriver(region, layout, event_idx=event_idx, in_order=in_order)


def start(end: FrontEnd, size: int, base: int = INITIAL, at: int = RING, index: int = 0) -> None:
    """Hand a packed ring over, started and enabled."""
    layout = PackedLayout(size)
    place = end.dma if end.bit else (lambda offset: UVA_BASE + offset)
    end.ok(Request.SET_VRING_NUM, VringState(index, size).encode())
    end.ok(Request.SET_VRING_BASE, VringState(index, base).encode())
    parts = VringAddr(index, 0, place(at), place(at + layout.device), place(at + layout.driver), 0)
    end.ok(Request.SET_VRING_ADDR, parts.encode())
    end.send(Request.SET_VRING_CALL, wire.encode_vring_fd(index, True), (end.call,))
    end.send(Request.SET_VRING_KICK, wire.encode_vring_fd(index, True), (end.call,))
    end.send(Request.SET_VRING_ENABLE, VringState(index, 1).encode())


def segment(end: FrontEnd, offset: int, length: int, write: bool) -> Segment:
    return Segment(DmaAddr(end.dma(offset)), length, write)


def base_of(end: FrontEnd, index: int = 0) -> int:
    """Stop a ring; where it stands."""
    (answer,) = end.send(Request.GET_VRING_BASE, VringState(index, 0).encode())
    return VringState.decode(answer.payload).value
