# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi registers, tables, commands and events as bytes: host page tables of 4 KiB pages. No I/O.

Source: AMD I/O Virtualization Technology (IOMMU) Specification, 48882: 2.2.2 (device table entry), 2.2.3 (page
tables), 2.4 (commands), 2.5 (event log), 3.4 (MMIO registers).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from virtiova.addr import Access
from virtiova.errors import ProtocolError

# Registers, as offsets from the base; all of them 64 bits wide.
DEVICE_TABLE: Final = 0x00
COMMAND_BASE: Final = 0x08
EVENT_BASE: Final = 0x10
CONTROL: Final = 0x18
FEATURES: Final = 0x30
COMMAND_HEAD: Final = 0x2000
COMMAND_TAIL: Final = 0x2008
EVENT_HEAD: Final = 0x2010
EVENT_TAIL: Final = 0x2018
STATUS: Final = 0x2020

CONTROL_TRANSLATE: Final = 1 << 0
CONTROL_EVENTS: Final = 1 << 2
CONTROL_COMMANDS: Final = 1 << 12
STATUS_EVENT_OVERFLOW: Final = 1 << 0
STATUS_EVENT_RUN: Final = 1 << 3
STATUS_COMMAND_RUN: Final = 1 << 4

DEVICE_ENTRY_SIZE: Final = 32
RECORD_SIZE: Final = 16
"""Of a command, and of an event."""
RING_ENTRIES: Final = 256
"""Of a command buffer or event log of one page: the smallest that there is (length code 8)."""
LEVELS: Final = 3
"""Of the page tables used here: 39-bit addresses."""
WIDTH: Final = 12 + 9 * LEVELS

_VALID: Final = 1 << 0
_TRANSLATION_VALID: Final = 1 << 1
_READ: Final = 1 << 61
_WRITE: Final = 1 << 62
_ADDRESS: Final = 0x000FFFFFFFFFF000
_EVERYTHING: Final = 0x7FFFFFFFFFFFF000
_STORE: Final = 1

EVENTS: Final[dict[int, str]] = {
    0x1: "illegal device table entry",
    0x2: "page fault",
    0x3: "device table hardware error",
    0x4: "page table hardware error",
    0x5: "illegal command",
    0x6: "command hardware error",
    0x7: "IOTLB invalidation timed out",
    0x8: "invalid device request",
}
PAGE_FAULT: Final = 0x2
_OF_A_DEVICE: Final = frozenset({0x1, 0x2, 0x3, 0x4, 0x7, 0x8})
"""Events that name the device whose access they are about; the others are about the command buffer."""
_F_WRITE: Final = 1 << 21
_F_PRESENT: Final = 1 << 20


def device_table_base(table: int, entries: int) -> int:
    """The device table register: ``entries`` entries (whole 4 KiB pages of them) at ``table``."""
    pages, rest = divmod(entries * DEVICE_ENTRY_SIZE, 4096)
    if rest or not 1 <= pages <= 512:
        raise ProtocolError(f"a device table of {entries} entries: wanted a multiple of 128 up to 65536")
    return table | (pages - 1)


def ring_base(page: int) -> int:
    """The base register of a command buffer or event log of one 4 KiB page: 256 records of 16 bytes."""
    return page | 8 << 56


def device_entry(root: int, domain: int, *, levels: int = LEVELS, access: Access = Access.RW) -> bytes:
    """32 bytes: translate through page tables of ``levels`` levels at ``root``. Interrupts are left alone.

    ``levels`` 0 means no tables: addresses go through as they are.
    """
    flags = _VALID | _TRANSLATION_VALID | levels << 9 | _permissions(access)
    return struct.pack("<QQQQ", (root & _ADDRESS) | flags, domain & 0xFFFF, 0, 0)


def page_entry(address: int, access: Access, next_level: int = 0) -> bytes:
    """8 bytes of a page table; ``next_level`` is that of the table at ``address``, 0 if it is a page.

    Without any permission it is not present.
    """
    if not access:
        return bytes(8)
    return struct.pack("<Q", (address & _ADDRESS) | _VALID | next_level << 9 | _permissions(access))


def _permissions(access: Access) -> int:
    return (_READ if Access.READ in access else 0) | (_WRITE if Access.WRITE in access else 0)


def table_index(iova: int, level: int) -> int:
    """Which of the 512 entries of a table of ``level`` (1: leaves) translates ``iova``."""
    return iova >> (3 + 9 * level) & 511


# -- commands -----------------------------------------------------------------------------------------------------


def _command(code: int, low: int, high: int) -> bytes:
    return struct.pack("<QQ", low | code << 60, high)


def completion_wait(address: int, value: int) -> bytes:
    """COMPLETION_WAIT: once all earlier commands are done, store the 64-bit ``value`` at ``address``."""
    return _command(1, (address & 0x000FFFFFFFFFFFF8) | _STORE, value)


def invalidate_device(source: int) -> bytes:
    """INVALIDATE_DEVTAB_ENTRY: forget the cached device table entry of a requester id."""
    return _command(2, source, 0)


def invalidate_pages(domain: int) -> bytes:
    """INVALIDATE_IOMMU_PAGES: forget all cached translations of a domain (S, and the largest range; PDE too)."""
    return _command(3, domain << 32, _EVERYTHING | 1 << 1 | 1)


def invalidate_page(domain: int, iova: int) -> bytes:
    """INVALIDATE_IOMMU_PAGES: forget what is cached of one 4 KiB page."""
    return _command(3, domain << 32, iova & ~0xFFF)


def invalidate_all() -> bytes:
    """INVALIDATE_IOMMU_ALL: forget everything. Optional (bit 6 of the extended features)."""
    return _command(8, 0, 0)


# -- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of the event log, decoded. ``address`` is whole, not the page only."""

    code: int
    source: int
    """Requester id; -1 if the event is not about a device."""
    address: int
    write: bool
    present: bool
    """Whether a page was there, and only its permission was missing."""

    @classmethod
    def unpack(cls, record: bytes) -> Event | None:
        """From 16 bytes; None for an entry that the IOMMU has not written yet."""
        if len(record) != RECORD_SIZE:
            raise ProtocolError(f"an event of {len(record)} bytes, {RECORD_SIZE} wanted")
        source, _, flags, address = struct.unpack("<HHIQ", record)
        code = flags >> 28
        if not code:
            return None
        return cls(
            code=code,
            source=source if code in _OF_A_DEVICE else -1,
            address=address,
            write=bool(flags & _F_WRITE),
            present=bool(flags & _F_PRESENT),
        )

    @property
    def text(self) -> str:
        """In words, with its number."""
        return f"{EVENTS.get(self.code, 'event')} (AMD-Vi event {self.code:#x})"


def ring_offset(register: int) -> int:
    """A head or tail register as an index into a ring of one page; `ProtocolError` if it points nowhere."""
    offset = register & 0x7FFFF
    if offset % RECORD_SIZE or offset >= RING_ENTRIES * RECORD_SIZE:
        raise ProtocolError(f"a ring of {RING_ENTRIES} records has none at offset 0x{offset:x}")
    return offset // RECORD_SIZE
