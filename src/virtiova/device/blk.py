# SPDX-License-Identifier: Apache-2.0
"""Block device (virtio 1.4, 5.2): requests from one queue or several over a store of 512-byte sectors."""

from __future__ import annotations

import enum
import struct
from types import MappingProxyType
from typing import Final

from virtiova._core import Disk
from virtiova.device.base import Device
from virtiova.device.store import Native, Store
from virtiova.errors import AccessError, ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain

SECTOR: Final = 512
"""Bytes in a sector: the unit of requests and of the capacity, whatever the block size."""

ID_BYTES: Final = 20
MAX_QUEUES: Final = 256
SIZE_MAX: Final = 1 << 17
SEG_MAX: Final = 126
"""Bytes in a buffer and buffers in a request, as the driver is told; with header and status they fit 128 entries."""
MAX_DATA: Final = SIZE_MAX * SEG_MAX
"""Bytes in a request, whatever its driver believed: also how long one request may keep everybody else waiting."""
DISCARD_SECTORS: Final = 1 << 21
ZEROES_SECTORS: Final = 1 << 15
RANGES: Final = 16
"""Sectors in a range that is discarded, or zeroed (which may have to be written out), and ranges in a request."""
_PHYSICAL_EXPONENT: Final = 3
_HEADS: Final = 16
_TRACK: Final = 63
_MAX_CYLINDERS: Final = 16383
_STEP: Final = 1 << 16
_HEADER: Final = struct.Struct("<IIQ")
_HEADER_BYTES: Final = _HEADER.size
_RANGE: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
WRITEBACK_AT: Final = 32
"""Offset of ``writeback`` in the configuration, its only field that is the driver's to write."""


