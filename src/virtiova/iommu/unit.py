# SPDX-License-Identifier: Apache-2.0
"""What a platform's IOMMU can do besides serving the one device that a port is for."""

from __future__ import annotations

from typing import Protocol

from virtiova.ports import Iommu


class PlatformIommu(Iommu, Protocol):
    """The ``Iommu`` port of one device, behind an IOMMU that may have more devices behind it.

    What belongs to the IOMMU itself (registers, queues, the root of its tables) is a *unit* that all of them share;
    what belongs to one device is its domain: page tables, number, faults. `enable` and `disable` are the unit's, except
    where each device is attached by itself (virtio-iommu).
    """

    def beside(self, source: int, *, around: bool = False) -> PlatformIommu:
        """The port for another device, by its requester id: with a domain of its own, unless all share one table.

        ``around``: that device's bus is led around the IOMMU, which may then not know it.
        """
