# SPDX-License-Identifier: Apache-2.0
"""A served device without sockets: whatever a front end or a driver says, nothing breaks and nothing stays."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaks import descriptors
from serve_kit import (
    DATA,
    GPA_BASE,
    HEADER,
    IOVA_BASE,
    PAGE,
    PLAIN,
    RAM,
    RING,
    SIZE,
    USED,
    UVA_BASE,
    WITH_BIT,
    FrontEnd,
    disk,
    fives,
)
from virtiova.addr import GPA, UVA
from virtiova.errors import ProtocolError
from virtiova.features import Feature
from virtiova.serve.host import Host
from virtiova.serve.offer import offer_of
from virtiova.serve.session import Session
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    ConfigSpace,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)


@pytest.fixture(autouse=True)
def _no_descriptor_stays() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


# -- hostile


@pytest.mark.parametrize(
    ("kind", "payload", "fds"),
    [
        (Request.SET_FEATURES, bytes(7), 0),
        (Request.SET_FEATURES, wire.u64(1 << Feature.SR_IOV), 0),
        (Request.SET_FEATURES, wire.u64(PLAIN), 1),
        (Request.SET_PROTOCOL_FEATURES, wire.u64(1 << ProtocolFeature.PAGEFAULT), 0),
        (Request.SET_MEM_TABLE, wire.encode_table([MemoryRegion(GPA(0), PAGE, UVA(0), 0)]), 0),
        (Request.SET_MEM_TABLE, wire.encode_table([MemoryRegion(GPA(0), PAGE, UVA(0), 0)]), 2),
        (Request.ADD_MEM_REG, bytes(40), 0),
        (Request.ADD_MEM_REG, bytes(40), 1),
        (Request.SET_VRING_NUM, VringState(0, 3).encode(), 0),
        (Request.SET_VRING_NUM, VringState(0, 65536).encode(), 0),
        (Request.SET_VRING_NUM, VringState(1, 8).encode(), 0),
        (Request.SET_VRING_BASE, VringState(0, 0x10000).encode(), 0),
        (Request.SET_VRING_ADDR, VringAddr(7, 0, 0, 0, 0, 0).encode(), 0),
        (Request.SET_VRING_KICK, wire.u64(0), 0),
        (Request.SET_VRING_KICK, wire.u64(0x100), 1),
        (Request.SET_VRING_KICK, wire.u64(0), 2),
        (Request.SET_VRING_CALL, wire.u64(9), 1),
        (Request.SET_VRING_ENABLE, VringState(0, 2).encode(), 0),
        (Request.SET_BACKEND_REQ_FD, b"", 0),
        (Request.IOTLB_MSG, bytes(32), 0),
        (Request.SET_STATUS, wire.u64(256), 0),
        (Request.SET_LOG_FD, b"", 0),
        (Request.POSTCOPY_ADVISE, b"", 0),
        (99, b"", 0),
        (99, b"abc", 3),
    ],
)
def test_a_message_that_makes_no_sense(kind: int, payload: bytes, fds: int) -> None:
    """It is refused where the front end asked to be told, and ends the connection where it did not."""
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        assert end.refused(kind, payload, (end.call,) * fds).startswith("refused: ")
        assert end.send(Request.GET_FEATURES), "the connection goes on"
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        with pytest.raises(ProtocolError):
            end.send(kind, payload, (end.call,) * fds)


def test_requests_of_features_that_were_not_agreed_upon() -> None:
    with FrontEnd(disk()) as end:
        end.send(Request.SET_PROTOCOL_FEATURES, wire.u64(1 << ProtocolFeature.REPLY_ACK))
        assert "STATUS was not agreed upon" in end.refused(Request.SET_STATUS, wire.u64(0))
        with pytest.raises(ProtocolError, match="CONFIG was not agreed upon"):
            end.send(Request.GET_CONFIG, ConfigSpace(0, 0, bytes(8)).encode())


def test_a_running_ring_keeps_its_size() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        assert "running" in end.refused(Request.SET_VRING_NUM, VringState(0, 16).encode())


def test_rings_that_start_with_nothing() -> None:
    """Out of order: a kick before size, addresses and memory."""
    with FrontEnd(fives()) as end:
        end.send(Request.SET_VRING_KICK, wire.u64(0), (end.call,))
        end.work()
        assert "without addresses or size" in end.said[-1]


messages = st.tuples(
    st.one_of(st.sampled_from(list(Request)), st.integers(0, 2**32 - 1)),
    st.one_of(
        st.binary(max_size=48),
        st.builds(lambda index, value: VringState(index, value).encode(), st.integers(0, 2), st.integers(0, 17)),
        st.sampled_from([PLAIN, WITH_BIT, WITH_BIT | 1 << 29, 0, 0x100, 1, 15]).map(wire.u64),
        st.builds(
            lambda gpa, size, uva: MemoryRegion(GPA(gpa), size, UVA(uva), 0).encode_single(),
            st.sampled_from([0, GPA_BASE, 2**64 - PAGE]),
            st.sampled_from([0, PAGE, RAM, 2**64 - 1]),
            st.sampled_from([0, UVA_BASE, 2**64 - PAGE]),
        ),
        st.builds(
            lambda a, b, c: VringAddr(0, 0, a, b, c, 0).encode(),
            *(st.sampled_from([0, 8, UVA_BASE + RING, IOVA_BASE + USED, 2**64 - 16]) for _ in range(3)),
        ),
        st.binary(min_size=32, max_size=32),
    ),
    st.integers(0, 2),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(messages, max_size=25))
def test_whatever_a_front_end_says_nothing_breaks_and_nothing_stays(
    said: list[tuple[int, bytes, int, bool]],
) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT)
        try:
            for kind, payload, fds, ack in said:
                for reply in end.send(kind, payload, (end.file,) * fds, ack=ack):
                    for fd in reply.fds:
                        os.close(fd)
                end.work()
        except ProtocolError:
            pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 7), max_size=8))
def test_whatever_a_driver_puts_into_a_ring_nothing_breaks(noise: bytes, heads: list[int]) -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN | 1 << Feature.RING_INDIRECT_DESC)
        end.start()
        end.put(RING, noise[: 16 * SIZE])
        end.put(RING + 16 * SIZE + 4, b"".join(struct.pack("<H", head) for head in heads))
        end.put(RING + 16 * SIZE + 2, struct.pack("<H", len(heads)))
        end.put(HEADER, noise)
        end.host.rounds.kicked(0)
        end.work()
        assert end.used() <= len(heads)


def test_a_host_lets_go_of_everything() -> None:
    device = fives()
    session = Session(offer_of(device))
    host = Host(device, session, clock=lambda: 0.0, say=lambda _: None)
    for fd in (os.memfd_create("a"), os.memfd_create("b")):
        session.receive(Message(Request.SET_MEM_TABLE, bytes(8)).encode()[:15], (fd,))
        host.close()


def test_another_device_on_the_same_connection_starts_from_nothing() -> None:
    """QEMU keeps the connection of a device that is unplugged, takes no memory back, and gives it all again."""
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.offer((end.dma(DATA), 8, True))
        end.serve()
        assert end.used() == 1
        end.ok(Request.SET_OWNER)
        assert end.host.ram.blocks == ()
        assert not any(ring.started for ring in end.host.rings)
        end.ok(Request.ADD_MEM_REG, end.region().encode_single(), (end.file,))
        assert "overlaps" in end.refused(Request.ADD_MEM_REG, end.region().encode_single(), (end.file,))
