# SPDX-License-Identifier: Apache-2.0
"""Our vhost-user front end as a machine: real back ends as its oracle, scripted ones for what no real one does."""

from __future__ import annotations

import array
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe_kit import GENERAL
from vhost_user_kit import (
    FEATURES,
    STORAGE_DAEMON,
    TESTPMD,
    Answer,
    Gone,
    Scripted,
    commands,
    descriptors,
    honest,
    installed,
    scripted,
)
from virtiova import probe
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.cli import main
from virtiova.driver.open import open_device
from virtiova.errors import AccessError, MachineError, NotPossibleError, ProtocolError, UsageError, VirtiovaError
from virtiova.features import Feature, has
from virtiova.machine.model_peer import disk_image
from virtiova.machine.vhost_user import backend as backends
from virtiova.machine.vhost_user import frontend
from virtiova.machine.vhost_user.backend import BackEnd
from virtiova.machine.vhost_user.guess import guess_kind
from virtiova.machine.vhost_user.iotlb import EVERYTHING, IotlbServer
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.machine.vhost_user.memory import FILE_SIZE, REGIONS, SharedMemory
from virtiova.result import Cell
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

NO_DAEMON = "n/a: no qemu-storage-daemon (apt install qemu-system-common)"
NO_TESTPMD = "n/a: no dpdk-testpmd (apt install dpdk-dev)"
needs_daemon = pytest.mark.skipif(not installed("qemu-storage-daemon"), reason=NO_DAEMON)
needs_testpmd = pytest.mark.skipif(not installed("dpdk-testpmd"), reason=NO_TESTPMD)


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


def _miss(iova: int, perm: Access, need_reply: bool = True) -> bytes:
    asked = IotlbMessage(IOVA(iova), 0, UVA(0), perm, IotlbKind.MISS)
    return Message(1, asked.encode(), need_reply=need_reply).encode()


def test_a_miss_is_served_while_an_answer_is_awaited(tmp_path: Path) -> None:
    """The back end asks in the middle of every request, and gets its UPDATE before it gives its own answer."""
    page = 0x500000

    def ask_first(other: Scripted, message: Message) -> bytes | None:
        assert other.back is not None
        other.back.sendall(_miss(page + 8, Access.WRITE))
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
        other.back.sendall(_miss(0x700000, Access.READ))
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
        other.back.sendall(_miss(0x500000, Access.READ, need_reply=False))
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


# -- hostile back ends -------------------------------------------------------------------------------------------


def _with_fds(count: int) -> Answer:
    def answer(other: Scripted, message: Message) -> None:
        assert other.main is not None
        fds = array.array("i", [0] * count)
        data = message.answer(u64(FEATURES)).encode()
        other.main.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    return answer


def _gone(other: Scripted, message: Message) -> bytes | None:
    raise Gone


def _silent(other: Scripted, message: Message) -> bytes | None:
    return None


def _bring_up(path: str) -> None:
    with VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        open_device(machine)


HOSTILE: dict[str, tuple[dict[int, Answer], type[VirtiovaError], str]] = {
    "silent": ({Request.GET_FEATURES: _silent}, MachineError, "did not answer GET_FEATURES within"),
    "gone": ({Request.SET_OWNER: _gone}, MachineError, "closed the main channel"),
    "short number": (
        {Request.GET_FEATURES: lambda _, m: m.answer(b"\1\2\3\4").encode()},
        ProtocolError,
        "4 bytes, wanted 8",
    ),
    "long number": ({Request.GET_FEATURES: lambda _, m: m.answer(bytes(64)).encode()}, ProtocolError, "wanted 8"),
    "other answer": (
        {Request.GET_FEATURES: lambda _, m: Message(39, u64(0), reply=True).encode()},
        ProtocolError,
        "SET_STATUS where GET_FEATURES",
    ),
    "no reply flag": ({Request.GET_FEATURES: lambda _, m: Message(1, u64(0)).encode()}, ProtocolError, "answered"),
    "two answers": (
        {Request.GET_FEATURES: lambda _, m: m.answer(u64(FEATURES)).encode() * 2},
        ProtocolError,
        "GET_FEATURES where",
    ),
    "wrong version": (
        {Request.GET_FEATURES: lambda _, m: struct.pack("<III", 1, 6, 8) + bytes(8)},
        ProtocolError,
        "wanted version 1",
    ),
    "4 GiB": ({Request.GET_FEATURES: lambda _, m: struct.pack("<III", 1, 5, 0xFFFFFFF0)}, ProtocolError, "at most"),
    "many descriptors": ({Request.GET_FEATURES: _with_fds(9)}, ProtocolError, "file descriptors"),
    "half a header": ({Request.GET_FEATURES: lambda _, m: b"\1\0\0"}, MachineError, "did not answer"),
    "no to the owner": (
        {Request.SET_BACKEND_REQ_FD: lambda _, m: m.acknowledge(ok=False).encode(), Request.SET_MEM_TABLE: _gone},
        MachineError,
        "closed the main channel",
    ),
    "no to the memory": (
        {Request.SET_MEM_TABLE: lambda _, m: m.acknowledge(ok=False).encode()},
        MachineError,
        "refused SET_MEM_TABLE",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_back_end_ends_in_a_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "REPLY_SECONDS", 0.3)
    answers, kind, words = HOSTILE[name]
    before = descriptors()
    with scripted(tmp_path, answers) as (_, path), pytest.raises(kind, match=words):
        _bring_up(path)
    assert descriptors() == before


def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path) -> None:
    before = descriptors()
    hands_over: dict[int, Answer] = {Request.GET_FEATURES: _with_fds(3)}
    with scripted(tmp_path, hands_over) as (_, path), VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        assert machine.transport is not None
        machine.transport.reset()
    assert descriptors() == before


