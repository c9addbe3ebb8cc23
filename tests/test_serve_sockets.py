# SPDX-License-Identifier: Apache-2.0
"""The names of sockets: mode, owner, and whose dead socket may be taken over."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from virtiova.errors import NotPossibleError, UsageError
from virtiova.serve import sockets
from virtiova.serve.journal import LONGEST_LINE, MAX_LINES, Throttle, log
from virtiova.serve.sockets import SocketOptions


def dead(path: Path) -> None:
    """A socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_mode_from_the_first_moment(tmp_path: Path, mode: int, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    seen = []
    real = os.umask

    def look(mask: int) -> int:
        if path.exists():
            seen.append(stat.S_IMODE(path.stat().st_mode))
        return real(mask)

    before = os.umask(umask)
    monkeypatch.setattr(os, "umask", look)
    try:
        sock, identity = sockets.listen(str(path), SocketOptions(mode))
    finally:
        monkeypatch.undo()
        assert os.umask(before) == umask
    with sock:
        # The first chance to look, after bind, and the end.
        assert seen == [mode]
        assert stat.S_IMODE(path.stat().st_mode) == mode
    sockets.remove(str(path), identity)
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_owner(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = SocketOptions(0o660, 1234, 4321)
    for _ in range(2):
        # The second time over the dead one, which is not ours but of whom we give it to.
        sock, _ = sockets.listen(str(path), options)
        info = path.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 4321, 0o660)
        sock.close()
    with pytest.raises(UsageError, match="a dead socket of user 1234"):
        sockets.listen(str(path), SocketOptions())
    assert path.exists()


def test_a_dead_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead(path)
    sock, identity = sockets.listen(str(path), SocketOptions())
    with pytest.raises(NotPossibleError, match="somebody is serving there"):
        sockets.listen(str(path), SocketOptions())
    with contextlib.ExitStack() as stack:
        for _ in range(sockets.BACKLOG + 1):
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(NotPossibleError, match="many wait"):
            sockets.listen(str(path), SocketOptions())
    assert (path.stat().st_dev, path.stat().st_ino) == identity
    sock.close()

    for make in (Path.touch, Path.mkdir, lambda each: each.symlink_to("nowhere"), os.mkfifo):
        other = tmp_path / "other"
        make(other)
        with pytest.raises(UsageError, match="something else"):
            sockets.listen(str(other), SocketOptions())
        assert other.is_symlink() or other.exists()
        (Path.rmdir if other.is_dir() else Path.unlink)(other)


def test_a_datagram_socket_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        with pytest.raises(UsageError, match="wrong type"):
            sockets.listen(str(path), SocketOptions())
    assert path.exists()


def test_the_name_of_another_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, identity = sockets.listen(str(path), SocketOptions())
    # The dead one is kept, so that its inode is not used again.
    path.rename(tmp_path / "old")
    first.close()
    second, _ = sockets.listen(str(path), SocketOptions())
    sockets.remove(str(path), identity)
    assert path.exists()
    second.close()


def test_of_many_that_start_at_once_over_a_dead_one_one_serves(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(20):
        dead(path)
        gate = threading.Barrier(4)
        won: list[socket.socket] = []

        def start(gate: threading.Barrier = gate, won: list[socket.socket] = won) -> None:
            gate.wait()
            with contextlib.suppress(NotPossibleError):
                won.append(sockets.listen(str(path), SocketOptions())[0])

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = won
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            winner.accept()[0].close()
        winner.close()
        path.unlink()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    for path in (str(tmp_path / ("x" * 108)), str(tmp_path / "missing" / "s"), str(tmp_path / "n\0ul")):
        with pytest.raises(UsageError):
            sockets.listen(path, SocketOptions())


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    """A pipe that is full: what does not fit is lost and counted, and the next line that fits says so."""
    program = (
        "import sys\nfrom virtiova.serve.journal import log\n"
        "for n in range(2000): log('x' * 200)\n"
        "log('y' * 100_000)\n"
        "print('done', flush=True)\nsys.stdin.readline()\nlog('after')\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"done\n"
            first = os.read(process.stderr.fileno(), 1 << 20)
            process.stdin.write(b"\n")
            process.stdin.flush()
            lines = first.splitlines()
            assert set(lines) == {b"virtiova: " + b"x" * 200}
            told, after = process.stderr.read().splitlines()
            assert told == b"virtiova: %d lines were lost: nobody took them" % (2001 - len(lines))
            assert after == b"virtiova: after"
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_line_has_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    log("y" * 100_000)
    (line,) = capfd.readouterr().err.splitlines()
    assert len(line) == LONGEST_LINE + len("...")


def test_the_log_has_an_end() -> None:
    now = 0.0
    lines: list[str] = []
    say = Throttle(lines.append, lambda: now)
    for n in range(1000):
        say(str(n))
    assert lines == [str(n) for n in range(MAX_LINES)]
    now = 1.0
    say("later")
    assert lines[-2:] == [f"{1000 - MAX_LINES} lines were left out here", "later"]
