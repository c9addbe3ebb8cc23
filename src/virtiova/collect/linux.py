# SPDX-License-Identifier: Apache-2.0
"""A Linux system from inside: sysfs, debugfs, /proc and firmware tables, of this machine or gathered elsewhere."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View, ViewKind
from virtiova.collect.tree import Tree, base, text
from virtiova.collect.types import type_name
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1
from virtiova.result.scan import Place

_DEVICES: Final = "/sys/bus/virtio/devices"
_FEATURES_OK: Final = 8
_DRIVER_OK: Final = 4
_FUNCTION: Final = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2}\.[0-7])")
_ROOT_BUS: Final = re.compile(r"pci([0-9a-f]{4}):([0-9a-f]{2})")


def collect(tree: Tree) -> View:
    """All that its files say of a system."""
    view = View(ViewKind.GUEST, text(tree, "/proc/sys/kernel/hostname") or "", tree.source)
    for name in tree.names(_DEVICES):
        view.devices.append(_device(tree, name))
    _machine(tree, view)
    view.problems += tree.problems
    view.empty = not view.devices and not list(view.machine)
    return view


def _sysfs(path: str) -> Place:
    return Place("sysfs", path)


def _machine(tree: Tree, view: View) -> None:
    put = view.machine.put
    for path, key in (
        ("/proc/sys/kernel/osrelease", k.KERNEL),
        ("/proc/cmdline", k.KERNEL_OPTIONS),
        ("/sys/hypervisor/type", k.HYPERVISOR),
    ):
        found = text(tree, path)
        if found is not None:
            put(key, found, Place("proc" if path.startswith("/proc") else "sysfs", path))
            if key is k.HYPERVISOR:
                put(k.XEN_DOMAIN, found == "xen", _sysfs(path))
    if tree.exists("/sys/class"):
        put(k.IOMMUS, tuple(tree.names("/sys/class/iommu")), _sysfs("/sys/class/iommu"))
        put(k.IOMMU_GROUPS, len(tree.names("/sys/kernel/iommu_groups")), _sysfs("/sys/kernel/iommu_groups"))


def _device(tree: Tree, name: str) -> Device:
    device = Device(name)
    at = f"{_DEVICES}/{name}"
    put = device.facts.put
    kind = text(tree, f"{at}/device")
    if kind is not None:
        put(k.TYPE, type_name(int(kind, 16)), _sysfs(f"{at}/device"))
    status = text(tree, f"{at}/status")
    if status is not None:
        put(k.STATUS, int(status, 16), _sysfs(f"{at}/status"))
    word = text(tree, f"{at}/features")
    if word is not None and set(word) <= {"0", "1"} and len(word) > VIRTIO_F_ACCESS_PLATFORM:
        place = _sysfs(f"{at}/features")
        put(k.FEATURES, sum(1 << bit for bit, char in enumerate(word) if char == "1"), place)
        put(k.VERSION_1, word[VIRTIO_F_VERSION_1] == "1", place)
        if status is not None and int(status, 16) & _FEATURES_OK:
            taken = word[VIRTIO_F_ACCESS_PLATFORM] == "1"
            put(k.ACCEPTED, taken, place)
            if taken:
                put(k.OFFERED, True, place, Certainty.INFERRED)
    put(k.DRIVER, base(tree.link(f"{at}/driver")), _sysfs(f"{at}/driver"))
    _where(tree, device, at)
    return device


def _where(tree: Tree, device: Device, at: str) -> None:
    """Its transport, addresses, and IOMMU group, all of the device that the virtio device sits on."""
    real = tree.real(at)
    if real is None:
        return
    parent = real.rpartition("/")[0]
    put, place = device.facts.put, _sysfs(real)
    put(k.ADDRESS, base(parent), place)
    function = _FUNCTION.fullmatch(base(parent))
    if function:
        put(k.TRANSPORT, "pci", place)
        chain = [part for part in parent.split("/") if _FUNCTION.fullmatch(part)]
        root = next((m for part in parent.split("/") if (m := _ROOT_BUS.fullmatch(part))), None)
        if root:
            put(k.PLACE, f"pci:{root[2]}:" + "/".join(part[-4:] for part in chain), place)
        put(k.BRIDGED, len(chain) > 1, place)
    group = tree.link(f"{parent}/iommu_group")
    if group is not None:
        put(k.GROUP, base(group), _sysfs(f"{parent}/iommu_group"))
        path = f"/sys/kernel/iommu_groups/{base(group)}/type"
        kind = text(tree, path)
        if kind is not None:
            put(k.GROUP_TYPE, kind, _sysfs(path))
