# SPDX-License-Identifier: Apache-2.0
"""vhost-user as bytes: held against messages that QEMU sent, and against whatever anybody else might send."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.errors import ProtocolError
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    BackendRequest,
    ConfigSpace,
    Framer,
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    LogDescription,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
messages = st.builds(
    Message,
    request=u32,
    payload=st.binary(max_size=80),
    fds=st.lists(st.integers(3, 1000), max_size=wire.MAX_FDS).map(tuple),
    reply=st.booleans(),
    need_reply=st.booleans(),
)


# -- messages as QEMU 7.2 sends them ------------------------------------------------------------------------------


def test_a_number() -> None:
    sent = Message(Request.SET_FEATURES, wire.u64(0x370000000)).encode()
    assert sent == bytes.fromhex("02000000 01000000 08000000 0000007003000000")
    assert wire.u64_of(sent[12:]) == 0x370000000


def test_flags() -> None:
    assert Message(Request.GET_FEATURES, need_reply=True).encode() == bytes.fromhex("01000000 09000000 00000000")
    asked = Message(Request.SET_BACKEND_REQ_FD, fds=(9,), need_reply=True)
    assert asked.acknowledge().encode() == bytes.fromhex("15000000 05000000 08000000 0000000000000000")
    assert asked.acknowledge(False).encode()[-8:] == wire.u64(1)


def test_a_miss_and_what_answers_it() -> None:
    miss = IotlbMessage(IOVA(0xFFFFF042), 0, UVA(0), Access.READ, IotlbKind.MISS)
    sent = Message(BackendRequest.IOTLB_MSG, miss.encode(), need_reply=True).encode()
    assert sent == bytes.fromhex("01000000 09000000 20000000 42f0ffff00000000") + bytes(16) + b"\1\1" + bytes(6)
    update = struct.pack("<QQQBB6s", 0xFFFFF000, 0x1000, 0x7F0000C2D000, 3, 2, b"\xa5" * 6)
    expected = IotlbMessage(IOVA(0xFFFFF000), 0x1000, UVA(0x7F0000C2D000), Access.RW, IotlbKind.UPDATE)
    assert IotlbMessage.decode(update) == expected
    assert IotlbMessage.decode(update[:26]) == expected


@pytest.mark.parametrize("perm", [6, 178])
def test_garbage_in_an_invalidation_is_dropped(perm: int) -> None:
    found = IotlbMessage.decode(struct.pack("<QQQBB6x", 0xFEF00000, 0xFFFFFFFF01100000, 0x7FFD12345678, perm, 3))
    assert found == IotlbMessage(IOVA(0xFEF00000), 0xFFFFFFFF01100000, UVA(0), Access.NONE, IotlbKind.INVALIDATE)
    assert found.iova + found.size == 2**64


def test_a_memory_table_of_a_small_machine() -> None:
    table = struct.pack("<II", 3, 0)
    regions = [(0, 0xC0000), (0xE0000, 0x10000), (0x100000, 0x3F00000)]
    for gpa, size in regions:
        table += struct.pack("<QQQQ", gpa, size, 0x7F0000000000 + gpa, gpa)
    found = wire.decode_table(table)
    assert [(region.gpa, region.size) for region in found] == regions
    assert found[2] == MemoryRegion(GPA(0x100000), 0x3F00000, UVA(0x7F0000100000), 0x100000)
    assert wire.encode_table(found) == table
    assert MemoryRegion.decode_single(bytes(8) + table[-32:]) == found[2]
    assert found[2].encode_single() == bytes(8) + table[-32:]


def test_a_rings_addresses_in_their_order() -> None:
    payload = struct.pack("<IIQQQQ", 0, 0, 0xFFFFF000, 0xFFFFF080, 0xFFFFF040, 0)
    found = VringAddr.decode(payload)
    assert (found.desc, found.avail, found.used) == (0xFFFFF000, 0xFFFFF040, 0xFFFFF080)
    assert found.encode() == payload
    assert not found.logged


def test_descriptors_of_a_ring() -> None:
    assert wire.decode_vring_fd(wire.u64(0x101)) == (1, False)
    assert wire.decode_vring_fd(wire.u64(3)) == (3, True)
    assert wire.encode_vring_fd(3, has_fd=False) == wire.u64(0x103)
    with pytest.raises(ProtocolError, match="0x200"):
        wire.decode_vring_fd(wire.u64(0x200))


def test_a_configuration() -> None:
    asked = struct.pack("<III", 0, 57, 0) + bytes(57)
    assert ConfigSpace.decode(asked) == ConfigSpace(0, 0, bytes(57))
    answered = ConfigSpace(0, 0, b"\x80" + bytes(56)).encode()
    assert answered == asked[:12] + b"\x80" + bytes(56)


def test_names() -> None:
    assert wire.protocol_feature_names(0x2029) == ["MQ", "REPLY_ACK", "BACKEND_REQ", "RESET_DEVICE"]
    assert wire.protocol_feature_names(1 << 40) == ["40"]
    assert wire.request_name(22) == "IOTLB_MSG"
    assert wire.request_name(99) == "99"
    assert [feature.value for feature in ProtocolFeature] == list(range(23))
    assert [request.value for request in Request] == list(range(1, 41))


# -- whatever there is survives being sent ------------------------------------------------------------------------


@given(st.lists(messages, max_size=6))
def test_messages_survive_a_stream_that_is_read_as_wanted(sent: list[Message]) -> None:
    """Descriptors come with the first byte of their message, however many messages lie in the socket."""
    framer, found = Framer(), list[Message]()
    for message in sent:
        data, fds = message.encode(), message.fds
        while data:
            step = framer.wanted
            assert step > 0
            found += framer.feed(data[:step], fds)
            data, fds = data[step:], ()
    assert found == sent
    assert framer.idle
    assert framer.wanted == wire.HEADER_SIZE


@given(st.lists(messages.filter(lambda message: not message.fds), min_size=1, max_size=5), st.data())
def test_messages_survive_any_cut(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(message.encode() for message in sent)
    cuts = sorted({0, len(stream), *data.draw(st.lists(st.integers(0, len(stream)), max_size=8))})
    framer = Framer()
    assert [found for start, end in pairwise(cuts) for found in framer.feed(stream[start:end])] == sent


ranges = st.tuples(u64, u64).map(lambda pair: (pair[0], min(pair[1], 2**64 - pair[0])))


@given(ranges, ranges, st.sampled_from([Access.READ, Access.WRITE, Access.RW]), st.sampled_from(list(IotlbKind)))
def test_iotlb_messages_survive(at: tuple[int, int], to: tuple[int, int], perm: Access, kind: IotlbKind) -> None:
    if kind is IotlbKind.INVALIDATE:
        to, perm = (0, 0), Access.NONE
    message = IotlbMessage(IOVA(at[0]), min(at[1], to[1] or at[1], 2**64 - to[0]), UVA(to[0]), perm, kind)
    assert IotlbMessage.decode(message.encode()) == message


@given(u64, u64, u64, u64, u32, st.integers(0, 2**16 - 1), st.binary(max_size=100))
def test_other_values_survive(a: int, b: int, c: int, d: int, index: int, short: int, data: bytes) -> None:
    region = MemoryRegion(GPA(a), b, UVA(c), d)
    assert MemoryRegion.decode(region.encode()) == region
    assert MemoryRegion.decode_single(region.encode_single()) == region
    assert wire.decode_table(wire.encode_table([region] * 8)) == (region,) * 8
    assert VringAddr.decode(VringAddr(index, 1, a, b, c, d).encode()) == VringAddr(index, 1, a, b, c, d)
    assert VringState.decode(VringState(index, short).encode()) == VringState(index, short)
    config = ConfigSpace(short % 150, index, data)
    assert ConfigSpace.decode(config.encode()) == config
    inflight = InflightDescription(a, b, short, 128)
    assert InflightDescription.decode(inflight.encode()) == inflight
    assert InflightDescription.decode(inflight.encode()[:20]) == inflight
    assert LogDescription.decode(LogDescription(a, b).encode()) == LogDescription(a, b)


# -- hostile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (struct.pack("<III", 1, 0, 0), "wanted version 1"),
        (struct.pack("<III", 1, 2, 0), "wanted version 1"),
        (struct.pack("<III", 24, 1, 0x1001), "GET_CONFIG with 0x1001 bytes"),
        (struct.pack("<III", 1, 1, 0xFFFFFFFF), "0xffffffff bytes"),
    ],
)
def test_a_header_without_meaning(header: bytes, said: str) -> None:
    framer = Framer()
    good = Message(Request.SET_OWNER).encode()
    with pytest.raises(ProtocolError, match=said):
        framer.feed(good + header, (7, 8))
    assert sorted(framer.abandon()) == [7, 8]
    assert framer.feed(good) == [Message(Request.SET_OWNER)]


def test_too_many_descriptors() -> None:
    framer = Framer()
    framer.feed(b"\5", range(100, 105))
    with pytest.raises(ProtocolError, match="10 file descriptors, wanted at most 8"):
        framer.feed(b"\0", range(105, 110))
    assert framer.abandon() == tuple(range(100, 110))
    assert framer.abandon() == ()


def test_descriptors_of_an_unfinished_message_are_not_forgotten() -> None:
    framer = Framer()
    assert framer.feed(Message(Request.SET_MEM_TABLE, bytes(8)).encode()[:15], (7,)) == []
    assert not framer.idle
    assert framer.wanted == 5
    assert framer.abandon() == (7,)
    assert framer.idle


@pytest.mark.parametrize(
    ("decode", "payload", "said"),
    [
        (wire.u64_of, bytes(7), "7 bytes, wanted 8"),
        (wire.u64_of, bytes(9), "9 bytes, wanted 8"),
        (wire.decode_table, bytes(7), "table of 7 bytes"),
        (wire.decode_table, struct.pack("<II", 1, 0), "8 bytes, wanted 40"),
        (wire.decode_table, struct.pack("<II", 1, 0) + bytes(64), "72 bytes, wanted 40"),
        (wire.decode_table, struct.pack("<II", 9, 0) + bytes(288), "9 regions"),
        (wire.decode_table, struct.pack("<II", 0xFFFFFFFF, 0), "4294967295 regions"),
        (MemoryRegion.decode_single, bytes(32), "32 bytes, wanted 40"),
        (VringState.decode, bytes(12), "12 bytes, wanted 8"),
        (VringAddr.decode, bytes(39), "39 bytes, wanted 40"),
        (IotlbMessage.decode, bytes(25), "25 bytes"),
        (IotlbMessage.decode, bytes(33), "33 bytes"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 0, 1, 0, 1, 0), "type 0"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 0, 1, 0, 1, 5), "type 5"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 0, 1, 0, 4, 2), "permission 4"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 2**64 - 1, 2, 0, 3, 2), "behind 2"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 0, 2, 2**64 - 1, 3, 2), "behind 2"),
        (IotlbMessage.decode, struct.pack("<QQQBB", 2**64 - 1, 2, 0, 3, 1), "behind 2"),
        (ConfigSpace.decode, bytes(11), "11 bytes"),
        (ConfigSpace.decode, struct.pack("<III", 0, 60, 0), "12 bytes, wanted 72"),
        (ConfigSpace.decode, struct.pack("<III", 0, 257, 0) + bytes(257), "0x0\\+0x101"),
        (ConfigSpace.decode, struct.pack("<III", 0xFFFFFFFF, 1, 0) + bytes(1), "0xffffffff"),
        (InflightDescription.decode, bytes(21), "21 bytes"),
        (LogDescription.decode, bytes(8), "8 bytes, wanted 16"),
    ],
)
def test_a_payload_without_meaning(decode: Callable[[bytes], object], payload: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        decode(payload)


DECODERS: list[Callable[[bytes], object]] = [
    wire.u64_of,
    wire.decode_table,
    wire.decode_vring_fd,
    MemoryRegion.decode,
    MemoryRegion.decode_single,
    VringState.decode,
    VringAddr.decode,
    IotlbMessage.decode,
    ConfigSpace.decode,
    InflightDescription.decode,
    LogDescription.decode,
]


@given(st.sampled_from(DECODERS), st.binary(max_size=60))
def test_any_payload_is_a_value_or_a_protocol_error(decode: Callable[[bytes], object], payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert decode(payload) is not None


def _chunks(data: bytes, step: int) -> Iterator[bytes]:
    return (data[at : at + step] for at in range(0, len(data), step))


@given(st.binary(max_size=200), st.integers(1, 40))
def test_any_stream_is_messages_or_a_protocol_error(stream: bytes, step: int) -> None:
    framer = Framer()
    with contextlib.suppress(ProtocolError):
        for chunk in _chunks(stream, step):
            for message in framer.feed(chunk):
                assert len(message.payload) <= wire.MAX_PAYLOAD
            assert framer.wanted > 0
