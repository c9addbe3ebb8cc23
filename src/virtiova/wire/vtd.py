# SPDX-License-Identifier: Apache-2.0
"""Intel VT-d registers and tables as bytes: legacy mode, second-level paging. No I/O.

Source: Intel Virtualization Technology for Directed I/O, architecture specification: 9.1 (root entry), 9.3
(context entry), 9.8 (second-level entry), 10.4 (registers), 6.5.2 (queued invalidation), 7.1 (fault reasons).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from virtiova.errors import ProtocolError

# Registers, as offsets from the base.
CAP: Final = 0x08
ECAP: Final = 0x10
GCMD: Final = 0x18
GSTS: Final = 0x1C
RTADDR: Final = 0x20
CCMD: Final = 0x28
FSTS: Final = 0x34
IQH: Final = 0x80
IQT: Final = 0x88
IQA: Final = 0x90

GSTS_KEEP: Final = 0x96FFFFFF
"""Bits of the status that are written back with a command: the one-shot ones are left out."""
CMD_TRANSLATE: Final = 1 << 31
CMD_SET_ROOT: Final = 1 << 30
CMD_QUEUED: Final = 1 << 26
CONTEXT_GLOBAL: Final = 1 << 63 | 1 << 61
IOTLB_GLOBAL: Final = 1 << 63 | 1 << 60
PENDING: Final = 1 << 63
FSTS_CLEAR: Final = 0x7D
FSTS_PENDING: Final = 2
FSTS_QUEUE_ERROR: Final = 0x10

READ: Final = 1
WRITE: Final = 2
PRESENT: Final = 1

REASONS: Final[dict[int, str]] = {
    0x1: "root entry not present",
    0x2: "context entry not present",
    0x3: "context entry invalid",
    0x4: "address beyond the address width",
    0x5: "no write permission",
    0x6: "no read permission",
    0x7: "next-level page table unreachable",
    0x8: "root table unreachable",
    0x9: "context table unreachable",
    0xA: "reserved bits set in the root entry",
    0xB: "reserved bits set in the context entry",
    0xC: "reserved bits set in a page-table entry",
    0xD: "translation type not allowed",
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What CAP and ECAP say that matters here."""

    levels: int
    """Of the page tables: 3 (39-bit IOVAs) or 4 (48)."""
    caching_mode: bool
    """Software must invalidate after it made an entry present, too."""
    fault_offset: int
    fault_records: int
    iotlb_offset: int
    device_tlb: bool
    """There are invalidations for the TLBs of devices (ATS)."""

    @classmethod
    def unpack(cls, cap: int, ecap: int) -> Capabilities:
        """From the two 64-bit registers."""
        widths = cap >> 8 & 0x1F
        if not widths & 6:
            raise ProtocolError(f"VT-d capabilities 0x{cap:x}: neither 3 nor 4 levels of page tables")
        return cls(
            levels=4 if widths & 4 else 3,
            caching_mode=bool(cap & 1 << 7),
            fault_offset=(cap >> 24 & 0x3FF) * 16,
            fault_records=(cap >> 40 & 0xFF) + 1,
            iotlb_offset=(ecap >> 8 & 0x3FF) * 16 + 8,
            device_tlb=bool(ecap & 1 << 2),
        )


def root_entry(context_table: int) -> bytes:
    """16 bytes: the context table of one bus."""
    return struct.pack("<QQ", context_table | PRESENT, 0)


def context_entry(page_table: int, levels: int, domain: int, *, device_tlb: bool = False) -> bytes:
    """16 bytes: translate through ``page_table``. Translation type 0, or 1 for a device that may keep translations."""
    return struct.pack("<QQ", page_table | device_tlb << 2 | PRESENT, (levels - 2) | domain << 8)


def page_entry(address: int, flags: int) -> bytes:
    """8 bytes of a page table; ``flags`` 0 is not present."""
    return struct.pack("<Q", address | flags if flags else 0)


def table_index(iova: int, level: int) -> int:
    """Which of the 512 entries of a table of ``level`` (1: leaves) translates ``iova``."""
    return iova >> (12 + 9 * (level - 1)) & 511


def queue_context_global() -> bytes:
    """16 bytes: invalidate the whole context cache, through the queue."""
    return struct.pack("<QQ", 1 | 1 << 4, 0)


def queue_iotlb_global() -> bytes:
    """16 bytes: invalidate the whole IOTLB, through the queue."""
    return struct.pack("<QQ", 2 | 1 << 4, 0)


def queue_device_tlb_all(source: int) -> bytes:
    """16 bytes: let device ``source`` (a requester id) forget all translations that it keeps (6.5.2.5).

    The size bit with all address bits set stands for all addresses.
    """
    return struct.pack("<QQ", 3 | source << 32, 0x7FFFFFFFFFFFF000 | 1)


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault recording register, decoded. ``page`` is all that it keeps of the address."""

    page: int
    write: bool
    source: int
    reason: int

    @classmethod
    def unpack(cls, low: int, high: int) -> FaultRecord | None:
        """From the record's two words; None if it holds no fault."""
        if not high & 1 << 63:
            return None
        return cls(low & ~0xFFF, not high & 1 << 62, high & 0xFFFF, high >> 32 & 0xFF)

    @property
    def text(self) -> str:
        """The reason in words, with its number."""
        return f"{REASONS.get(self.reason, 'reason')} (VT-d fault {self.reason:#x})"
