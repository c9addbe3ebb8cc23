# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space and the virtio-pci capabilities as bytes (virtio 1.4, 4.1). No I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.errors import ProtocolError

VENDOR_VIRTIO: Final = 0x1AF4
COMMAND: Final = 4
COMMAND_IO: Final = 1
COMMAND_MEMORY: Final = 2
COMMAND_BUS_MASTER: Final = 4
STATUS: Final = 6
STATUS_CAPABILITIES: Final = 0x10
HEADER_TYPE: Final = 0x0E
BAR0: Final = 0x10
CAP_POINTER: Final = 0x34
CAP_VENDOR: Final = 0x09
CAP_MSIX: Final = 0x11
CONFIG_SIZE: Final = 256
EXTENDED: Final = 0x100
"""Where the extended capabilities of PCI Express begin."""
EXTENDED_END: Final = 0x1000
"""Where a function's configuration space ends; in ECAM the next function's follows."""
EXTENDED_ATS: Final = 0x000F
ATS_SIZE: Final = 8
ATS_CONTROL: Final = 6
"""Of the ATS capability: the 16-bit control register (PCI Express 5.0, 10.5.1)."""
ATS_ENABLE: Final = 1 << 15
MAX_BAR: Final = 1 << 63
"""Bytes of the largest BAR that is believed."""

# Types of virtio structures (virtio 1.4, 4.1.4).
COMMON: Final = 1
NOTIFY: Final = 2
ISR: Final = 3
DEVICE: Final = 4


@dataclass(frozen=True, slots=True)
class VirtioCap:
    """``struct virtio_pci_cap``: a structure at ``offset`` of BAR ``bar``."""

    kind: int
    bar: int
    offset: int
    length: int
    multiplier: int
    """Of a NOTIFY structure: bytes between the notification registers of two queues."""


@dataclass(frozen=True, slots=True)
class MsixCap:
    """The MSI-X capability at ``at``: a table of ``size`` entries at ``offset`` of BAR ``bar``."""

    at: int
    size: int
    bar: int
    offset: int


def capabilities(config: bytes) -> Iterator[tuple[int, int]]:
    """(id, offset) of each capability, bounded: a list that loops ends with `ProtocolError`."""
    if len(config) < CONFIG_SIZE:
        raise ProtocolError(f"PCI configuration space of {len(config)} bytes, {CONFIG_SIZE} wanted")
    if not config[STATUS] & STATUS_CAPABILITIES:
        return
    at = config[CAP_POINTER] & 0xFC
    seen: set[int] = set()
    while at:
        if at in seen or at < 0x40:
            raise ProtocolError(f"PCI capability list loops or leaves its place at 0x{at:02x}")
        seen.add(at)
        yield config[at], at
        at = config[at + 1] & 0xFC


def extended_capability(header: int) -> tuple[int, int]:
    """Id, and offset of the next one (0: this is the last), of an extended capability's first 32 bits (7.6.3).

    Raises `ProtocolError` for an offset that is none. Id 0 (nothing there) and 0xFFFF (no such registers) are for
    the caller to see.
    """
    after = header >> 20 & 0xFFC
    if after and after < EXTENDED:
        raise ProtocolError(f"PCI extended capability list leaves its place at 0x{after:03x}")
    return header & 0xFFFF, after


def extended_capabilities(read: Callable[[int, int], bytes]) -> Iterator[tuple[int, int]]:
    """(id, offset) of each extended capability, bounded: a list that loops ends with `ProtocolError`.

    ``read`` gives bytes of configuration space by offset and length, none where there are none. So only what is
    wanted is read: in a virtual machine each access ends in the hypervisor. Nothing comes of a function without them:
    conventional PCI, or one of whose space only the first 256 bytes can be had.
    """
    at = EXTENDED
    seen: set[int] = set()
    while at:
        if at in seen:
            raise ProtocolError(f"PCI extended capability list loops at 0x{at:03x}")
        seen.add(at)
        header = read(at, 4)
        if len(header) < 4:
            return
        ident, after = extended_capability(int.from_bytes(header, "little"))
        if ident == 0xFFFF:
            return
        # Id 0 is an empty place, which may begin the list (7.6.3).
        if ident:
            yield ident, at
        at = after


