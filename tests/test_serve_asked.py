# SPDX-License-Identifier: Apache-2.0
"""What a user finds out by asking: of a quiet server, of one that is busy, of a disk that may only be read."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
VIRTIOVA = (sys.executable, "-m", "virtiova")


def virtiova(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VIRTIOVA, *words], capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT)


@contextlib.contextmanager
def served(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [*VIRTIOVA, "serve", "blk", *words, "--socket-path", str(path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as server:
        try:
            end = time.monotonic() + 20
            while not path.exists() and time.monotonic() < end:
                time.sleep(0.02)
            yield server
        finally:
            server.kill()


@pytest.fixture
def image(tmp_path: Path) -> str:
    name = tmp_path / "image"
    name.write_bytes(bytes(1 << 20))
    return str(name)


def test_a_quiet_server_answers_who_asks(tmp_path: Path, image: str) -> None:
    with served(tmp_path / "s", image, "-q") as server:
        # Listening: its signals are its own by then.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
        time.sleep(0.5)
        server.send_signal(signal.SIGUSR1)
        assert server.stderr is not None
        assert server.stderr.readline().startswith("virtiova: connections ")
        assert '"schema": "virtiova/serve/1"' in server.stderr.readline()
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=20) == ("", "")
        assert server.returncode == 0


def test_help_says_how_it_ends_and_what_is_wrong_on_purpose() -> None:
    words = " ".join(virtiova("serve", "--help").stdout.split())
    assert "the exit status is 0 then" in words
    assert words.count("wrong on purpose") == 2
    assert "0 for serve" in virtiova("--help").stdout


def test_a_busy_back_end_is_not_taken_for_a_mute_one(tmp_path: Path, image: str) -> None:
    with served(tmp_path / "s", image, "-q"), socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "s"))
        done = virtiova("probe", "vhost-user", str(tmp_path / "s"), "--experiment", "device-writes")
    assert "did not answer GET_FEATURES within 3 s: is another front end connected to it?" in done.stderr


def test_a_disk_that_may_only_be_read_is_not_asked_to_be_written(tmp_path: Path, image: str) -> None:
    with served(tmp_path / "s", image, "--read-only", "-q"):
        asked = ("--write", "--experiment", "device-reads", "--experiment", "device-writes")
        done = virtiova("probe", "vhost-user", str(tmp_path / "s"), *asked)
    assert done.returncode == 0, done.stdout
    assert "n/a         the disk may only be read (VIRTIO_BLK_F_RO)" in done.stdout
    assert "1 as predicted, 1 not applicable" in done.stdout


def test_a_type_that_may_be_wrong_is_said() -> None:
    spawn = f"{' '.join(VIRTIOVA)} serve blk --memory 1M -q --socket-path {{socket}}"
    words = ("probe", "vhost-user", "--spawn", spawn, "--experiment", "device-writes")
    hint = "That the device is of type rng is what --type says; without it the type is guessed."
    assert hint in virtiova(*words, "--type", "rng").stdout
    assert "--type says" not in virtiova(*words, "--type", "blk").stdout
