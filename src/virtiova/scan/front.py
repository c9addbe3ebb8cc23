# SPDX-License-Identifier: Apache-2.0
"""What is in front of a device, out of what was collected: an IOMMU, in which state, and how that is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.policy import Front
from virtiova.result.scan import Seen

_TRANSLATING: Final = frozenset({"DMA", "DMA-FQ"})


@dataclass(slots=True)
class InFront:
    """``front`` is None where it is not known, and ``why`` says why. ``iommu`` is its name in the output."""

    front: Front | None
    iommu: str = ""
    basis: list[Seen] = field(default_factory=list)
    assumes: list[str] = field(default_factory=list)
    why: str = ""


def in_front(view: View, device: Device) -> InFront:
    """What is in front of one device. The surest source first: what runs, what the guest set up, what is written."""
    facts, machine = device.facts, view.machine
    name = machine.get(k.IOMMU) or ""
    behind = facts.fact(k.BEHIND_IOMMU)
    if behind is not None and not behind.value:
        return InFront(Front.NONE, "", [behind.seen("its bus goes around the IOMMU" if name else "no IOMMU")])
    root = facts.fact(k.DMA_ROOT)
    if root is not None and root.value.endswith("-nodmar"):
        return InFront(Front.OFF, name, [root.seen()])
    kind = facts.fact(k.GROUP_TYPE)
    if kind is not None and kind.value == "identity":
        return InFront(Front.PASSTHROUGH, name or _unit(view), [kind.seen("its IOMMU group lets addresses through")])
    if kind is not None and kind.value in _TRANSLATING:
        return InFront(Front.TRANSLATING, name or _unit(view), [kind.seen(f"its IOMMU group is of type {kind.value}")])
    lets = machine.fact(k.IOMMU_BYPASS)
    if lets is not None and lets.value:
        return InFront(Front.OFF, name, [lets.seen()])
    if name and name != "none":
        found = machine.fact(k.IOMMU)
        told = [found.seen(f"the machine has an IOMMU: {name}")] if found else []
        if behind is not None:
            told.append(behind.seen("its bus is behind it"))
        assumed = ["the guest programs the IOMMU"] if view.kind is ViewKind.CONFIGURATION else []
        return InFront(Front.TRANSLATING, name, told, assumed)
    return _nothing(view, device, name)


def _nothing(view: View, device: Device, name: str) -> InFront:
    machine = view.machine
    if name == "none":
        found = machine.fact(k.IOMMU)
        return InFront(Front.NONE, "", [found.seen("the machine has no IOMMU")] if found else [])
    group = device.facts.fact(k.GROUP)
    if group is not None:
        return InFront(None, _unit(view), [group.seen()], why="it is in an IOMMU group whose type is not said")
    units, groups = machine.fact(k.IOMMUS), machine.fact(k.IOMMU_GROUPS)
    if units is not None and not units.value and (groups is None or not groups.value):
        return InFront(Front.NONE, "", [units.seen("the system has no IOMMU")])
    if units is not None and units.value:
        return InFront(Front.NONE, "", [units.seen("it is in no IOMMU group, although the system has IOMMUs")])
    return InFront(None, why="nothing says whether an IOMMU is in front of it")


def _unit(view: View) -> str:
    """The kind of the system's IOMMU by the names of its units."""
    units = view.machine.get(k.IOMMUS) or ()
    for prefix, kind in (("dmar", "intel"), ("ivhd", "amd"), ("smmu3", "smmuv3"), ("s390-iommu", "zpci")):
        if any(unit.startswith(prefix) for unit in units):
            return kind
    return "virtio" if any(unit.startswith("virtio") for unit in units) else "iommu"
