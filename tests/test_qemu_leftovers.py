# SPDX-License-Identifier: Apache-2.0
"""Real QEMU: however a machine ends, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_kit import BLK, child_environment, gone
from virtiova.driver.open import open_device
from virtiova.errors import (
    MachineError,
    RefusedError,
    UsageError,
)
from virtiova.machine.qemu.machine import QemuMachine

pytestmark = pytest.mark.qemu


# -- nothing left behind ------------------------------------------------------------------------------------------


def children() -> dict[int, str]:
    """Processes that this one has started and not waited for: pid and state."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = stat.read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid():
                found[int(stat.parent.name)] = state
    return found


def descriptors() -> dict[str, str]:
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[fd.name] = os.readlink(fd)
    return found


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:virtiova")


def shm_entries() -> set[str]:
    """Names in shared memory that could be ours or QEMU's; others come and go on any machine."""
    shm = Path("/dev/shm")
    names = {path.name for path in shm.iterdir()} if shm.is_dir() else set()
    return {name for name in names if "qemu" in name.lower() or "virtiova" in name.lower()}


def good(machine: QemuMachine) -> None:
    open_device(machine)


def killed(machine: QemuMachine) -> None:
    os.kill(machine.pid, signal.SIGKILL)
    machine.bus.ping()


def asked(machine: QemuMachine) -> None:
    machine.qmp("query-status")


def raises(machine: QemuMachine) -> None:
    raise KeyboardInterrupt


LIVES: list[tuple[str, Callable[[QemuMachine], None], type[BaseException] | None]] = [
    (BLK, good, None),
    ("virtio-net-pci", good, None),
    ("virtio-rng-pci,iommu_platform=on", good, None),
    ("virtio-blk-pci,iommu_platform=on,addr=3", good, RefusedError),
    ("virtio-blk-pci,no-such=1", good, UsageError),
    ("edu", good, UsageError),
    (BLK, killed, MachineError),
    (BLK, raises, KeyboardInterrupt),
]


def live(device: str, use: Callable[[QemuMachine], None], error: type[BaseException] | None) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext(), QemuMachine(device) as machine:
        use(machine)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for temporary files that nobody else uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == str(tmp_path)
    return tmp_path


def test_twenty_machines_leave_nothing_behind(temporary: Path) -> None:
    live(*LIVES[0])
    before = children(), descriptors(), mappings(), shm_entries()
    for number in range(20):
        live(*LIVES[number % len(LIVES)])
    assert (children(), descriptors(), mappings(), shm_entries()) == before
    assert list(temporary.iterdir()) == []


def test_a_machine_that_was_asked_over_qmp_leaves_nothing_behind() -> None:
    live(BLK, asked, None)
    before = children(), descriptors(), mappings()
    live(BLK, asked, None)
    assert (children(), descriptors(), mappings()) == before


def test_a_running_machine_has_no_file_with_a_name(blk: QemuMachine) -> None:
    """What has no name cannot stay: memory, image, BIOS and sockets are all anonymous."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{blk.pid}/fd").iterdir()]
    named = [link for link in links if link.startswith("/") and not link.endswith(" (deleted)")]
    assert set(named) <= {"/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"}
    sockets = {link.partition(":")[2].strip("[]") for link in links if link.startswith("socket:")}
    assert sockets
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        assert len(fields) == 7 or fields[6] not in sockets, "a socket with a path"


CHILD = """
import os, sys, time
from virtiova.driver.open import open_device
from virtiova.machine.qemu.machine import QemuMachine
machine = QemuMachine("virtio-blk-pci,iommu_platform=on")
open_device(machine)
print(machine.pid, flush=True)
how = sys.argv[1]
if how == "exit":
    sys.exit(0)
if how == "error":
    raise RuntimeError("in the middle")
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt", "exit", "error"])
def test_no_qemu_outlives_its_process(how: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        text=True,
    )
    with child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        if how in ("kill", "interrupt"):
            assert not gone(pid)
            child.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
        deadline = time.monotonic() + 2
        child.wait(10)
        while not gone(pid):
            assert time.monotonic() < deadline, "QEMU is still there"
            time.sleep(0.01)