def virtio_caps(config: bytes) -> dict[int, VirtioCap]:
    """The first virtio structure of each type; types that do not lie in a BAR are left out."""
    found: dict[int, VirtioCap] = {}
    for cap_id, at in capabilities(config):
        if cap_id != CAP_VENDOR or at + 16 > CONFIG_SIZE:
            continue
        _, _, length, kind, bar, offset, size = struct.unpack_from("<BBBBB3xII", config, at)
        multiplier = 0
        if kind == NOTIFY and length >= 20 and at + 20 <= CONFIG_SIZE:
            (multiplier,) = struct.unpack_from("<I", config, at + 16)
        if kind in (COMMON, NOTIFY, ISR, DEVICE) and bar <= 5:
            found.setdefault(kind, VirtioCap(kind, bar, offset, size, multiplier))
    return found


def msix_cap(config: bytes) -> MsixCap | None:
    """The MSI-X capability, if there is one (PCI Local Bus 3.0, 6.8.2)."""
    for cap_id, at in capabilities(config):
        if cap_id == CAP_MSIX and at + 12 <= CONFIG_SIZE:
            control, table = struct.unpack_from("<HI", config, at + 2)
            return MsixCap(at, (control & 0x7FF) + 1, table & 7, table & ~7)
    return None


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: ``size`` bytes, I/O or memory; ``wide``: it takes two registers."""

    index: int
    size: int
    io: bool
    wide: bool


def bar(index: int, low: int, high: int) -> Bar | None:
    """A BAR from what its registers read after all ones were written; None if it is not implemented."""
    if low in (0, 0xFFFFFFFF):
        return None
    if low & 1:
        return Bar(index, _size(index, (low & 0xFFFC) | 0xFFFFFFFFFFFF0000), io=True, wide=False)
    wide = (low >> 1) & 3 == 2
    full = (low & ~0xF) | (high << 32 if wide else 0xFFFFFFFF << 32)
    return Bar(index, _size(index, full), io=False, wide=wide)


def _size(index: int, address_bits: int) -> int:
    """The size of a BAR from its writable address bits, which have to be the upper ones without a gap."""
    size = (~address_bits & 0xFFFFFFFFFFFFFFFF) + 1
    if size & (size - 1) or size > MAX_BAR:
        raise ProtocolError(f"BAR {index}: address bits 0x{address_bits:x} are no size")
    return size


def device_type(device: int, subsystem: int) -> int:
    """The virtio device type of a PCI device id; transitional ids keep it in the subsystem id (4.1.2)."""
    if 0x1040 <= device <= 0x107F:
        return device - 0x1040
    if 0x1000 <= device <= 0x103F:
        return subsystem
    raise ProtocolError(f"PCI device id 0x{device:04x} is no virtio device")


# Offsets in ``struct virtio_pci_common_cfg`` (virtio 1.4, 4.1.4.3).
COMMON_DEVICE_FEATURE_SELECT: Final = 0
COMMON_DEVICE_FEATURE: Final = 4
COMMON_DRIVER_FEATURE_SELECT: Final = 8
COMMON_DRIVER_FEATURE: Final = 12
COMMON_MSIX_CONFIG: Final = 16
COMMON_STATUS: Final = 20
COMMON_QUEUE_SELECT: Final = 22
COMMON_QUEUE_SIZE: Final = 24
COMMON_QUEUE_MSIX_VECTOR: Final = 26
COMMON_QUEUE_ENABLE: Final = 28
COMMON_QUEUE_NOTIFY_OFF: Final = 30
COMMON_QUEUE_DESC: Final = 32
COMMON_QUEUE_DRIVER: Final = 40
COMMON_QUEUE_DEVICE: Final = 48

# Offsets in the legacy I/O BAR (virtio 1.4, 4.1.4.10).
LEGACY_HOST_FEATURES: Final = 0
LEGACY_GUEST_FEATURES: Final = 4
LEGACY_QUEUE_PFN: Final = 8
LEGACY_QUEUE_SIZE: Final = 12
LEGACY_QUEUE_SELECT: Final = 14
LEGACY_QUEUE_NOTIFY: Final = 16
LEGACY_STATUS: Final = 18
LEGACY_CONFIG_VECTOR: Final = 20
LEGACY_QUEUE_VECTOR: Final = 22
LEGACY_CONFIG: Final = 20
LEGACY_CONFIG_MSIX: Final = 24
NO_VECTOR: Final = 0xFFFF
