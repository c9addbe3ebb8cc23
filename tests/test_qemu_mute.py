# SPDX-License-Identifier: Apache-2.0
"""A QEMU that never answers is waited for once, and not in every cell of a run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path as File

import pytest

from virtiova.errors import MachineError
from virtiova.machine.qemu import bus, machine
from virtiova.machine.qemu.boards import Q35
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.plan import Runner, Task
from virtiova.result import Path

SECONDS = 0.5
DEVICE = "virtio-rng-pci"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short wait, and nothing that is remembered from other tests."""
    monkeypatch.setattr(bus, "ANSWER_SECONDS", SECONDS)
    monkeypatch.setattr(machine, "_mute", set())
    monkeypatch.setattr(machine, "_answered", set())


def mute(folder: File) -> str:
    """A QEMU that says its version, and else nothing."""
    folder.mkdir(exist_ok=True)
    file = folder / Q35.binary
    file.write_text('#!/bin/sh\ncase "$1" in --version) echo version 7.2.0 ;; *) exec sleep 60 ;; esac\n')
    file.chmod(0o755)
    return str(file)


def refusal(binary: str) -> tuple[str, float]:
    begun = time.monotonic()
    with pytest.raises(MachineError) as caught:
        QemuMachine(DEVICE, "none", binary=binary)
    return str(caught.value), time.monotonic() - begun


def test_the_second_cell_does_not_wait(tmp_path: File) -> None:
    one, other = mute(tmp_path / "one"), mute(tmp_path / "other")
    said, seconds = refusal(one)
    assert said.startswith("QEMU did not answer for 0.5 s")
    assert seconds >= SECONDS
    said, seconds = refusal(one)
    assert said == f"{one} did not answer when it was started before; it is not asked again"
    assert seconds < SECONDS
    assert refusal(other)[0].startswith("QEMU did not answer"), "another one is asked"


def test_every_cell_of_a_run_has_its_row(tmp_path: File) -> None:
    mute(tmp_path)
    tasks = [Task("q35", "none", DEVICE, "device-writes", qemu=str(tmp_path)) for _ in range(8)]
    begun = time.monotonic()
    cells = list(Runner(jobs=1).run(tasks))
    assert time.monotonic() - begun < 4 * SECONDS
    assert [cell.observed for cell in cells] == [Path.UNKNOWN] * 8
    assert "did not answer for" in cells[0].evidence.note
    assert all("not asked again" in cell.evidence.note for cell in cells[1:])


@pytest.mark.qemu
def test_one_that_has_answered_before_is_asked_again(tmp_path: File) -> None:
    """What happens to it once may be the load of the machine."""
    file = tmp_path / Q35.binary
    file.symlink_to(str(shutil.which(Q35.binary)))
    with QemuMachine(DEVICE, "none", binary=str(file)):
        pass
    file.unlink()
    for _ in range(2):
        assert refusal(mute(tmp_path))[0].startswith("QEMU did not answer")
