# SPDX-License-Identifier: Apache-2.0
"""The machine's memory where the kernel is the back end: it uses our own addresses, so they are the real ones."""

from __future__ import annotations

import ctypes
from dataclasses import replace

from virtiova.addr import UVA
from virtiova.machine.vhost_user.memory import SharedMemory


class OwnMemory(SharedMemory):
    """A shared file mapped here. A byte's guest-physical address, its offset in the file and our own address are three
    numbers, and what is one run for the guest is none for us."""

    def __init__(self) -> None:
        super().__init__()
        window = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(window)
        # It would keep the mapping from being closed.
        del window
        self.regions = tuple(replace(region, uva=UVA(base + region.offset)) for region in self.regions)

    @property
    def table(self) -> list[tuple[int, int, int]]:
        """(guest-physical address, size, our own address) of each region."""
        return [(region.gpa, region.size, region.uva) for region in self.regions]
