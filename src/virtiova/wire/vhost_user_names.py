# SPDX-License-Identifier: Apache-2.0
"""The numbers of the vhost-user protocol, and their names: requests, protocol features, feature bits of its own.

Source: QEMU ``docs/interop/vhost-user.rst``. `wire.vhost_user` has them, too: whoever speaks the protocol needs both.
"""

from __future__ import annotations

import enum
from typing import Final, TypeVar

F_LOG_ALL: Final = 26
"""The virtio feature bit that turns the dirty log on and off."""
F_PROTOCOL_FEATURES: Final = 30
"""The virtio feature bit of vhost-user's own: there are protocol features, and rings start disabled."""


class Request(enum.IntEnum):
    """Front end to back end, on the main channel."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(enum.IntEnum):
    """Back end to front end, on the back-end channel."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(enum.IntEnum):
    """Bit numbers of the protocol features."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22


_Name = TypeVar("_Name", Request, BackendRequest, ProtocolFeature)


def _name(kind: type[_Name], number: int) -> str:
    try:
        return kind(number).name
    except ValueError:
        return str(number)


def request_name(number: int) -> str:
    """A request on the main channel by name; the number for one that is not known."""
    return _name(Request, number)


def protocol_feature_names(word: int) -> list[str]:
    """The protocol features in ``word`` by name, unknown ones as their bit number, lowest first."""
    return [_name(ProtocolFeature, bit) for bit in range(word.bit_length()) if word >> bit & 1]
