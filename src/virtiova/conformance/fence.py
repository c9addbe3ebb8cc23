# SPDX-License-Identifier: Apache-2.0
"""A fence around what the device was granted: all other memory is looked at, before and after."""

from __future__ import annotations

from virtiova.addr import GPA, PAGE_SIZE
from virtiova.machine.vhost_user.memory import REGIONS, SharedMemory
from virtiova.probe.canary import TwinRegion

_BLOCK = 64 * PAGE_SIZE


class Fence:
    """All memory of the machine as it is now, but for the pages ``open``, by their guest-physical addresses."""

    def __init__(self, memory: SharedMemory, open_pages: set[int]) -> None:
        self._ram = memory.ram
        self._open = open_pages
        self._before = {
            gpa: self._ram.read(GPA(gpa), min(_BLOCK, region.gpa + region.size - gpa))
            for region in REGIONS
            for gpa in range(region.gpa, region.gpa + region.size, _BLOCK)
        }

    def touched(self) -> list[int]:
        """The pages outside that are not as they were."""
        found = []
        for start, before in self._before.items():
            after = self._ram.read(GPA(start), len(before))
            if after == before:
                continue
            for at in range(0, len(before), PAGE_SIZE):
                page = slice(at, at + PAGE_SIZE)
                if before[page] != after[page] and start + at not in self._open:
                    found.append(start + at)
        return found


def homes(regions: list[TwinRegion], letters: str = "A") -> set[int]:
    """The pages of ``regions`` in their homes of these letters."""
    return {gpa & -PAGE_SIZE for region in regions for letter in letters for gpa in region.homes[letter].gpas}