def test_a_flood_of_misses_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "MAX_MISSES", 100)

    def flood(other: Scripted, message: Message) -> None:
        assert other.back is not None
        other.back.sendall(_miss(0x500000, Access.READ, need_reply=False) * 300)

    with scripted(tmp_path, {Request.SET_VRING_KICK: flood}) as (_, path):
        (cell,) = probe.vhost_user(path, ["device-writes"], kind="rng")
    assert cell.observed is Way.UNKNOWN
    assert "100 times" in cell.evidence.note


def test_one_that_asks_and_never_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "REPLY_SECONDS", 0.3)

    def ask(other: Scripted, message: Message) -> None:
        assert other.back is not None
        other.back.settimeout(3)
        while True:
            other.back.sendall(_miss(0x500000, Access.READ) * 100)

    with scripted(tmp_path, {Request.SET_VRING_KICK: ask}) as (_, path):
        (cell,) = probe.vhost_user(path, ["device-writes"], kind="rng")
    assert cell.observed is Way.UNKNOWN
    assert "does not read the back-end channel" in cell.evidence.note


def test_nonsense_on_the_back_end_channel_is_a_clear_outcome(tmp_path: Path) -> None:
    def nonsense(other: Scripted, message: Message) -> bytes | None:
        assert other.back is not None
        other.back.sendall(Message(1, bytes(7)).encode())
        return honest(other, message)

    with scripted(tmp_path, {Request.SET_VRING_NUM: nonsense}) as (_, path):
        (cell,) = probe.vhost_user(path, ["device-writes"], kind="rng")
    assert cell.observed is Way.UNKNOWN
    assert "IOTLB message of 7 bytes" in cell.evidence.note


def test_one_that_dies_while_a_request_is_out_is_a_clear_outcome(tmp_path: Path) -> None:
    """The ring is started, and then there is nobody any more."""

    def last(other: Scripted, message: Message) -> bytes | None:
        if Request.SET_VRING_ENABLE in [each.request for each in other.seen]:
            assert other.main is not None
            other.main.sendall(message.answer(u64(FEATURES)).encode())
            raise Gone
        return honest(other, message)

    with scripted(tmp_path, {Request.GET_FEATURES: last}) as (_, path):
        (cell,) = probe.vhost_user(path, ["device-writes"], kind="rng")
    assert cell.observed is Way.UNKNOWN
    assert "closed the main channel" in cell.evidence.note
    assert any("0 MISS" in word for word in cell.evidence.words)


def test_a_kick_that_is_full_and_made_to_wait_holds_nobody(tmp_path: Path) -> None:
    """The flag that lets a descriptor wait, and its counter, are the back end's as well."""

    def fill(other: Scripted, message: Message) -> bytes | None:
        os.set_blocking(message.fds[0], True)
        if message.request == Request.SET_VRING_KICK:
            os.eventfd_write(message.fds[0], (1 << 64) - 2)
        return honest(other, message)

    answers: dict[int, Answer] = {Request.SET_VRING_KICK: fill, Request.SET_VRING_CALL: fill}
    with scripted(tmp_path, answers) as (_, path), VhostUserMachine(BackEnd(path, kind="rng")) as machine:
        assert machine.transport is not None
        open_device(machine)
        started = time.monotonic()
        machine.transport.notify(0)
        assert time.monotonic() - started < 1


