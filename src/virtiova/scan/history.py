# SPDX-License-Identifier: Apache-2.0
"""Mistakes of products that are over: since when, until when, and the commit that ended each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from virtiova.spec import Citation, commit

_NUMBERS: Final = re.compile(r"(?<!\d)(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[-~]?rc(\d{1,3}))?")
_RELEASED: Final = 999
"""Sorts a release after its candidates."""


def numbers(version: str) -> tuple[int, int, int, int] | None:
    """``8.0.4``, ``6.11.0-rc5``, ``22.11`` so that they compare; None where there is no version in it."""
    found = _NUMBERS.search(version)
    if found is None:
        return None
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch or 0), int(candidate) if candidate else _RELEASED


def number_in(product: str, name: str) -> str:
    """The version in ``dpdk 22.11``, if it is ``name``'s; empty where it is another's, or none is said."""
    first, _, version = product.partition(" ")
    return version if first == name and numbers(version) else ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake. ``since`` is the first release that has it (empty: the beginning), ``fixed`` the first that has
    the fix, ``stable`` the releases of older branches that got it too, such as ``7.2.5``."""

    product: str
    what: str
    fixed: str
    commit: str
    subject: str
    since: str = ""
    stable: tuple[str, ...] = ()

    def has(self, version: str) -> bool | None:
        """Has that version the mistake? None: nothing can be said of it."""
        told = numbers(version)
        if told is None:
            return None
        fixed, since = numbers(self.fixed), numbers(self.since)
        if (fixed is not None and told >= fixed) or (since is not None and told < since):
            return False
        return not any(
            told[:2] == branch[:2] and told >= branch for branch in map(numbers, self.stable) if branch is not None
        )

    @property
    def citation(self) -> Citation:
        """The fix."""
        return commit(self.commit, self.subject, f"{self.product} {self.fixed}")

    @property
    def releases(self) -> str:
        """Where it is fixed, in words."""
        return " or ".join([f"{self.product} {self.fixed}", *self.stable])


DEVICE_TLB: Final = Mistake(
    "QEMU",
    "vhost listens for device-TLB invalidations only, also where the guest never enabled ATS",
    "8.1",
    "ee071f67f7a1",
    "vhost: register and change IOMMU flag depending on Device-TLB state",
    stable=("7.2.5", "8.0.4"),
)
DIRTY_RING: Final = Mistake(
    "QEMU",
    "the used ring's IOVA is taken for a physical address when written pages are logged",
    "8.0",
    "345cc1cbcbce",
    "vhost: fix vq dirty bitmap syncing when vIOMMU is enabled",
    stable=("7.2.1",),
)
UNCHECKED: Final = Mistake(
    "QEMU",
    "a back end that cannot translate is not refused",
    "6.1",
    "04ceb61a4075",
    "virtio: Fail if iommu_platform is requested, but unsupported",
)
PREMAPPED: Final = Mistake(
    "Linux",
    "virtio_net writes 16 bytes past a page of receive buffers",
    "6.11",
    "111fc9f517cb",
    "virtio_net: disable premapped mode by default",
    since="6.10.0-rc1",
)

DPDK: Final[tuple[Mistake, ...]] = (
    Mistake(
        "DPDK",
        "deadlock: a miss is sent while a lock is held",
        "17.11",
        "1aadb2f6b1d1",
        "vhost: fix deadlock on IOTLB miss",
    ),
    Mistake(
        "DPDK",
        "a miss that could not be sent stays pending for ever",
        "18.02",
        "82b9c1540348",
        "vhost: remove pending IOTLB entry if miss request failed",
        since="17.11",
    ),
    Mistake(
        "DPDK",
        "crash after a new memory table: translations of the old one stay",
        "18.08",
        "af53db486792",
        "vhost: flush IOTLB cache on new mem table handling",
        since="17.11",
    ),
    Mistake(
        "DPDK",
        "packed rings: translated with the wrong permission",
        "18.11",
        "30affaeebc56",
        "vhost: fix IOVA access for packed ring",
        since="18.08",
    ),
    Mistake(
        "DPDK",
        "rings of more than 256 entries fail where the IOMMU maps pages of 4 KiB",
        "19.11",
        "5d9dc18e1bcc",
        "vhost: fix vring memory partially mapped",
        since="17.11",
    ),
    Mistake(
        "DPDK",
        "stale translations after the guest's driver is changed; throughput falls to a hundredth",
        "21.11",
        "e7cb7fdf5471",
        "vhost: clean IOTLB cache on vring stop",
        since="17.11",
    ),
    Mistake(
        "DPDK",
        "VDUSE: a mapping that failed is kept as an address",
        "26.03",
        "970e569b85a4",
        "vhost: fix mmap error check in VDUSE IOTLB miss handler",
        since="23.07",
    ),
)
"""In whose front end bit 33 was taken. Releases by ``git tag --contains``."""
DPDK_LOG: Final = Mistake(
    "DPDK",
    "written pages are logged by their IOVAs",
    "19.11",
    "1fc3b3f06aa9",
    "vhost: convert buffer addresses to GPA for logging",
    since="17.11",
)
