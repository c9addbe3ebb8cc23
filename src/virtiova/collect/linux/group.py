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
_DIRECT_WINDOW: Final = "linux,direct64-ddr-window-info"
"""Where Linux notes that it made a window onto all of memory (``arch/powerpc/platforms/pseries/iommu.c``)."""
_MEMBERS: Final = 64
_ANCESTORS: Final = 8


def put(tree: Tree, sits: Seat, device: Device, *, arm: bool) -> None:
    """All of it, as facts. ``arm``: on this system a device is not coherent unless its device tree says so."""
    holder = _holder(tree, sits)
    _hints(tree, sits, device, arm=arm)
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


def _hints(tree: Tree, sits: Seat, device: Device, *, arm: bool) -> None:
    """What a device tree says: of the device's node, or of that of what it is behind, and of the buses above."""
    facts = device.facts
    coherent, node = False, _node(tree, sits.path)
    first = node
    while node.startswith(f"{devicetree.ROOT}/"):
        held = set(tree.names(node))
        coherent = coherent or "dma-coherent" in held
        for name in ("iommus", "iommu-map"):
            if name in held:
                facts.put(k.IOMMU_NODE, name, Place("firmware", f"{node}/{name}"), Certainty.SAID)
        if _DIRECT_WINDOW in held:
            facts.put(k.IOMMU_OPTIONS, ("window=direct",), Place("firmware", f"{node}/{_DIRECT_WINDOW}"))
        if "memory-region" in held and node == first:
            pool = devicetree.restricted_pool(tree, f"{node}/memory-region")
            if pool:
                facts.put(k.RESTRICTED_POOL, pool, Place("firmware", f"{node}/memory-region"), Certainty.SAID)
        node = node.rpartition("/")[0]
    # Elsewhere it is the other way round: coherent is what does not say otherwise.
    if first and (coherent or arm):
        facts.put(k.DMA_COHERENT, coherent, Place("firmware", f"{first}/dma-coherent"))


def _node(tree: Tree, path: str) -> str:
    """The node of a device, or of the nearest one above that has one (a PCI function may have none, its host bridge
    does); empty where there is no device tree."""
    for _ in range(_ANCESTORS):
        if tree.link(f"{path}/of_node") is not None:
            return tree.real(f"{path}/of_node") or ""
        path = path.rpartition("/")[0]
        if path in ("", "/sys/devices", "/sys/devices/platform"):
            break
    return ""
