# SPDX-License-Identifier: Apache-2.0
"""``virtiova serve net`` and ``serve console`` as processes: probed over our own front end, and what they refuse."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leaks import descriptors
from served_guest import Server, wait_for
from virtiova import probe
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.machine.vhost_user.guess import guess_kind

SERVE = f"{shlex.quote(sys.executable)} -m virtiova serve"
WHICH = {
    "net": "net --datagram-fd {net} --socket-path {socket}",
    "console": "console --terminal-fd {net} --size 80x25 --socket-path {socket}",
}
SOME = ["device-writes", "device-reads", "unmapped", "unmap"]


@pytest.mark.parametrize("kind", sorted(WHICH))
@pytest.mark.parametrize("names", [SOME, pytest.param(None, marks=pytest.mark.sweep)])
def test_every_byte_goes_where_it_should(kind: str, names: list[str] | None) -> None:
    cells = list(probe.vhost_user(spawn=f"{SERVE} {WHICH[kind]}", experiments=names, jobs=2))
    assert {cell.device for cell in cells} == {f"vhost-user-{kind}?"}
    seen = {cell.experiment: cell.observed for cell in cells}
    assert not [cell for cell in cells if cell.mismatch or cell.observed == "unknown"], seen
    assert [seen[name] for name in SOME] == ["translated", "translated", "blocked", "blocked"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("net", "one wire"),
        ("net --neighbour 10.0.2.2 --tap x", "one wire"),
        ("net --discard --neighbour 10.0.2.2", "one wire"),
        ("net --neighbour 10.0.2.256", "IPv4"),
        ("net --neighbour 10.0.2.2 --mac 52:54:00", "six bytes"),
        ("net --tap a/b", "no name of an interface"),
        ("net --datagram-fd 999", "descriptor 999"),
        ("net --datagram-fd -1", "descriptor -1"),
        ("net --datagram /nowhere/a /nowhere/b", "/nowhere/a"),
        ("console", "one terminal"),
        ("console --pty --stdio", "one terminal"),
        ("console --stdio -j", "cannot share"),
        ("console --pty --size 80", "columns and rows"),
        ("console --pty --size 80x0", "both or none"),
        ("console --pty --size 99999x1", "up to 65535"),
        ("console --terminal /nowhere/a", "/nowhere/a"),
        ("console --terminal-fd 999", "descriptor 999"),
    ],
)
def test_what_is_refused(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = descriptors()
    path = tmp_path / "s"
    assert main(["serve", *words.split(), "--socket-path", str(path)]) == exits.USAGE
    assert said in capsys.readouterr().err
    assert not path.exists()
    assert descriptors() == before


def test_a_console_says_where_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    terminal = tmp_path / "terminal"
    with (
        Server(tmp_path, "pty", "console", "--pty") as pty,
        Server(tmp_path, "socket", "console", "--terminal", str(terminal)) as sock,
    ):
        wait_for(lambda: "the console is at /dev/pts/" in pty.log(), "the name of the pseudo-terminal")
        assert terminal.is_socket()
        pty.stop()
        sock.stop()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".log", ".log"]


def test_standard_input_that_ends_does_not_end_the_server(tmp_path: Path) -> None:
    command = [*shlex.split(SERVE), "console", "--stdio", "--socket-path", str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for((tmp_path / "s").exists, "the socket")
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert out == b""


@pytest.mark.parametrize(("features", "queues", "kind"), [(0b101, 2, "console"), (0b100, 2, "console")])
def test_a_console_is_guessed(features: int, queues: int, kind: str) -> None:
    assert guess_kind(features | 1 << 32, queues, bytes([25, 0, 80, 0, 1, 0, 0, 0, 0, 0, 0, 0]))[0] == kind


def test_a_disk_of_one_queue_is_no_console() -> None:
    assert guess_kind(0b110, 1, (2048).to_bytes(8, "little"))[0] == "blk"
