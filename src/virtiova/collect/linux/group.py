# SPDX-License-Identifier: Apache-2.0
"""A device's IOMMU: which unit, which group and of what type, who else is in it; hints of a device tree."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device
from virtiova.collect.linux import devicetree, units
from virtiova.collect.linux.read import place, word
from virtiova.collect.linux.seat import Seat
from virtiova.collect.tree import Tree, base
from virtiova.result.scan import Place

GROUPS: Final = "/sys/kernel/iommu_groups"
NO_IOMMU: Final = "vfio-noiommu"
"""The name of a group that vfio makes for a device that is in none (Linux, ``vfio_noiommu_group_alloc()``)."""
_MEMBERS: Final = 64
_ANCESTORS: Final = 8


def put(tree: Tree, sits: Seat, device: Device) -> None:
    """All of it, as facts."""
    holder = _holder(tree, sits)
    _hints(tree, sits, device)
    unit = tree.link(f"{holder}/iommu")
    if unit is not None:
        kind = units.kind(base(unit))
        if kind:
            device.facts.put(k.IOMMU, kind, place(f"{holder}/iommu"))
    link = tree.link(f"{holder}/iommu_group")
    if link is None:
        return
    facts, group = device.facts, f"{GROUPS}/{base(link)}"
    if word(tree, f"{group}/name") == NO_IOMMU:
        facts.put(k.BEHIND_IOMMU, False, place(f"{group}/name"))
        return
    facts.put(k.GROUP, base(link), place(f"{holder}/iommu_group"))
    group_type = word(tree, f"{group}/type")
    if group_type is not None:
        facts.put(k.GROUP_TYPE, group_type, place(f"{group}/type"))
    drivers = _drivers(tree, group)
    if drivers:
        facts.put(k.GROUP_DRIVERS, drivers, place(f"{group}/devices"))


def _holder(tree: Tree, sits: Seat) -> str:
    """Whose DMA it is: that of what the device sits on, or of the function that a vDPA device is part of."""
    path = sits.path
    if sits.transport != "vdpa":
        return path
    for _ in range(_ANCESTORS):
        if tree.link(f"{path}/iommu_group") is not None:
            return path
        path = path.rpartition("/")[0]
        if path in ("", "/sys/devices"):
            break
    return sits.path


def _drivers(tree: Tree, group: str) -> tuple[str, ...]:
    """The drivers of a group's members, each once; members without one are left out."""
    members = tree.names(f"{group}/devices")[:_MEMBERS]
    found = {base(tree.link(f"{group}/devices/{member}/driver")) for member in members}
    return tuple(sorted(found - {""}))


def _hints(tree: Tree, sits: Seat, device: Device) -> None:
    """What a device tree says: of the node itself, and for PCI of the host bridge above."""
    path = sits.path.partition("/pci")[0] if sits.transport == "pci" else sits.path
    node = f"{path}/of_node"
    if tree.link(node) is None or path == "/sys/devices":
        return
    facts, held = device.facts, set(tree.names(node))
    facts.put(k.DMA_COHERENT, "dma-coherent" in held, Place("firmware", f"{node}/dma-coherent"))
    for name in ("iommus", "iommu-map"):
        if name in held:
            facts.put(k.IOMMU_NODE, name, Place("firmware", f"{node}/{name}"), Certainty.SAID)
    if "memory-region" in held:
        pool = devicetree.restricted_pool(tree, f"{node}/memory-region")
        if pool:
            facts.put(k.RESTRICTED_POOL, pool, Place("firmware", f"{node}/memory-region"), Certainty.SAID)
