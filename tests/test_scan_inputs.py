# SPDX-License-Identifier: Apache-2.0
"""Inputs of a scan: what is no file, what cannot be read beside what can, and a slot that is easily overlooked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.collect import keys as k
from virtiova.collect import qemu
from virtiova.result.scan import Place

GOOD = "qemu-system-x86_64 -M q35 -nodefaults -device virtio-rng-pci\n"


def test_a_pipe_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody may ever write to it."""
    os.mkfifo(tmp_path / "pipe")
    assert main(["scan", str(tmp_path / "pipe")]) == exits.COULD_NOT_LOOK
    assert "neither a file nor a folder" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_read_is_no_success(tmp_path: Path) -> None:
    """Also beside an input in which nothing is found."""
    (tmp_path / "good").write_text(GOOD)
    assert main(["scan", "-q", "--cmdline", str(tmp_path / "good")]) == exits.OK
    assert main(["scan", "-q", "--cmdline", str(tmp_path / "good"), str(tmp_path / "none.xml")]) == exits.COULD_NOT_LOOK


def test_amd_iommu_takes_a_slot() -> None:
    """It brings a PCI function of its own along (QEMU's ``info qtree``)."""
    words = [*GOOD.split()[:4], "-device", "amd-iommu", "-device", "virtio-rng-pci,id=one"]
    (device,) = qemu.collect(words, Place("command line", "x")).devices
    assert device.facts.get(k.PLACE) == "pci:00:02.0"
