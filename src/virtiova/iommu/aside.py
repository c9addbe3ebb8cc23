# SPDX-License-Identifier: Apache-2.0
"""An IOMMU that is in the machine, on and programmed, but not in front of the device under test."""

from __future__ import annotations

from virtiova.addr import GPA, IOVA, Access
from virtiova.iommu.unit import PlatformIommu
from virtiova.ports import Fault


class AsideIommu:
    """The ``Iommu`` port of a device whose bus goes around ``behind``, the machine's IOMMU.

    Everything that is asked for is done in that IOMMU's tables all the same, so that if the device were behind it
    after all, its bytes would land where the tables point, or nowhere, but not at the bare address. ``present``:
    the device is of a kind that could be behind it, so that a control device on the same bus can show that it is not.
    """

    in_front = False

    def __init__(self, behind: PlatformIommu, *, present: bool) -> None:
        self.behind = behind
        self.present = present
        self.name = behind.name
        self.caches = behind.caches
        self.page_size = behind.page_size
        self.write_only = behind.write_only
        self.can_be_off = behind.can_be_off
        self.shared = behind.shared
        self.own_bit33 = behind.own_bit33

    def beside(self, source: int, *, around: bool = True) -> AsideIommu:
        """Another device whose bus goes around the same IOMMU."""
        return AsideIommu(self.behind.beside(source, around=True), present=self.present)

    def enable(self) -> None:
        self.behind.enable()

    def disable(self) -> None:
        self.behind.disable()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        self.behind.map(iova, gpa, size, access)

    def unmap(self, iova: IOVA, size: int) -> None:
        self.behind.unmap(iova, size)

    def invalidate(self) -> None:
        self.behind.invalidate()

    def faults(self) -> list[Fault]:
        return self.behind.faults()

    def allocate(self, size: int) -> IOVA:
        return self.behind.allocate(size)