# -- starting and ending -----------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["nowhere.sock"], "no such socket"),
        ([], "one of the two"),
        (["a", "--spawn", "b {socket}"], "one of the two"),
        (["--spawn", "true"], "names its socket"),
        (["--spawn", "no-such-program-here {socket}"], "no program"),
        (["--spawn", "true '{socket}"], "--spawn"),
        (["--spawn", "true {socket}", "--type", "blck"], "did you mean 'blk'"),
    ):
        assert main.main(["probe", "vhost-user", *words]) == 2
        assert why in capsys.readouterr().err


def test_a_command_that_does_not_listen_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "START_SECONDS", 0.3)
    before = set(os.listdir(tempfile.gettempdir()))
    mark = f"sleep 98765.{os.getpid()}"
    with pytest.raises(MachineError, match="did not listen within"):
        VhostUserMachine(BackEnd(spawn=f"sh -c '{mark} & {mark} # {{socket}}'", kind="rng"))
    assert not [line for line in commands() if line.startswith(mark)]
    assert not [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("virtiova-")]


def test_one_that_ends_at_once_is_quoted() -> None:
    (cell,) = probe.vhost_user(
        spawn="sh -c 'echo its last words >&2; exit 3 # {socket}'", kind="rng", experiments=["ring"]
    )
    assert cell.observed is Way.UNKNOWN
    assert "exit status 3" in cell.evidence.note
    assert cell.evidence.words == ["its last words"]


def test_the_script_does_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", "vhost-user", "--spawn", "cat {fd}", "--type", "blk", "--experiment", "ring", "--script"]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert "probe.vhost_user(experiments=['ring'], kind='blk', spawn='cat {fd}')" in said
    compile(said, "script", "exec")


# -- real back ends ----------------------------------------------------------------------------------------------


def _answers(cells: Iterator[Cell]) -> dict[str, Cell]:
    return {cell.experiment: cell for cell in cells}


