# SPDX-License-Identifier: Apache-2.0
"""What a newer QEMU has or does otherwise: SMMUv3's stage 2, AMD-Vi's pass-through, the bit on sun4u."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path as FilePath

import pytest

from newer_qemu import SUITE, newer_qemu
from probe_kit import GENERAL, ON, observed, wrong
from virtiova import probe
from virtiova.cli import exits, main
from virtiova.machine.qemu.boards import Q35, SUN4U
from virtiova.machine.qemu.suites import named
from virtiova.result import Cell, Path

pytestmark = pytest.mark.qemu

DIES = """
import os, sys
from virtiova.cli import main
from virtiova.serve.host import Host

perform = Host._perform

def dies(host, event):
    if type(event).__name__ == "RingKick":
        os._exit(3)
    return perform(host, event)

Host._perform = dies
sys.exit(main.main(sys.argv[1:]))
"""
"""A back end that ends when a ring is started."""
PATHS = ("device-writes", "device-reads", "ring", "indirect", "split-buffer", "msi", "remap")
TABLES = ("empty-tables", "past-end", "unmapped", "read-only", "write-only", "unmap", "bus-master-off")


def cells(qemu: str, device: str, iommu: str, machine: str, only: Sequence[str] | None = None) -> dict[str, Cell]:
    return {cell.experiment: cell for cell in probe.qemu(device, iommu, only, machine=machine, qemu=qemu)}


def test_smmuv3_stage_2(pytestconfig: pytest.Config) -> None:
    qemu = newer_qemu(pytestconfig).directory
    seen = cells(qemu, f"virtio-blk-pci{ON}", "smmuv3,stage=2", "virt")
    assert list(seen) == GENERAL
    assert wrong(list(seen.values())) == []
    expected = dict.fromkeys(PATHS, "translated") | dict.fromkeys(TABLES, "blocked")
    expected |= {"unmap-stale": "stale", "remap-stale": "stale", "translation-off": "direct"}
    expected |= {"not-taken": "refused", "renegotiate": "refused", "no-version-1": "translated"}
    assert observed(seen) == expected | {"carry-on": "translated"}
    assert "at stage 2" in seen["unmapped"].evidence.live
    seen = cells(qemu, "virtio-blk-pci", "smmuv3,stage=2", "virt", ("device-writes", "msi", "unmapped"))
    assert observed(seen) == {"device-writes": "bypass", "msi": "translated", "unmapped": "bypass"}


@pytest.mark.sweep
def test_amd_vi_lets_everything_through_unless_told_otherwise(pytestconfig: pytest.Config) -> None:
    newer_qemu(pytestconfig)
    qemu = named(SUITE, [Q35]).directory
    only = ("device-writes", "ring", "unmapped", "msi")
    device = f"virtio-rng-pci{ON}"
    assert observed(cells(qemu, device, "amd", "q35", only)) == {
        "device-writes": "translated",
        "ring": "translated",
        "unmapped": "blocked",
        "msi": "translated",
    }
    seen = cells(qemu, device, "amd,pt=on", "q35", only)
    assert observed(seen) == dict.fromkeys(only, "direct")
    assert {cell.explained for cell in seen.values()} == {"QEMU-AMD-PASS-THROUGH"}


@pytest.mark.sweep
def test_sun4u_offers_the_bit_unless_told_otherwise(pytestconfig: pytest.Config) -> None:
    """The board says no for a device that says nothing; one that is put somewhere by hand is left to QEMU."""
    newer_qemu(pytestconfig)
    qemu = named(SUITE, [SUN4U]).directory
    for device, offered, path in (
        ("virtio-rng-pci", False, "bypass"),
        (f"virtio-rng-pci{ON}", True, "translated"),
        ("virtio-rng-pci,bus=pciB,addr=1", True, "translated"),
    ):
        cell = cells(qemu, device, "sabre", "sun4u", ("device-writes",))["device-writes"]
        assert (cell.offered, cell.observed) == (offered, path)


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_the_whole_matrix_on_two_qemus(
    pytestconfig: pytest.Config, tmp_path: FilePath, capsys: pytest.CaptureFixture[str]
) -> None:
    newer_qemu(pytestconfig)
    output = tmp_path / "m.json"
    assert main.main(["matrix", "--qemu", SUITE, "-q", "-o", str(output)]) == exits.OK, capsys.readouterr().err
    found = json.loads(output.read_text())["cells"]
    ran = [cell["product"] for cell in found if cell["observed"] != Path.NOT_APPLICABLE]
    products = Counter(product for product in ran if product.startswith("QEMU "))
    assert len(products) == 2
    assert min(products.values()) > 200
    fronts = {
        (cell["machine"], cell["iommu"], cell.get("iommu_options", ""))
        for cell in found
        if cell["observed"] == Path.TRANSLATED
    }
    assert {
        ("virt", "smmuv3", "stage=2"),
        ("riscv-virt", "riscv", ""),
        ("riscv-virt", "riscv", "kind=pci"),
        ("riscv-virt", "riscv", "paging=sv39x4"),
    } <= fronts


@pytest.mark.sweep
@pytest.mark.parametrize("experiment", ["no-version-1", "carry-on", "empty-tables", "bus-master-off"])
def test_a_back_end_that_qemu_gives_up(pytestconfig: pytest.Config, experiment: str) -> None:
    """It cannot start the rings, says so, and lets go of the back end: nothing can be asked of it after that."""
    newer_qemu(pytestconfig)
    qemu = named(SUITE, [Q35]).directory
    backend = f"{shlex.quote(sys.executable)} -m virtiova serve blk {{image}} --socket-path {{socket}}"
    (cell,) = probe.qemu(f"vhost-user-blk-pci{ON}", None, [experiment], backend=backend, qemu=qemu)
    assert (cell.observed, cell.explained) == (
        Path.BLOCKED,
        "QEMU-VHOST-DECIDES-AT-PLUG" if experiment == "no-version-1" else None,
    )
    assert re.fullmatch(r"vhost-user-blk: vhost start failed: Error starting vhost: .*", cell.evidence.live)


@pytest.mark.sweep
def test_a_back_end_that_ended_was_not_given_up(pytestconfig: pytest.Config, tmp_path: FilePath) -> None:
    """QEMU says the same of one that was gone: which is no sign that it was ever able to do anything."""
    newer_qemu(pytestconfig)
    qemu = named(SUITE, [Q35]).directory
    program = tmp_path / "dies.py"
    program.write_text(DIES)
    backend = f"{shlex.quote(sys.executable)} {program} serve blk {{image}} --socket-path {{socket}} --sandbox off"
    (cell,) = probe.qemu(f"vhost-user-blk-pci{ON}", None, ["unmapped"], backend=backend, qemu=qemu)
    assert any("vhost start failed" in word for word in cell.evidence.words), cell.evidence.words
    assert (cell.observed, cell.evidence.live) == (Path.UNKNOWN, "")
