# SPDX-License-Identifier: Apache-2.0
"""Cells for tests, each observed once: they are frozen data, so that several tests may look at the same ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from virtiova import probe
from virtiova.probe.experiment import EXPERIMENTS
from virtiova.probe.plan import all_experiments
from virtiova.result import Cell, Path

KINDS: Final = ("blk", "net", "rng")
ON: Final = ",iommu_platform=on"
GENERAL: Final = all_experiments("virtio-blk-pci")
"""What is asked of every device."""
# device, IOMMU, interface: what can be put on a q35 machine without asking QEMU for anything special.
VARIANTS: Final = (
    *((f"virtio-{kind}-pci{bit}", "intel", "auto") for kind in KINDS for bit in ("", ON)),
    *((f"virtio-{kind}-pci-transitional", "intel", "legacy") for kind in KINDS),
    ("virtio-blk-pci-transitional", "intel", "modern"),
)

Cells = MappingProxyType[str, Cell]


@functools.cache
def qemu_cells(
    device: str,
    iommu: str = "intel",
    interface: str = "auto",
    only: Sequence[str] | None = None,
    machine: str = "q35",
) -> Cells:
    """All cells of a QEMU device (or those of the experiments ``only``, a tuple) by the name of the experiment."""
    cells = probe.qemu(device, iommu, only, machine=machine, interface=interface)
    return MappingProxyType({cell.experiment: cell for cell in cells})


@functools.cache
def model_cells(behaviour: str, device: str = "blk", iommu: str = "soft") -> Cells:
    """All cells of a device of the in-process machine by the name of the experiment."""
    cells = probe.model(behaviour, device, iommu=iommu)
    return MappingProxyType({cell.experiment: cell for cell in cells})


def wrong(cells: Sequence[Cell]) -> list[str]:
    """The cells whose observation is neither predicted nor explained, or missing; in words."""
    return [
        f"{cell.device} offered={cell.offered} {cell.experiment}: {cell.observed}, predicted {cell.predicted}; "
        f"{cell.evidence.note}"
        for cell in cells
        if cell.observed is Path.UNKNOWN or (cell.mismatch and cell.explained is None)
    ]


def observed(cells: Mapping[str, Cell]) -> dict[str, str]:
    """Experiment -> path, without those that do not apply."""
    return {name: str(cell.observed) for name, cell in cells.items() if cell.observed is not Path.NOT_APPLICABLE}


__all__ = [
    "EXPERIMENTS",
    "GENERAL",
    "KINDS",
    "ON",
    "VARIANTS",
    "Cells",
    "model_cells",
    "observed",
    "qemu_cells",
    "wrong",
]
