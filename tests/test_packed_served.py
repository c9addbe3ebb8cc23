# SPDX-License-Identifier: Apache-2.0
"""Packed rings over vhost-user: our own back ends behind our own front end, behind QEMU's, and DPDK's behind ours."""

from __future__ import annotations

import os
import sys

import pytest

from vhost_user_kit import STORAGE_DAEMON, TESTPMD, installed
from virtiova import probe
from virtiova.result import Cell
from virtiova.result import Path as Way

SERVE = f"{sys.executable} -m virtiova serve"
COMMANDS = {
    "blk": f"{SERVE} blk {{image}} --socket-path {{socket}}",
    "leaky": f"{SERVE} leaky {{image}} --socket-path {{socket}}",
    "net": f"{SERVE} net --datagram-fd {{net}} --socket-path {{socket}}",
    "rng": f"{SERVE} rng --socket-path {{socket}}",
    "stale": f"{SERVE} stale {{image}} --socket-path {{socket}}",
}
ASKED = ["device-writes", "ring", "indirect", "unmap", "remap", "not-taken"]


def ways(cells: list[Cell]) -> dict[str, Way]:
    return {cell.experiment: cell.observed for cell in cells}


def packed(cells: list[Cell]) -> bool:
    return all("rings: packed" in cell.evidence.words for cell in cells)


@pytest.mark.parametrize("kind", ["blk", "net", "rng"])
def test_what_is_served_goes_through(kind: str) -> None:
    cells = list(probe.vhost_user(spawn=COMMANDS[kind], kind=kind, experiments=ASKED, ring="packed"))
    assert packed(cells)
    assert not any(cell.mismatch for cell in cells), cells
    assert ways(cells) == {
        "device-writes": Way.TRANSLATED,
        "ring": Way.TRANSLATED,
        "indirect": Way.TRANSLATED,
        "unmap": Way.BLOCKED,
        "remap": Way.TRANSLATED,
        "not-taken": Way.BYPASS,
    }


def test_devices_that_are_wrong_on_purpose_are_so_over_packed_rings_too() -> None:
    (leaky,) = probe.vhost_user(spawn=COMMANDS["leaky"], kind="blk", experiments=["ring"], ring="packed")
    assert (leaky.observed, leaky.mismatch) == (Way.BYPASS, True)
    stale = list(probe.vhost_user(spawn=COMMANDS["stale"], kind="blk", experiments=["ring", "remap"], ring="packed"))
    assert ways(stale) == {"ring": Way.TRANSLATED, "remap": Way.STALE}
    assert packed([leaky, *stale])


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["blk", "rng"])
@pytest.mark.parametrize("bit", ["on", "off"])
def test_behind_qemu(kind: str, bit: str) -> None:
    device = f"vhost-user-{kind}-pci,packed=on,iommu_platform={bit}"
    cells = list(probe.qemu(device, experiments=["device-writes", "ring", "unmap"], backend=COMMANDS[kind]))
    assert packed(cells)
    assert not any(cell.mismatch for cell in cells), cells
    through = bit == "on"
    assert ways(cells) == {
        "device-writes": Way.TRANSLATED if through else Way.BYPASS,
        "ring": Way.TRANSLATED if through else Way.BYPASS,
        "unmap": Way.BLOCKED if through else Way.BYPASS,
    }


@pytest.mark.skipif(not installed("dpdk-testpmd"), reason="dpdk-testpmd is not installed")
def test_testpmd_over_packed_rings() -> None:
    command = TESTPMD.replace("{prefix}", f"virtiova-packed-{os.getpid()}")
    asked = ["device-writes", "ring", "unmapped", "not-taken"]
    cells = list(probe.vhost_user(spawn=command, kind="net", echo=True, experiments=asked, jobs=1, ring="packed"))
    assert packed(cells)
    assert not any(cell.mismatch for cell in cells), cells
    assert ways(cells)["ring"] is Way.TRANSLATED


@pytest.mark.skipif(not installed("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed")
def test_a_back_end_that_has_none() -> None:
    (cell,) = probe.vhost_user(spawn=STORAGE_DAEMON, kind="blk", experiments=["device-writes"], ring="packed")
    assert cell.evidence.words[0] == "rings: split: packed ones were asked for, and are not offered"
    assert cell.observed is Way.BYPASS
