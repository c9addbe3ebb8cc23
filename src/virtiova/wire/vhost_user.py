# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol as bytes: messages, their payloads, and a framer that cuts a stream into them. No I/O.

Front end and back end are the two ends of a stream socket; the back end may have a second one, the
back-end channel, on which it asks. Everything is in the byte order of the host that both run on, which is
little-endian on all that this project runs on. Source: QEMU ``docs/interop/vhost-user.rst``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA, Access
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user_names import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    BackendRequest,
    ProtocolFeature,
    Request,
    protocol_feature_names,
    request_name,
)

__all__ = [
    "F_LOG_ALL",
    "F_PROTOCOL_FEATURES",
    "HEADER_SIZE",
    "IOTLB_MESSAGE_SIZE",
    "MAX_CONFIG",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "NO_FD",
    "BackendRequest",
    "ConfigSpace",
    "Framer",
    "InflightDescription",
    "IotlbKind",
    "IotlbMessage",
    "LogDescription",
    "MemoryRegion",
    "Message",
    "ProtocolFeature",
    "Request",
    "VringAddr",
    "VringState",
    "decode_table",
    "decode_vring_fd",
    "encode_table",
    "encode_vring_fd",
    "iotlb_ranges",
    "protocol_feature_names",
    "request_name",
    "u64",
    "u64_of",
]

HEADER_SIZE: Final = 12
MAX_PAYLOAD: Final = 4096
"""Bytes of the longest payload that is accepted; the longest known, a configuration, has 268."""
MAX_FDS: Final = 8
"""File descriptors with one message: one for each region of a memory table."""
MAX_CONFIG: Final = 256
"""Bytes of device configuration that one message carries."""

_VERSION: Final = 1
_VERSION_MASK: Final = 3
_REPLY: Final = 4
_NEED_REPLY: Final = 8
_HEADER: Final = struct.Struct("<III")
_U64: Final = struct.Struct("<Q")
_PAIR: Final = struct.Struct("<II")
_REGION: Final = struct.Struct("<QQQQ")
_RING: Final = struct.Struct("<IIQQQQ")
_IOTLB: Final = struct.Struct("<QQQBB6x")
_IOTLB_SHORTEST: Final = 26
_CONFIG: Final = struct.Struct("<III")
_INFLIGHT: Final = struct.Struct("<QQHH")
_LOG: Final = struct.Struct("<QQ")


# -- messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """One message of either direction. ``fds`` are the receiver's own numbers, which it has to close."""

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    reply: bool = False
    need_reply: bool = False

    def encode(self) -> bytes:
        """Header and payload; the ``fds`` go beside them, with the first byte."""
        flags = _VERSION | (_REPLY if self.reply else 0) | (_NEED_REPLY if self.need_reply else 0)
        return _HEADER.pack(self.request, flags, len(self.payload)) + self.payload

    def answer(self, payload: bytes, fds: tuple[int, ...] = ()) -> Message:
        """The reply to this message."""
        return Message(self.request, payload, fds, reply=True)

    def acknowledge(self, ok: bool = True) -> Message:
        """The answer to a message with ``need_reply`` that has no reply of its own: 0 is success (REPLY_ACK)."""
        return self.answer(u64(0 if ok else 1))


def u64(value: int) -> bytes:
    """A payload of one number."""
    return _U64.pack(value)


def u64_of(payload: bytes) -> int:
    """The number that a payload consists of."""
    _sized("a number", payload, _U64.size)
    (value,) = _U64.unpack(payload)
    return int(value)


