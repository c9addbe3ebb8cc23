# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space of a virtio function, as sysfs shows it: ids, revision, ATS (for root only)."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device
from virtiova.collect.linux.read import number, place, say
from virtiova.collect.tree import Tree
from virtiova.errors import ProtocolError
from virtiova.wire import pci

FUNCTIONS: Final = "/sys/bus/pci/devices"
_TRANSITIONAL: Final = range(0x1000, 0x1040)
MODERN: Final = range(0x1040, 0x1080)


def read(tree: Tree, address: str) -> bytes:
    """What may be seen of it; empty if nothing."""
    return tree.read(f"{FUNCTIONS}/{address}/config", pci.EXTENDED_END) or b""


def put(tree: Tree, address: str, device: Device) -> None:
    """Ids, and ATS if so much may be seen."""
    at = f"{FUNCTIONS}/{address}"
    data = read(tree, address)
    where = place(f"{at}/config")
    if len(data) >= 16:
        vendor, ident, revision = int.from_bytes(data[0:2], "little"), int.from_bytes(data[2:4], "little"), data[8]
    else:
        found = [number(tree, f"{at}/{name}") for name in ("vendor", "device", "revision")]
        vendor, ident, revision = (-1 if value is None else value for value in found)
        where = place(f"{at}/device")
    if vendor == 0xFFFF:
        say(tree, f"{at}/config", "all ones: the function does not answer")
        return
    if vendor != pci.VENDOR_VIRTIO or ident < 0:
        return
    put_fact = device.facts.put
    put_fact(k.PCI_ID, f"{vendor:04x}:{ident:04x}", where)
    if revision >= 0:
        put_fact(k.PCI_REVISION, revision, where)
    put_fact(k.CAN_BE_LEGACY, ident in _TRANSITIONAL, where)
    _ats(tree, f"{at}/config", data, device)


def _ats(tree: Tree, path: str, data: bytes, device: Device) -> None:
    if len(data) < pci.CONFIG_SIZE:
        return
    try:
        found = dict(pci.extended_capabilities(data))
    except ProtocolError as error:
        say(tree, path, str(error))
        return
    at = found.get(pci.EXTENDED_ATS)
    # 256 bytes are all that a conventional function has, or all that its machine lets anybody reach.
    device.facts.put(k.ATS, at is not None, place(path))
    if at is not None and at + pci.ATS_SIZE <= len(data):
        control = int.from_bytes(data[at + pci.ATS_CONTROL : at + pci.ATS_CONTROL + 2], "little")
        device.facts.put(k.ATS_ENABLED, bool(control & pci.ATS_ENABLE), place(path))
