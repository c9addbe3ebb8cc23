# SPDX-License-Identifier: Apache-2.0
"""Known departures of products from what is predicted. They explain a mismatch; they never change a prediction."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from virtiova.addr import Access
from virtiova.policy.facts import Facts, Front, Mapping, Payload
from virtiova.result import Path


@dataclass(frozen=True, slots=True)
class Departure:
    """One thing that one product is known to do otherwise.

    ``versions`` are those it was seen on, ``7.2`` or ``7.2 to 10.0``: both with all that follows on their numbers,
    so that 10.0.2 is among them and 10.1 is not.
    """

    id: str
    product: str
    versions: str
    title: str
    source: str
    when: Callable[[Facts, Path], bool]

    def covers(self, product: str) -> bool:
        """Is ``product`` (its name, a space, its version) one that this was seen on, or between two of them?"""
        name, _, version = product.partition(" ")
        numbers = _numbers(version)
        if name != self.product or not numbers:
            return False
        first, _, last = self.versions.partition(" to ")
        low, high = _numbers(first), _numbers(last or first)
        return numbers[: len(low)] >= low and numbers[: len(high)] <= high


def _numbers(version: str) -> tuple[int, ...]:
    """``10.0.2`` as numbers; what follows them (a distribution's, a candidate's) is left out. Empty: not known."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


DEPARTURES: tuple[Departure, ...] = (
    Departure(
        "QEMU-BUS-MASTER",
        "QEMU",
        "7.2 to 10.0",
        "a device that does not offer bit 33 does DMA although its bus master bit was never set",
        "observed; QEMU gives such a device the system memory itself, which the bus master bit does not gate",
        lambda facts, path: not facts.bus_master and facts.offered is False and path in (Path.BYPASS, Path.DIRECT),
    ),
    Departure(
        "QEMU-KICK-AFTER-REFUSAL",
        "QEMU",
        "7.2 to 10.0",
        "a kick is served although FEATURES_OK was refused and the status never showed DRIVER_OK",
        "observed; departs from virtio 1.4, 2.1.2. The accesses stay behind the IOMMU",
        # What a mapping is to lead to is no buffer: virtio-iommu's own requests are not asked about here.
        lambda facts, path: (
            facts.carries_on and facts.payload is not Payload.MAP_TARGET and path in (Path.TRANSLATED, Path.DIRECT)
        ),
    ),
    Departure(
        "QEMU-DECIDES-AT-PLUG",
        "QEMU",
        "7.2 to 10.0",
        "the offered bit decides, when the device is plugged, not the accepted one",
        "observed; hw/virtio/virtio-bus.c sets the DMA address space when the device is realized",
        lambda facts, path: (
            bool(facts.offered) and not facts.accepted and not facts.version_1 and path is Path.TRANSLATED
        ),
    ),
    Departure(
        "QEMU-VHOST-DECIDES-AT-PLUG",
        "QEMU",
        "7.2 to 10.0",
        "a vhost-user back end is given IOVAs as user addresses if bit 33 was offered, also where it was not taken",
        "observed; hw/virtio/vhost.c: vhost_dev_has_iommu() looks at what the device offers, not at what was taken. A "
        "back end without the bit has no IOTLB, and finds no memory at such an address",
        lambda facts, path: (
            facts.vhost
            and bool(facts.offered)
            and not facts.accepted
            and not facts.version_1
            and not facts.carries_on
            and not facts.xen
            and facts.bus_master
            and facts.front is Front.TRANSLATING
            and facts.mapping is Mapping.MAPPED
            and path is Path.BLOCKED
        ),
    ),
    Departure(
        "QEMU-AMD-BUS-NUMBER",
        "QEMU",
        "7.2 to 10.0",
        "AMD-Vi does not translate for a device behind a bridge: it looks for the device table entry of bus 0",
        "observed; hw/i386/amd_iommu.c keeps the bus number that the bus has when the device is plugged, which is 0. "
        'Fixed by "amd_iommu: Fix handling device on buses != 0" (2025)',
        lambda facts, path: (
            facts.iommu == "amd"
            and facts.bridged
            and facts.front is Front.TRANSLATING
            # The control says the same if it is behind the bridge, too; if not, it does see an IOMMU.
            and (path is Path.DIRECT or (path is Path.BYPASS and bool(facts.accepted)))
        ),
    ),
    Departure(
        "QEMU-AMD-PASS-THROUGH",
        "QEMU",
        "10.0",
        "AMD-Vi with pt=on, which is QEMU's default, translates for no device, whatever its tables say",
        "observed: with pt=off the same tables are obeyed; hw/i386/amd_iommu.c leaves the devices' DMA with the memory "
        'itself when pass-through is supported. Since "amd_iommu: Add support for pass though mode" (v9.2)',
        lambda facts, path: (
            facts.iommu == "amd"
            and facts.pass_through
            and not facts.bridged
            and facts.front is Front.TRANSLATING
            and path is Path.DIRECT
        ),
    ),
    Departure(
        "QEMU-GPU-BACKING-STAYS",
        "QEMU",
        "7.2 to 10.0",
        "a GPU goes on to read the page that a backing entry led to when it was attached, whatever the IOMMU says now",
        "observed; hw/display/virtio-gpu.c maps entries when they are attached, and keeps that until they are detached",
        lambda facts, path: (
            facts.payload is Payload.BACKING
            and bool(facts.accepted)
            and facts.mapping is Mapping.REMAPPED
            and path is Path.STALE
        ),
    ),
    Departure(
        "VDUSE-WRITE-ONLY",
        "VDUSE",
        "6.12",
        "a page that is mapped for writing only is read all the same",
        "observed with qemu-storage-daemon 7.2: the kernel tells the device the permission with the file that the page "
        "is in, and a processor has no pages that can be written and not read. A device that looks at the permission "
        "by itself is not among them",
        lambda facts, path: (
            facts.iommu == "vdpa"
            and bool(facts.offered)
            and facts.mapping is Mapping.WRITE_ONLY
            and facts.access is Access.READ
            and path is Path.TRANSLATED
        ),
    ),
    Departure(
        "LEAKY-ON-PURPOSE",
        "virtiova-leaky",
        "0.1",
        "virtiova serve leaky takes bit 33 and uses bare addresses all the same",
        "it is made for that: whoever has to notice such a device can be tested with it",
        lambda facts, path: bool(facts.accepted) and facts.front is Front.TRANSLATING and path is Path.BYPASS,
    ),
    Departure(
        "STALE-ON-PURPOSE",
        "virtiova-stale",
        "0.1",
        "virtiova serve stale keeps every translation that it was ever given, and acknowledges that it forgot them",
        "it is made for that: whoever has to notice such a device can be tested with it",
        lambda facts, path: (
            bool(facts.accepted) and facts.mapping in (Mapping.REMOVED, Mapping.REMAPPED) and path is Path.STALE
        ),
    ),
)


def departure(product: str, facts: Facts, observed: Path) -> str | None:
    """The id of the known departure of ``product`` that explains ``observed``, or None."""
    for row in DEPARTURES:
        if row.covers(product) and row.when(facts, observed):
            return row.id
    return None
