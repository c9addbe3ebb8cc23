# SPDX-License-Identifier: Apache-2.0
"""VDUSE's numbers and bytes: against those that a kernel was seen to take, and what is refused of what comes back."""

from __future__ import annotations

import struct

import pytest

from virtiova.addr import Access
from virtiova.errors import ProtocolError, UsageError
from virtiova.wire import vduse as wire
from virtiova.wire.vduse import IotlbEntry, QueueInfo, Request, RequestKind


def test_numbers_of_calls_are_the_kernels() -> None:
    assert (wire.GET_API_VERSION, wire.CREATE_DEV, wire.IOTLB_GET_FD) == (0x80088100, 0x41508102, 0xC0208110)
    assert (wire.DEV_GET_FEATURES, wire.VQ_SETUP) == (0x80088111, 0x40208114)
    assert len(QueueInfo.ask(0)) == wire.VQ_GET_INFO >> 16 & 0x3FFF == 48


@pytest.mark.parametrize(
    "request_",
    [
        Request(RequestKind.GET_VQ_STATE, 7, index=3),
        Request(RequestKind.SET_STATUS, 8, status=15),
        Request(RequestKind.UPDATE_IOTLB, 9, start=0, last=(1 << 64) - 1),
    ],
)
def test_messages_come_out_as_they_went_in(request_: Request) -> None:
    assert len(request_.encode()) == wire.MESSAGE_SIZE
    assert Request.decode(request_.encode()) == request_


def test_a_message_of_no_known_type_can_be_answered() -> None:
    with pytest.raises(wire.UnknownRequest) as found:
        Request.decode(struct.pack("=II", 3, 77).ljust(wire.MESSAGE_SIZE, b"\0"))
    assert found.value.number == 77
    with pytest.raises(ProtocolError):
        Request.decode(bytes(wire.MESSAGE_SIZE - 1))


@pytest.mark.parametrize("name", ["", "a/b", "control", "..", "x" * 256, "a b", "a\0b", "ä"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError):
        wire.name_bytes(name)


def test_a_region_is_bounded() -> None:
    good = struct.pack("=QQQB7x", 4096, 0x1000, 0x1FFF, 1)
    assert IotlbEntry.decode(good) == IotlbEntry(4096, 0x1000, 0x1FFF, Access.READ)
    for offset, start, last, perm in ((0, 2, 1, 3), (0, 0, 1, 0), (0, 0, 1, 4), (1 << 63, 0, 1, 3), (0, 0, 1 << 63, 3)):
        with pytest.raises(ProtocolError):
            IotlbEntry.decode(struct.pack("=QQQB7x", offset, start, last, perm))
