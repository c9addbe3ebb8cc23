# SPDX-License-Identifier: Apache-2.0
"""Our vhost-user front end as a machine: memory, tables, guesses, and what it says on the wire."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost_user_kit import (
    FEATURES,
    Answer,
    Scripted,
    honest,
    miss,
    scripted,
)
from virtiova import probe
from virtiova.addr import GPA, IOVA, Access
from virtiova.driver.open import open_device
from virtiova.errors import AccessError, NotPossibleError
from virtiova.features import Feature, has
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.guess import guess_kind
from virtiova.machine.vhost_user.iotlb import EVERYTHING, IotlbServer
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.machine.vhost_user.memory import FILE_SIZE, REGIONS, SharedMemory
from virtiova.result import Path as Way
from virtiova.wire.vhost_user import (
    IotlbKind,
    IotlbMessage,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    decode_table,
    u64,
)

# -- memory and tables -------------------------------------------------------------------------------------------


def test_a_byte_has_three_addresses_that_are_never_mistaken_for_each_other() -> None:
    places = []
    for kind in ("gpa", "uva", "offset"):
        places.append([(getattr(region, kind), getattr(region, kind) + region.size) for region in REGIONS])
    for ranges in places:
        for index, (start, end) in enumerate(sorted(ranges)):
            assert all(end <= other for other, _ in sorted(ranges)[index + 1 :])
            assert end > start
    for region in REGIONS:
        assert region.gpa != region.offset
        assert region.offset + region.size <= FILE_SIZE
    assert min(region.uva for region in REGIONS) > 1 << 40
    # Adjacent for the guest, and for nobody else.
    _, low, high = REGIONS
    assert low.gpa + low.size == high.gpa
    assert low.uva + low.size != high.uva
    assert low.offset + low.size != high.offset


def test_the_memory_cannot_be_cut_short_by_who_has_its_descriptor() -> None:
    memory = SharedMemory()
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 4096)
        memory.ram.write(GPA(0x400010), b"here")
        assert os.pread(memory.fd, 4, REGIONS[2].offset + 0x10) == b"here"
        assert memory.uva(0x400010) == REGIONS[2].uva + 0x10
        with pytest.raises(AccessError):
            memory.uva(0xA0000)
    finally:
        memory.close()
        memory.close()


@pytest.fixture
def tables() -> Iterator[tuple[IotlbServer, list[tuple[int, int]]]]:
    memory = SharedMemory()
    server = IotlbServer(memory.ram)
    told: list[tuple[int, int]] = []
    server.tell = lambda base, size: told.append((base, size))
    server.enable()
    yield server, told
    memory.close()


X, A, C = IOVA(0x500000), GPA(0x200000), GPA(0x204000)


def test_a_miss_is_answered_with_what_the_tables_allow(tables: tuple[IotlbServer, list[tuple[int, int]]]) -> None:
    server, _ = tables
    assert server.resolve(X + 0x123, Access.READ) is None
    server.map(X, A, 0x1000, Access.READ)
    assert server.resolve(X + 0x123, Access.READ) == (X, A, Access.READ)
    assert server.resolve(X, Access.RW) is None
    assert [(fault.address, fault.write, fault.reason) for fault in server.faults()] == [
        (X + 0x123, False, "not mapped"),
        (X, True, "not writable"),
    ]
    server.map(X, A, 0x1000, Access.WRITE)
    assert server.resolve(X, Access.READ) is None
    server.failed(X, Access.WRITE)
    assert [fault.reason for fault in server.faults()] == ["not readable", "access fail, says the back end"]


def test_only_what_was_told_and_changed_is_taken_back(tables: tuple[IotlbServer, list[tuple[int, int]]]) -> None:
    server, told = tables
    server.map(X, A, 0x2000)
    server.invalidate()
    assert told == []
    server.resolve(X, Access.RW)
    server.invalidate()
    assert told == []
    server.map(X, C, 0x1000)
    server.invalidate()
    assert told == [(X, 0x1000)]
    # It is no longer told of it, so that there is nothing to take back until it asks again.
    server.unmap(X, 0x2000)
    server.invalidate()
    assert told == [(X, 0x1000)]


def test_switching_takes_everything_back_in_two_halves(tables: tuple[IotlbServer, list[tuple[int, int]]]) -> None:
    server, told = tables
    server.map(X, A, 0x1000)
    server.resolve(X, Access.RW)
    server.disable()
    assert told == list(EVERYTHING)
    assert sorted(EVERYTHING)[0] == (0, 1 << 63)
    assert sum(size for _, size in EVERYTHING) == 1 << 64
    # Off: the address itself, if it is one of RAM.
    assert server.resolve(X + 5, Access.RW) == (X, GPA(X), Access.RW)
    assert server.resolve(1 << 40, Access.RW) is None
    assert server.faults() == []


# -- guessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "queues", "config", "kind"),
    [
        (0x175007E46, 1, (2048).to_bytes(8, "little") + bytes(16), "blk"),
        (0xF7C66E7CB, 1, None, "net"),
        (0x170000001, 2, (80 | 25 << 16).to_bytes(8, "little") + bytes(16), "console"),
        (0x170000000, None, None, "rng"),
        (0x170000000, 1, None, "rng"),
    ],
)
def test_the_type_is_guessed(features: int, queues: int | None, config: bytes | None, kind: str) -> None:
    guessed, why = guess_kind(features, queues, config)
    assert guessed == kind
    assert why


@pytest.mark.parametrize(
    ("features", "queues", "config"), [(0x170000000, 3, None), (0x170000040, 1, None), (0x170000000, 1, bytes(24))]
)
def test_what_fits_nothing_is_not_guessed(features: int, queues: int | None, config: bytes | None) -> None:
    with pytest.raises(NotPossibleError, match="--type"):
        guess_kind(features, queues, config)


# -- what is said on the wire ------------------------------------------------------------------------------------


def test_what_a_driver_does_becomes_messages(tmp_path: Path) -> None:
    with scripted(tmp_path) as (other, path), VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        assert machine.transport is not None
        assert has(machine.transport.read_features(), Feature.ACCESS_PLATFORM)
        open_device(machine)
        machine.transport.reset()
        names = [Request(message.request).name for message in other.seen]
        table = next(message for message in other.seen if message.request == Request.SET_MEM_TABLE)
        ring = next(message for message in other.seen if message.request == Request.SET_VRING_ADDR)
    assert names.index("SET_OWNER") < names.index("SET_FEATURES") < names.index("SET_MEM_TABLE")
    assert names.index("SET_VRING_NUM") < names.index("SET_VRING_KICK") < names.index("SET_VRING_ENABLE")
    assert names[-2:] == ["SET_VRING_ENABLE", "GET_VRING_BASE"]
    assert decode_table(table.payload) == REGIONS
    assert len(table.fds) == len(REGIONS)
    # Bit 33 was taken: an IOVA, which is no address of RAM, nor one of ours.
    assert VringAddr.decode(ring.payload).desc >= 1 << 36


def test_without_bit_33_rings_are_at_our_own_addresses(tmp_path: Path) -> None:
    offer: Answer = lambda _, message: message.answer(u64(FEATURES & ~(1 << Feature.ACCESS_PLATFORM))).encode()  # noqa: E731
    with scripted(tmp_path, {Request.GET_FEATURES: offer}) as (other, path):
        with VhostUserMachine(BackEnd(path, kind="rng")) as machine:
            open_device(machine)
        ring = next(message for message in other.seen if message.request == Request.SET_VRING_ADDR)
    address = VringAddr.decode(ring.payload).desc
    assert any(region.uva <= address < region.uva + region.size for region in REGIONS)


def test_a_miss_is_served_while_an_answer_is_awaited(tmp_path: Path) -> None:
    """The back end asks in the middle of every request, and gets its UPDATE before it gives its own answer."""
    page = 0x500000

    def ask_first(other: Scripted, message: Message) -> bytes | None:
        assert other.back is not None
        other.back.sendall(miss(page + 8, Access.WRITE))
        return honest(other, message)

    answers: dict[int, Answer] = {Request.SET_VRING_NUM: ask_first}
    with scripted(tmp_path, answers) as (other, path), VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        machine.iommu.map(IOVA(page), GPA(0x200000), 0x1000)
        open_device(machine)
        assert other.back is not None
        machine.wait(lambda: False, 0.05)
        updates = [message for message in other.seen if message.request == Request.IOTLB_MSG]
        other.back.settimeout(2)
        reply = other.back.recv(64)
        # Nothing is mapped there: a failure, and a fault.
        other.back.sendall(miss(0x700000, Access.READ))
        machine.wait(lambda: False, 0.05)
        failed = other.back.recv(64)
        faults = machine.iommu.faults()
    update = IotlbMessage.decode(updates[0].payload)
    assert (update.iova, update.size, update.perm, update.kind) == (page, 4096, Access.RW, IotlbKind.UPDATE)
    assert update.uaddr == REGIONS[1].uva + 0x100000
    assert reply[-8:] == u64(0)
    assert failed[-8:] == u64(1)
    assert [(fault.address, fault.write) for fault in faults] == [(0x700000, False)]


def test_an_invalidation_waits_for_its_acknowledgement(tmp_path: Path) -> None:
    late = 0.1
    acknowledged: list[float] = []

    def slowly(other: Scripted, message: Message) -> bytes | None:
        if IotlbMessage.decode(message.payload).kind is IotlbKind.INVALIDATE:
            time.sleep(late)
            acknowledged.append(time.monotonic())
        return honest(other, message)

    answers: dict[int, Answer] = {Request.IOTLB_MSG: slowly}
    with scripted(tmp_path, answers) as (other, path), VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        machine.iommu.map(IOVA(0x500000), GPA(0x200000), 0x1000)
        open_device(machine)
        assert other.back is not None
        other.back.sendall(miss(0x500000, Access.READ, need_reply=False))
        machine.wait(lambda: False, 0.05)
        machine.iommu.unmap(IOVA(0x500000), 0x1000)
        machine.iommu.invalidate()
        assert acknowledged
        assert time.monotonic() >= acknowledged[0]
        assert machine.front.counters.invalidates == 1


def test_bit_33_is_refused_for_a_back_end_that_could_not_ask(tmp_path: Path) -> None:
    only: Answer = lambda _, message: message.answer(u64(1 << ProtocolFeature.REPLY_ACK)).encode()  # noqa: E731
    with scripted(tmp_path, {Request.GET_PROTOCOL_FEATURES: only}) as (other, path):
        (cell,) = probe.vhost_user(path, ["device-writes"], kind="rng")
    assert cell.observed is Way.REFUSED
    assert cell.mismatch
    assert any("could not ask" in word for word in cell.evidence.words)
    assert Request.SET_MEM_TABLE not in [message.request for message in other.seen]
