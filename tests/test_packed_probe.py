# SPDX-License-Identifier: Apache-2.0
"""Every experiment over packed rings: on the in-process machine, and on QEMU's devices."""

from __future__ import annotations

import pytest

from virtiova import probe
from virtiova.errors import UsageError
from virtiova.probe.plan import BEHAVIOURS, with_ring
from virtiova.result import Cell, Path

PACKED = "rings: packed"
SPLIT_ONLY = ("no-version-1",)
"""Experiments whose driver takes no packed rings although they are offered."""

NOTHING = (Path.NOT_APPLICABLE, Path.REFUSED)
"""No ring was ever used."""


def judged(cell: Cell) -> tuple[str, Path, bool]:
    return cell.experiment, cell.observed, cell.mismatch


def rings_of(cell: Cell) -> list[str]:
    return [word for word in cell.evidence.words if word.startswith("rings:")]


@pytest.mark.parametrize("kind", ["blk", "net", "rng", "console"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_model_is_judged_alike_over_either_ring(behaviour: str, kind: str) -> None:
    split = list(probe.model(behaviour, kind))
    packed = list(probe.model(behaviour, kind, ring="packed"))
    assert [judged(cell) for cell in packed] == [judged(cell) for cell in split]
    assert all(cell.device_options == "packed=on" for cell in packed)
    for cell in packed:
        if cell.observed not in NOTHING:
            wanted = "rings: split: the driver did not take packed ones" if cell.experiment in SPLIT_ONLY else PACKED
            assert rings_of(cell) == [wanted], cell
    assert not any(map(rings_of, split)), "there was no choice"


@pytest.mark.qemu
@pytest.mark.parametrize("bit", ["", ",iommu_platform=on"])
@pytest.mark.parametrize("kind", ["blk", "net", "rng"])
def test_qemu_is_judged_alike_over_either_ring(kind: str, bit: str) -> None:
    asked = ["device-writes", "device-reads", "ring", "indirect", "unmapped", "unmap", "not-taken", "never-offered"]
    split = list(probe.qemu(f"virtio-{kind}-pci{bit}", experiments=asked))
    packed = list(probe.qemu(f"virtio-{kind}-pci{bit}", experiments=asked, ring="packed"))
    assert [judged(cell) for cell in packed] == [judged(cell) for cell in split]
    assert not any(cell.mismatch for cell in packed)
    assert all(rings_of(cell) == [PACKED] for cell in packed if cell.observed not in NOTHING)


@pytest.mark.qemu
def test_packed_rings_that_the_device_itself_was_told_to_offer() -> None:
    (cell,) = probe.qemu("virtio-blk-pci,packed=on,iommu_platform=on", experiments=["ring"])
    assert (cell.observed, rings_of(cell), cell.device_options) == (Path.TRANSLATED, [PACKED], "packed=on")


@pytest.mark.qemu
def test_the_legacy_interface_has_no_packed_rings() -> None:
    (cell,) = probe.qemu("virtio-blk-pci-transitional,packed=on", experiments=["device-writes"], interface="legacy")
    assert rings_of(cell) == ["rings: split: packed ones were asked for, and are not offered"]
    assert cell.observed is Path.BYPASS


def test_what_rings_there_are() -> None:
    assert with_ring("virtio-blk-pci", "packed") == "virtio-blk-pci,packed=on"
    assert with_ring("virtio-blk-pci,packed=on", "packed") == "virtio-blk-pci,packed=on"
    assert with_ring("virtio-blk-pci,packed=on", "split") == "virtio-blk-pci,packed=on"
    assert with_ring("edu", "packed") == "edu"
    with pytest.raises(UsageError, match="packed rings or not"):
        with_ring("virtio-blk-pci,packed=off", "packed")
    with pytest.raises(UsageError, match="packed"):
        with_ring("virtio-blk-pci", "paked")
    with pytest.raises(UsageError, match="no options but packed=on"):
        list(probe.model("honest", "blk,ats=on"))
