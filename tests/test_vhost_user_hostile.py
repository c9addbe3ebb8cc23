# SPDX-License-Identifier: Apache-2.0
"""Back ends that lie, stop, flood or die, and commands that start none: a clear outcome, and nothing left."""

from __future__ import annotations

import array
import os
import socket
import struct
import tempfile
import time
from pathlib import Path

import pytest

from leaks import descriptors
from vhost_user_kit import (
    FEATURES,
    Answer,
    Gone,
    Scripted,
    commands,
    honest,
    miss,
    scripted,
)
from virtiova import probe
from virtiova.addr import Access
from virtiova.cli import main
from virtiova.driver.open import open_device
from virtiova.errors import MachineError, ProtocolError, VirtiovaError
from virtiova.machine import backend as backends
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user import frontend
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.result import Path as Way
from virtiova.wire.vhost_user import (
    Message,
    Request,
    u64,
)

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
        {Request.SET_BACKEND_REQ_FD: lambda _, m: m.acknowledge(ok=False).encode()},
        ProtocolError,
        "answered SET_BACKEND_REQ_FD where GET_FEATURES was to be answered",
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
        other.back.sendall(miss(0x500000, Access.READ, need_reply=False) * 300)

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
            other.back.sendall(miss(0x500000, Access.READ) * 100)

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
        (["--spawn", "true '{socket}"], "closing quotation"),
        (["--spawn", "true {socket}", "--type", "blck"], "did you mean 'blk'"),
    ):
        assert main.main(["probe", "vhost-user", *words]) == 2
        assert why in capsys.readouterr().err


def test_a_socket_is_tried_once_and_not_in_each_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "REPLY_SECONDS", 0.2)
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        assert main.main(["probe", "vhost-user", str(path), "--type", "blk"]) == 3
        out, err = capsys.readouterr()
        said = f"{path}: the back end did not answer GET_FEATURES within 0.2 s: is another front end connected to it?"
        assert (out, err) == ("", f"virtiova: {said}\n")
    assert main.main(["probe", "vhost-user", str(path), "--type", "blk"]) == 3
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"virtiova: {path}: cannot connect: Connection refused\n")
    (tmp_path / "disk.img").write_bytes(bytes(512))
    assert main.main(["probe", "vhost-user", str(tmp_path / "disk.img")]) == 2
    assert "disk.img: is not a socket" in capsys.readouterr().err


def test_a_command_that_does_not_listen_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "START_SECONDS", 0.3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = f"sleep 98765.{os.getpid()}"
    with pytest.raises(MachineError, match="did not listen within"):
        VhostUserMachine(BackEnd(spawn=f"sh -c '{mark} & {mark} # {{socket}}'", kind="rng"))
    assert not [line for line in commands() if line.startswith(mark)]
    assert not list(tmp_path.iterdir())


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
