# SPDX-License-Identifier: Apache-2.0
"""RAM for a test."""

from __future__ import annotations

from virtiova.addr import GPA
from virtiova.dma.ram import MappedRam, RamBlock


def make_ram(size: int, gpa: int = 0) -> MappedRam:
    """Zeroed RAM in one block."""
    return MappedRam(bytearray(size), [RamBlock(GPA(gpa), size, 0)])
