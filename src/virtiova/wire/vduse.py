# SPDX-License-Identifier: Apache-2.0
"""VDUSE as numbers and bytes: ``/dev/vduse/control`` and ``/dev/vduse/NAME``, a vDPA device served by a process.

Source: Linux ``include/uapi/linux/vduse.h``, API version 0. Everything is in the machine's own byte order; the numbers
are those of the generic ioctl encoding (x86, Arm).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from virtiova.addr import Access
from virtiova.errors import ProtocolError, UsageError
from virtiova.wire.vhost import Direction

API_VERSION: Final = 0
_TYPE: Final = 0x81


def _ioctl(number: int, size: int = 0, direction: Direction = Direction.NONE) -> int:
    return direction << 30 | size << 16 | _TYPE << 8 | number


_CONFIG: Final = struct.Struct("=256sIIQII52xI")
_ENTRY: Final = struct.Struct("=QQQB7x")
_QUEUE: Final = struct.Struct("=IH26x")
_INFO: Final = struct.Struct("=IIQQQHHHHB7x")
_EVENT: Final = struct.Struct("=Ii")
_HEAD: Final = struct.Struct("=II16x")
_RANGE: Final = struct.Struct("=QQ")
_STATE: Final = struct.Struct("=IHHHH")
_INDEX: Final = struct.Struct("=I")
NAME_SIZE: Final = 256
CONFIG_MAX: Final = 4096
"""Bytes of configuration that the kernel takes: a page."""
MESSAGE_SIZE: Final = 152
"""``struct vduse_dev_request`` and ``struct vduse_dev_response``."""

GET_API_VERSION: Final = _ioctl(0x00, 8, Direction.READ)
SET_API_VERSION: Final = _ioctl(0x01, 8, Direction.WRITE)
CREATE_DEV: Final = _ioctl(0x02, _CONFIG.size, Direction.WRITE)
DESTROY_DEV: Final = _ioctl(0x03, NAME_SIZE, Direction.WRITE)
IOTLB_GET_FD: Final = _ioctl(0x10, _ENTRY.size, Direction.BOTH)
DEV_GET_FEATURES: Final = _ioctl(0x11, 8, Direction.READ)
VQ_SETUP: Final = _ioctl(0x14, _QUEUE.size, Direction.WRITE)
VQ_GET_INFO: Final = _ioctl(0x15, _INFO.size, Direction.BOTH)
VQ_SETUP_KICKFD: Final = _ioctl(0x16, _EVENT.size, Direction.WRITE)
VQ_INJECT_IRQ: Final = _ioctl(0x17, 4, Direction.WRITE)

SERVING: Final = (DESTROY_DEV, IOTLB_GET_FD, DEV_GET_FEATURES, VQ_GET_INFO, VQ_SETUP_KICKFD, VQ_INJECT_IRQ)
"""What is asked of the kernel once a device is there, and nothing else."""


class RequestKind(IntEnum):
    """``enum vduse_req_type``."""

    GET_VQ_STATE = 0
    SET_STATUS = 1
    UPDATE_IOTLB = 2


# -- the device -----------------------------------------------------------------------------------------------------


def name_bytes(name: str) -> bytes:
    """``char name[VDUSE_NAME_MAX]``. `UsageError` for what is no name of a file in ``/dev/vduse``."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) < NAME_SIZE or b"/" in raw or b"\0" in raw or name in (".", "..", "control"):
        raise UsageError(f"{name!r} is no name for a device: 1 to {NAME_SIZE - 1} bytes without a slash, not 'control'")
    if not all(0x21 <= byte <= 0x7E for byte in raw):
        raise UsageError(f"{name!r} is no name for a device: wanted printable ASCII without blanks")
    return raw.ljust(NAME_SIZE, b"\0")


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """``struct vduse_dev_config``: what the device is."""

    name: str
    device_id: int
    features: int
    queues: int
    config: bytes
    vendor_id: int = 0x1AF4
    align: int = 4096

    def encode(self) -> bytes:
        """336 bytes and the configuration. `UsageError` for a name or configuration that the kernel does not take."""
        if len(self.config) > CONFIG_MAX:
            raise UsageError(f"{len(self.config)} bytes of configuration, VDUSE takes {CONFIG_MAX}")
        head = _CONFIG.pack(
            name_bytes(self.name),
            self.vendor_id,
            self.device_id,
            self.features,
            self.queues,
            self.align,
            len(self.config),
        )
        return head + self.config


def queue_config(index: int, max_size: int) -> bytes:
    """``struct vduse_vq_config``: 32 bytes."""
    return _QUEUE.pack(index, max_size)


