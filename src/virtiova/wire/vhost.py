# SPDX-License-Identifier: Apache-2.0
"""The kernel's vhost interface as numbers and bytes: ``/dev/vhost-*`` and, on top of it, ``/dev/vhost-vdpa-*``.

Sources: Linux ``include/uapi/linux/vhost.h`` and ``vhost_types.h``. Everything is in the machine's own byte order; the
numbers are those of the generic ioctl encoding (x86, Arm).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final

from virtiova.addr import IOVA, UVA, Access
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

_TYPE: Final = 0xAF


class Direction(IntEnum):
    """Who gets bytes of an ioctl's argument: the top two bits of its number."""

    NONE = 0
    WRITE = 1
    READ = 2
    BOTH = 3


def _ioctl(number: int, size: int = 0, direction: Direction = Direction.NONE) -> int:
    return direction << 30 | size << 16 | _TYPE << 8 | number


GET_FEATURES: Final = _ioctl(0x00, 8, Direction.READ)
SET_FEATURES: Final = _ioctl(0x00, 8, Direction.WRITE)
SET_OWNER: Final = _ioctl(0x01)
RESET_OWNER: Final = _ioctl(0x02)
SET_MEM_TABLE: Final = _ioctl(0x03, 8, Direction.WRITE)
SET_VRING_NUM: Final = _ioctl(0x10, 8, Direction.WRITE)
SET_VRING_ADDR: Final = _ioctl(0x11, 40, Direction.WRITE)
SET_VRING_BASE: Final = _ioctl(0x12, 8, Direction.WRITE)
GET_VRING_BASE: Final = _ioctl(0x12, 8, Direction.BOTH)
SET_VRING_KICK: Final = _ioctl(0x20, 8, Direction.WRITE)
SET_VRING_CALL: Final = _ioctl(0x21, 8, Direction.WRITE)
SET_VRING_ERR: Final = _ioctl(0x22, 8, Direction.WRITE)
SET_BACKEND_FEATURES: Final = _ioctl(0x25, 8, Direction.WRITE)
GET_BACKEND_FEATURES: Final = _ioctl(0x26, 8, Direction.READ)
NET_SET_BACKEND: Final = _ioctl(0x30, 8, Direction.WRITE)
VSOCK_SET_GUEST_CID: Final = _ioctl(0x60, 8, Direction.WRITE)
VSOCK_SET_RUNNING: Final = _ioctl(0x61, 4, Direction.WRITE)
VDPA_GET_DEVICE_ID: Final = _ioctl(0x70, 4, Direction.READ)
VDPA_GET_STATUS: Final = _ioctl(0x71, 1, Direction.READ)
VDPA_SET_STATUS: Final = _ioctl(0x72, 1, Direction.WRITE)
VDPA_GET_CONFIG: Final = _ioctl(0x73, 8, Direction.READ)
VDPA_SET_CONFIG: Final = _ioctl(0x74, 8, Direction.WRITE)
VDPA_SET_VRING_ENABLE: Final = _ioctl(0x75, 8, Direction.WRITE)
VDPA_GET_VRING_NUM: Final = _ioctl(0x76, 2, Direction.READ)
VDPA_SET_CONFIG_CALL: Final = _ioctl(0x77, 4, Direction.WRITE)
VDPA_GET_IOVA_RANGE: Final = _ioctl(0x78, 16, Direction.READ)
VDPA_GET_CONFIG_SIZE: Final = _ioctl(0x79, 4, Direction.READ)
VDPA_GET_VQS_COUNT: Final = _ioctl(0x80, 4, Direction.READ)


class BackendFeature(IntFlag):
    """Bits of GET_BACKEND_FEATURES."""

    IOTLB_MSG_V2 = 1 << 1
    IOTLB_BATCH = 1 << 2
    IOTLB_ASID = 1 << 3
    SUSPEND = 1 << 4
    RESUME = 1 << 5
    ENABLE_AFTER_DRIVER_OK = 1 << 6
    DESC_ASID = 1 << 7
    IOTLB_PERSIST = 1 << 8


