# SPDX-License-Identifier: Apache-2.0
"""A served device without sockets: what a front end says, what comes back, and where bytes land."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from leaks import descriptors
from serve_kit import (
    DATA,
    GPA_BASE,
    HEADER,
    IOVA_BASE,
    OTHER,
    PAGE,
    PLAIN,
    RAM,
    RING,
    RINGS,
    SIZE,
    STATUS,
    USED,
    UVA_BASE,
    WITH_BIT,
    FrontEnd,
    disk,
    fives,
    request,
)
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.blk import Status as BlkStatus
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.features import Feature
from virtiova.serve.misses import ANSWER_SECONDS
from virtiova.serve.offer import offer_of
from virtiova.serve.rings import BATCH
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    ConfigSpace,
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringState,
)


@pytest.fixture(autouse=True)
def _no_descriptor_stays() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


# -- the sequence of QEMU 7.2 with vhost-user-rng and bit 33, byte for byte


def test_the_sequence_of_qemu() -> None:
    with FrontEnd(fives()) as end:
        (features,) = end.send(Request.GET_FEATURES)
        assert features.encode()[:12] == bytes.fromhex("01000000 05000000 08000000")
        assert wire.u64_of(features.payload) == 0xF74000000
        (protocol,) = end.send(Request.GET_PROTOCOL_FEATURES)
        assert wire.u64_of(protocol.payload) == 0x1A02B
        assert end.send(Request.SET_PROTOCOL_FEATURES, wire.u64(0x2029)) == []
        assert end.send(Request.GET_QUEUE_NUM) == [Message(17, wire.u64(1), reply=True)]
        end.ok(Request.SET_BACKEND_REQ_FD, b"", (end.call,))
        assert end.send(Request.SET_OWNER) == []
        assert end.send(Request.SET_VRING_CALL, wire.u64(0), (end.call,)) == []
        assert end.send(Request.SET_VRING_ERR, wire.u64(0), (end.call,)) == []
        assert end.send(Request.SET_VRING_CALL, wire.u64(0), (end.call,)) == []
        # Bits 28, 29 and 33 come from QEMU whatever is offered.
        assert end.send(Request.SET_FEATURES, wire.u64(0x370000000)) == []
        end.bit = True
        end.ok(Request.SET_MEM_TABLE, wire.encode_table([end.region()]), (end.file,))
        end.start()
        end.put(RING + 16 * SIZE, b"\0\0\0\0")
        asked = end.work()
        assert [(miss.iova, miss.perm) for miss in asked] == [
            (IOVA_BASE + RING, Access.READ),
            (IOVA_BASE + USED, Access.READ),
            (IOVA_BASE + USED, Access.WRITE),
        ]
        for offset in (RING, USED, USED):
            assert end.map(offset) == [Message(Request.IOTLB_MSG, wire.u64(0), reply=True)]
            end.answer(True)
        assert end.work() == []
        end.offer((end.dma(DATA + 0x310), 64, True))
        assert [(miss.iova, miss.perm) for miss in end.work()] == [(IOVA_BASE + DATA, Access.WRITE)]
        end.map(DATA)
        end.answer(True)
        assert end.work() == []
        assert end.get(DATA + 0x310, 64) == b"\x55" * 64
        assert end.used_element(0) == (0, 64)
        assert end.invalidate(IOVA_BASE + DATA, PAGE) == [Message(Request.IOTLB_MSG, wire.u64(0), reply=True)]
        assert end.send(Request.SET_VRING_ENABLE, VringState(0, 0).encode()) == []
        assert end.send(Request.GET_VRING_BASE, VringState(0, 0).encode()) == [
            Message(11, VringState(0, 1).encode(), reply=True)
        ]


def test_what_is_offered_is_what_is_there() -> None:
    assert not offer_of(Rng()).protocol >> ProtocolFeature.CONFIG & 1
    assert not offer_of(Rng()).protocol >> ProtocolFeature.INFLIGHT_SHMFD & 1
    assert offer_of(disk()).protocol >> ProtocolFeature.CONFIG & 1
    assert offer_of(disk()).protocol >> ProtocolFeature.INFLIGHT_SHMFD & 1
    assert offer_of(Rng()).features >> Feature.ACCESS_PLATFORM & 1
    assert not offer_of(Rng(), access_platform=False).features >> Feature.ACCESS_PLATFORM & 1


# -- where bytes land


def test_without_the_bit_rings_are_user_addresses_and_buffers_guest_physical() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.offer((GPA_BASE + DATA, 100, True))
        assert end.work() == []
        assert end.get(DATA, 101) == b"\x55" * 100 + b"\0"
        assert os.eventfd_read(end.call) > 0


@pytest.mark.parametrize(("behaviour", "lands"), [("honest", "translated"), ("leaky", "bypass")])
def test_with_the_bit_bytes_go_where_the_iotlb_points(behaviour: str, lands: str) -> None:
    """RAM once more, where the bare addresses point: what goes around the IOTLB is found there."""
    with FrontEnd(fives(), behaviour) as end:
        end.negotiate(WITH_BIT)
        double = os.memfd_create("bare")
        os.ftruncate(double, RAM)
        bare = MemoryRegion(GPA(IOVA_BASE), RAM, UVA(UVA_BASE + (1 << 32)), 0)
        end.send(Request.SET_MEM_TABLE, wire.encode_table([end.region(), bare]), (end.file, double))
        end.start()
        end.offer((end.dma(DATA), 64, True))
        os.pwrite(double, end.get(RING, PAGE), RING)
        end.serve({RING: RING, USED: USED, DATA: OTHER})
        landed = {
            "translated": end.get(OTHER, 64),
            "bypass": os.pread(double, 64, DATA),
            "neither": end.get(DATA, 64),
        }
        os.close(double)
    assert landed == {name: (b"\x55" if name == lands else b"\0") * 64 for name in landed}


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_goes_through_a_mapping_that_was_taken_back(whole: bool) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.offer((end.dma(DATA), 64, True))
        end.serve()
        if whole:
            # As QEMU says "everything": two halves around the interrupt window, the first ends at 2**64.
            assert end.invalidate(0xFEF00000, 0xFFFFFFFF01100000)[0].payload == wire.u64(0)
            assert end.invalidate(0, 0xFEE00000)[0].payload == wire.u64(0)
        else:
            assert end.invalidate(IOVA_BASE + DATA, PAGE)[0].payload == wire.u64(0)
        end.put(DATA, bytes(64))
        end.offer((end.dma(DATA), 64, True), head=1)
        assert end.serve({**RINGS, DATA: OTHER}) == (4 if whole else 1)
        assert end.get(DATA, 64) == bytes(64)
        assert end.get(OTHER, 64) == b"\x55" * 64
        assert end.used() == 2


@pytest.mark.parametrize("iova", [2**64 - PAGE, 0], ids=["below", "above"])
def test_an_invalidation_that_wraps_forgets_on_both_sides(iova: int) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(RING)
        end.map(USED)
        update = IotlbMessage(IOVA(iova), PAGE, UVA(UVA_BASE + DATA), Access.RW, IotlbKind.UPDATE)
        end.ok(Request.IOTLB_MSG, update.encode())
        end.offer((iova, 64, True))
        assert not end.work()
        assert end.used() == 1
        assert end.invalidate(2**64 - PAGE, 2 * PAGE)[0].payload == wire.u64(0)
        end.offer((iova, 64, True), head=1)
        assert [miss.iova for miss in end.work()] == [iova]
        assert end.used() == 1


def test_the_stale_disk_keeps_what_was_taken_back() -> None:
    with FrontEnd(fives(), "stale") as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.offer((end.dma(DATA), 64, True))
        end.serve()
        end.invalidate(IOVA_BASE + DATA, PAGE)
        end.put(DATA, bytes(64))
        end.offer((end.dma(DATA), 64, True), head=1)
        assert end.serve({**RINGS, DATA: OTHER}) == 0
        assert end.get(DATA, 64) == b"\x55" * 64


def test_a_mapping_that_allows_more_replaces_one_that_allows_less() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(DATA, None, Access.READ)
        end.offer((end.dma(DATA), 64, True))
        assert end.serve() == 4
        assert end.get(DATA, 64) == b"\x55" * 64


def test_all_that_is_missing_is_asked_for_at_once() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(RING)
        end.map(USED)
        for n in range(4):
            # Each over a border of pages: eight of them.
            end.offer((end.dma(DATA + n * 2 * PAGE + PAGE - 8), 16, True), head=n)
        assert len(end.work()) == 8
        assert end.used() == 0
        assert end.work() == []
        for n in range(8):
            end.map(DATA + n * PAGE)
            end.answer(True)
        assert end.work() == []
        assert end.used() == 4


def test_every_update_and_invalidate_is_acknowledged_while_a_ring_waits() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.offer((end.dma(DATA), 64, True))
        assert end.work()
        for _ in range(3):
            assert end.map(OTHER)[0].payload == wire.u64(0)
            assert end.invalidate(IOVA_BASE + OTHER, PAGE)[0].payload == wire.u64(0)
            end.work()
        assert end.used() == 0


# -- what cannot be reached


def test_a_refused_page_ends_its_request_with_an_error() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        request(end)
        end.serve({**RINGS, HEADER: HEADER, STATUS: STATUS})
        assert end.used() == 1
        assert end.get(STATUS, 1)[0] == BlkStatus.IOERR
        assert end.host.counters.faults == 1
        # A refusal is not for ever: the next request asks again.
        request(end)
        end.serve()
        assert end.get(STATUS, 1)[0] == BlkStatus.OK
        assert end.get(DATA, SECTOR) == b"\x04" * SECTOR


def test_silence_is_a_refusal_after_a_while() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        for offset in (RING, USED, HEADER, STATUS):
            end.map(offset)
        request(end)
        assert len(end.work()) == 1
        end.now = ANSWER_SECONDS - 0.1
        end.host.expire()
        assert end.work() == []
        assert end.used() == 0
        end.now = ANSWER_SECONDS
        end.host.expire()
        assert end.work() == []
        assert end.get(STATUS, 1)[0] == BlkStatus.IOERR
        assert "never answered" in end.said[-1]


def test_a_ring_that_is_refused_is_tried_again_with_the_next_kick() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.offer((end.dma(DATA), 64, True))
        asked = end.work()
        for _ in asked:
            end.answer(False)
        assert end.work() == [], "not in a circle: each refusal is a fault in the guest's log"
        end.host.rounds.kicked(0)
        assert end.serve() == len(asked) + 1
        assert end.used() == 1


def test_without_a_channel_there_is_nobody_to_ask() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT, protocol=1 << ProtocolFeature.REPLY_ACK)
        end.start()
        end.offer((end.dma(DATA), 64, True))
        assert end.work() == []
        assert "nobody to ask" in end.said[-1]
        assert end.host.counters.broken == 1


# -- state that outlives nothing


def test_a_stopped_ring_goes_on_where_it_was_and_knows_no_mapping() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.start()
        for n in range(3):
            end.offer((end.dma(DATA), 8, True), head=n)
        end.serve()
        (stopped,) = end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert VringState.decode(stopped.payload) == VringState(0, 3)
        assert len(end.host.iotlb) == 0
        end.offer((end.dma(DATA), 8, True), head=3)
        assert end.work() == []
        end.start(base=3)
        end.offer((end.dma(DATA), 8, True), head=4, kick=False)
        assert end.serve() == 4
        assert end.used() == 4
        assert end.used_element(3) == (4, 8)


@pytest.mark.parametrize("how", ["features", "table", "status", "reset"])
def test_firmware_leaves_no_mapping_behind(how: str) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        end.map(DATA)
        assert len(end.host.iotlb) == 1
        if how == "features":
            end.send(Request.SET_FEATURES, wire.u64(WITH_BIT | 1 << Feature.RING_EVENT_IDX))
        elif how == "table":
            end.table()
        elif how == "status":
            end.send(Request.SET_STATUS, wire.u64(0))
        else:
            end.send(Request.RESET_DEVICE)
        assert len(end.host.iotlb) == 0


def test_a_disabled_ring_waits() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.send(Request.SET_VRING_ENABLE, VringState(0, 0).encode())
        end.offer((end.dma(DATA), 8, True))
        end.work()
        assert end.used() == 0
        end.send(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        end.work()
        assert end.used() == 1


def test_without_protocol_features_a_ring_is_enabled_from_the_start() -> None:
    with FrontEnd(fives()) as end:
        end.send(Request.SET_FEATURES, wire.u64(1 << Feature.VERSION_1))
        end.table()
        end.start()
        end.host.rings[0].enabled = False
        end.send(Request.SET_VRING_KICK, wire.u64(0), (end.call,))
        end.offer((end.dma(DATA), 8, True))
        end.work()
        assert end.used() == 1


def test_several_rings() -> None:
    device = Blk(MemoryStore(bytearray(SECTOR * 8)), queues=2)
    with FrontEnd(device) as end:
        end.negotiate(PLAIN)
        end.start(0)
        end.start(1)
        assert end.send(Request.GET_QUEUE_NUM)[0].payload == wire.u64(2)
        end.put(HEADER, struct.pack("<IIQ", 0, 0, 0))
        end.offer((end.dma(HEADER), 16, False), (end.dma(DATA), 512, True), (end.dma(STATUS), 1, True), index=1)
        end.work()
        assert (end.used(0), end.used(1)) == (0, 1)


def test_a_batch_is_bounded() -> None:
    """Between two looks the front end is listened to: no more than a batch is done in one."""
    assert BATCH <= 64
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        for n in range(SIZE):
            end.offer((end.dma(DATA), 8, True), head=n)
        end.work()
        assert end.used() == SIZE


# -- configuration and status


def test_configuration() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN)
        (answer,) = end.send(Request.GET_CONFIG, ConfigSpace(0, 0, bytes(57)).encode())
        assert len(answer.payload) == 12 + 57
        assert ConfigSpace.decode(answer.payload).data[:8] == struct.pack("<Q", 64)
        (answer,) = end.send(Request.GET_CONFIG, ConfigSpace(200, 0, bytes(20)).encode())
        assert ConfigSpace.decode(answer.payload).data == bytes(20)
        # Beyond what a message can carry: the failure that this request has.
        beyond = struct.pack("<III", 250, 7, 0) + bytes(7)
        assert end.send(Request.GET_CONFIG, beyond) == [Message(Request.GET_CONFIG, b"", reply=True)]
        assert "wanted 256 bytes at most" in end.said[-1]
        assert end.host.counters.refusals == 1
        end.ok(Request.SET_CONFIG, ConfigSpace(32, 0, b"\0").encode())
        assert "does not exist" in end.refused(Request.SET_CONFIG, ConfigSpace(200, 0, b"\0").encode())


def test_a_new_file_of_what_is_in_flight_is_sparse() -> None:
    queues, size = 16, 32768
    with FrontEnd(Blk(MemoryStore(bytearray(SECTOR)), queues=queues)) as end:
        end.negotiate(PLAIN)
        wanted = InflightDescription(0, 0, queues, size)
        (answer,) = end.send(Request.GET_INFLIGHT_FD, wanted.encode())
        (fd,) = answer.fds
        try:
            info = os.fstat(fd)
            assert info.st_size >= queues * size * 16
            assert info.st_blocks * 512 <= queues * 2 * PAGE
            # The version and the number of entries of each ring are there.
            step = info.st_size // queues
            heads = [struct.unpack("<QHHHH", os.pread(fd, 16, step * ring)) for ring in range(queues)]
            assert heads == [(0, 1, size, 0, 0)] * queues
        finally:
            os.close(fd)


def test_status_is_kept_and_a_broken_ring_is_seen_in_it() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.ok(Request.SET_STATUS, wire.u64(15))
        end.start()
        end.put(RING + 16 * SIZE + 2, struct.pack("<H", 1000))
        end.host.rounds.kicked(0)
        end.work()
        assert "makes no sense" in end.said[-1]
        assert end.send(Request.GET_STATUS)[0].payload == wire.u64(15 | 64)