def queue_eventfd(index: int, fd: int) -> bytes:
    """``struct vduse_vq_eventfd``: 8 bytes; ``fd`` -1 takes it away."""
    return _EVENT.pack(index, fd)


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """``struct vduse_vq_info``: a ring as its driver set it up. ``base``: the available index to begin with; of a
    packed ring with the wrap counter in bit 15. Nothing of it is checked yet."""

    index: int
    size: int
    desc: int
    driver: int
    device: int
    base: int
    ready: bool

    @staticmethod
    def ask(index: int) -> bytearray:
        """48 bytes for the kernel to fill in."""
        return bytearray(_INFO.pack(index, 0, 0, 0, 0, 0, 0, 0, 0, 0))

    @classmethod
    def decode(cls, data: bytes | bytearray, *, packed: bool) -> QueueInfo:
        """What the kernel filled in."""
        index, size, desc, driver, device, first, second, _, _, ready = _INFO.unpack(data)
        base = (first & 1) << 15 | second & 0x7FFF if packed else first
        return cls(index, size, desc, driver, device, base, bool(ready))


@dataclass(frozen=True, slots=True)
class IotlbEntry:
    """``struct vduse_iotlb_entry``: addresses from ``start`` to ``last``, both included, and where in a file."""

    offset: int
    start: int
    last: int
    access: Access

    @staticmethod
    def ask(start: int, last: int) -> bytearray:
        """32 bytes for the kernel to fill in with the first region that has one of these addresses."""
        return bytearray(_ENTRY.pack(0, start, last, 0))

    @classmethod
    def decode(cls, data: bytes | bytearray) -> IotlbEntry:
        """What the kernel filled in. `ProtocolError` for what is no region."""
        offset, start, last, perm = _ENTRY.unpack(data)
        if last < start or perm not in (1, 2, 3) or last - start >= 1 << 63 or offset > (1 << 63) - 1 - (last - start):
            raise ProtocolError(f"a region from 0x{start:x} to 0x{last:x} at 0x{offset:x}, access {perm}")
        return cls(offset, start, last, Access(perm))


# -- messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """``struct vduse_dev_request``. Of ``index``, ``status``, ``start`` and ``last`` those that its kind has."""

    kind: RequestKind
    number: int
    index: int = 0
    status: int = 0
    start: int = 0
    last: int = 0

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """One message as it was read. `ProtocolError` for what is none."""
        if len(data) != MESSAGE_SIZE:
            raise ProtocolError(f"a message of {len(data)} bytes, wanted {MESSAGE_SIZE}")
        raw, number = _HEAD.unpack_from(data)
        try:
            kind = RequestKind(raw)
        except ValueError:
            raise UnknownRequest(number, f"a message of type {raw}, wanted 0 to 2") from None
        if kind is RequestKind.GET_VQ_STATE:
            return cls(kind, number, index=_INDEX.unpack_from(data, _HEAD.size)[0])
        if kind is RequestKind.SET_STATUS:
            return cls(kind, number, status=data[_HEAD.size])
        start, last = _RANGE.unpack_from(data, _HEAD.size)
        if last < start:
            raise UnknownRequest(number, f"addresses from 0x{start:x} to 0x{last:x}")
        return cls(kind, number, start=start, last=last)

    def encode(self) -> bytes:
        """152 bytes, as the kernel sends them."""
        if self.kind is RequestKind.GET_VQ_STATE:
            body = _INDEX.pack(self.index)
        elif self.kind is RequestKind.SET_STATUS:
            body = bytes([self.status])
        else:
            body = _RANGE.pack(self.start, self.last)
        return (_HEAD.pack(self.kind, self.number) + body).ljust(MESSAGE_SIZE, b"\0")


class UnknownRequest(ProtocolError):
    """A message that nobody knows what to do with, but that can be answered: ``number``."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def response(number: int, *, ok: bool, state: bytes = b"") -> bytes:
    """``struct vduse_dev_response``: 152 bytes."""
    return (_HEAD.pack(number, 0 if ok else 1) + state).ljust(MESSAGE_SIZE, b"\0")


def queue_state(index: int, base: int, *, packed: bool) -> bytes:
    """``struct vduse_vq_state``: where a ring stands, by its available index; of a packed ring with the wrap counter in
    bit 15, and nothing taken that was not given back."""
    if packed:
        return _STATE.pack(index, base >> 15, base & 0x7FFF, base >> 15, base & 0x7FFF)
    return _STATE.pack(index, base, 0, 0, 0)
