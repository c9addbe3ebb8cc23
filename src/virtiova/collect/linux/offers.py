# SPDX-License-Identifier: Apache-2.0
"""What a device offers, which sysfs does not say: by debugfs, or read off its registers. Nothing is ever written."""

from __future__ import annotations

import os
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device
from virtiova.collect.linux import config
from virtiova.collect.linux.read import SHORT, place, quoted, say, word
from virtiova.collect.linux.seat import Seat
from virtiova.collect.tree import LiveTree, Tree, base, text
from virtiova.errors import ProtocolError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM
from virtiova.result.scan import Place
from virtiova.wire import pci

DEBUG: Final = "/sys/kernel/debug/virtio"
_MACHINES: Final = frozenset({"x86_64", "aarch64", "riscv64", "ppc64le"})
"""Where a plain load is what a PCI register wants, and little-endian is the byte order (not on s390x)."""
_MEMORY: Final = 0x200
"""``IORESOURCE_MEM`` in the flags of sysfs' ``resource``."""
_SECOND_WORD: Final = 1
_BITS: Final = 1024


def put(tree: Tree, device: Device, sits: Seat | None, *, closed: bool) -> None:
    """Whether it offers bit 33, if anything here says so.

    ``closed``: the machine is a confidential guest. There a load from a device's registers by a program is for the
    kernel to emulate, which not every kernel can (Linux before 6.12 ends a program of a TDX guest for it).
    """
    path = f"{DEBUG}/{device.name}/device_features"
    bits = _debugfs(tree, path)
    if bits is not None:
        device.facts.put(k.OFFERED, VIRTIO_F_ACCESS_PLATFORM in bits, place(path))
    elif (
        tree.live
        and isinstance(tree, LiveTree)
        and not closed
        and sits is not None
        and sits.transport == "pci"
        and _worth_it(device)
    ):
        found = _registers(tree, sits.address)
        if found is not None:
            device.facts.put(k.OFFERED, found, Place("pci", f"{config.FUNCTIONS}/{sits.address}"))


def _worth_it(device: Device) -> bool:
    """What was taken was offered; and the registers of a driver that shows more than 64 bits show another word."""
    return device.facts.get(k.ACCEPTED) is False and not device.facts.get(k.WIDE_FEATURES)


def _debugfs(tree: Tree, path: str) -> set[int] | None:
    """The bits that the device offers, a number a line ("virtio: add debugfs infrastructure to allow to debug virtio
    features", in v6.10; CONFIG_VIRTIO_DEBUG). An empty file is a device that offers nothing."""
    # A folder that may not be entered is said once; a file in it looks as if it were not there.
    if not tree.names(DEBUG) or not tree.exists(path):
        return None
    said = text(tree, path, SHORT)
    if said is None:
        return None
    bits = said.split()
    if not all(bit.isdecimal() and len(bit) < 5 and int(bit) < _BITS for bit in bits):
        say(tree, path, f"{quoted(said)} is no list of feature bits")
        return None
    return {int(bit) for bit in bits}


def _registers(tree: LiveTree, address: str) -> bool | None:
    """Bit 33 in the second word of ``device_feature``, if that is the word that the device shows now.

    Why this disturbs nothing, on any machine: it maps the page for reading only, so that a store would be a fault of
    ours and never reach the device, and makes at most three aligned loads of 32 bits, all in the common configuration
    (virtio 1.4, 4.1.4.3), of ``device_feature_select`` and ``device_feature``. A load of these has no effect on the
    device (4.1.4.3.1: it is a window onto words that do not change); the one register of a virtio function that a
    load changes, the ISR status (4.1.4.5), is another structure, which is not mapped unless it shares the page, and
    is not loaded in any case. The function has to be awake, decode memory, and belong to virtio-pci: nobody else
    knows in which state it is.

    The selector is where the driver left it when it last read the features: at word 1 up to Linux 6.16. Since
    "virtio_pci_modern: allow configuring extended features" (in v6.17) it reads four words and leaves it at 3, where
    nothing is learnt, as the selector is not ours to change. Such a kernel is known by the 128 bits in ``features``.
    """
    where = _register_place(tree, address)
    if where is None:
        return None
    index, offset = where
    return _load(tree.at(f"{config.FUNCTIONS}/{address}/resource{index}"), offset)


def _register_place(tree: LiveTree, address: str) -> tuple[int, int] | None:
    """BAR and offset of the common configuration, if it may be looked at."""
    at = f"{config.FUNCTIONS}/{address}"
    if os.geteuid() != 0 or os.uname().machine not in _MACHINES:
        return None
    if base(tree.link(f"{at}/driver")) != "virtio-pci" or word(tree, f"{at}/power_state") != "D0":
        return None
    if not any(tree.exists(f"{at}/resource{index}") for index in range(6)):
        return None
    data = config.reader(tree, address)(0, pci.CONFIG_SIZE)
    if len(data) < pci.CONFIG_SIZE or not data[pci.COMMAND] & pci.COMMAND_MEMORY:
        return None
    try:
        common = pci.virtio_caps(data).get(pci.COMMON)
    except ProtocolError as error:
        say(tree, f"{at}/config", str(error))
        return None
    # Eight bytes that begin at a multiple of eight are in one page. Linux itself wants a multiple of four.
    if common is None or common.offset % 8 or common.length < pci.COMMON_DEVICE_FEATURE + 4:
        return None
    size = _bar_size(tree, f"{at}/resource", common.bar)
    return (common.bar, common.offset) if common.offset + common.length <= size else None


def _bar_size(tree: Tree, path: str, index: int) -> int:
    """Bytes of a memory BAR, from ``resource``: first address, last address and flags of each; 0 if it is none."""
    rows = (text(tree, path, SHORT) or "").splitlines()
    try:
        first, last, flags = (int(value, 16) for value in rows[index].split())
    except (IndexError, ValueError):
        return 0
    return last - first + 1 if flags & _MEMORY and last > first else 0


def _load(path: str, offset: int) -> bool | None:
    """The word, if the selector says before and after that it is the second one. None: the kernel forbids it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    from virtiova._core import Mapping

    try:
        page = os.sysconf("SC_PAGESIZE")
        start = offset // page * page
        # A function that is unplugged meanwhile takes its registers away: the guard of a mapping survives that.
        mapping = Mapping(fd, start, page, page, writable=False)
    except OSError:
        return None
    finally:
        os.close(fd)
    window = mapping.window(offset - start, pci.COMMON_DEVICE_FEATURE + 4)
    try:
        if window.load32(pci.COMMON_DEVICE_FEATURE_SELECT) != _SECOND_WORD:
            return None
        value = window.load32(pci.COMMON_DEVICE_FEATURE)
        if window.load32(pci.COMMON_DEVICE_FEATURE_SELECT) != _SECOND_WORD or value == 0xFFFFFFFF or mapping.faults:
            return None
        return bool(value >> (VIRTIO_F_ACCESS_PLATFORM - 32) & 1)
    finally:
        window.release()
        mapping.close()