class BatchKind(IntEnum):
    """What an IOTLB message of a vDPA device may be besides `IotlbKind`: UPDATEs between the two take effect at
    once."""

    BEGIN = 5
    END = 6


MESSAGE_SIZE: Final = 72
_V1, _V2 = 1, 2
_MESSAGE: Final = struct.Struct("=IIQQQBB")
_STATE: Final = struct.Struct("=II")
_FILE: Final = struct.Struct("=Ii")
_ADDR: Final = struct.Struct("=IIQQQQ")
_TABLE: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")
_CONFIG: Final = struct.Struct("=II")
_RANGE: Final = struct.Struct("=QQ")
CONFIG_AT: Final = _CONFIG.size
"""Where the bytes begin in a `vdpa_config`."""


def encode_iotlb(message: IotlbMessage, *, v2: bool) -> bytes:
    """``struct vhost_msg`` or, for who took `BackendFeature.IOTLB_MSG_V2`, ``struct vhost_msg_v2``: 72 bytes."""
    return _message(message.iova, message.size, message.uaddr, message.perm.value, message.kind, v2=v2)


def encode_batch(kind: BatchKind) -> bytes:
    """A border of a batch (vhost-vdpa with `BackendFeature.IOTLB_BATCH`): 72 bytes."""
    return _message(0, 0, 0, 0, kind, v2=True)


def _message(iova: int, size: int, uaddr: int, perm: int, kind: int, *, v2: bool) -> bytes:
    return _MESSAGE.pack(_V2 if v2 else _V1, 0, iova, size, uaddr, perm, kind).ljust(MESSAGE_SIZE, b"\0")


def decode_iotlb(data: bytes) -> IotlbMessage:
    """One message as it was read. `ProtocolError` for what is none."""
    if len(data) != MESSAGE_SIZE:
        raise ProtocolError(f"an IOTLB message of {len(data)} bytes, wanted {MESSAGE_SIZE}")
    form, _, iova, size, uaddr, perm, kind = _MESSAGE.unpack_from(data)
    if form not in (_V1, _V2):
        raise ProtocolError(f"a message of type {form}, wanted an IOTLB message (1 or 2)")
    try:
        return IotlbMessage(IOVA(iova), size, UVA(uaddr), Access(perm), IotlbKind(kind))
    except ValueError as error:
        raise ProtocolError(f"an IOTLB message of kind {kind} and access {perm}") from error


def vring_state(index: int, value: int) -> bytearray:
    """``struct vhost_vring_state``: 8 bytes."""
    return bytearray(_STATE.pack(index, value))


def state_value(data: bytes | bytearray) -> int:
    """The number in a ``vhost_vring_state`` that was answered."""
    return int(_STATE.unpack(data)[1])


def vring_file(index: int, fd: int) -> bytes:
    """``struct vhost_vring_file``: 8 bytes; ``fd`` -1 takes it away."""
    return _FILE.pack(index, fd)


def vring_addr(index: int, desc: int, used: int, avail: int) -> bytes:
    """``struct vhost_vring_addr``: 40 bytes. IOVAs with bit 33, else addresses of the calling process."""
    return _ADDR.pack(index, 0, desc, used, avail, 0)


def memory_table(regions: Sequence[tuple[int, int, int]]) -> bytes:
    """``struct vhost_memory`` of (guest-physical address, size, our own address)."""
    return _TABLE.pack(len(regions), 0) + b"".join(_REGION.pack(gpa, size, uva, 0) for gpa, size, uva in regions)


def vdpa_config(offset: int, data: bytes) -> bytearray:
    """``struct vhost_vdpa_config``: bytes to write, or as many to be filled."""
    return bytearray(_CONFIG.pack(offset, len(data)) + data)


def iova_range(data: bytes) -> tuple[int, int]:
    """``struct vhost_vdpa_iova_range``: the first and the last IOVA."""
    first, last = _RANGE.unpack(data)
    return int(first), int(last)
