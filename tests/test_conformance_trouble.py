# SPDX-License-Identifier: Apache-2.0
"""Peers that are none: a clear word for each case, in bounded time, and nothing left of them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhost_user_kit import commands
from virtiova.cli import main
from virtiova.conformance.cases import CASES
from virtiova.conformance.run import run_cases
from virtiova.machine.backend import BackEnd
from virtiova.result import CaseResult, Verdict

Peer = Callable[[socket.socket], None]


def closes(_: socket.socket) -> None:
    """Hangs up at once."""


def garbage(peer: socket.socket) -> None:
    """Says what is no message."""
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)
    peer.recv(4096)


def floods(peer: socket.socket) -> None:
    """A million well-formed messages that nobody asked for."""
    message = struct.pack("<IIIQ", 1, 5, 8, 0)
    for _ in range(1000):
        peer.sendall(message * 1000)


def wrong_fds(peer: socket.socket) -> None:
    """The right answer, with descriptors that have no business there."""
    while peer.recv(4096):
        with open("/dev/null", "rb") as null:
            socket.send_fds(peer, [struct.pack("<IIIQ", 1, 5, 8, 1 << 33 | 1 << 32)], [null.fileno()] * 20)


def mute(peer: socket.socket) -> None:
    """Takes everything, answers nothing."""
    while peer.recv(4096):
        pass


def never_reads(peer: socket.socket) -> None:
    """Neither."""
    time.sleep(20)


class Serving:
    """Somebody at a socket."""

    def __init__(self, path: Path, peer: Peer) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._peer = peer
        self.served = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with connected:
            self.served += 1
            with contextlib.suppress(OSError):
                self._peer(connected)

    def close(self) -> None:
        """No longer."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Peer], Serving]]:
    """Somebody who behaves so."""
    made: list[Serving] = []
    monkeypatch.setattr("virtiova.machine.vhost_user.frontend.REPLY_SECONDS", 0.3)

    def serve(peer: Peer) -> Serving:
        made.append(Serving(tmp_path / "peer.sock", peer))
        return made[-1]

    yield serve
    for each in made:
        each.close()


def asked(backend: BackEnd) -> list[CaseResult]:
    """All cases."""
    return list(run_cases(backend, list(CASES.values())))


@pytest.mark.parametrize("peer", [closes, garbage, floods, wrong_fds, mute, never_reads])
def test_who_is_no_back_end(peer: Peer, serving: Callable[[Peer], Serving]) -> None:
    peers = serving(peer)
    before = set(os.listdir("/proc/self/fd"))
    begin = time.monotonic()
    results = asked(BackEnd(peers.path, kind="rng"))
    assert time.monotonic() - begin < 15
    assert [each.case for each in results] == list(CASES)
    for each in results:
        assert each.result in (Verdict.UNKNOWN, Verdict.NOT_APPLICABLE), each
        assert each.evidence.seen
    # Who is given up is not asked again and again.
    assert any(each.evidence.seen.startswith("not asked: ") for each in results)
    # Of ours nothing is left; of theirs, one for each connection may be.
    assert len(set(os.listdir("/proc/self/fd")) - before) <= peers.served


def test_the_command_says_so_and_exits_with_3(
    serving: Callable[[Peer], Serving], capsys: pytest.CaptureFixture[str]
) -> None:
    path = serving(closes).path
    assert main.main(["probe", "vhost-user", path, "--type", "rng", "--conformance"]) == 3
    out = capsys.readouterr().out
    assert "translate" in out
    assert "has closed the main channel" in out


PYTHON = sys.executable


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{PYTHON} -c 'import sys; sys.exit(7)' {{socket}}", "exit status 7"),
        (f"{PYTHON} -c 'import os; os.kill(os.getpid(), 11)' {{socket}}", "exit status -11"),
        # Goes away into a session of its own, and leaves somebody behind.
        (
            f"{PYTHON} -c 'import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(999.25)' {{socket}}",
            "it has to stay in the foreground",
        ),
    ],
)
def test_a_command_that_does_not_serve(command: str, said: str) -> None:
    begin = time.monotonic()
    results = asked(BackEnd(spawn=command, kind="rng"))
    assert time.monotonic() - begin < 15
    unknown = [each for each in results if each.result is not Verdict.NOT_APPLICABLE]
    assert unknown
    assert all(said in each.evidence.seen for each in unknown)
    assert not [line for line in commands() if "999.25" in line]


def test_one_that_works_from_a_session_of_its_own_is_ended_too() -> None:
    script = "import os, sys; os.fork() and (os.wait(), os._exit(0)); os.setsid(); "
    script += "from virtiova.cli.main import main; sys.exit(main(sys.argv[1:]))"
    spawn = f"{PYTHON} -c '{script}' serve rng --socket-path {{socket}}"
    (result,) = run_cases(BackEnd(spawn=spawn, kind="rng"), [CASES["translate"]])
    assert result.result is Verdict.PASS, result
    assert not [line for line in commands() if "os.setsid(); from virtiova.cli" in line]


def test_one_that_ends_with_its_connection_is_started_for_each_case() -> None:
    script = (
        "import socket, sys; from virtiova.device.rng import Rng; from virtiova.serve.server import Server; "
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen(1); "
        "connected = listener.accept()[0]; Server(Rng(), fd=connected.detach()).run()"
    )
    backend = BackEnd(spawn=f'{PYTHON} -c "{script}" {{socket}}', kind="rng")
    names = ["translate", "bit33-declined", "unoffered-bit", "bit33-without-channel"]
    results = {each.case: each for each in run_cases(backend, [CASES[name] for name in names], jobs=1)}
    assert {name: each.result for name, each in results.items()} == dict.fromkeys(names, Verdict.PASS), results
