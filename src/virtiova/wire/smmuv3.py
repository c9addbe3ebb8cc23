# SPDX-License-Identifier: Apache-2.0
"""Arm SMMUv3 registers, tables, commands and events as bytes: AArch64 tables, 4 KiB granule. No I/O.

Source: Arm System Memory Management Unit Architecture Specification, IHI 0070: 3.5 (queues), 4 (commands), 5.2
(stream table entry), 5.4 (context descriptor), 6 (registers), 7.3 (events); Arm ARM, D8 (page tables).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

# Registers, as offsets from the base; those of the event queue's indices lie on page 1.
IDR0: Final = 0x00
IDR1: Final = 0x04
IDR5: Final = 0x14
CR0: Final = 0x20
CR0ACK: Final = 0x24
GERROR: Final = 0x60
STRTAB_BASE: Final = 0x80
STRTAB_BASE_CFG: Final = 0x88
CMDQ_BASE: Final = 0x90
CMDQ_PROD: Final = 0x98
CMDQ_CONS: Final = 0x9C
EVENTQ_BASE: Final = 0xA0
EVENTQ_PROD: Final = 0x100A8
EVENTQ_CONS: Final = 0x100AC

CR0_SMMUEN: Final = 1
CR0_EVENTQEN: Final = 1 << 2
CR0_CMDQEN: Final = 1 << 3
OVERFLOW: Final = 1 << 31
"""In an event queue's indices: events were lost (producer), and software knows of it (consumer)."""

STE_SIZE: Final = 64
COMMAND_SIZE: Final = 16
EVENT_SIZE: Final = 32

