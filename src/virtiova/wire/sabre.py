# SPDX-License-Identifier: Apache-2.0
"""The SPARC64 PCI host bridge's IOMMU (sabre, UltraSPARC IIi) as bytes: registers and table entries. No I/O.

All of it is big-endian. Source: UltraSPARC-IIi User's Manual, the chapters on the IOMMU and its registers; the same
numbers in Linux, arch/sparc/include/asm/iommu_64.h, and QEMU, hw/sparc64/sun4u_iommu.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from virtiova.errors import AccessError, ProtocolError

# Registers of 64 bits, as offsets from the host bridge's base.
CONTROL: Final = 0x200
TSB_BASE: Final = 0x208
FLUSH: Final = 0x210

ENABLE: Final = 1
"""MMU_EN of the control register. Clear: addresses go through one to one."""
SIZE_SHIFT: Final = 16
MAX_SIZE: Final = 7

PAGE: Final = 8192
ENTRY: Final = 8
_ENTRIES: Final = 1024
"""Of a table of size 0; each step of the size doubles them."""

VALID: Final = 1 << 63
WRITABLE: Final = 1 << 1
"""The only permission bit: a valid entry can always be read."""
_ADDRESS: Final = 0x1FF_FFFF_E000
"""Bits 40:13: physical addresses have 41 bits."""
_WORD: Final = struct.Struct(">Q")


def reach(size: int) -> int:
    """Bytes of bus addresses that a table of ``size`` (0 to 7) translates: 8 MiB to 1 GiB. Above, the index wraps."""
    if not 0 <= size <= MAX_SIZE:
        raise ProtocolError(f"TSB size {size}: there are 0 to {MAX_SIZE}")
    return _ENTRIES * PAGE << size


def table_bytes(size: int) -> int:
    """Bytes of a table of ``size``: 8 KiB to 1 MiB."""
    return reach(size) // PAGE * ENTRY


def size_for(end: int) -> int:
    """The smallest size that translates all addresses below ``end``; `AccessError` if none does."""
    for size in range(MAX_SIZE + 1):
        if end <= reach(size):
            return size
    raise AccessError(0, end, f"beyond the 0x{reach(MAX_SIZE):x} bytes that the largest TSB translates")


def control(size: int, *, on: bool) -> int:
    """The control register: table of ``size``, 8 KiB pages, translating or not."""
    return size << SIZE_SHIFT | (ENABLE if on else 0)


def entry_offset(address: int, size: int) -> int:
    """Where in a table of ``size`` the entry for a bus address lies: the hardware looks at no higher bit."""
    return (address % reach(size)) // PAGE * ENTRY


@dataclass(frozen=True, slots=True)
class Entry:
    """A translation table entry (TTE) of an 8 KiB page."""

    valid: bool
    address: int
    """Physical, a multiple of 8192, below 1 << 41."""
    writable: bool

    def pack(self) -> bytes:
        """8 bytes, big-endian; an invalid entry is all zeros."""
        if not self.valid:
            return bytes(ENTRY)
        if self.address & ~_ADDRESS:
            raise AccessError(self.address, PAGE, "not the address of an 8 KiB page of a 41-bit address space")
        return _WORD.pack(VALID | self.address | (WRITABLE if self.writable else 0))

    @classmethod
    def unpack(cls, data: bytes) -> Entry:
        """From 8 bytes of the table."""
        if len(data) != ENTRY:
            raise ProtocolError(f"a table entry has {ENTRY} bytes, not {len(data)}")
        (word,) = _WORD.unpack(data)
        if not word & VALID:
            return cls(False, 0, False)
        return cls(True, word & _ADDRESS, bool(word & WRITABLE))


def register(value: int) -> bytes:
    """A register's 8 bytes in bus order."""
    return _WORD.pack(value)
