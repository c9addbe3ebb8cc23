# SPDX-License-Identifier: Apache-2.0
"""Devices on Linux' vDPA bus: whose tables translate for them, who serves them, and which are given to user space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device
from virtiova.collect.linux import group, seat
from virtiova.collect.linux.read import natural, place
from virtiova.collect.opened import VDUSE, holders
from virtiova.collect.tree import Tree, base

DEVICES: Final = "/sys/bus/vdpa/devices"
_SOFT: Final = "/sys/devices/virtual/vduse"
"""Where the driver core puts what VDUSE makes: devices of a class that have no parent."""
_NODE: Final = "vhost-vdpa-"


def put(tree: Tree, sits: seat.Seat, device: Device) -> None:
    """What the vDPA device below a virtio device adds to its facts. ``sits`` is that vDPA device.

    VDUSE's devices have tables of their own ("vduse: Introduce VDUSE - vDPA Device in Userspace", c8a6153b6c59, in
    v5.15): its IOTLB, which the kernel fills with bounce pages, or user space through vhost-vdpa. Without bit 33 there
    is no such device: ``vduse_validate_config()``.
    """
    if not sits.path.startswith(f"{_SOFT}/"):
        return
    facts, where = device.facts, place(sits.path)
    facts.put(k.IOMMU, "vduse", where)
    facts.put(k.OFFERED, True, where, Certainty.INFERRED)
    facts.put(k.BACKEND, "vdpa", where)
    facts.put(k.BACKEND_SOCKET, f"{VDUSE}/{base(sits.path.rpartition('/')[0])}", where)
    facts.put(k.BACKEND_OFFERED, True, where, Certainty.INFERRED)


def devices(tree: Tree, seen: set[str], *, arm: bool) -> Iterator[Device]:
    """All of them but those of ``seen``, which have become virtio devices: given to user space, or nobody's."""
    for name in sorted(set(tree.names(DEVICES)) - seen, key=natural):
        at = f"{DEVICES}/{name}"
        device = Device(name)
        device.facts.put(k.DRIVER, base(tree.link(f"{at}/driver")), place(f"{at}/driver"))
        sits = seat.Seat(tree.real(at) or at, "vdpa", name)
        seat.put(sits, device)
        group.put(tree, sits, device, arm=arm)
        put(tree, sits, device)
        if tree.live:
            _users(tree, at, device)
        yield device


def _users(tree: Tree, at: str, device: Device) -> None:
    """The programs that have it open by way of vhost-vdpa."""
    nodes = {f"/dev/{name}" for name in tree.names(at) if name.startswith(_NODE)}
    found = [who for node in sorted(nodes) for who in holders(tree, node)]
    if found:
        told = tuple(f"{who.name} (process {who.pid})" for who in found)
        device.facts.put(k.USERS, told, place(f"/proc/{found[0].pid}/fd"))
