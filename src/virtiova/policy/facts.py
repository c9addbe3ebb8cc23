# SPDX-License-Identifier: Apache-2.0
"""Facts: all that the rule looks at, as one value."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from virtiova.addr import Access
from virtiova.features import Generation


class Front(enum.StrEnum):
    """What is in front of the device, and in which state."""

    NONE = "none"
    """No IOMMU in the machine, or none on this bus."""
    OFF = "off"
    """An IOMMU that does not translate: switched off."""
    PASSTHROUGH = "passthrough"
    """An IOMMU that was told to let this device's addresses through as they are."""
    TRANSLATING = "translating"


class Mapping(enum.StrEnum):
    """What the IOMMU's tables say about the address, and what they said before."""

    MAPPED = "mapped"
    UNMAPPED = "unmapped"
    READ_ONLY = "read-only"
    WRITE_ONLY = "write-only"
    REMOVED = "removed"
    """It was mapped and used, was taken away, and the IOMMU was told (invalidation)."""
    REMOVED_UNTOLD = "removed, not invalidated"
    REMAPPED = "remapped"
    """It was mapped and used, now points to another page, and the IOMMU was told."""
    REMAPPED_UNTOLD = "remapped, not invalidated"


class Payload(enum.StrEnum):
    """Where the address in question travels: in a descriptor (or is a ring's own), or inside a request."""

    NONE = "descriptor"
    BACKING = "gpu-backing"
    """An entry of the memory that backs a GPU's resource."""
    PAGE_NUMBER = "page-number"
    """The number of a page that is given to a balloon, or taken back."""
    BLOCK = "memory-block"
    """A block of a memory device."""
    REGION = "pmem-region"
    """Persistent memory, as its device's configuration names it."""
    MAP_TARGET = "map-target"
    """The physical address that virtio-iommu is told to map to. Bit 33 is then that of the IOMMU, and the access one
    of a device behind it that goes through."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one device, its driver and its platform when one access is made.

    ``offered`` and ``accepted`` are bit 33; None where it is not known. ``version_1``: VIRTIO_F_VERSION_1 was
    accepted (never on the legacy interface). ``insists``: this device is known to refuse a driver that does not
    take an offered bit 33, which the specification leaves open; None if it is not known. ``hardware``: a physical
    device, whose DMA passes the physical IOMMU whatever it says. ``declared``: the device was asked to offer the
    bit; with ``can_be_legacy`` it cannot. ``wrote_unoffered``: the driver took bit 33 although it was not offered.
    ``carries_on``: FEATURES_OK was refused and the driver uses the queues all the same. ``iommu`` (its name in the
    output), ``bridged`` (behind a bridge), ``vhost`` (its rings are served by a back end outside of the machine) and
    ``pass_through`` (the IOMMU was told that it may let addresses through: ``pt=on``) are for the known departures: no
    rule asks for them. ``payload``: the address is one that travels inside a request, and what it is there.
    """

    offered: bool | None
    accepted: bool | None
    front: Front = Front.TRANSLATING
    xen: bool = False
    restricted: bool = False
    version_1: bool = True
    insists: bool | None = None
    hardware: bool = False
    declared: bool | None = None
    can_be_legacy: bool = False
    wrote_unoffered: bool = False
    carries_on: bool = False
    bus_master: bool = True
    mapping: Mapping = Mapping.MAPPED
    access: Access = Access.WRITE
    iommu: str = ""
    bridged: bool = False
    vhost: bool = False
    pass_through: bool = False
    payload: Payload = Payload.NONE
    generation: Generation = Generation.TODAY
