# SPDX-License-Identifier: Apache-2.0
"""The machine's IOMMUs: those that the kernel programs, those that the firmware describes, what it was told of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Facts
from virtiova.collect.linux import devicetree, seat
from virtiova.collect.linux.read import number, place, say, word
from virtiova.collect.tree import LIMIT, Tree
from virtiova.errors import ProtocolError
from virtiova.wire import acpi

CLASS: Final = "/sys/class/iommu"
GROUPS: Final = "/sys/kernel/iommu_groups"
TABLES: Final = "/sys/firmware/acpi/tables"
XEN_HIDES: Final = frozenset({"RMAD", "XMAR"})
"""What Xen makes of the name DMAR, so that its domain 0 leaves the IOMMU alone; RMAD was seen with 4.17."""
_KINDS: Final = (
    ("dmar", "intel"),
    ("ivhd", "amd"),
    ("smmu3.", "smmuv3"),
    ("smmu.", "smmu"),
    ("s390-iommu.", "zpci"),
    ("riscv-iommu", "riscv"),
)
"""By the names that drivers give ``iommu_device_sysfs_add()``."""
_OF_TABLE: Final = {"DMAR": "intel", "IVRS": "amd", "IORT": "smmuv3", "VIOT": "virtio", "RIMT": "riscv"}
_OFF: Final = {"intel_iommu": "intel", "amd_iommu": "amd"}


def kind(unit: str) -> str:
    """The kind of an IOMMU by the name of its unit; a word out of the name where it is not known here."""
    known = next((kind for prefix, kind in _KINDS if unit.startswith(prefix)), None)
    if known is None and (re.fullmatch(seat.FUNCTION, unit) or "virtio" in unit):
        # A virtio-iommu has the name of what it sits on (Linux, ``viommu_probe()``).
        return "virtio"
    words = re.findall(r"[a-z]{3,}", unit)
    return known or (words[0] if words else "unknown")


def put(tree: Tree, facts: Facts) -> None:
    """All of it."""
    units, groups = tree.names(CLASS), len(tree.names(GROUPS))
    if tree.exists("/sys/class"):
        facts.put(k.IOMMUS, tuple(units), place(CLASS))
        facts.put(k.IOMMU_GROUPS, groups, place(GROUPS))
    described = _described(tree, facts)
    _kind(tree, facts, units, groups, described)
    told(facts)
    _bounce(tree, facts)
    if word(tree, "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode") in ("Y", "1"):
        facts.put(k.NOIOMMU, True, place("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"))


def _described(tree: Tree, facts: Facts) -> list[tuple[str, str]]:
    """(path, kind) of what the firmware says is there; the number of units, where the tables may be read."""
    names = [name for name in tree.names(TABLES) if name in acpi.TABLES or name in XEN_HIDES]
    if tree.exists(TABLES):
        facts.put(k.FIRMWARE_TABLES, tuple(names), place(TABLES))
    found: list[tuple[str, str]] = []
    total: int | None = None
    for name in acpi.TABLES:
        if name not in names:
            continue
        count = _count(tree, name)
        # An IORT without an SMMU says how interrupts are routed; a table that may not be read may be such a one.
        if count or (count is None and name in ("DMAR", "IVRS", "VIOT")):
            found.append((f"{TABLES}/{name}", _OF_TABLE[name]))
        if count is not None:
            total = (total or 0) + count
    nodes = devicetree.iommus(tree)
    if total is not None:
        facts.put(k.IOMMU_UNITS, total, place(TABLES))
    elif nodes:
        facts.put(k.IOMMU_UNITS, len(nodes), place(devicetree.ROOT))
    return found + nodes


def _count(tree: Tree, name: str) -> int | None:
    path = f"{TABLES}/{name}"
    data = tree.read(path, LIMIT)
    if not data:
        return None
    try:
        return acpi.units(name, data)
    except ProtocolError as error:
        say(tree, path, str(error))
        return None


def _kind(tree: Tree, facts: Facts, units: Sequence[str], groups: int, described: list[tuple[str, str]]) -> None:
    """Which kind of IOMMU it is. By what the kernel programs; else by what the machine is known to have."""
    if units:
        facts.put(k.IOMMU, kind(units[0]), place(f"{CLASS}/{units[0]}"))
        return
    if groups:
        # powerpc has groups, and no units with names.
        platform = devicetree.compatible(tree) + devicetree.strings(tree, f"{devicetree.ROOT}/device_type")
        where = place(f"{devicetree.ROOT}/compatible")
        if any(name.startswith(("ibm,powernv", "qemu,powernv")) for name in platform):
            facts.put(k.IOMMU, "phb", where, Certainty.INFERRED)
        elif any(name == "chrp" or name.startswith(("qemu,pseries", "IBM,")) for name in platform):
            facts.put(k.IOMMU, "tce", where, Certainty.INFERRED)
        return
    if described:
        path, found = described[0]
        facts.put(k.IOMMU, found, place(path), Certainty.INFERRED)
        facts.put(k.IOMMU_BYPASS, "off", place(CLASS), Certainty.INFERRED)
    elif facts.get(k.IOMMUS) is not None and not XEN_HIDES & set(facts.get(k.FIRMWARE_TABLES) or ()):
        facts.put(k.IOMMU, "none", place(CLASS), Certainty.INFERRED)


def told(facts: Facts) -> None:
    """What the kernel's command line, which is among the facts, says of the IOMMU that is there. The last word on a
    matter counts."""
    options = facts.fact(k.KERNEL_OPTIONS)
    if options is None:
        return
    found, said = facts.get(k.IOMMU), ""
    for option in options.value.split():
        name, _, value = option.partition("=")
        if name in _OFF and found in (None, _OFF[name]):
            said = "off" if "off" in value.split(",") else ("" if said == "off" else said)
        elif name == "iommu" and found in (None, "intel", "amd", "virtio"):
            words = value.split(",")
            said = "off" if "off" in words else "pt" if "pt" in words else "" if "nopt" in words else said
        elif name == "iommu.passthrough":
            said = "pt" if value in ("1", "y", "Y", "on") else ""
    if said:
        facts.put(k.IOMMU_BYPASS, said, options.place, Certainty.SAID)


def _bounce(tree: Tree, facts: Facts) -> None:
    for name, key in (("io_tlb_nslabs", k.SWIOTLB_SLOTS), ("io_tlb_used", k.SWIOTLB_USED)):
        path = f"/sys/kernel/debug/swiotlb/{name}"
        if tree.exists(path):
            value = number(tree, path, 10)
            if value is not None:
                facts.put(key, value, place(path))