class Bit(enum.IntEnum):
    """Feature bits of this device type (virtio 1.4, 5.2.3)."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


_LIMITS: Final = (Bit.SIZE_MAX, Bit.SEG_MAX, Bit.GEOMETRY, Bit.BLK_SIZE, Bit.FLUSH, Bit.TOPOLOGY)
_WRITING: Final = (Bit.CONFIG_WCE, Bit.DISCARD, Bit.WRITE_ZEROES)


class Request(enum.IntEnum):
    """``type`` of ``struct virtio_blk_req``."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(enum.IntEnum):
    """``status`` of ``struct virtio_blk_req``, its last byte."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


_IN: Final = Request.IN.value
_OK: Final = Status.OK
_ANSWER: Final = {status: bytes((status,)) for status in Status}


class Blk(Device):
    """``queues`` queues of requests against ``store``; ``serial`` (at most 20 bytes) is what get-id answers.

    ``native``: queues may be served without Python, if the store can be had so.
    A store that is read-only makes a device that offers RO, and answers IOERR to whatever would change it.
    """

    device_id = DeviceId.BLOCK
    bit_names = MappingProxyType({bit.value: bit.name for bit in Bit})

    def __init__(self, store: Store, serial: bytes = b"virtiova", *, queues: int = 1, native: bool = True) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"{queues} queues, wanted 1 to {MAX_QUEUES}")
        self._store = store
        self._serial = serial[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._writeback = True
        self._disks: dict[int, Disk] = {}
        self.native = native and isinstance(store, Native)
        self.queues = queues
        bits = [*_LIMITS, *((Bit.RO,) if store.read_only else _WRITING), *((Bit.MQ,) if queues > 1 else ())]
        self.features = sum(1 << bit for bit in bits)

    def config(self) -> bytes:
        """``struct virtio_blk_config`` (virtio 1.4, 5.2.4) up to ``unused1``; the capacity is in sectors.

        ``writeback`` is 0 for a driver that took CONFIG_WCE and not FLUSH (5.2.5.2). Topology: 4 KiB are written at
        once. Geometry: made up, as everybody's is.
        """
        capacity = self._store.size // SECTOR
        cylinders = min(capacity // (_HEADS * _TRACK), _MAX_CYLINDERS)
        geometry = (cylinders, _HEADS, _TRACK)
        topology = (_PHYSICAL_EXPONENT, 0, 1 << _PHYSICAL_EXPONENT, 0)
        limits = (capacity, SIZE_MAX, SEG_MAX, *geometry, SECTOR, *topology, self._writes_back, 0, self.queues)
        if self._store.read_only:
            return _CONFIG.pack(*limits, 0, 0, 0, 0, 0, 0)
        alignment = 1 << _PHYSICAL_EXPONENT
        return _CONFIG.pack(*limits, DISCARD_SECTORS, RANGES, alignment, ZEROES_SECTORS, RANGES, 1)

    def configure(self, offset: int, data: bytes) -> None:
        """Write cache on or off, for a driver that took CONFIG_WCE; all else is not the driver's."""
        if offset <= WRITEBACK_AT < offset + len(data) and self.has(Bit.CONFIG_WCE):
            self._writeback = bool(data[WRITEBACK_AT - offset])

    def reset(self) -> None:
        """The cache is on again."""
        self._writeback = True

    @property
    def _writes_back(self) -> bool:
        if not self._writeback:
            return False
        # Read before negotiation, it says what a driver that takes all would get.
        return self.has(Bit.FLUSH) or not self.has(Bit.CONFIG_WCE)

    def engine(self, queue: int) -> Disk | None:
        """Reads, and writes that need not be settled, over a store that can be had natively."""
        if not self.native or not isinstance(self._store, Native):
            return None
        disk = self._disks.get(queue)
        if disk is None:
            disk = self._disks[queue] = self._store.disk(MAX_DATA)
        disk.may_write = not self._store.read_only and self._cached
        return disk

    @property
    def uring(self) -> bool:
        """Whether an engine that was asked for uses io_uring."""
        return any(disk.uring for disk in self._disks.values())

    @property
    def how(self) -> str:
        """How bytes are got at, for a log."""
        return self._store.how if self.native and isinstance(self._store, Native) else "each request in Python"

    def handle(self, queue: int, chain: Chain) -> None:
        """One ``struct virtio_blk_req``: a header of 16 bytes, data either way, a status byte last of all.

        A request that fails in any way the driver can be told of gets a status. One without room for the
        status, or without a whole header, raises `ProtocolError`; a status that cannot be written raises
        `AccessError`.
        """
        if not chain.writable or chain.readable < _HEADER_BYTES:
            raise ProtocolError(
                f"block request of {chain.readable} readable and {chain.writable} writable bytes, "
                f"wanted a header of {_HEADER.size} and a status of 1"
            )
        try:
            kind, _, sector = _HEADER.unpack(chain.read(_HEADER_BYTES))
            # First, and without a look at names in an enumeration: nearly all requests, and this is their time.
            status = self._read(sector, chain) if kind == _IN else self._perform(kind, sector, chain)
        except (AccessError, OSError):
            status = Status.IOERR
        left = chain.writable - 1
        if left:
            chain.skip(left)
        chain.write(_ANSWER[status])

    def finish(self, queue: int, chain: Chain, found: bytes) -> None:
        """The status, after what was read. One with other room than when it was begun is done from the start."""
        if not chain.writable or (found and chain.writable != len(found) + 1):
            self.handle(queue, chain)
            return
        status = _OK
        try:
            for done in range(0, len(found), _STEP):
                chain.write(found[done : done + _STEP])
        except AccessError:
            status = Status.IOERR
        if left := chain.writable - 1:
            chain.skip(left)
        chain.write(_ANSWER[status])

    def _perform(self, kind: int, sector: int, chain: Chain) -> Status:
        match kind:
            case Request.OUT:
                return self._write(sector, chain)
            case Request.FLUSH:
                self._store.flush()
                return Status.OK
            case Request.GET_ID:
                chain.write(self._serial[: chain.writable - 1])
                return Status.OK
            case Request.DISCARD | Request.WRITE_ZEROES:
                return self._ranges(Request(kind), chain)
        return Status.UNSUPP

    def _within(self, sector: int, length: int) -> bool:
        """Whole sectors, none of them past the last one, and no more than a request may move."""
        if length % SECTOR or length > MAX_DATA:
            return False
        return sector + length // SECTOR <= self._store.size // SECTOR

    def _read(self, sector: int, chain: Chain) -> Status:
        length = chain.writable - 1
        if not self._within(sector, length):
            return Status.IOERR
        if length <= _STEP:
            chain.write(self._store.read(sector * SECTOR, length))
            return _OK
        for done in range(0, length, _STEP):
            chain.write(self._store.read(sector * SECTOR + done, min(_STEP, length - done)))
        return Status.OK

    def _write(self, sector: int, chain: Chain) -> Status:
        """RO: IOERR, and nothing is written (virtio 1.4, 5.2.6.2)."""
        length = chain.readable
        if self._store.read_only or not self._within(sector, length):
            return Status.IOERR
        for done in range(0, length, _STEP):
            self._store.write(sector * SECTOR + done, chain.read(_STEP))
        self._settle()
        return Status.OK

    @property
    def _cached(self) -> bool:
        """A driver that cannot flush, or has switched the cache off, takes a completed write for a stable one."""
        return self._writeback and self.has(Bit.FLUSH)

    def _settle(self) -> None:
        if not self._cached:
            self._store.flush()

    def _ranges(self, kind: Request, chain: Chain) -> Status:
        """``struct virtio_blk_discard_write_zeroes``, one or more: all are judged before the first is done.

        An unknown flag, or unmap in a discard, is UNSUPP (virtio 1.4, 5.2.6.2).
        """
        if self._store.read_only:
            return Status.IOERR
        if chain.readable % _RANGE.size or not _RANGE.size <= chain.readable <= _RANGE.size * RANGES:
            return Status.IOERR
        ranges = list(_RANGE.iter_unpack(chain.read()))
        discard = kind is Request.DISCARD
        if any(flags & ~(0 if discard else _UNMAP) for _, _, flags in ranges):
            return Status.UNSUPP
        most = DISCARD_SECTORS if discard else ZEROES_SECTORS
        end = self._store.size // SECTOR
        if any(count > most or sector + count > end for sector, count, _ in ranges):
            return Status.IOERR
        for sector, count, flags in ranges:
            if not count:
                continue
            if discard:
                self._store.discard(sector * SECTOR, count * SECTOR)
            else:
                self._store.zero(sector * SECTOR, count * SECTOR, free=bool(flags & _UNMAP))
        self._settle()
        return Status.OK
