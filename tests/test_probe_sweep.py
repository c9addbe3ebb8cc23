# SPDX-License-Identifier: Apache-2.0
"""Many cells in a row: every answer among the predicted ones, and nothing that piles up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest

from probe_kit import KINDS, ON, wrong
from virtiova.probe import Runner, Task
from virtiova.result import Cell, Path

pytestmark = pytest.mark.qemu

# Declared x kind, and the legacy interface; each with what goes both ways.
EIGHT = (
    *((f"virtio-{kind}-pci{bit}", "auto") for kind in KINDS for bit in ("", ON)),
    ("virtio-blk-pci-transitional", "legacy"),
    ("virtio-net-pci-transitional", "legacy"),
)
NAMES = ("device-writes", "ring", "indirect", "split-buffer", "translation-off")


def tasks(rounds: int) -> list[Task]:
    """Every kind in every round; the experiments take turns."""
    return [
        Task("q35", "intel", device, NAMES[(turn + place) % len(NAMES)], interface)
        for turn in range(rounds)
        for place, (device, interface) in enumerate(EIGHT)
    ]


def sweep(wanted: Sequence[Task]) -> list[Cell]:
    descriptors = os.listdir("/proc/self/fd")
    cells = list(Runner().run(wanted))
    assert len(cells) == len(wanted)
    assert wrong(cells) == []
    assert not any(cell.mismatch for cell in cells), "these experiments need no explanation"
    assert Path.NOT_APPLICABLE not in {cell.observed for cell in cells}
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors) + 1, "descriptors pile up"
    return cells


def test_24_cells_in_a_row() -> None:
    cells = sweep(tasks(3))
    assert len(cells) == 24


@pytest.mark.sweep
def test_320_cells_in_a_row() -> None:
    cells = sweep(tasks(40))
    assert len(cells) == 320
    seen = Counter((cell.device, cell.offered, cell.experiment, cell.observed) for cell in cells)
    assert len(seen) == len(EIGHT) * len(NAMES), "the same question has the same answer every time"
    assert set(seen.values()) == {8}
