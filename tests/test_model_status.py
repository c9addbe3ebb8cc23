# SPDX-License-Identifier: Apache-2.0
"""The model's status register and features, to the letter of virtio 1.4, 2.1, 2.2 and 3.1.1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model_rig import BIT33, LIVE, SET_UP, V1, Rig
from virtiova.addr import GPA, PAGE_SIZE
from virtiova.features import Feature, Status, mask
from virtiova.machine.model import Behaviour
from virtiova.testing.raw_rings import RawRing


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.machine.close()


@pytest.mark.parametrize("behaviour", ["honest", "lying"])
def test_insisting_device_refuses_features_ok_and_nothing_else(behaviour: Behaviour) -> None:
    rig = Rig(behaviour)
    assert rig.negotiate(V1) == SET_UP
    assert "ACCESS_PLATFORM is offered and was not taken" in rig.machine.words()[0]
    assert rig.negotiate(V1 | BIT33) == SET_UP | Status.FEATURES_OK
    assert rig.negotiate(0) == SET_UP | Status.FEATURES_OK, "without VERSION_1 it may not insist"
    rig.machine.close()


@pytest.mark.parametrize("bit", [0, 34, 40, 63])
def test_a_bit_that_was_never_offered_is_refused(rig: Rig, bit: int) -> None:
    offered = rig.transport.read_features()
    assert not offered >> bit & 1
    assert rig.negotiate(offered | 1 << bit) == SET_UP
    assert "never offered" in rig.machine.words()[0]


def test_quirky_device_refuses_bit_33() -> None:
    rig = Rig("quirky")
    assert rig.negotiate(V1 | BIT33) == SET_UP
    assert rig.negotiate(V1) == SET_UP | Status.FEATURES_OK
    rig.machine.close()


def test_a_driver_may_try_a_smaller_set_after_a_refusal(rig: Rig) -> None:
    assert rig.negotiate(V1 | BIT33 | 1 << 40) == SET_UP
    rig.transport.write_features(V1 | BIT33)
    rig.transport.write_status(SET_UP | Status.FEATURES_OK)
    assert rig.transport.read_status() == SET_UP | Status.FEATURES_OK


def test_a_driver_that_carries_on_after_the_refusal_is_not_served(rig: Rig) -> None:
    assert rig.negotiate(V1) == SET_UP
    rig.queue()
    rig.transport.write_status(LIVE)
    assert rig.transport.read_status() == SET_UP
    rig.ask()
    assert not rig.done()
    assert rig.landed() == ""
    assert any("DRIVER_OK without FEATURES_OK" in word for word in rig.machine.words())


def test_features_are_frozen_after_features_ok() -> None:
    rig = Rig(insists=False)
    rig.negotiate(V1 | BIT33)
    rig.transport.write_features(V1)
    rig.queue()
    rig.transport.write_status(LIVE)
    rig.ask()
    assert rig.done()
    assert rig.landed() == "A", "bit 33 is still accepted"
    assert any("features written after FEATURES_OK" in word for word in rig.machine.words())
    rig.machine.close()


def test_nothing_before_driver_ok_and_all_of_it_then_without_a_kick(rig: Rig) -> None:
    rig.negotiate(rig.transport.read_features() & ~mask([Feature.RING_EVENT_IDX]))
    rig.queue()
    rig.ask()
    assert not rig.done()
    assert rig.landed() == ""
    rig.transport.write_status(LIVE)
    assert rig.done()


def test_status_bits_cannot_be_cleared_nor_made_up(rig: Rig) -> None:
    rig.start()
    rig.transport.write_status(Status.ACKNOWLEDGE)
    assert rig.transport.read_status() == LIVE
    rig.transport.write_status(LIVE | Status.DEVICE_NEEDS_RESET | Status.SUSPEND | 0x20)
    assert rig.transport.read_status() == LIVE
    rig.ask()
    assert rig.done()


def test_failed_stops_the_device(rig: Rig) -> None:
    rig.start()
    rig.transport.write_status(LIVE | Status.FAILED)
    rig.ask()
    assert not rig.done()
    assert rig.transport.read_status() == LIVE | Status.FAILED
    rig.transport.reset()
    assert rig.transport.read_status() == 0


def test_reset_forgets_queues_and_kicks_and_features(rig: Rig) -> None:
    rig.start()
    rig.ask()
    rig.transport.reset()
    assert not rig.done()
    rig.negotiate(V1 | BIT33)
    rig.transport.write_status(LIVE)
    rig.transport.notify(0)
    assert not rig.done(), "the queue was not enabled again"


def test_renegotiation_without_the_bit_changes_the_space() -> None:
    rig = Rig(insists=False)
    rig.start(V1 | BIT33)
    rig.ask()
    assert rig.done()
    assert rig.landed() == "A"
    rig.ram.write(rig.a, bytes(PAGE_SIZE))
    rig.ram.write(GPA(rig.ring.desc), bytes(PAGE_SIZE))
    rig.ring = RawRing(rig.ram, rig.ring.desc)
    rig.start(V1)
    rig.ask()
    assert rig.done()
    assert rig.landed() == "B"
    rig.machine.close()


@pytest.mark.parametrize("what", ["unreachable", "misaligned", "nonsense"])
def test_a_bad_ring_needs_a_reset_and_a_reset_heals(rig: Rig, what: str) -> None:
    rig.negotiate(V1 | BIT33)
    ring = rig.ring
    good = ring.avail
    if what == "unreachable":
        ring.avail = rig.a
    elif what == "misaligned":
        ring.avail += 1
    else:
        ring.put16(ring.avail + 2, 100)
    rig.queue()
    rig.transport.write_status(LIVE)
    assert not rig.done()
    assert rig.transport.read_status() == LIVE | Status.DEVICE_NEEDS_RESET
    assert "needs a reset" in rig.machine.words()[-1]
    assert [f.address for f in rig.iommu.faults()] == ([rig.a + 2] if what == "unreachable" else [])
    ring.put16(good + 2, 0)
    rig.ask()
    assert not rig.done(), "a good ring is not enough"
    ring.avail = good
    ring.index = 0
    rig.start()
    rig.ask()
    assert rig.done()
