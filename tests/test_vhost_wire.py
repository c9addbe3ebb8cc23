# SPDX-License-Identifier: Apache-2.0
"""The kernel's vhost interface as bytes: the numbers and places that ``linux/vhost.h`` makes of its text."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import IOVA, UVA, Access
from virtiova.errors import ProtocolError
from virtiova.wire import vhost
from virtiova.wire.vhost import BatchKind
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

NUMBERS = {
    "GET_FEATURES": 0x8008AF00,
    "SET_FEATURES": 0x4008AF00,
    "SET_OWNER": 0x0000AF01,
    "RESET_OWNER": 0x0000AF02,
    "SET_MEM_TABLE": 0x4008AF03,
    "SET_VRING_NUM": 0x4008AF10,
    "SET_VRING_ADDR": 0x4028AF11,
    "SET_VRING_BASE": 0x4008AF12,
    "GET_VRING_BASE": 0xC008AF12,
    "SET_VRING_KICK": 0x4008AF20,
    "SET_VRING_CALL": 0x4008AF21,
    "SET_VRING_ERR": 0x4008AF22,
    "SET_BACKEND_FEATURES": 0x4008AF25,
    "GET_BACKEND_FEATURES": 0x8008AF26,
    "NET_SET_BACKEND": 0x4008AF30,
    "VSOCK_SET_GUEST_CID": 0x4008AF60,
    "VSOCK_SET_RUNNING": 0x4004AF61,
    "VDPA_GET_DEVICE_ID": 0x8004AF70,
    "VDPA_GET_STATUS": 0x8001AF71,
    "VDPA_SET_STATUS": 0x4001AF72,
    "VDPA_SET_CONFIG_CALL": 0x4004AF77,
    "VDPA_GET_CONFIG": 0x8008AF73,
    "VDPA_SET_CONFIG": 0x4008AF74,
    "VDPA_SET_VRING_ENABLE": 0x4008AF75,
    "VDPA_GET_VRING_NUM": 0x8002AF76,
    "VDPA_GET_IOVA_RANGE": 0x8010AF78,
    "VDPA_GET_CONFIG_SIZE": 0x8004AF79,
    "VDPA_GET_VQS_COUNT": 0x8004AF80,
}
"""What a C compiler prints for each."""


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_numbers_of_calls(name: str, number: int) -> None:
    assert getattr(vhost, name) == number


def test_every_call_is_compared() -> None:
    ours = {
        name for name, value in vars(vhost).items() if isinstance(value, int) and name.isupper() and value >> 8 & 0xAF
    }
    assert {name for name in ours if not name.startswith("_")} <= NUMBERS.keys()


UPDATE = IotlbMessage(IOVA(0x1122334455667000), 0x2000, UVA(0x7F0011223000), Access.RW, IotlbKind.UPDATE)


@pytest.mark.parametrize(("v2", "form"), [(False, 1), (True, 2)])
def test_where_the_parts_of_a_message_are(v2: bool, form: int) -> None:
    data = vhost.encode_iotlb(UPDATE, v2=v2)
    assert len(data) == 72
    assert struct.unpack_from("=II", data) == (form, 0)
    assert struct.unpack_from("=QQQBB", data, 8) == (0x1122334455667000, 0x2000, 0x7F0011223000, 3, 2)
    assert not any(data[34:])


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(list(Access)),
    st.sampled_from(list(IotlbKind)),
    st.booleans(),
)
def test_messages_there_and_back(iova: int, size: int, uaddr: int, access: Access, kind: IotlbKind, v2: bool) -> None:
    message = IotlbMessage(IOVA(iova), size, UVA(uaddr), access, kind)
    assert vhost.decode_iotlb(vhost.encode_iotlb(message, v2=v2)) == message


@given(st.binary(max_size=100) | st.binary(min_size=72, max_size=72))
def test_whatever_is_read_is_a_message_or_said_to_be_none(data: bytes) -> None:
    try:
        message = vhost.decode_iotlb(data)
    except ProtocolError:
        return
    assert len(data) == 72
    assert message.kind in IotlbKind


@pytest.mark.parametrize(("kind", "number"), [(BatchKind.BEGIN, 5), (BatchKind.END, 6)])
def test_borders_of_a_batch(kind: BatchKind, number: int) -> None:
    data = vhost.encode_batch(kind)
    assert (len(data), data[0], data[33]) == (72, 2, number)


def test_structures_of_rings_and_memory() -> None:
    assert vhost.vring_state(3, 256) == struct.pack("=II", 3, 256)
    assert vhost.state_value(vhost.vring_state(3, 0x80018000)) == 0x80018000
    assert vhost.vring_file(1, -1) == struct.pack("=Ii", 1, -1)
    # In the order of the structure, which is not that of the rings in memory.
    assert vhost.vring_addr(1, desc=0x10, used=0x20, avail=0x30) == struct.pack("=IIQQQQ", 1, 0, 0x10, 0x20, 0x30, 0)
    table = vhost.memory_table([(0x1000, 0x2000, 0x7F0000000000), (0x100000, 0x3000, 0x7E0000000000)])
    assert struct.unpack("=II8Q", table) == (
        *(2, 0),
        *(0x1000, 0x2000, 0x7F0000000000, 0),
        *(0x100000, 0x3000, 0x7E0000000000, 0),
    )
