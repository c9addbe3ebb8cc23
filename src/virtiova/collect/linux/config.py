# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space of a virtio function, as sysfs shows it: ids, revision, ATS (for root only)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device
from virtiova.collect.linux.read import number, place, say, word
from virtiova.collect.tree import LiveTree, Tree
from virtiova.errors import ProtocolError
from virtiova.wire import pci

FUNCTIONS: Final = "/sys/bus/pci/devices"
_TRANSITIONAL: Final = range(0x1000, 0x1040)


def reader(tree: Tree, address: str) -> Callable[[int, int], bytes]:
    """Bytes of it by offset and length; none where nothing is there, or may be seen.

    Of this machine only what is asked for is read: each access goes to the device, in a virtual machine through the
    hypervisor, and all 4096 bytes would take longer than everything else together.
    """
    path = f"{FUNCTIONS}/{address}/config"
    if tree.live and isinstance(tree, LiveTree):
        live = tree
        return lambda offset, length: _live(live, path, offset, length)
    data = tree.read(path, pci.EXTENDED_END) or b""
    return lambda offset, length: data[offset : offset + length]


def _live(tree: LiveTree, path: str, offset: int, length: int) -> bytes:
    try:
        fd = os.open(tree.at(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        say(tree, path, error.strerror or "cannot be read")
        return b""
    finally:
        os.close(fd)


def put(tree: Tree, address: str, device: Device) -> None:
    """Ids, and ATS if so much may be seen."""
    at = f"{FUNCTIONS}/{address}"
    vendor, ident = number(tree, f"{at}/vendor"), number(tree, f"{at}/device")
    if vendor != pci.VENDOR_VIRTIO or ident is None:
        return
    where = place(f"{at}/device")
    device.facts.put(k.PCI_ID, f"{vendor:04x}:{ident:04x}", where)
    device.facts.put(k.CAN_BE_LEGACY, ident in _TRANSITIONAL, where)
    revision = number(tree, f"{at}/revision")
    if revision is not None:
        device.facts.put(k.PCI_REVISION, revision, place(f"{at}/revision"))
    if tree.live and word(tree, f"{at}/power_state") not in (None, "D0", "unknown"):
        # It sleeps, and the kernel would wake it for this.
        return
    read = reader(tree, address)
    if read(0, 4) == b"\xff\xff\xff\xff":
        say(tree, f"{at}/config", "all ones: the function does not answer")
        return
    # The end of the first 256 bytes: who may see it may see all that there is.
    if len(read(pci.CONFIG_SIZE - 4, 4)) == 4:
        _ats(tree, f"{at}/config", read, device)


def _ats(tree: Tree, path: str, read: Callable[[int, int], bytes], device: Device) -> None:
    try:
        found = dict(pci.extended_capabilities(read))
    except ProtocolError as error:
        say(tree, path, str(error))
        return
    at = found.get(pci.EXTENDED_ATS)
    # 256 bytes are all that a conventional function has, or all that its machine lets anybody reach.
    device.facts.put(k.ATS, at is not None, place(path))
    if at is not None:
        control = read(at + pci.ATS_CONTROL, 2)
        if len(control) == 2:
            enabled = bool(int.from_bytes(control, "little") & pci.ATS_ENABLE)
            device.facts.put(k.ATS_ENABLED, enabled, place(path))
