# SPDX-License-Identifier: Apache-2.0
"""What the matrix asks about addresses inside requests: device, state of bit 33, experiment. Knowledge only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtiova.machine.qemu.board import Board
from virtiova.machine.qemu.command import devices
from virtiova.probe.plan import all_experiments

_ON: Final = ",iommu_platform=on"
# With the bit off, and with it on. Where nothing can be blocked, there is no point in taking a mapping away.
_QUESTIONS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "gpu": (("gpu-backing",), ("gpu-backing", "gpu-unmapped", "gpu-remap")),
    "balloon": (("balloon-inflate", "balloon-report"), ("balloon-inflate", "balloon-report", "not-taken")),
    "mem": (("mem-unplug",), ("mem-unplug",)),
    "pmem": (("pmem-region",), ("pmem-region",)),
}
_VIRTIO: Final = "virtio"


def questions(board: Board, iommu: str, *, full: bool) -> Iterator[tuple[str, str, str]]:
    """IOMMU, device and experiment, as a task has them. ``full``: everything that the devices can be asked."""
    names = devices(board)
    for kind, (off, on) in _QUESTIONS.items():
        device = f"virtio-{kind}-pci"
        if device not in names:
            continue
        for bit, chosen in (("", off), (_ON, on)):
            for experiment in all_experiments(device) if full else chosen:
                yield iommu, device + bit, experiment
    if iommu == _VIRTIO:
        # It is a virtio device itself, with a bit 33 of its own.
        for bit in ("", _ON):
            yield iommu + bit, f"virtio-blk-pci{_ON}", "map-target"
