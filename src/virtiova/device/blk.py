# SPDX-License-Identifier: Apache-2.0
"""Block device (virtio 1.4, 5.2): read, write, flush and get-id over a store of 512-byte sectors."""

from __future__ import annotations

import enum
import struct
from typing import Final, Protocol

from virtiova.device.base import Device
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain

SECTOR: Final = 512
"""Bytes in a sector: the unit of requests and of the capacity, whatever the block size."""

ID_BYTES: Final = 20
_STEP: Final = 1 << 16
_HEADER: Final = struct.Struct("<IIQ")
_CONFIG: Final = struct.Struct("<QIIHBBI")
_F_BLK_SIZE: Final = 6
_F_FLUSH: Final = 9


class Request(enum.IntEnum):
    """``type`` of ``struct virtio_blk_req``."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class Status(enum.IntEnum):
    """``status`` of ``struct virtio_blk_req``, its last byte."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Store(Protocol):
    """What a disk is made of. Offsets and sizes in bytes; an ``OSError`` becomes status IOERR."""

    @property
    def size(self) -> int:
        """Bytes in total; what is left after the last whole sector is not used."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, which are within `size`."""

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``, all of it within `size`."""

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""


class MemoryStore:
    """A disk in memory: ``image`` is used in place, not copied."""

    def __init__(self, image: bytearray) -> None:
        self._image = image

    @property
    def size(self) -> int:
        """Bytes in total."""
        return len(self._image)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        return bytes(self._image[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        self._image[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Nothing is more stable than this."""


class Blk(Device):
    """One queue of requests against ``store``; ``serial`` (at most 20 bytes) is what get-id answers."""

    device_id = DeviceId.BLOCK
    queues = 1
    features = 1 << _F_FLUSH | 1 << _F_BLK_SIZE

    def __init__(self, store: Store, serial: bytes = b"virtiova") -> None:
        self._store = store
        self._serial = serial[:ID_BYTES].ljust(ID_BYTES, b"\0")

    def config(self) -> bytes:
        """``struct virtio_blk_config`` up to ``blk_size``; the capacity is in sectors."""
        return _CONFIG.pack(self._store.size // SECTOR, 0, 0, 0, 0, 0, SECTOR)

    def handle(self, queue: int, chain: Chain) -> None:
        """One ``struct virtio_blk_req``: a header of 16 bytes, data either way, a status byte last of all.

        A request that fails in any way the driver can be told of gets a status. One without room for the
        status, or without a whole header, raises `ProtocolError`; a status that cannot be written raises
        `AccessError`.
        """
        if not chain.writable or chain.readable < _HEADER.size:
            raise ProtocolError(
                f"block request of {chain.readable} readable and {chain.writable} writable bytes, "
                f"wanted a header of {_HEADER.size} and a status of 1"
            )
        try:
            kind, _, sector = _HEADER.unpack(chain.read(_HEADER.size))
            status = self._perform(kind, sector, chain)
        except (AccessError, OSError):
            status = Status.IOERR
        chain.skip(chain.writable - 1)
        chain.write(bytes((status,)))

    def _perform(self, kind: int, sector: int, chain: Chain) -> Status:
        match kind:
            case Request.IN:
                return self._read(sector, chain)
            case Request.OUT:
                return self._write(sector, chain)
            case Request.FLUSH:
                self._store.flush()
                return Status.OK
            case Request.GET_ID:
                chain.write(self._serial[: chain.writable - 1])
                return Status.OK
        return Status.UNSUPP

    def _within(self, sector: int, length: int) -> bool:
        """Whole sectors, none of them past the last one."""
        return length % SECTOR == 0 and sector + length // SECTOR <= self._store.size // SECTOR

    def _read(self, sector: int, chain: Chain) -> Status:
        length = chain.writable - 1
        if not self._within(sector, length):
            return Status.IOERR
        for done in range(0, length, _STEP):
            chain.write(self._store.read(sector * SECTOR + done, min(_STEP, length - done)))
        return Status.OK

    def _write(self, sector: int, chain: Chain) -> Status:
        length = chain.readable
        if not self._within(sector, length):
            return Status.IOERR
        for done in range(0, length, _STEP):
            self._store.write(sector * SECTOR + done, chain.read(_STEP))
        return Status.OK
