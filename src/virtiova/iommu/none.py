# SPDX-License-Identifier: Apache-2.0
"""No IOMMU: nothing stands in front of the device, and every address goes through as it is."""

from __future__ import annotations

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.errors import NotPossibleError
from virtiova.ports import Fault


class NoIommu:
    """The ``Iommu`` port of a machine that has none. Calls do nothing; `allocate` is not possible."""

    name = "none"
    present = False
    in_front = False
    caches = False
    page_size = PAGE_SIZE
    write_only = False
    can_be_off = True
    shared = True
    own_bit33 = None

    def beside(self, source: int, *, around: bool = False) -> NoIommu:
        """The same: nothing."""
        return self

    def enable(self) -> None:
        """Nothing to enable."""

    def disable(self) -> None:
        """Nothing to disable."""

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Nothing to map: the device uses guest-physical addresses."""

    def unmap(self, iova: IOVA, size: int) -> None:
        """Nothing to unmap."""

    def invalidate(self) -> None:
        """Nothing is cached."""

    def faults(self) -> list[Fault]:
        """Nobody who could fault: always empty."""
        return []

    def allocate(self, size: int) -> IOVA:
        """Raise `NotPossibleError`: an address space of its own is what this machine lacks."""
        raise NotPossibleError(f"no IOVA for 0x{size:x} bytes: this machine has no IOMMU")
