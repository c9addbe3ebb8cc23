# SPDX-License-Identifier: Apache-2.0
"""Virtio functions that are not on the virtio bus: given to user space by vfio or uio, or driven by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device
from virtiova.collect.linux import config, group, seat
from virtiova.collect.linux.read import natural, number, place
from virtiova.collect.tree import Tree, base
from virtiova.collect.types import type_name
from virtiova.errors import ProtocolError
from virtiova.wire import pci

_USER: Final = ("vfio", "uio", "igb_uio")


def devices(tree: Tree, seen: set[str], *, arm: bool) -> Iterator[Device]:
    """All of them but those whose addresses were ``seen``."""
    for name in sorted(tree.names(config.FUNCTIONS), key=natural):
        at = f"{config.FUNCTIONS}/{name}"
        if name in seen or number(tree, f"{at}/vendor") != pci.VENDOR_VIRTIO:
            continue
        kind = _type(tree, at)
        if kind is not None:
            yield _device(tree, name, kind, arm=arm)


def _type(tree: Tree, at: str) -> int | None:
    """Its device type; None for what else has that vendor id (shared memory, a test device)."""
    ident, subsystem = number(tree, f"{at}/device"), number(tree, f"{at}/subsystem_device")
    try:
        return pci.device_type(ident or 0, subsystem or 0)
    except ProtocolError:
        return None


def _device(tree: Tree, name: str, kind: int, *, arm: bool) -> Device:
    device = Device(name)
    at = f"{config.FUNCTIONS}/{name}"
    put = device.facts.put
    put(k.TYPE, type_name(kind), place(f"{at}/device"))
    driver = base(tree.link(f"{at}/driver"))
    put(k.DRIVER, driver, place(f"{at}/driver"))
    put(k.VFIO, is_for_users(driver), place(f"{at}/driver"))
    real = tree.real(at)
    sits = seat.of_parent(tree, real) if real else seat.Seat(at, "pci", name)
    seat.put(sits, device)
    group.put(tree, sits, device, arm=arm)
    config.put(tree, name, device)
    return device


def is_for_users(driver: str) -> bool:
    """A driver that hands the function to user space: vfio-pci and its relatives, uio_pci_generic, igb_uio."""
    return driver.startswith(_USER) or driver.endswith(("-vfio-pci", "_vfio_pci"))
