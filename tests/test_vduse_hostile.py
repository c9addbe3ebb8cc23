# SPDX-License-Identifier: Apache-2.0
"""A VDUSE device whose kernel or driver is odd or hostile: what is refused is said, and what is served goes on."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vduse_kit import (
    AGREED,
    DATA,
    IOVA,
    PAGE,
    RAM,
    READY,
    RING,
    RUNNING,
    SIZE,
    STEP,
    TAKEN,
    USED,
    Fake,
    no_leaks,
    serves,
    two_rings,
)
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import Feature, Status
from virtiova.wire import vduse as wire
from virtiova.wire.vduse import Request, RequestKind


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A disk with two rings. Whatever a test did, its thread ends and no descriptor is left."""
    with no_leaks(), Fake(two_rings(), tmp_path, monkeypatch) as made:
        yield made


def test_one_that_means_well_is_served(fake: Fake) -> None:
    fake.start()
    assert fake.reads(0)
    assert fake.reads(1, sector=7)
    assert fake.stands(0) == 1
    assert fake.kernel.queues[0].injected
    assert serves(fake)


# -- messages


def test_messages_of_unknown_types_are_refused_and_the_next_one_is_served(fake: Fake) -> None:
    for kind in (3, 7, 1 << 31, (1 << 32) - 1):
        fake.raw(struct.pack("=II", kind, 9).ljust(wire.MESSAGE_SIZE, b"\xff"))
        assert fake.answer()[:2] == (9, False)
    assert fake.told("a message of type 3, wanted 0 to 2")
    assert serves(fake)


@pytest.mark.parametrize("index", [2, 255, (1 << 32) - 1])
def test_a_ring_that_is_none(fake: Fake, index: int) -> None:
    assert not fake.ask(RequestKind.GET_VQ_STATE, index=index)[0]
    assert serves(fake)


def test_addresses_that_end_before_they_begin(fake: Fake) -> None:
    fake.start()
    fake.raw(Request(RequestKind.UPDATE_IOTLB, 5, start=0x2000, last=0x1FFF).encode())
    assert fake.answer()[:2] == (5, False)
    assert fake.reads()


@pytest.mark.parametrize("length", [1, wire.MESSAGE_SIZE - 1])
def test_a_message_that_is_cut_short_ends_it_in_words(fake: Fake, length: int) -> None:
    fake.raw(bytes(length))
    fake._thread.join(10)
    assert isinstance(fake.ended, ProtocolError)
    assert f"{length} bytes" in str(fake.ended)


def test_a_device_that_the_kernel_gave_up_ends_it_in_words(fake: Fake) -> None:
    fake._sock.close()
    fake._thread.join(10)
    assert isinstance(fake.ended, MachineError)


def test_reads_that_find_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another process may have taken the message, and Linux wakes whoever waits without one.
    read, odd = fake.node.read, [BlockingIOError(errno.EAGAIN, "again")]

    def sometimes() -> bytes:
        if odd:
            raise odd.pop()
        return read()

    monkeypatch.setattr(fake.node, "read", sometimes)
    assert serves(fake)
    assert not odd


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=wire.MESSAGE_SIZE, max_size=wire.MESSAGE_SIZE),
            st.tuples(st.integers(0, 4), st.integers(0, 3), st.binary(max_size=24)).map(
                lambda parts: (struct.pack("=II16x", parts[0], parts[1]) + parts[2]).ljust(wire.MESSAGE_SIZE, b"\0")
            ),
            st.sampled_from([0, 1, 3, AGREED, RUNNING, 0x40, 0x80, 0xFF]).map(
                lambda status: Request(RequestKind.SET_STATUS, 4, status=status).encode()
            ),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_message_is_answered_once(fake: Fake, messages: list[bytes], ready: bool) -> None:
    fake.kernel.maps.clear()
    fake.map()
    for index in (0, 1):
        fake.ring(index, ready=ready)
    for message in messages:
        fake.raw(message)
        assert fake.answer()[0] == struct.unpack_from("=I", message, 4)[0]
    assert fake.silent()
    assert fake.ended is None
    assert serves(fake)


# -- status


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (1 << Feature.VERSION_1, "without bit 33"),
        (TAKEN | 1 << 63, "were never offered"),
        (0, "without bit 33"),
    ],
)
def test_features_that_are_not_to_be_agreed_upon(fake: Fake, features: int, why: str) -> None:
    fake.start()
    assert fake.status(0)
    fake.kernel.features = features
    assert fake.status(READY)
    assert not fake.status(AGREED)
    assert fake.told(why)
    # A driver that goes on as if nothing had been said gets no rings.
    assert not fake.status(RUNNING)
    fake.offer((IOVA + DATA, 512, True))
    assert not fake.done(seconds=0.1)
    assert serves(fake)