def _sized(what: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise ProtocolError(f"vhost-user: {what} of {len(payload)} bytes, wanted {size}")


class Framer:
    """Cuts what a socket gives into messages.

    A descriptor arrives with the first byte of the message that it was sent with, and a read may run from
    one message into the next: only the length tells whose it is. So read at most `wanted` bytes at a time;
    then descriptors belong to the message that the first byte read belongs to, as `feed` takes it.
    """

    def __init__(self) -> None:
        self._data = b""
        self._fds: list[int] = []

    @property
    def wanted(self) -> int:
        """Bytes to read next: up to the end of the header, then of the payload. Never 0."""
        if len(self._data) < HEADER_SIZE:
            return HEADER_SIZE - len(self._data)
        return HEADER_SIZE + self._size() - len(self._data)

    @property
    def idle(self) -> bool:
        """Whether nothing of an unfinished message is held: an end of the stream here is an orderly one."""
        return not self._data and not self._fds

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """The messages that ``data`` completes. The ``fds`` came with its first byte and are this object's now.

        Raises `ProtocolError` for a header that has no meaning and for what exceeds `MAX_PAYLOAD` or
        `MAX_FDS`; the stream is of no use after that, and all descriptors are left to `abandon`.
        """
        self._fds += fds
        self._data += data
        found: list[Message] = []
        try:
            if len(self._fds) > MAX_FDS:
                raise ProtocolError(f"vhost-user: {len(self._fds)} file descriptors, wanted at most {MAX_FDS}")
            while len(self._data) >= HEADER_SIZE and len(self._data) >= (end := HEADER_SIZE + self._size()):
                request, flags, _ = _HEADER.unpack_from(self._data)
                payload, self._data = self._data[HEADER_SIZE:end], self._data[end:]
                mine, self._fds = tuple(self._fds), []
                found.append(Message(request, payload, mine, bool(flags & _REPLY), bool(flags & _NEED_REPLY)))
        except ProtocolError:
            self._fds += [fd for message in found for fd in message.fds]
            raise
        return found

    def abandon(self) -> tuple[int, ...]:
        """Forget what is unfinished; the descriptors that came with it, for the caller to close."""
        fds, self._fds, self._data = tuple(self._fds), [], b""
        return fds

    def _size(self) -> int:
        """Bytes of the payload that the header announces, once it was found to be one."""
        request, flags, size = _HEADER.unpack_from(self._data)
        if flags & _VERSION_MASK != _VERSION:
            raise ProtocolError(f"vhost-user: flags 0x{flags:x} of request {request}, wanted version {_VERSION}")
        if size > MAX_PAYLOAD:
            raise ProtocolError(
                f"vhost-user: {request_name(request)} with 0x{size:x} bytes, wanted at most 0x{MAX_PAYLOAD:x}"
            )
        return int(size)


# -- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """``size`` bytes of guest memory: at ``gpa`` for the guest, at ``uva`` for the front end, and in a file at
    ``offset``. Nothing is judged here but the number of bytes in the message."""

    gpa: GPA
    size: int
    uva: UVA
    offset: int

    def encode(self) -> bytes:
        """32 bytes, as in a table."""
        return _REGION.pack(self.gpa, self.size, self.uva, self.offset)

    @classmethod
    def decode(cls, payload: bytes) -> MemoryRegion:
        """From 32 bytes."""
        _sized("a memory region", payload, _REGION.size)
        gpa, size, uva, offset = _REGION.unpack(payload)
        return cls(GPA(gpa), size, UVA(uva), offset)

    def encode_single(self) -> bytes:
        """The payload of ADD_MEM_REG and REM_MEM_REG."""
        return bytes(8) + self.encode()

    @classmethod
    def decode_single(cls, payload: bytes) -> MemoryRegion:
        """From the payload of ADD_MEM_REG or REM_MEM_REG."""
        _sized("a single memory region", payload, 8 + _REGION.size)
        return cls.decode(payload[8:])


def encode_table(regions: Sequence[MemoryRegion]) -> bytes:
    """The payload of SET_MEM_TABLE; one descriptor goes with each region, in this order."""
    return _PAIR.pack(len(regions), 0) + b"".join(region.encode() for region in regions)


def decode_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    """The regions of SET_MEM_TABLE. What comes after them is refused, as is a count above `MAX_FDS`."""
    if len(payload) < _PAIR.size:
        raise ProtocolError(f"vhost-user: a memory table of {len(payload)} bytes")
    count, _ = _PAIR.unpack_from(payload)
    if count > MAX_FDS:
        raise ProtocolError(f"vhost-user: a memory table of {count} regions, wanted at most {MAX_FDS}")
    _sized(f"a memory table of {count} regions", payload, _PAIR.size + count * _REGION.size)
    starts = range(_PAIR.size, len(payload), _REGION.size)
    return tuple(MemoryRegion.decode(payload[start : start + _REGION.size]) for start in starts)


# -- rings ----------------------------------------------------------------------------------------------------------

NO_FD: Final = 0x100
"""In the number that goes with a kick, call or error descriptor: there is none."""
_INDEX: Final = 0xFF


@dataclass(frozen=True, slots=True)
class VringState:
    """A number of one ring: its size, its base, or whether it is enabled."""

    index: int
    value: int

    def encode(self) -> bytes:
        """8 bytes."""
        return _PAIR.pack(self.index, self.value)

    @classmethod
    def decode(cls, payload: bytes) -> VringState:
        """From 8 bytes."""
        _sized("a ring's state", payload, _PAIR.size)
        return cls(*_PAIR.unpack(payload))


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where a ring is: IOVAs if bit 33 was accepted, else the front end's addresses. ``log`` is where the used ring
    is in the dirty log, a guest-physical address, and counts if bit 0 of ``flags`` is set."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def encode(self) -> bytes:
        """40 bytes."""
        return _RING.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def decode(cls, payload: bytes) -> VringAddr:
        """From 40 bytes."""
        _sized("a ring's addresses", payload, _RING.size)
        return cls(*_RING.unpack(payload))

    @property
    def logged(self) -> bool:
        """Whether what is written to the used ring goes into the dirty log."""
        return bool(self.flags & 1)


def encode_vring_fd(index: int, has_fd: bool) -> bytes:
    """The payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""
    return u64(index & _INDEX | (0 if has_fd else NO_FD))


def decode_vring_fd(payload: bytes) -> tuple[int, bool]:
    """Ring, and whether a descriptor goes with it. Bits that have no meaning are refused."""
    value = u64_of(payload)
    if value & ~(_INDEX | NO_FD):
        raise ProtocolError(f"vhost-user: 0x{value:x} for a ring's descriptor, wanted a ring below 256 and bit 8")
    return value & _INDEX, not value & NO_FD


# -- IOTLB ----------------------------------------------------------------------------------------------------------


class IotlbKind(enum.IntEnum):
    """What an IOTLB message wants."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


@dataclass(frozen=True, slots=True)
class IotlbMessage:
    """``size`` bytes at ``iova`` (a range that may end at 2**64, never behind it). ``uaddr`` and ``perm`` count in
    an UPDATE, ``perm`` in a MISS; what QEMU 7.2 leaves of them in an INVALIDATE is its stack, and is dropped. The range
    of an INVALIDATE is not judged: whoever takes it forgets rather too much than too little."""

    iova: IOVA
    size: int
    uaddr: UVA
    perm: Access
    kind: IotlbKind

    def encode(self) -> bytes:
        """32 bytes, as the C structure."""
        return _IOTLB.pack(self.iova, self.size, self.uaddr, self.perm.value, self.kind)

    @classmethod
    def decode(cls, payload: bytes) -> IotlbMessage:
        """From 26 bytes, which have all fields, to 32, with padding whose content does not matter."""
        if not _IOTLB_SHORTEST <= len(payload) <= _IOTLB.size:
            raise ProtocolError(
                f"vhost-user: an IOTLB message of {len(payload)} bytes, wanted {_IOTLB_SHORTEST} to {_IOTLB.size}"
            )
        iova, size, uaddr, perm, kind = _IOTLB.unpack(payload.ljust(_IOTLB.size, b"\0"))
        if kind not in IotlbKind.__members__.values():
            raise ProtocolError(f"vhost-user: an IOTLB message of type {kind}, wanted 1 to 4")
        if kind == IotlbKind.INVALIDATE:
            uaddr, perm = 0, 0
        elif iova + size > 1 << 64 or (kind == IotlbKind.UPDATE and uaddr + size > 1 << 64):
            raise ProtocolError(f"vhost-user: IOTLB range 0x{iova:x}+0x{size:x} (at 0x{uaddr:x}) ends behind 2**64")
        if perm > Access.RW.value:
            raise ProtocolError(f"vhost-user: permission {perm} in an IOTLB message, wanted 0 to 3")
        return cls(IOVA(iova), size, UVA(uaddr), Access(perm), IotlbKind(kind))


IOTLB_MESSAGE_SIZE: Final = HEADER_SIZE + _IOTLB.size
"""Bytes of a whole message of the IOTLB, as all front ends send it."""
_WHOLE_IOTLB: Final = struct.Struct("<12xQQ16x")


_MISS: Final = struct.Struct("<IIIQQQBB6x")


def encode_miss(page: int, access: Access, *, need_reply: bool) -> bytes:
    """A whole MISS message on the back-end channel: of a page, as ``Message`` would have it of an `IotlbMessage`."""
    flags = _VERSION | (_NEED_REPLY if need_reply else 0)
    return _MISS.pack(
        BackendRequest.IOTLB_MSG, flags, _IOTLB.size, page, PAGE_SIZE, 0, access.value, IotlbKind.MISS.value
    )


def iotlb_ranges(messages: bytes | bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """IOVA and size in each of several whole IOTLB messages, one behind the other."""
    yield from _WHOLE_IOTLB.iter_unpack(messages)


# -- configuration, in-flight requests, dirty log -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """Bytes of the device's configuration at ``offset``. An empty ``data`` in a reply says that there are none."""

    offset: int
    flags: int
    data: bytes

    def encode(self) -> bytes:
        """A header of 12 bytes, and the bytes."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, payload: bytes) -> ConfigSpace:
        """From a payload whose header names as many bytes as it has, `MAX_CONFIG` at most."""
        if len(payload) < _CONFIG.size:
            raise ProtocolError(f"vhost-user: a configuration message of {len(payload)} bytes")
        offset, size, flags = _CONFIG.unpack_from(payload)
        if size > MAX_CONFIG or offset + size > MAX_CONFIG:
            raise ProtocolError(f"vhost-user: configuration 0x{offset:x}+0x{size:x}, wanted {MAX_CONFIG} bytes at most")
        _sized(f"a configuration message for {size} bytes", payload, _CONFIG.size + size)
        return cls(offset, flags, payload[_CONFIG.size :])


@dataclass(frozen=True, slots=True)
class InflightDescription:
    """Where the requests in flight are noted: ``mmap_size`` bytes of a file at ``mmap_offset``."""

    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int

    def encode(self) -> bytes:
        """24 bytes, as the C structure."""
        return _INFLIGHT.pack(self.mmap_size, self.mmap_offset, self.queues, self.queue_size) + bytes(4)

    @classmethod
    def decode(cls, payload: bytes) -> InflightDescription:
        """From the 20 bytes that the fields take, or 24 with the padding of the C structure."""
        if len(payload) not in (_INFLIGHT.size, _INFLIGHT.size + 4):
            raise ProtocolError(
                f"vhost-user: a description of {len(payload)} bytes of what is in flight, wanted 20 or 24"
            )
        return cls(*_INFLIGHT.unpack_from(payload))


@dataclass(frozen=True, slots=True)
class LogDescription:
    """Where the dirty log is: ``size`` bytes of a file at ``offset``, one bit for each 4 KiB page."""

    size: int
    offset: int

    def encode(self) -> bytes:
        """16 bytes."""
        return _LOG.pack(self.size, self.offset)

    @classmethod
    def decode(cls, payload: bytes) -> LogDescription:
        """From 16 bytes."""
        _sized("a description of a dirty log", payload, _LOG.size)
        return cls(*_LOG.unpack(payload))
