# SPDX-License-Identifier: Apache-2.0
"""The kernel's VFIO interface as bytes: request numbers and structures (Linux, include/uapi/linux/vfio.h). No I/O."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from virtiova.errors import ProtocolError

_BASE: Final = ord(";") << 8 | 100

GET_API_VERSION: Final = _BASE + 0
CHECK_EXTENSION: Final = _BASE + 1
SET_IOMMU: Final = _BASE + 2
GROUP_GET_STATUS: Final = _BASE + 3
GROUP_SET_CONTAINER: Final = _BASE + 4
GROUP_GET_DEVICE_FD: Final = _BASE + 6
DEVICE_GET_INFO: Final = _BASE + 7
DEVICE_GET_REGION_INFO: Final = _BASE + 8
DEVICE_GET_IRQ_INFO: Final = _BASE + 9
DEVICE_SET_IRQS: Final = _BASE + 10
DEVICE_RESET: Final = _BASE + 11
IOMMU_GET_INFO: Final = _BASE + 12
IOMMU_MAP_DMA: Final = _BASE + 13
IOMMU_UNMAP_DMA: Final = _BASE + 14

API_VERSION: Final = 0
TYPE1V2_IOMMU: Final = 3
NOIOMMU_IOMMU: Final = 8

GROUP_VIABLE: Final = 1
DEVICE_FLAG_RESET: Final = 1
DEVICE_FLAG_PCI: Final = 2
CONFIG_REGION: Final = 7
_EVENTFD_TRIGGER: Final = 1 << 2 | 1 << 5
"""VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER."""
_NONE_TRIGGER: Final = 1 << 0 | 1 << 5
_NONE_UNMASK: Final = 1 << 0 | 1 << 4
_CAP_IOVA_RANGE: Final = 1
_HEADER: Final = struct.Struct("<HHI")


class DmaFlag(enum.IntFlag):
    """What a mapping lets the device do."""

    READ = 1
    WRITE = 2


class Irq(enum.IntEnum):
    """Kinds of interrupts of a PCI device, by their index."""

    INTX = 0
    MSI = 1
    MSIX = 2


@dataclass(frozen=True, slots=True)
class Region:
    """A region of a device: a BAR, or its configuration space. ``offset`` is that in the device's descriptor."""

    size: int
    offset: int


def group_status() -> bytearray:
    """Room for a group's status."""
    return bytearray(struct.pack("<II", 8, 0))


def viable(status: bytes | bytearray) -> bool:
    """Are all devices of the group out of the kernel's hands?"""
    return bool(struct.unpack_from("<I", status, 4)[0] & GROUP_VIABLE)


def device_info() -> bytearray:
    """Room for what a device is: flags, how many regions, how many kinds of interrupts."""
    return bytearray(struct.pack("<5I", 20, 0, 0, 0, 0))


def region_info(index: int) -> bytearray:
    """Room for a region."""
    return bytearray(struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))


def decode_region(info: bytes | bytearray) -> Region:
    """What the kernel filled in."""
    size, offset = struct.unpack_from("<QQ", info, 16)
    return Region(size, offset)


def map_dma(iova: int, vaddr: int, size: int, flags: DmaFlag) -> bytes:
    """A mapping: ``iova``, our own address, bytes; all multiples of the page."""
    return struct.pack("<IIQQQ", 32, flags, vaddr, iova, size)


def unmap_dma(iova: int, size: int) -> bytearray:
    """Room for an answer: how many bytes were unmapped stands in the last field."""
    return bytearray(struct.pack("<IIQQ", 24, 0, iova, size))


def unmapped(answer: bytes | bytearray) -> int:
    """How many bytes were."""
    size: int = struct.unpack_from("<Q", answer, 16)[0]
    return size


def irq_info(index: Irq) -> bytearray:
    """Room for how many interrupts of a kind there are."""
    return bytearray(struct.pack("<4I", 16, 0, index, 0))


def irq_count(info: bytes | bytearray) -> int:
    """How many."""
    count: int = struct.unpack_from("<I", info, 12)[0]
    return count


def set_irq_events(index: Irq, fds: list[int]) -> bytes:
    """Let interrupts of a kind, from the first on, signal these eventfds."""
    head = struct.pack("<5I", 20 + 4 * len(fds), _EVENTFD_TRIGGER, index, 0, len(fds))
    return head + struct.pack(f"<{len(fds)}i", *fds)


def unmask_irq(index: Irq) -> bytes:
    """Let the first one through again."""
    return struct.pack("<5I", 20, _NONE_UNMASK, index, 0, 1)


def clear_irqs(index: Irq) -> bytes:
    """Switch all of a kind off."""
    return struct.pack("<5I", 20, _NONE_TRIGGER, index, 0, 0)


def iommu_info(size: int) -> bytearray:
    """Room for what the IOMMU can: ``size`` bytes."""
    return bytearray(struct.pack("<IIQII", size, 0, 0, 0, 0) + bytes(size - 24))


def info_size(info: bytes | bytearray) -> int:
    """How much room it takes."""
    size: int = struct.unpack_from("<I", info, 0)[0]
    return size


def page_sizes(info: bytes | bytearray) -> int:
    """The page sizes that it maps, a bit each."""
    sizes: int = struct.unpack_from("<Q", info, 8)[0]
    return sizes


def iova_ranges(info: bytes | bytearray) -> list[tuple[int, int]]:
    """First and last address of each range of IOVAs that may be mapped; empty if the kernel does not say.

    Raises `ProtocolError` for a chain of capabilities that leaves the structure, or does not end.
    """
    at: int = struct.unpack_from("<I", info, 16)[0]
    for _ in range(16):
        if not at:
            return []
        if at + _HEADER.size + 8 > len(info):
            raise ProtocolError(f"a capability of the IOMMU at 0x{at:x} lies outside of 0x{len(info):x} bytes")
        kind, _version, following = _HEADER.unpack_from(info, at)
        if kind == _CAP_IOVA_RANGE:
            count: int = struct.unpack_from("<I", info, at + 8)[0]
            if at + 16 + 16 * count > len(info):
                raise ProtocolError(f"the IOMMU names {count} ranges, in 0x{len(info):x} bytes")
            return [struct.unpack_from("<QQ", info, at + 16 + 16 * n) for n in range(count)]
        at = following
    raise ProtocolError("the capabilities of the IOMMU have no end")
