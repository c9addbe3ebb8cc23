# SPDX-License-Identifier: Apache-2.0
"""A caller that is interrupted, forks, or asks for much: nothing is lost, nothing hangs, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from virtiova import probe
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import ProtocolError, UsageError
from virtiova.machine.model import ModelMachine
from virtiova.machine.qemu.bus import QtestBus
from virtiova.result import Path

INTERRUPTED = """
import gc, os, signal, time
from virtiova.machine.qemu import process
from virtiova.machine.qemu.machine import QemuMachine

def raise_it(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, raise_it)
QemuMachine("virtio-rng-pci").close()
before = len(os.listdir("/proc/self/fd"))
for round in range(20):
    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.003 * round)
    try:
        QemuMachine("virtio-rng-pci").close()
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
end = time.monotonic() + 10
while process._live and time.monotonic() < end:
    # What was interrupted while it was being closed ends with its last reference.
    gc.collect()
    time.sleep(0.05)
print(len(process._live), len(os.listdir("/proc/self/fd")) - before)
"""

FORKED = """
import os, sys
from virtiova import probe

def paths():
    return [str(cell.observed) for cell in probe.qemu("virtio-rng-pci", experiments=["device-writes"])]

assert paths() == ["bypass"]
child = os.fork()
if child == 0:
    os._exit(0 if paths() == ["bypass"] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), paths())
"""


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.qemu
def test_an_interrupted_start_leaves_no_qemu_and_no_descriptor() -> None:
    live, descriptors = python(INTERRUPTED).split()
    assert live == "0"
    # Between the making of a descriptor and the note that it is ours an interrupt may strike, too: now and then, not
    # ten for each of twenty starts.
    assert int(descriptors) <= 12


@pytest.mark.qemu
def test_after_a_fork_both_go_on() -> None:
    assert python(FORKED).strip() == "0 ['bypass']"


class _Echo:
    """A socket whose peer answers every question, and says something more."""

    def __init__(self, more: bytes) -> None:
        self._more = more
        self._out = b""

    def settimeout(self, _: float) -> None: ...

    def sendall(self, data: bytes) -> None:
        self._out += b"OK 0x11\n" * data.count(b"\n") + self._more

    def recv(self, _: int) -> bytes:
        out, self._out = self._out, b""
        return out


def test_an_answer_to_nothing_is_no_answer_to_the_next_question() -> None:
    bus = QtestBus(_Echo(b"OK 0xee\n"), AssertionError)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="2 answers to 1"):
        bus.read_bytes(0x1000, 1)


def test_a_disk_can_be_read_for_ever() -> None:
    with ModelMachine("honest", "blk") as machine:
        disk = open_device(machine)
        assert isinstance(disk, BlkDriver)
        for _ in range(2500):
            assert disk.read(7)[:16] == b"sector 00000007 "
        for sector, count in ((-1, 1), (0, 0), (10**9, 1)):
            with pytest.raises(UsageError):
                disk.read(sector, count)


def test_what_cannot_be_is_said_before_the_first_cell() -> None:
    with pytest.raises(UsageError, match="ring"):
        probe.model("honest", "blk", "ring")
    with pytest.raises(UsageError, match="behaviour"):
        probe.model("hones", "blk")
    with pytest.raises(UsageError, match="jobs"):
        probe.model("honest", "blk", jobs=-1)


@pytest.mark.qemu
def test_a_qemu_that_talks_garbage_costs_its_own_cells_only(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    fake = os.path.join(str(tmp_path), "qemu-system-x86_64")
    with open(fake, "w", encoding="utf-8") as file:
        file.write("#!/bin/sh\nexec 1>&2\nkill -9 $$\n")
    os.chmod(fake, 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cells = list(probe.qemu("virtio-rng-pci", experiments=["device-writes", "ring"]))
    assert [cell.observed for cell in cells] == [Path.UNKNOWN, Path.UNKNOWN]
    assert all(cell.evidence.note for cell in cells)
