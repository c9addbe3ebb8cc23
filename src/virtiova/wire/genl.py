# SPDX-License-Identifier: Apache-2.0
"""Generic netlink as bytes, as far as it takes to have a vDPA device taken off its bus.

Sources: Linux ``include/uapi/linux/netlink.h``, ``genetlink.h`` and ``vdpa.h``. Everything is in the machine's own byte
order.
"""

from __future__ import annotations

import struct
from typing import Final

from virtiova.errors import ProtocolError

_HEAD: Final = struct.Struct("=IHHII")
_GENL: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR: Final = struct.Struct("=i")
_U16: Final = struct.Struct("=H")
_NLMSG_ERROR: Final = 2
_REQUEST: Final = 1
_ACK: Final = 4
_CONTROLLER: Final = 0x10
_GET_FAMILY: Final = 3
_FAMILY_ID: Final = 1
_FAMILY_NAME: Final = 2
_VDPA_DEV_DEL: Final = 4
_VDPA_DEV_NAME: Final = 4


def _message(family: int, command: int, attribute: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    length = _ATTRIBUTE.size + len(value)
    body = _GENL.pack(command, 1, 0) + _ATTRIBUTE.pack(length, attribute) + value
    body += b"\0" * (-len(body) % 4)
    return _HEAD.pack(_HEAD.size + len(body), family, _REQUEST | _ACK, 1, 0) + body


def family_query(name: str) -> bytes:
    """Which number has the family ``name``?"""
    return _message(_CONTROLLER, _GET_FAMILY, _FAMILY_NAME, name)


def vdpa_delete(family: int, name: str) -> bytes:
    """Take the vDPA device ``name`` off its bus. ``family``: the number of "vdpa"."""
    return _message(family, _VDPA_DEV_DEL, _VDPA_DEV_NAME, name)


def error_of(data: bytes) -> int | None:
    """The error number of an acknowledgement, 0 for none; None for a message that is something else."""
    kind = _kind(data)
    if kind != _NLMSG_ERROR:
        return None
    if len(data) < _HEAD.size + _ERROR.size:
        raise ProtocolError(f"netlink: an acknowledgement of {len(data)} bytes")
    return -int(_ERROR.unpack_from(data, _HEAD.size)[0])


def family_of(data: bytes) -> int:
    """The number in the answer to `family_query`. `ProtocolError` if there is none."""
    _kind(data)
    at = _HEAD.size + _GENL.size
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            break
        if kind == _FAMILY_ID and length == _ATTRIBUTE.size + _U16.size:
            return int(_U16.unpack_from(data, at + _ATTRIBUTE.size)[0])
        at += length + -length % 4
    raise ProtocolError("netlink: an answer without the number of the family")


def _kind(data: bytes) -> int:
    if len(data) < _HEAD.size:
        raise ProtocolError(f"netlink: a message of {len(data)} bytes")
    return int(_HEAD.unpack_from(data)[1])
