# SPDX-License-Identifier: Apache-2.0
"""The dirty log, proven by QEMU: what only the device wrote while its machine migrated arrives in the other machine.

No processor runs here and nobody else writes to these pages, so that QEMU learns of them from the log or not at all.
That it would not is seen as well: with a back end that notes nothing, they stay behind.
"""

from __future__ import annotations

import mmap
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from served_guest import wait_for
from virtiova.addr import GPA, PAGE_SIZE
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import MachineError
from virtiova.machine.backend import BackEnd
from virtiova.machine.qemu import machine as qemu_machine
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.machine.qemu.monitor import Monitor
from virtiova.machine.qemu.process import QemuProcess, memory_file

pytestmark = pytest.mark.qemu

SILENT = """
import sys
from virtiova.cli import main
from virtiova.serve.dirty import DirtyLog

DirtyLog.mark = lambda *_: None
sys.exit(main.main(sys.argv[1:]))
"""
"""A back end that takes the log, and notes nothing in it."""
BALLAST, BALLAST_AT = 4 << 20, 0x3000000
"""Bytes that no two of are alike, so that they take their time, and where they are: behind everything else."""
SLOWLY, AT_ONCE = 2 << 20, 1 << 40
"""Bytes a second."""
LENGTH = 8 * 512


class Recorded(QemuProcess):
    """Keeps its command line, for the machine that the first one migrates to."""

    last: Sequence[str] = ()

    def __init__(self, argv: Sequence[str], fds: Sequence[int], environment: Any = None) -> None:
        Recorded.last = tuple(argv)
        super().__init__(argv, fds, environment)


def migrating(machine: QemuMachine) -> dict[str, Any]:
    told = machine.qmp("query-migrate")
    assert isinstance(told, dict)
    assert told.get("status") in ("setup", "active", "device", "completed"), told
    return told


def leave(machine: QemuMachine, state: Path, meanwhile: Callable[[], None]) -> bytes:
    """Migrate into a file; ``meanwhile`` is when all pages but the ballast were sent. The RAM at the end."""
    machine.ram.write(GPA(BALLAST_AT), os.urandom(BALLAST))
    machine.qmp("migrate-set-parameters", max_bandwidth=SLOWLY)
    machine.qmp("migrate", uri=f"exec:cat >{shlex.quote(str(state))}")
    # What comes before is nearly all zero, and a page of zeros takes nine bytes.
    wait_for(lambda: migrating(machine).get("ram", {}).get("transferred", 0) > BALLAST // 4, "the ballast")
    meanwhile()
    told = migrating(machine)
    assert (told["status"], told["ram"]["dirty-sync-count"]) == ("active", 1), "the first round was over too soon"
    machine.qmp("migrate-set-parameters", max_bandwidth=AT_ONCE)
    wait_for(lambda: migrating(machine)["status"] == "completed", "the end of the migration")
    assert migrating(machine)["ram"]["dirty-sync-count"] > 1
    return machine.ram.read(GPA(machine.board.usable), machine.board.ram_size - machine.board.usable)


def arrive(argv: Sequence[str], state: Path, start: int) -> bytes:
    """The RAM of a machine of the same kind, from ``start`` on, once it has taken in what is in the file."""
    with ExitStack() as stack:
        ram = memory_file("arrived", 64 << 20)
        stack.callback(os.close, ram)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        words = " ".join(argv)
        words = re.sub(r"mem-path=\S+?,", f"mem-path=/proc/self/fd/{ram},", words)
        words = re.sub(r"id=qmp,fd=\d+", f"id=qmp,fd={theirs.fileno()}", words)
        words = re.sub(r"-chardev socket,id=qtest,fd=\d+ -qtest \S+ -qtest-log none", "-S", words)
        (bios,) = map(int, re.findall(r"-bios /proc/self/fd/(\d+)", words))
        process = QemuProcess(
            [*words.split(), "-incoming", f"exec:cat {shlex.quote(str(state))}"], [ram, theirs.fileno(), bios]
        )
        stack.callback(process.close)
        theirs.close()
        monitor = Monitor(ours, lambda said: MachineError(f"{said}; {process.stderr()}"))
        stack.callback(monitor.close)
        wait_for(lambda: _status(monitor) == "paused", "the other machine")
        with mmap.mmap(ram, 64 << 20, prot=mmap.PROT_READ) as found:
            return bytes(found[start:])


def _status(monitor: Monitor) -> str:
    told = monitor.execute("query-status", {})
    assert isinstance(told, dict)
    return str(told["status"])


@pytest.mark.parametrize("bit", [True, pytest.param(False, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("honest", [True, False], ids=["with the log", "with a log that nobody writes to"])
def test_what_only_the_device_wrote_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bit: bool, honest: bool
) -> None:
    monkeypatch.setattr(qemu_machine, "QemuProcess", Recorded)
    silent = tmp_path / "silent.py"
    silent.write_text(SILENT)
    program = "-m virtiova" if honest else shlex.quote(str(silent))
    spawn = f"{shlex.quote(sys.executable)} {program} serve blk {{image}} --socket-path {{socket}}"
    device = f"vhost-user-blk-pci{',iommu_platform=on' if bit else ''}"
    state = tmp_path / "state"
    with QemuMachine(device, "intel,device-iotlb=on", backend=BackEnd(spawn=spawn)) as machine:
        driver = cast(BlkDriver, open_device(machine))
        start = machine.board.usable
        buffers = [driver.ops.alloc(LENGTH) for _ in range(2)]
        for buffer in buffers:
            buffer.write(0, b"\xee" * LENGTH)
        requests = [driver.make_device_write([(buffer.addr, LENGTH)]) for buffer in buffers]
        before = machine.ram.read(GPA(start), machine.board.ram_size - start)

        def write() -> None:
            for request in requests:
                request.go()
            assert machine.wait(driver.queues()[0].ring.used_moved, 5.0)
            wait_for(lambda: all(buffer.read(0, 1) != b"\xee" for buffer in buffers), "the device")

        left = leave(machine, state, write)
        # The first one lets go of the back end; its pages are ours, and stay.
        machine._process.close()
        found = arrive(Recorded.last, state, start)
    ballast = range((BALLAST_AT - start) // PAGE_SIZE, (BALLAST_AT + BALLAST - start) // PAGE_SIZE)
    written = {n for n in pages(before, left) if n not in ballast}
    data = {n for n in written if b"sector 0000" in left[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]}
    assert len(data) == 2, "each buffer has a page"
    behind = pages(left, found)
    if honest:
        assert behind == set(), "all of it arrived"
    else:
        assert data <= behind <= written, "and nothing but what was written since the first round is missing"


def pages(one: bytes, other: bytes) -> set[int]:
    """Numbers of the pages that differ."""
    assert len(one) == len(other)
    steps = range(0, len(one), PAGE_SIZE)
    return {at // PAGE_SIZE for at in steps if one[at : at + PAGE_SIZE] != other[at : at + PAGE_SIZE]}
