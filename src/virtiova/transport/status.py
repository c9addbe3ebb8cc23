# SPDX-License-Identifier: Apache-2.0
"""Waiting for a reset, which is the same on every transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.errors import MachineError

_READS: Final = 1000


def wait_for_reset(read_status: Callable[[], int]) -> None:
    """Wait until the status reads 0 (virtio 1.4, 4.1.4.3.2), for a bounded number of reads."""
    for _ in range(_READS):
        if read_status() == 0:
            return
    raise MachineError(f"the device did not finish its reset within {_READS} reads of its status")