LEAF: Final = 3
"""Level of the 4 KiB pages. Tables begin at level 1: 512 entries a table, 39 bits in all."""
TOP: Final = 1
ADDRESS_BITS: Final = 39
_T0SZ: Final = 64 - ADDRESS_BITS
_SL0: Final = 1
_OUTPUT: Final = ((1 << 48) - 1) & ~0xFFF


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the identification registers say that matters here."""

    stage1: bool
    stage2: bool
    output_size: int
    """Code of the output address size, as it goes into IPS and S2PS."""
    granule_4k: bool
    stream_bits: int
    command_queue_bits: int
    event_queue_bits: int

    @classmethod
    def unpack(cls, idr0: int, idr1: int, idr5: int) -> Capabilities:
        """From the three 32-bit registers."""
        return cls(
            stage1=bool(idr0 & 2),
            stage2=bool(idr0 & 1),
            output_size=min(idr5 & 7, 5),
            granule_4k=bool(idr5 & 1 << 4),
            stream_bits=idr1 & 0x3F,
            command_queue_bits=idr1 >> 21 & 0x1F,
            event_queue_bits=idr1 >> 16 & 0x1F,
        )


# -- stream table entries, 64 bytes -------------------------------------------------------------------------------


def ste_stage1(context: int) -> bytes:
    """Translate by stage 1, through the one context descriptor at ``context``."""
    return struct.pack("<8Q", 1 | 5 << 1 | context, *[0] * 7)


def ste_stage2(table: int, output_size: int, vmid: int = 1) -> bytes:
    """Translate by stage 2, through the tables at ``table``; faults are recorded (S2R)."""
    word = _T0SZ | _SL0 << 6 | output_size << 16 | 1 << 19 | 1 << 26
    return struct.pack("<8Q", 1 | 6 << 1, 0, vmid | word << 32, table, 0, 0, 0, 0)


def context_descriptor(table: int, output_size: int, asid: int = 1) -> bytes:
    """64 bytes: ``table`` for the lower half of addresses, none for the upper (EPD1); faults are recorded (R, A)."""
    low = _T0SZ | 1 << 30 | 1 << 31
    high = output_size | 1 << 9 | 1 << 13 | 1 << 14 | asid << 16
    # Attribute 0 of MAIR: normal memory, write-back.
    return struct.pack("<8Q", low | high << 32, table, 0, 0xFF, 0, 0, 0, 0)


# -- page tables, 8 bytes an entry ---------------------------------------------------------------------------------


def table_index(iova: int, level: int) -> int:
    """Which of the 512 entries of a table of ``level`` (1 to 3) translates ``iova``."""
    return iova >> 12 + 9 * (LEAF - level) & 511


def table_entry(table: int) -> bytes:
    """Points to the table of the next level."""
    return struct.pack("<Q", table | 3)


def page_stage1(page: int, *, writable: bool) -> bytes:
    """A 4 KiB page of stage 1. AP[2:1] says read-write (1) or read-only (3): all of its values can be read."""
    return struct.pack("<Q", page & _OUTPUT | _FLAGS | (1 if writable else 3) << 6 | 3)


def page_stage2(page: int, *, readable: bool, writable: bool) -> bytes:
    """A 4 KiB page of stage 2, normal memory. S2AP has one bit for reads and one for writes."""
    return struct.pack("<Q", page & _OUTPUT | _FLAGS | (writable << 1 | readable) << 6 | 0xF << 2 | 3)


_FLAGS: Final = 1 << 10 | 3 << 8
"""The access flag, so that there is no F_ACCESS, and inner shareable."""
NO_ENTRY: Final = bytes(8)


# -- queues --------------------------------------------------------------------------------------------------------


def advance(index: int, bits: int) -> int:
    """The next index of a queue of 2**bits entries. The bit above them says how often it went around."""
    return (index + 1) & ((2 << bits) - 1)


def slot(index: int, bits: int) -> int:
    """Which entry an index means."""
    return index & ((1 << bits) - 1)


def cfgi_all() -> bytes:
    """CMD_CFGI_ALL: forget every cached stream table entry and context descriptor."""
    return struct.pack("<QQ", 0x04, 31)


def tlbi_all() -> bytes:
    """CMD_TLBI_NSNH_ALL: forget every cached translation, of both stages."""
    return struct.pack("<QQ", 0x30, 0)


def sync() -> bytes:
    """CMD_SYNC: done when everything before it is."""
    return struct.pack("<QQ", 0x46, 0)


# -- events --------------------------------------------------------------------------------------------------------

EVENTS: Final[dict[int, str]] = {
    0x01: "unsupported upstream transaction (F_UUT)",
    0x02: "stream id beyond the stream table (C_BAD_STREAMID)",
    0x03: "stream table unreachable (F_STE_FETCH)",
    0x04: "stream table entry invalid (C_BAD_STE)",
    0x06: "substreams are disabled (F_STREAM_DISABLED)",
    0x07: "translated request where none is allowed (F_TRANSL_FORBIDDEN)",
    0x08: "substream id out of range (C_BAD_SUBSTREAMID)",
    0x09: "context descriptor unreachable (F_CD_FETCH)",
    0x0A: "context descriptor invalid (C_BAD_CD)",
    0x0B: "page table unreachable (F_WALK_EABT)",
    0x10: "no page-table entry (F_TRANSLATION)",
    0x11: "output address too large (F_ADDR_SIZE)",
    0x12: "access flag not set (F_ACCESS)",
    0x13: "no permission (F_PERMISSION)",
    0x20: "TLB conflict (F_TLB_CONFLICT)",
    0x21: "configuration cache conflict (F_CFG_CONFLICT)",
}


@dataclass(frozen=True, slots=True)
class Event:
    """An event record, decoded."""

    id: int
    stream: int
    write: bool
    stage2: bool
    address: int
    """The input address; 0 for events about a configuration, which have none."""

    @classmethod
    def unpack(cls, record: bytes) -> Event:
        """From 32 bytes."""
        ident, stream, _, flags, address, _ = struct.unpack("<IIIIQQ", record)
        # Events about a configuration (C_BAD_...) say nothing of the access.
        about_access = ident & 0xFF in _ACCESS_EVENTS
        return cls(
            id=ident & 0xFF,
            stream=stream,
            write=about_access and not flags & 1 << 3,
            stage2=about_access and bool(flags & 1 << 7),
            address=address if about_access else 0,
        )

    @property
    def text(self) -> str:
        """The event in words, with its number."""
        stage = " at stage 2" if self.stage2 else ""
        return f"{EVENTS.get(self.id, 'event')}{stage} (SMMUv3 event {self.id:#x})"


_ACCESS_EVENTS: Final = frozenset({0x01, 0x07, 0x0B, 0x10, 0x11, 0x12, 0x13, 0x20})