@needs_daemon
def test_the_storage_daemon_goes_around_in_every_experiment() -> None:
    """It offers no bit 33, so that it takes bare addresses wherever it is asked."""
    cells = _answers(probe.vhost_user(spawn=STORAGE_DAEMON))
    not_asked = {"not-taken", "carry-on", "no-version-1", "bus-master-off"}
    assert {name for name, cell in cells.items() if cell.observed is Way.NOT_APPLICABLE} == not_asked
    assert not [name for name, cell in cells.items() if cell.mismatch or cell.observed is Way.UNKNOWN]
    assert cells["msi"].observed is Way.TRANSLATED
    assert cells["translation-off"].observed is Way.DIRECT
    others = set(cells) - not_asked - {"msi", "translation-off"}
    assert {cells[name].observed for name in others} == {Way.BYPASS}
    assert {cell.offered for name, cell in cells.items() if name not in not_asked} == {False}
    assert {cell.device for cell in cells.values()} == {"vhost-user-blk?"}
    assert any("a guess" in word for word in cells["ring"].evidence.words)
    assert cells["ring"].evidence.features_ok is None
    assert not [line for line in commands() if "qemu-storage-daemon" in line.split(" ")[0]]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A storage daemon of somebody else's: its disk, and its socket."""
    disk, path = tmp_path / "disk.img", tmp_path / "daemon.sock"
    disk.write_bytes(os.urandom(1 << 20))
    command = STORAGE_DAEMON.replace("{image}", str(disk)).replace("{socket}", str(path))
    with subprocess.Popen(command.split(), stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(path, process)
            yield disk, str(path)
        finally:
            process.kill()


@needs_daemon
def test_somebody_elses_disk_is_not_changed_without_permission(
    daemon: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    disk, path = daemon
    before = hashlib.sha256(disk.read_bytes()).digest()
    command = ["probe", "vhost-user", path, "--experiment", "device-reads", "--experiment", "device-writes"]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert "--write allows that" in said
    assert "Nothing was written to its disk" in said
    assert hashlib.sha256(disk.read_bytes()).digest() == before
    with VhostUserMachine(BackEnd(path, kind="blk")) as machine, pytest.raises(UsageError, match="--write"):
        open_device(machine).make_device_read([(0x200000, 512)])


@needs_daemon
def test_with_permission_it_is_read_back_and_put_back(daemon: tuple[Path, str]) -> None:
    disk, path = daemon
    before = hashlib.sha256(disk.read_bytes()).digest()
    cells = _answers(probe.vhost_user(path, ["device-reads", "write-only"], kind="blk", write=True))
    assert {cell.observed for cell in cells.values()} == {Way.BYPASS}
    assert cells["device-reads"].evidence.deliveries[0].arrived.startswith(b"page B 00400000.".hex())
    assert hashlib.sha256(disk.read_bytes()).digest() == before


NOT_ASKED = {"carry-on", "never-offered", "bus-master-off"}
"""Of a back end that offers the bit and refuses nobody."""
THROUGH = set(GENERAL) - NOT_ASKED - {"not-taken", "no-version-1", "renegotiate", "msi", "translation-off"}
"""What is decided by whether the bit is honoured."""


@pytest.mark.parametrize(
    ("device", "wrong"), [("blk", set()), ("leaky", THROUGH), ("stale", {"unmap", "remap"}), ("rng", set())]
)
def test_our_own_back_ends_do_what_their_names_say(device: str, wrong: set[str], tmp_path: Path) -> None:
    """One process for all cells, so that each also follows another one's connection."""
    path, disk = tmp_path / "own.sock", tmp_path / "own.img"
    disk.write_bytes(bytes(disk_image(64)))
    words = ["serve", device, *([] if device == "rng" else [str(disk)]), "--socket-path", str(path), "-q"]
    with subprocess.Popen([sys.executable, "-m", "virtiova", *words], stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(path, process)
            cells = _answers(probe.vhost_user(str(path), write=True))
        finally:
            process.terminate()
    assert {cell.device for cell in cells.values()} == {"vhost-user-rng?" if device == "rng" else "vhost-user-blk?"}
    assert {name for name, cell in cells.items() if cell.mismatch} == wrong
    assert not [name for name, cell in cells.items() if cell.observed is Way.UNKNOWN]
    silent = {"device-reads", "write-only"} if device == "rng" else set()
    assert {name for name, cell in cells.items() if cell.observed is Way.NOT_APPLICABLE} == NOT_ASKED | silent
    assert cells["unmap-stale"].observed is (Way.BYPASS if device == "leaky" else Way.STALE)
    # Whatever the device made of it, the disk is as it was.
    assert disk.read_bytes() == bytes(disk_image(64))


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@needs_daemon
def test_a_write_that_nobody_looked_at_is_put_back_by_the_next(daemon: tuple[Path, str]) -> None:
    disk, path = daemon
    before = disk.read_bytes()
    with VhostUserMachine(BackEnd(path, kind="blk", write=True)) as machine:
        for last in (False, True):
            driver = open_device(machine)
            region = driver.ops.alloc(512)  # type: ignore[attr-defined]
            region.write(0, b"late" * 128)
            request = driver.make_device_read([(region.addr, 512)])
            request.go()
            assert machine.wait(request.done, 2)
            assert (disk.read_bytes() == before) is False
            if last:
                assert request.arrived() is None  # as before the second write, and yet not as it was
            assert machine.transport is not None
            machine.transport.reset()
    assert disk.read_bytes() == before


@pytest.fixture(scope="module")
def testpmd() -> Iterator[str]:
    """DPDK's test program as a network that returns every frame; it offers bit 33 and asks for translations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "testpmd.sock"
        command = TESTPMD.replace("{socket}", str(path)).replace("{prefix}", f"virtiova-{os.getpid()}")
        with subprocess.Popen(
            command.split(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _wait_for(path, process)
                yield str(path)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()


TESTPMD_WAYS = {
    "device-writes": Way.TRANSLATED,
    "device-reads": Way.TRANSLATED,
    "ring": Way.TRANSLATED,
    "unmapped": Way.BLOCKED,
    "read-only": Way.BLOCKED,
    "unmap": Way.BLOCKED,
    "remap": Way.TRANSLATED,
    "not-taken": Way.BYPASS,
    "renegotiate": Way.BYPASS,
    "translation-off": Way.DIRECT,
}


@needs_testpmd
@pytest.mark.parametrize("experiment", TESTPMD_WAYS)
def test_testpmd_goes_through_where_the_bit_is_taken(testpmd: str, experiment: str) -> None:
    (cell,) = probe.vhost_user(testpmd, [experiment], kind="net", echo=True)
    assert cell.observed is TESTPMD_WAYS[experiment], cell
    assert not cell.mismatch
    assert cell.offered is True
    # It has a status, so that FEATURES_OK is its own answer.
    assert cell.evidence.features_ok is True
