# SPDX-License-Identifier: Apache-2.0
"""A program that a user named as QEMU and that is none: what it says is bounded in bytes and in time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from virtiova.errors import NotPossibleError
from virtiova.machine.qemu.ask import LIMIT, ask
from virtiova.machine.qemu.boards import Q35
from virtiova.machine.qemu.command import _help
from virtiova.machine.qemu.installation import Installation, device_types, qemu_version
from virtiova.machine.qemu.suites import _refusal

Make = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Make:
    """A shell script with the name of a QEMU; its path."""

    def make(text: str) -> str:
        path = tmp_path / Q35.binary
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_what_is_said_comes_whole(script: Make) -> None:
    answer = ask([script('echo "out $1"; echo "err $FOO" >&2; cat; exit 3'), "word"], os.environ | {"FOO": "bar"})
    assert (answer.status, answer.out, answer.err, answer.why) == (3, "out word\n", "err bar\n", "err bar")
    answer = ask([script(f"head -c {LIMIT} /dev/zero; kill -9 $$")])
    assert (answer.status, len(answer.out), answer.why) == (-9, LIMIT, "exit status -9")


def test_what_is_no_text_is_shown_as_such(script: Make) -> None:
    answer = ask([script(r"printf 'a\377b\n'; printf 'bad \033[31m\377\n' >&2")])
    assert answer.out == "a\ufffdb\n"
    assert answer.why == "bad \ufffd[31m\ufffd"


@pytest.mark.parametrize("where", ["", " >&2"])
def test_more_than_the_limit_is_no_answer(script: Make, where: str) -> None:
    binary = script(f"yes{where}; exit 0")
    began = time.monotonic()
    with pytest.raises(NotPossibleError, match=f"{Q35.binary} says more than {LIMIT} bytes"):
        ask([binary])
    assert time.monotonic() - began < 5
    assert ask([script(f"head -c 100 /dev/zero{where}")], limit=100).status == 0
    with pytest.raises(NotPossibleError, match="says more than 99 bytes"):
        ask([binary], limit=99)


def test_700_mb_cost_no_memory(script: Make) -> None:
    binary = script("head -c 700000000 /dev/zero")
    code = f"from virtiova.machine.qemu.installation import qemu_version as v; print(v({binary!r}))"
    limit = 400 << 20
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert (done.returncode, done.stdout) == (0, "unknown\n"), done.stderr


def test_longer_than_the_seconds_is_no_answer_and_nothing_is_left_running(script: Make, tmp_path: Path) -> None:
    left = tmp_path / "pid"
    binary = script(f"sleep 60 & echo $! > {left}; sleep 60")
    began = time.monotonic()
    with pytest.raises(NotPossibleError, match=r"did not end within 0\.5 s"):
        ask([binary], seconds=0.5)
    assert time.monotonic() - began < 5
    assert gone(int(left.read_text()))


def test_a_child_that_holds_its_output_open_keeps_nobody_waiting(script: Make, tmp_path: Path) -> None:
    left = tmp_path / "pid"
    began = time.monotonic()
    assert ask([script(f"sleep 60 & echo $! > {left}; echo said")]).out == "said\n"
    assert time.monotonic() - began < 5
    assert gone(int(left.read_text()))


def gone(pid: int) -> bool:
    """Is a process of somebody else's gone, or a zombie whom nobody waits for?"""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(NotPossibleError, match="cannot be started: No such file"):
        ask([str(tmp_path / "nothing")])
    binary = tmp_path / Q35.binary
    binary.write_bytes(b"\x7fELF" + bytes(100))
    binary.chmod(0o755)
    assert qemu_version(str(binary)) == "unknown"
    assert _help(str(binary), "help", "x") == []
    assert "cannot be started: Exec format error" in _refusal(Installation(str(tmp_path)), Q35)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2)", "7.2.22"),
        ("QEMU emulator version 10.0.0-rc1", "10.0.0-rc1"),
        (r"QEMU emulator version 7.2\377", "7.2"),
        (r"version \033[31m", "unknown"),
        (r"\377", "unknown"),
    ],
)
def test_versions(script: Make, said: str, version: str) -> None:
    qemu_version.cache_clear()
    assert qemu_version(script(f"printf '{said}\\n'")) == version


def test_a_qemu_that_does_not_list_its_devices_says_why(script: Make, tmp_path: Path) -> None:
    installation = Installation(str(tmp_path))
    for text, why in (
        (r"printf 'no \377\n' >&2; exit 1", "does not list its devices: no \ufffd"),
        ("exit 4", "does not list its devices: exit status 4"),
        ("yes", "does not list its devices: .* says more than"),
        ("""seq -f 'name "virtio-%g", bus PCI' 501""", "lists 501 virtio device types, which no QEMU has"),
    ):
        script(text)
        with pytest.raises(NotPossibleError, match=why):
            device_types(installation, Q35)
    script("""seq -f 'name "virtio-%g", bus PCI' 500; echo 'name "virtio-\033[31m", bus PCI'""")
    assert len(device_types(installation, Q35)) == 500


@pytest.mark.parametrize("text", [r"printf 'version \377\n'", "head -c 5000000 /dev/zero"])
def test_the_command_with_such_a_directory(script: Make, tmp_path: Path, text: str) -> None:
    script(text)
    words = ["matrix", "--qemu", str(tmp_path), "--only", "q35", "--only", "amd", "--only", "iommu", "--list"]
    done = subprocess.run(
        [sys.executable, "-m", "virtiova", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "iommu    q35 amd virtio-blk-pci device-writes" in done.stdout
