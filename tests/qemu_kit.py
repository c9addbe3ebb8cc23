# SPDX-License-Identifier: Apache-2.0
"""What several tests of real QEMU need: a device, the environment of a child, and whether a process is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import virtiova

BLK: Final = "virtio-blk-pci,iommu_platform=on"


def child_environment() -> dict[str, str]:
    """For a child process that imports the package that is tested here."""
    return os.environ | {"PYTHONPATH": str(Path(virtiova.__file__).parent.parent)}


def gone(pid: int) -> bool:
    """Ended: no process of that id, or one that nobody has waited for yet."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return True
    return rest.split()[0] in "ZX"
