# SPDX-License-Identifier: Apache-2.0
"""The machine, as QEMU's monitor tells it: who it is, its IOMMU, its memory."""

from __future__ import annotations

import re
from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.asked import Ask, human, whole, word
from virtiova.collect.facts import Certainty, View
from virtiova.collect.monitor import CommandError
from virtiova.collect.monitor_words import ram_map
from virtiova.collect.qmp_tree import Tree
from virtiova.result.scan import Place

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"

# QEMU's types of IOMMUs that are devices.
_IOMMUS: Final = {
    "intel-iommu": "intel",
    "amd-iommu": "amd",
    "virtio-iommu-pci": "virtio",
    "virtio-iommu-pci-non-transitional": "virtio",
    "virtio-iommu-device": "virtio",
    "arm-smmuv3": "smmuv3",
    "riscv-iommu-pci": "riscv",
    "riscv-iommu-device": "riscv",
    "riscv-iommu-sys": "riscv",
}
# Machines whose PCI host bridges hold one.
_OF_MACHINE: Final = (
    (re.compile(r"pseries"), "tce"),
    (re.compile(r"powernv"), "phb"),
    (re.compile(r"sun4[uv]"), "sabre"),
    (re.compile(r"s390-ccw"), "zpci"),
)
# What each can be told that says how it treats devices.
_OPTIONS: Final = {
    "intel": ("caching-mode", "device-iotlb", "intremap", "pt", "dma-translation", "aw-bits", "x-scalable-mode",
              "x-flts", "snoop-control"),
    "amd": ("device-iotlb", "intremap", "pt", "xtsup", "dma-remap"),
    "virtio": ("boot-bypass", "granule", "aw-bits"),
    "smmuv3": ("stage",),
    "riscv": ("ats", "off", "s-stage", "g-stage"),
}  # fmt: skip
_GUARDS: Final = {
    "sev-guest": "sev",
    "sev-snp-guest": "sev-snp",
    "tdx-guest": "tdx",
    "s390-pv-guest": "s390-pv",
    "pef-guest": "pef",
}


def collect(ask: Ask, view: View) -> tuple[Tree, str]:
    """Put the machine's facts; the tree of its objects and its memory map, for its devices."""
    tree, put = Tree(ask), view.machine.put
    answers = {each: _mapping(tree.say(each)) for each in ("query-version", "query-name", "query-uuid", "query-status")}
    version = _version(answers["query-version"])
    if answers["query-version"]:
        put(k.VMM, "qemu", Place("qmp", "query-version"))
    if version:
        put(k.VMM_VERSION, version, Place("qmp", "query-version"))
    name = word(answers["query-name"].get("name"))
    view.name = name
    if name:
        put(k.NAME, name, Place("qmp", "query-name"))
    uuid = word(answers["query-uuid"].get("UUID")).lower()
    if _UUID.fullmatch(uuid) and uuid != _NO_UUID:
        put(k.UUID, uuid, Place("qmp", "query-uuid"))
    state = word(answers["query-status"].get("status"), 40)
    if state:
        put(k.RUN_STATE, state, Place("qmp", "query-status"))
        if state == "inmigrate":
            put(k.INCOMING, True, Place("qmp", "query-status"))
    arch = word(_mapping(tree.say("query-target")).get("arch"), 40)
    if arch:
        put(k.ARCH, arch, Place("qmp", "query-target"))
    kind = word(tree.get("/machine", "type"), 80).removesuffix("-machine")
    if kind:
        put(k.MACHINE_TYPE, kind, _qom("/machine", "type"))
    guard = tree.link("/machine", "confidential-guest-support")
    if guard:
        said = word(tree.get(guard, "type"), 80)
        put(k.RESTRICTED, _GUARDS.get(said, said), _qom("/machine", "confidential-guest-support"))
    tree.look()
    _iommu(tree, view, kind)
    try:
        mtree = human(ask, "info mtree -f")
    except CommandError:
        mtree = ""
    ram = ram_map(mtree)
    if ram:
        put(k.RAM, tuple(end for piece in ram for end in piece), Place("qmp", "info mtree -f"))
    return tree, mtree


def _iommu(tree: Tree, view: View, kind: str) -> None:
    """Its kind, and what it was told. None where the objects are known and none of them is one."""
    put = view.machine.put
    found = tree.of_type(*_IOMMUS)
    if found:
        path = found[0]
        name = _IOMMUS[tree.objects[path]]
        put(k.IOMMU, name, Place("qmp", f"qom-list {path.rpartition('/')[0]}"))
        # With virtio-iommu the options are also those of the function that it is on.
        told = [(each, _shown(tree.get(path, each))) for each in _OPTIONS.get(name, ())]
        put(k.IOMMU_OPTIONS, tuple(f"{each}={value}" for each, value in told if value), Place("qmp", f"qom-get {path}"))
        if ("dma-translation", "off") in told:
            put(k.IOMMU_BYPASS, "dma-translation=off", _qom(path, "dma-translation"))
        if len(found) > 1:
            view.problems.append(f"{view.source}: {len(found)} IOMMUs; the first, {path}, is taken for that of all")
        return
    name = next((each for pattern, each in _OF_MACHINE if pattern.match(kind)), "")
    if name:
        put(k.IOMMU, name, _qom("/machine", "type"), Certainty.DEFAULT)
    elif tree.objects:
        put(k.IOMMU, "none", Place("qmp", "qom-list /machine"))


def _version(said: dict[str, Any]) -> str:
    qemu = _mapping(said.get("qemu"))
    numbers = [whole(qemu.get(each), 10_000) for each in ("major", "minor", "micro")]
    return "" if None in numbers else ".".join(map(str, numbers))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if whole(value) is not None else word(value, 40)


def _qom(path: str, name: str) -> Place:
    return Place("qmp", f"{path} {name}")