def test_a_driver_that_takes_bits_of_its_status_back(fake: Fake) -> None:
    fake.start()
    assert fake.reads()
    assert not fake.status(AGREED)
    assert fake.told("only a reset takes bits of the status back")
    fake.kernel.status = RUNNING
    assert fake.reads()
    assert serves(fake)


def test_rings_before_features(fake: Fake) -> None:
    fake.map()
    fake.ring()
    assert not fake.status(READY | Status.DRIVER_OK)
    assert fake.told("without FEATURES_OK")
    assert serves(fake)


def test_a_start_that_is_refused_leaves_nothing_that_a_kick_could_start(fake: Fake) -> None:
    fake.map()
    fake.ring(0)
    fake.ring(1).size = 0
    for status in (READY, AGREED):
        assert fake.status(status)
    assert not fake.status(RUNNING)
    fake.kernel.queues[1].size = SIZE
    for index in (0, 1):
        fake.offer((IOVA + DATA, 512, True), index=index)
    time.sleep(0.05)
    assert fake.used(0) == fake.used(1) == 0
    assert fake.session.status == fake.notes.status == AGREED
    assert serves(fake)


# -- rings


@pytest.mark.parametrize("size", [0, 3, 7, 1 << 16, 0xFFFFFFFF])
def test_sizes_that_no_ring_has(fake: Fake, size: int) -> None:
    fake.map()
    fake.ring(0).size = size
    for status in (READY, AGREED):
        assert fake.status(status)
    assert not fake.status(RUNNING)
    assert fake.told(f"{size} entries")
    assert serves(fake)


def test_a_ring_larger_than_what_is_noted_of_it(fake: Fake) -> None:
    # Linux lets a process under vhost-vdpa set it, whatever the device said.
    fake.map()
    fake.ring(0).size = 1024
    for status in (READY, AGREED, RUNNING):
        fake.status(status)
    fake.offer((IOVA + DATA, 512, True))
    assert fake.told("entries")
    assert not fake.done(seconds=0.05)
    assert serves(fake)


@pytest.mark.parametrize(
    "where",
    [(1 << 64) - 1, (1 << 64) - PAGE, (1 << 63) - 8, 0, 1, IOVA - 16, IOVA + RAM - 4, IOVA + RING + 1],
)
@pytest.mark.parametrize("part", ["desc", "driver", "device"])
def test_rings_that_are_nowhere(fake: Fake, part: str, where: int) -> None:
    fake.map()
    setattr(fake.ring(0), part, where)
    fake.ring(1)
    for status in (READY, AGREED, RUNNING):
        fake.status(status)
    fake.offer((IOVA + DATA, 512, True))
    assert not fake.done(seconds=0.05)
    assert fake.ended is None
    if fake.kernel.status & Status.DRIVER_OK:
        assert fake.reads(1), "the other one has nothing to do with it"
    assert serves(fake)


def test_a_ring_that_becomes_ready_after_the_driver(fake: Fake) -> None:
    fake.map()
    fake.ring(0, ready=False)
    fake.ring(1)
    for status in (READY, AGREED, RUNNING):
        assert fake.status(status)
    assert fake.reads(1)
    fake.kick(0)
    fake.ring(0)
    assert fake.reads(0)


def test_a_ring_that_becomes_ready_and_is_absurd(fake: Fake) -> None:
    fake.map()
    fake.ring(0, ready=False).size = 3
    fake.ring(1)
    for status in (READY, AGREED, RUNNING):
        assert fake.status(status)
    fake.ring(0)
    fake.kick(0)
    assert fake.told("3 entries")
    assert fake.reads(1)
    assert serves(fake)


def test_a_reset_with_requests_under_way(fake: Fake) -> None:
    fake.start()
    for turn in range(20):
        fake.ask_sector(index=turn % 2)
        assert fake.status(0)
        assert not any(ring.started for ring in fake.connection.host.rings)
        # What is in memory now is somebody else's.
        fake.put(USED, bytes(64))
        fake.put(USED + STEP, bytes(64))
        time.sleep(0.002)
        assert fake.get(USED, 64) == fake.get(USED + STEP, 64) == bytes(64)
        assert serves(fake)


def test_nothing_is_noted_of_what_was_refused(fake: Fake) -> None:
    assert fake.session.status == fake.notes.status == 0
    assert fake.status(READY)
    assert fake.notes.status == READY
    fake.kernel.features = 0
    assert not fake.status(AGREED)
    assert fake.notes.status == READY
