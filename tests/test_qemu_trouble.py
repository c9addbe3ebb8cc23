# SPDX-License-Identifier: Apache-2.0
"""Real QEMU in trouble: what cannot be is said in good words, and nothing waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from qemu_kit import BLK, child_environment, gone
from virtiova.addr import IOVA, PAGE_SIZE
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.errors import (
    MachineError,
    NotPossibleError,
    RefusedError,
    UsageError,
)
from virtiova.machine.image import sector_text
from virtiova.machine.qemu import bus
from virtiova.machine.qemu.machine import QemuMachine

pytestmark = pytest.mark.qemu


# -- what cannot be, in good words ---------------------------------------------------------------------------------


def test_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotPossibleError, match=r"qemu-system-x86_64 is not installed .*qemu-system-x86"):
        QemuMachine(BLK)


def test_a_device_that_can_still_be_legacy() -> None:
    with pytest.raises(RefusedError, match="iommu_platform=on,addr=3") as caught:
        QemuMachine("virtio-blk-pci,iommu_platform=on,addr=3")
    words = "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device"
    assert words in caught.value.stderr


@pytest.mark.parametrize(
    ("device", "iommu", "message"),
    [
        ("virtio-blk-pcj", "intel", "'virtio-blk-pcj'.*did you mean 'virtio-blk-pci'"),
        ("virtio-rgn-pci", "intel", "'virtio-rgn-pci'.*did you mean 'virtio-rng-pci'"),
        ("virtio-blk-pci,iomu_platform=on", "intel", "'iomu_platform'.*did you mean 'iommu_platform'"),
        ("virtio-net-pci,disable_legacy=on", "intel", "'disable_legacy'.*did you mean 'disable-legacy'"),
        ("virtio-blk-pci,iommu_platform=maybe", "intel", "'iommu_platform' expects 'on' or 'off'"),
        # QEMU quotes the whole option back, so that the bit's name in its words need not be the reason.
        ("virtio-blk-pci,iommu_platform=on,bus=nowhere", "intel", "'nowhere' not found"),
        ("virtio-blk-pci,iommu_platform=on,num-queues=many", "intel", "num-queues"),
        ("virtio-blk-pci,=on", "intel", "empty option"),
        ("", "intel", "neither a device nor an IOMMU"),
        ("virtio-blk-pci\n-nographic", "intel", "neither a device nor an IOMMU"),
        ("x" * 5000, "intel", "neither a device nor an IOMMU"),
        (BLK, "intell", "'intell'.*did you mean 'intel'"),
        (BLK, "none,aw-bits=48", "'none' has no options"),
        (BLK, "intel,aw_bits=48", "option of intel-iommu 'aw_bits'.*did you mean 'aw-bits'"),
        (BLK, "virtio,boot-bypas=off", "option of virtio-iommu-pci 'boot-bypas'.*did you mean 'boot-bypass'"),
    ],
)
def test_names_that_do_not_exist(device: str, iommu: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QemuMachine(device, iommu)


# -- trouble in the middle ----------------------------------------------------------------------------------------


def test_qemu_is_killed_in_the_middle(blk: QemuMachine) -> None:
    driver = cast(BlkDriver, open_device(blk))
    assert driver.read(1, 1) == sector_text(1)
    os.kill(blk.pid, signal.SIGKILL)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(MachineError, match="QEMU"):
            driver.read(2, 1)
    with pytest.raises(MachineError, match="-9"):
        blk.wait(lambda: False, 5)
    with pytest.raises(MachineError):
        blk.iommu.faults()
    assert time.monotonic() - started < 5
    assert isinstance(blk.words(), list)
    blk.close()
    blk.close()


def test_qemu_stops_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "ANSWER_SECONDS", 1.0)
    with QemuMachine(BLK) as machine:
        driver = cast(BlkDriver, open_device(machine))
        os.kill(machine.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(MachineError, match=r"did not answer.*still running"):
            driver.read(2, 1)
        assert time.monotonic() - started < 4
        pid = machine.pid
        started = time.monotonic()
        machine.close()
        assert time.monotonic() - started < 2
        assert gone(pid)


QMP_CHILD = """
import os, signal, sys, time
from virtiova.errors import MachineError
from virtiova.machine.qemu import bus
from virtiova.machine.qemu.machine import QemuMachine
bus.ANSWER_SECONDS = 1.0
def descriptors():
    return len(os.listdir("/proc/self/fd"))
QemuMachine("virtio-rng-pci").close()
before = descriptors()
machine = QemuMachine("virtio-rng-pci")
assert machine.qmp("query-status")["running"]
os.kill(machine.pid, getattr(signal, sys.argv[1]))
time.sleep(0.1)
try:
    machine.qmp("query-status")
except MachineError:
    print("MachineError")
except Exception as error:
    print("not ours:", repr(error))
machine.close()
machine.close()
print("left:", descriptors() - before)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_qmp_of_a_machine_that_is_gone_or_stopped(how: str) -> None:
    """In a process of its own: the answer comes in bounded time, as an error of ours, and `close` closes."""
    done = subprocess.run(
        [sys.executable, "-c", QMP_CHILD, how],
        capture_output=True,
        env=child_environment(),
        text=True,
        timeout=12,
        check=False,
    )
    assert done.stdout.splitlines() == ["MachineError", "left: 0"], done.stderr


def test_a_request_that_never_completes(monkeypatch: pytest.MonkeyPatch, blk: QemuMachine) -> None:
    monkeypatch.setattr("virtiova.driver.base.REQUEST_SECONDS", 0.2)
    driver = cast(BlkDriver, open_device(blk))
    (queue,) = driver.queues()
    blk.iommu.unmap(IOVA(queue.region.addr), PAGE_SIZE)
    blk.iommu.invalidate()
    with pytest.raises(MachineError, match="did not complete"):
        driver.read(1, 1)
