# SPDX-License-Identifier: Apache-2.0
"""A Linux system from inside: sysfs, debugfs, /proc and firmware tables, of this machine or gathered elsewhere."""

from __future__ import annotations

from virtiova.collect import keys as k
from virtiova.collect.facts import View, ViewKind
from virtiova.collect.linux import bus, confidential, functions, machine, offers, units, vdpa
from virtiova.collect.linux.read import folded
from virtiova.collect.tree import Tree


def collect(tree: Tree) -> View:
    """All that its files say of a system. Reads only, and of every file a bounded part."""
    view = View(ViewKind.GUEST, "", tree.source)
    machine.put(tree, view.machine)
    confidential.put(tree, view.machine)
    units.put(tree, view.machine)
    view.name = view.machine.get(k.NAME) or ""
    closed = view.machine.get(k.RESTRICTED) is not None
    arm = (view.machine.get(k.ARCH) or "").startswith(("aarch64", "arm"))
    seen = set()
    for device, sits in bus.devices(tree, arm=arm):
        offers.put(tree, device, sits, closed=closed)
        view.devices.append(device)
        if sits is not None:
            seen.add(sits.address)
            if sits.transport == "vdpa":
                vdpa.put(tree, sits, device)
    view.devices += functions.devices(tree, seen, arm=arm)
    view.devices += vdpa.devices(tree, seen, arm=arm)
    view.problems += folded(tree.problems)
    view.empty = not view.devices and not list(view.machine)
    return view
