# SPDX-License-Identifier: Apache-2.0
"""A served device without sockets: memory that comes, goes and shrinks, and files of what is in flight."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from leaks import descriptors
from serve_kit import (
    DATA,
    PAGE,
    PLAIN,
    RAM,
    SIZE,
    STATUS,
    WITH_BIT,
    FrontEnd,
    disk,
    fives,
    request,
)
from virtiova.addr import GPA, UVA
from virtiova.device.blk import Status as BlkStatus
from virtiova.serve.inflight import Inflight
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    InflightDescription,
    LogDescription,
    MemoryRegion,
    Request,
    VringState,
)


@pytest.fixture(autouse=True)
def _no_descriptor_stays() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


# -- memory that comes and goes


def test_regions_come_and_go_while_a_ring_runs() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        assert end.send(Request.GET_MAX_MEM_SLOTS)[0].payload == wire.u64(64)
        end.table(end.region(0, 0x8000))
        end.start()
        end.offer((end.dma(DATA), 8, True))
        end.work()
        assert end.used_element(0) == (0, 0), "no RAM there: nothing written"
        end.ok(Request.ADD_MEM_REG, end.region(DATA, PAGE).encode_single(), (end.file,))
        end.offer((end.dma(DATA), 8, True), head=1)
        end.work()
        assert end.used_element(1) == (1, 8)
        end.ok(Request.REM_MEM_REG, end.region(DATA, PAGE).encode_single())
        assert "no region" in end.refused(Request.REM_MEM_REG, end.region(DATA, PAGE).encode_single())
        end.offer((end.dma(DATA), 8, True), head=2)
        end.work()
        assert end.used_element(2) == (2, 0)


def test_a_ring_whose_memory_goes_is_stopped_and_comes_back() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.start()
        end.offer((end.dma(DATA), 8, True))
        end.work()
        end.table(end.region(DATA, PAGE))
        end.offer((end.dma(DATA), 8, True), head=1)
        end.work()
        assert "no memory of the front end" in end.said[-1]
        end.table()
        end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        end.start(base=1)
        end.offer((end.dma(DATA), 8, True), head=1, kick=False)
        end.work()
        assert end.used() == 2


@pytest.mark.parametrize(
    "regions",
    [
        [MemoryRegion(GPA(0), 0, UVA(0), 0)],
        [MemoryRegion(GPA(0), RAM + PAGE, UVA(0), 0)],
        [MemoryRegion(GPA(2**64 - PAGE), 2 * PAGE, UVA(0), 0)],
        [MemoryRegion(GPA(0), PAGE, UVA(2**64 - PAGE), 0), MemoryRegion(GPA(0), PAGE, UVA(0x10000), 0)],
        [MemoryRegion(GPA(0), PAGE, UVA(0), 2**64 - PAGE)],
        [MemoryRegion(GPA(0), 2 * PAGE, UVA(0), 0), MemoryRegion(GPA(PAGE), PAGE, UVA(0x10000), 0)],
        [MemoryRegion(GPA(0), 2 * PAGE, UVA(0), 0), MemoryRegion(GPA(0x10000), PAGE, UVA(PAGE), 0)],
        [MemoryRegion(GPA(1), PAGE, UVA(0), 0)],
    ],
)
def test_a_table_that_makes_no_sense_leaves_no_memory_at_all(regions: list[MemoryRegion]) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        end.refused(Request.SET_MEM_TABLE, wire.encode_table(regions), (end.file,) * len(regions))
        assert end.host.ram.blocks == ()


# -- what is in flight


def test_what_was_in_flight_when_a_back_end_died_is_done_by_the_next() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN)
        wanted = InflightDescription(0, 0, 1, SIZE)
        (answer,) = end.send(Request.GET_INFLIGHT_FD, wanted.encode())
        description = InflightDescription.decode(answer.payload)
        (file,) = answer.fds
        end.start()
        request(end)
        end.work()
        assert end.used() == 1
        # It dies with a second request taken, marked, and not given back.
        request(end)
        inflight = end.host.rings[0].inflight
        assert isinstance(inflight, Inflight)
        inflight.begin([0])
        ram = end.get(0, RAM)
    with FrontEnd(disk()) as end:
        end.put(0, ram)
        end.put(STATUS, b"\xee")
        end.negotiate(PLAIN)
        end.ok(Request.SET_INFLIGHT_FD, description.encode(), (file,))
        os.close(file)
        end.start(base=1)
        end._avail[0] = 2
        end.work()
        assert end.used() == 2
        assert end.used_element(1)[0] == 0
        assert end.get(STATUS, 1)[0] == BlkStatus.OK
        end.work()
        assert end.used() == 2, "done once, not twice"


@pytest.mark.parametrize("description", [InflightDescription(16, 0, 1, 8), InflightDescription(2**63, 2**63, 1, 8)])
def test_a_file_that_is_too_small_for_what_is_in_flight(description: InflightDescription) -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN)
        empty = os.memfd_create("small")
        end.refused(Request.SET_INFLIGHT_FD, description.encode(), (empty,))
        os.close(empty)


# -- files that shrink under us


@pytest.mark.parametrize("bit", [False, True])
def test_memory_that_the_front_end_shortens_stops_the_ring_and_not_the_process(bit: bool) -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(WITH_BIT if bit else PLAIN)
        end.start()
        end.offer((end.dma(DATA), 8, True))
        end.serve()
        assert end.used() == 1
        os.ftruncate(end.file, 0)
        end.host.rounds.kicked(0)
        end.work()
        assert end.said[-1].startswith("ring 0 is stopped, the front end shortened its memory at 0x")
        assert end.session.status & 0x40, "DEVICE_NEEDS_RESET"
        # With memory that is there, and a kick, it is served again.
        os.ftruncate(end.file, RAM)
        end.table()
        assert not end.host.ram.damaged
        end.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        end.start()
        end.offer((end.dma(DATA), 8, True))
        end.serve()
        assert end.used() == 1


def test_a_dirty_log_that_the_front_end_shortens_stops_the_ring() -> None:
    with FrontEnd(fives()) as end:
        end.negotiate(PLAIN)
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)
        end.send(Request.SET_LOG_BASE, LogDescription(PAGE, 0).encode(), (log,))
        end.send(Request.SET_FEATURES, wire.u64(PLAIN | 1 << wire.F_LOG_ALL))
        end.start()
        os.ftruncate(log, 0)
        os.close(log)
        end.offer((end.dma(DATA), 8, True))
        end.work()
        assert end.said[-1] == "ring 0 is stopped, the front end shortened its dirty log"


def test_a_file_of_what_is_in_flight_that_shrinks_stops_the_ring() -> None:
    with FrontEnd(disk()) as end:
        end.negotiate(PLAIN)
        (answer,) = end.send(Request.GET_INFLIGHT_FD, InflightDescription(0, 0, 1, SIZE).encode())
        (file,) = answer.fds
        end.start()
        os.ftruncate(file, 0)
        os.close(file)
        request(end)
        end.work()
        assert end.said[-1] == "ring 0 is stopped, the front end shortened the file of what is in flight"
