# SPDX-License-Identifier: Apache-2.0
"""virtio-iommu as bytes: requests field by field, and whatever a device might answer."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import Access
from virtiova.errors import ProtocolError
from virtiova.wire import virtio_iommu as wire
from virtiova.wire.virtio_iommu import Config, Event, ReservedRegion, Status

ALL_FEATURES = 0x77
MASK64 = 2**64 - 1


def test_requests() -> None:
    assert wire.attach(3, 0x18) == struct.pack("<IIIII", 1, 3, 0x18, 0, 0)
    assert wire.attach(3, 0x18, wire.ATTACH_F_BYPASS) == struct.pack("<IIIII", 1, 3, 0x18, 1, 0)
    assert wire.detach(3, 0x18) == struct.pack("<IIIQ", 2, 3, 0x18, 0)
    mapped = wire.map_request(3, 0x1000, 0x1FFF, 0x800000, Access.RW)
    assert mapped == struct.pack("<IIQQQI", 3, 3, 0x1000, 0x1FFF, 0x800000, 3)
    assert wire.map_request(3, 0, 0xFFF, 0, Access.READ)[-4:] == struct.pack("<I", wire.MAP_F_READ)
    assert wire.map_request(3, 0, 0xFFF, 0, Access.WRITE)[-4:] == struct.pack("<I", wire.MAP_F_WRITE)
    assert wire.unmap_request(3, 0x1000, 0x1FFF) == struct.pack("<IIQQI", 4, 3, 0x1000, 0x1FFF, 0)
    assert wire.probe(0x18) == struct.pack("<II", 5, 0x18) + bytes(64)


def test_the_last_page_of_the_address_space_can_be_named() -> None:
    (last,) = struct.unpack_from("<Q", wire.unmap_request(1, 0, MASK64), 16)
    assert last == MASK64


@pytest.mark.parametrize(
    ("tail", "used", "status"),
    [
        (b"\0\0\0\0", 4, Status.OK),
        (b"\5\0\0\0", 4, Status.RANGE),
        (b"\xee\xee\xee\xee", 0, Status.UNSUPP),
        (b"\x63\0\0\0", 4, 0x63),
    ],
)
def test_statuses(tail: bytes, used: int, status: int) -> None:
    assert wire.status_of(tail, used) == status


def test_statuses_in_words() -> None:
    assert wire.status_text(5) == "RANGE"
    assert wire.status_text(0x63) == "status 0x63"


@given(st.binary(max_size=8), st.integers(0, 2**32 - 1))
def test_any_tail_is_a_status_or_a_protocol_error(tail: bytes, used: int) -> None:
    with contextlib.suppress(ProtocolError):
        assert wire.status_text(wire.status_of(tail, used))


# -- configuration ------------------------------------------------------------------------------------------------

# As QEMU 7.2 has it.
QEMU = struct.pack("<QQQIIIB3x", 0xFFFFFFFFFFFFF000, 0, MASK64, 0, 0xFFFFFFFF, 512, 1)


def test_the_configuration_of_qemu() -> None:
    config = Config.unpack(QEMU, ALL_FEATURES)
    assert config == Config(0xFFFFFFFFFFFFF000, 0, MASK64, 0, 0xFFFFFFFF, 512, True)
    assert config.granule == 4096
    assert wire.CONFIG_BYPASS == 36
    assert QEMU[wire.CONFIG_BYPASS] == 1


def test_fields_of_features_that_were_not_taken_mean_nothing() -> None:
    data = struct.pack("<QQQIIIB3x", 0x10000, 5, 4, 9, 8, 7, 0)
    config = Config.unpack(data, 0)
    assert (config.input_first, config.input_last) == (0, MASK64)
    assert (config.domain_first, config.domain_last) == (0, 0xFFFFFFFF)
    assert (config.probe_size, config.granule) == (0, 0x10000)
    for bit in (wire.F_INPUT_RANGE, wire.F_DOMAIN_RANGE):
        with pytest.raises(ProtocolError, match="no addresses"):
            Config.unpack(data, 1 << bit)


@given(st.binary(min_size=39, max_size=41), st.integers(0, 127))
def test_any_configuration_can_be_used_or_is_a_protocol_error(data: bytes, features: int) -> None:
    with contextlib.suppress(ProtocolError):
        config = Config.unpack(data, features)
        assert len(data) == wire.CONFIG_SIZE
        assert config.granule & (config.granule - 1) == 0 < config.granule
        assert config.input_first <= config.input_last
        assert config.domain_first <= config.domain_last


# -- properties ---------------------------------------------------------------------------------------------------


def resv(subtype: int, first: int, last: int, kind: int = 1) -> bytes:
    return struct.pack("<HHB3xQQ", kind, 20, subtype, first, last)


def test_properties() -> None:
    msi = resv(1, 0xFEE00000, 0xFEEFFFFF)
    other = struct.pack("<HH5s", 0x7, 5, b"spare")
    hole = resv(0, 0x1000, 0x1FFF, kind=0xF001)  # the upper four bits of the type are reserved
    found = wire.properties(other + msi + hole + bytes(64))
    assert found == [ReservedRegion(0xFEE00000, 0xFEEFFFFF, True), ReservedRegion(0x1000, 0x1FFF, False)]
    assert wire.properties(bytes(512)) == []
    assert wire.properties(b"") == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (resv(0, 0, 1)[:-1], "property of 20 bytes"),
        (struct.pack("<HH", 1, 0xFFFF), "property of 65535 bytes"),
        (struct.pack("<HHQ", 1, 8, 0), "reserved region of 8 bytes"),
        (resv(0, 2, 1), "ends before"),
    ],
)
def test_broken_properties(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        wire.properties(data)


@given(st.binary(max_size=200))
def test_any_properties_are_regions_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert all(0 <= region.first <= region.last <= MASK64 for region in wire.properties(data))


# -- events -------------------------------------------------------------------------------------------------------


def test_events() -> None:
    data = struct.pack("<B3xII4xQ", 2, 0x102, 0x18, 0x203004)
    event = Event.unpack(data, 24)
    assert event == Event(reason=2, read=False, write=True, endpoint=0x18, address=0x203004)
    assert event.text == "no mapping that allows it (virtio-iommu fault 0x2)"
    without = Event.unpack(struct.pack("<B3xII4xQ", 1, 1, 0x18, 0x203004), 24)
    assert (without.address, without.read, without.write) == (None, True, False)
    assert without.text.startswith("not attached")


@given(st.binary(max_size=32), st.integers(0, 2**32 - 1))
def test_any_bytes_are_an_event_or_a_protocol_error(data: bytes, used: int) -> None:
    with contextlib.suppress(ProtocolError):
        event = Event.unpack(data, used)
        assert len(data) == wire.EVENT_SIZE <= used
        assert 0 <= event.endpoint <= 0xFFFFFFFF
        assert f"{event.reason:#x}" in event.text
