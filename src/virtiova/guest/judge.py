# SPDX-License-Identifier: Apache-2.0
"""From what was seen of a guest's disk, inside and outside, to the address kind and the path; pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtiova.addr import AddressKind, hexaddr
from virtiova.features import VIRTIO_F_IOMMU_PLATFORM
from virtiova.guest.facts import Inside, feature, number
from virtiova.guest.outside import Outside
from virtiova.result import Path, Prediction

TRANSLATING_GROUPS: Final = frozenset({"DMA", "DMA-FQ"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One disk of a booted guest. ``data_right``: what the guest read of it is what is on it.

    ``control`` is the path of the other disk of the same machine, which has the bit: it shows whether the IOMMU
    translates at all. None: there is none, or it is this one. ``traced``: this QEMU tells of what its IOMMU translates.
    """

    inside: Inside
    disk: dict[str, str]
    outside: Outside
    data_right: bool
    has_iommu: bool
    control: Path | None = None
    traced: bool = True


def address_kind(seen: Seen) -> AddressKind:
    """The kind of address that the driver gave to the device."""
    outside = seen.outside
    if not outside.driver_ok or not seen.data_right:
        return AddressKind.UNKNOWN
    if outside.visible:
        if not _xen(seen):
            return AddressKind.GPA
        # A domain's own addresses end where its memory does, so that one past it can only be the machine's.
        kib = number(seen.inside.values.get("pages_end_kib"))
        past = kib is not None and outside.desc >= kib << 10
        return AddressKind.MACHINE if past else AddressKind.UNKNOWN
    # Where there is no RAM, or other bytes than the device's ring, only something that translates finds the ring.
    if not outside.ram or outside.through:
        return AddressKind.IOVA
    return AddressKind.UNKNOWN


def path(seen: Seen) -> Path:
    """Where the bytes went."""
    outside = seen.outside
    if not outside.driver_ok or not seen.data_right or not outside.used_index:
        return Path.UNKNOWN
    if outside.translated and outside.through:
        return Path.TRANSLATED
    if not outside.visible:
        # No RAM at the address, and yet the right data arrived.
        return Path.TRANSLATED if not outside.ram else Path.UNKNOWN
    if outside.translated:
        return Path.UNKNOWN
    if not seen.has_iommu:
        return Path.DIRECT
    if seen.control is not None:
        return {Path.TRANSLATED: Path.BYPASS, Path.DIRECT: Path.DIRECT}.get(seen.control, Path.UNKNOWN)
    return {True: Path.BYPASS, False: Path.DIRECT, None: Path.UNKNOWN}[translates(seen)]


def translates(seen: Seen) -> bool | None:
    """Was the IOMMU set up to translate for this disk? Its own word first, then the guest's; None: neither says."""
    if seen.outside.region:
        return seen.outside.region.endswith("-dmar")
    if seen.outside.let_through:
        return False
    group = seen.disk.get("group_type")
    if group in TRANSLATING_GROUPS:
        return True
    return False if group == "identity" else None


def disagreements(seen: Seen, prediction: Prediction, kind: AddressKind, groups: frozenset[str]) -> list[str]:
    """What was seen beside the path that the prediction, or the other side, does not agree with."""
    found = []
    said = feature(seen.disk.get("features", ""), VIRTIO_F_IOMMU_PLATFORM)
    if said is not None and said != seen.outside.accepted:
        found.append(f"the guest says that bit 33 is {_on(said)}, the device that it is {_on(seen.outside.accepted)}")
    if kind is not AddressKind.UNKNOWN and kind is not prediction.address:
        found.append(f"{prediction.address} addresses are predicted, {kind} addresses were seen")
    calls = number(seen.disk.get("dma_map"))
    if calls is not None and (calls > 0) != (prediction.dma_ops != "direct"):
        found.append(f"{prediction.dma_ops} DMA ops are predicted, and {calls} calls of the DMA API were counted")
    group = seen.disk.get("group_type")
    if groups and group not in groups:
        found.append(f"an IOMMU group of type {' or '.join(sorted(groups))} is expected, and it is {group or 'absent'}")
    return found


def sentence(seen: Seen, kind: AddressKind) -> str:
    """What was seen, in one line."""
    outside = seen.outside
    if not seen.data_right:
        return "the guest did not read what is on the disk"
    where = {
        AddressKind.IOVA: "an IOVA: no ring in RAM there" if outside.ram else "an IOVA: no RAM there",
        AddressKind.GPA: "the GPA itself: the ring is in RAM there",
        AddressKind.MACHINE: "a machine address: the ring is in RAM there",
    }.get(kind, "of unknown kind")
    parts = [f"ring at {hexaddr(outside.desc)}, {where}"]
    calls = seen.disk.get("dma_map")
    if calls is not None:
        parts.append(f"{calls} DMA API calls")
    if seen.has_iommu and seen.traced:
        parts.append(f"{outside.translated} translations of the rings")
        if outside.region.endswith("-nodmar"):
            parts.append("VT-d not translating for it")
        if outside.let_through:
            parts.append(f"{outside.let_through} let through")
    group = seen.disk.get("group_type")
    if group:
        parts.append(f"group type {group}")
    return ", ".join(parts)


def _xen(seen: Seen) -> bool:
    return seen.inside.values.get("hypervisor") == "xen"


def _on(value: bool) -> str:
    return "on" if value else "off"
