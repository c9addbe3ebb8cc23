# SPDX-License-Identifier: Apache-2.0
"""virtio-iommu requests, replies, events and configuration as bytes (virtio 1.4, 5.13). Little-endian. No I/O.

All ranges are inclusive at both ends, as the specification has them.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from virtiova.addr import Access
from virtiova.errors import ProtocolError

REQUEST_QUEUE: Final = 0
EVENT_QUEUE: Final = 1

# Feature bits (5.13.3).
F_INPUT_RANGE: Final = 0
F_DOMAIN_RANGE: Final = 1
F_MAP_UNMAP: Final = 2
F_BYPASS: Final = 3
F_PROBE: Final = 4
F_MMIO: Final = 5
F_BYPASS_CONFIG: Final = 6

ATTACH_F_BYPASS: Final = 1
"""Attach to a domain that lets all addresses through; only with F_BYPASS_CONFIG."""
MAP_F_READ: Final = 1
MAP_F_WRITE: Final = 2

TAIL_SIZE: Final = 4
EVENT_SIZE: Final = 24
CONFIG_SIZE: Final = 40
CONFIG_BYPASS: Final = 36
"""Offset of ``bypass`` in the configuration: the one field that the driver may write."""


class Status(enum.IntEnum):
    """What became of a request (5.13.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    DEVERR = 3
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class Reason(enum.IntEnum):
    """Why an access was refused (5.13.6.9)."""

    UNKNOWN = 0
    DOMAIN = 1
    MAPPING = 2


# -- requests: the device-readable part. The device appends its answer, four bytes with the status first -----------


def attach(domain: int, endpoint: int, flags: int = 0) -> bytes:
    """``struct virtio_iommu_req_attach``: the endpoint's accesses become those of the domain."""
    return struct.pack("<B3xIII4x", 1, domain, endpoint, flags)


def detach(domain: int, endpoint: int) -> bytes:
    """``struct virtio_iommu_req_detach``."""
    return struct.pack("<B3xII8x", 2, domain, endpoint)


def map_request(domain: int, first: int, last: int, physical: int, access: Access) -> bytes:
    """``struct virtio_iommu_req_map``: addresses ``first`` to ``last`` (inclusive) lie at ``physical``."""
    flags = (MAP_F_READ if Access.READ in access else 0) | (MAP_F_WRITE if Access.WRITE in access else 0)
    return struct.pack("<B3xIQQQI", 3, domain, first, last, physical, flags)


def unmap_request(domain: int, first: int, last: int) -> bytes:
    """``struct virtio_iommu_req_unmap``: every mapping that lies in ``first`` to ``last`` (inclusive) goes."""
    return struct.pack("<B3xIQQ4x", 4, domain, first, last)


def probe(endpoint: int) -> bytes:
    """``struct virtio_iommu_req_probe``: the answer is ``probe_size`` bytes of properties before the status."""
    return struct.pack("<B3xI64x", 5, endpoint)


def status_of(tail: bytes, used_length: int) -> int:
    """The status in a request's last four bytes, known (`Status`) or not.

    A device that does not know the request leaves the buffer alone: length 0 counts as UNSUPP (5.13.6.2).
    """
    if len(tail) != TAIL_SIZE:
        raise ProtocolError(f"an answer of {len(tail)} bytes, {TAIL_SIZE} wanted")
    return tail[0] if used_length else Status.UNSUPP


def status_text(status: int) -> str:
    """A status by name; ``status 0x..`` for one that the specification does not have."""
    try:
        return Status(status).name
    except ValueError:
        return f"status {status:#x}"


# -- configuration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Config:
    """``struct virtio_iommu_config``."""

    page_size_mask: int
    input_first: int
    input_last: int
    domain_first: int
    domain_last: int
    probe_size: int
    bypass: bool

    @classmethod
    def unpack(cls, data: bytes, features: int) -> Config:
        """From 40 bytes. Fields of features that are not in ``features`` get the values that stand for "any".

        `ProtocolError` for what leaves nothing to map: no page size, or a range that ends before it begins.
        """
        if len(data) != CONFIG_SIZE:
            raise ProtocolError(f"a virtio-iommu configuration of {len(data)} bytes, {CONFIG_SIZE} wanted")
        mask, first, last, low, high, probe_size, bypass = struct.unpack("<QQQIIIB3x", data)
        if not features >> F_INPUT_RANGE & 1:
            first, last = 0, 2**64 - 1
        if not features >> F_DOMAIN_RANGE & 1:
            low, high = 0, 2**32 - 1
        if not features >> F_PROBE & 1:
            probe_size = 0
        if mask == 0 or last < first or high < low:
            raise ProtocolError(
                f"no addresses: page_size_mask 0x{mask:x}, input 0x{first:x}-0x{last:x}, domains 0x{low:x}-0x{high:x}"
            )
        return cls(mask, first, last, low, high, probe_size, bool(bypass))

    @property
    def granule(self) -> int:
        """Bytes that every mapping starts and ends at a multiple of (5.13.6.1)."""
        return self.page_size_mask & -self.page_size_mask


# -- properties of an endpoint ------------------------------------------------------------------------------------

_RESV_MEM: Final = 1


@dataclass(frozen=True, slots=True)
class ReservedRegion:
    """``struct virtio_iommu_probe_resv_mem``: addresses that must not be mapped; ``msi``: where messages go."""

    first: int
    last: int
    msi: bool


def properties(data: bytes) -> list[ReservedRegion]:
    """The reserved regions among an endpoint's properties; properties of other types are skipped (5.13.6.7)."""
    found = []
    at = 0
    while at + 4 <= len(data):
        kind, length = struct.unpack_from("<HH", data, at)
        kind &= 0xFFF
        if kind == 0:
            break
        at += 4
        if at + length > len(data):
            raise ProtocolError(f"a property of {length} bytes at offset {at} of {len(data)}")
        if kind == _RESV_MEM:
            if length < 20:
                raise ProtocolError(f"a reserved region of {length} bytes, 20 wanted")
            subtype, first, last = struct.unpack_from("<B3xQQ", data, at)
            if last < first:
                raise ProtocolError(f"a reserved region that ends before it begins: 0x{first:x}-0x{last:x}")
            found.append(ReservedRegion(first, last, subtype == 1))
        at += length
    return found


# -- events -------------------------------------------------------------------------------------------------------

_FAULT_READ: Final = 1 << 0
_FAULT_WRITE: Final = 1 << 1
_FAULT_ADDRESS: Final = 1 << 8


@dataclass(frozen=True, slots=True)
class Event:
    """``struct virtio_iommu_fault``: one access that was refused."""

    reason: int
    read: bool
    write: bool
    endpoint: int
    address: int | None
    """Exact, not the page only; None if the device left it out."""

    @classmethod
    def unpack(cls, data: bytes, used_length: int) -> Event:
        """From a buffer of 24 bytes of which the device says that it wrote ``used_length``."""
        if len(data) != EVENT_SIZE or used_length < EVENT_SIZE:
            raise ProtocolError(f"an event of {min(len(data), used_length)} bytes, {EVENT_SIZE} wanted")
        reason, flags, endpoint, address = struct.unpack("<B3xII4xQ", data)
        known = bool(flags & _FAULT_ADDRESS)
        read, write = bool(flags & _FAULT_READ), bool(flags & _FAULT_WRITE)
        return cls(reason, read, write, endpoint, address if known else None)

    @property
    def text(self) -> str:
        """The reason in words, with its number."""
        words = {
            Reason.UNKNOWN: "not attached to any domain, or an unknown reason",
            Reason.DOMAIN: "not attached to a domain",
            Reason.MAPPING: "no mapping that allows it",
        }
        known = words[Reason(self.reason)] if self.reason in words else "reason"
        return f"{known} (virtio-iommu fault {self.reason:#x})"
