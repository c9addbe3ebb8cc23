# SPDX-License-Identifier: Apache-2.0
"""RISC-V IOMMU registers, device directory, page tables, commands and fault records as bytes, little-endian. No I/O.

Source: RISC-V IOMMU Architecture Specification 1.0: 2.1 (device directory), 3.1 (commands), 3.2 (fault records),
5 (registers); RISC-V Privileged Architecture, "Sv39", "Sv48" and "Sv39x4" (page tables).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

# Registers, as offsets from the base (5.1); of 8 bytes where it says so.
CAPABILITIES: Final = 0x00
"""8 bytes."""
DDTP: Final = 0x10
"""8 bytes."""
CQB: Final = 0x18
"""8 bytes."""
CQH: Final = 0x20
CQT: Final = 0x24
FQB: Final = 0x28
"""8 bytes."""
FQH: Final = 0x30
FQT: Final = 0x34
CQCSR: Final = 0x48
FQCSR: Final = 0x4C

DDTP_BUSY: Final = 1 << 4
QUEUE_ENABLE: Final = 1
"""In cqcsr and fqcsr, as the others below."""
QUEUE_ON: Final = 1 << 16
QUEUE_BUSY: Final = 1 << 17
QUEUE_MEMORY_FAULT: Final = 1 << 8
FAULTS_LOST: Final = 1 << 9
"""fqof: the fault queue was full. Nothing more is recorded until software clears it (3.2)."""
COMMAND_ILLEGAL: Final = 1 << 10

OFF: Final = 0
"""Mode of the device directory (5.5): no access is let through."""
BARE: Final = 1
"""Addresses go through as they are."""
ONE_LEVEL: Final = 2
TWO_LEVELS: Final = 3

COMMAND_SIZE: Final = 16
RECORD_SIZE: Final = 32
_PPN: Final = (1 << 44) - 1


@dataclass(frozen=True, slots=True)
class Paging:
    """A format of page tables of 4 KiB pages: ``stage`` 1 or 2, ``levels`` 3 or 4, and its number in a context."""

    name: str
    stage: int
    levels: int
    mode: int

    @property
    def root_bits(self) -> int:
        """Address bits that index the root: the second stage has a root of 16 KiB, four times as large."""
        return 9 if self.stage == 1 else 11

    @property
    def root_size(self) -> int:
        """Bytes of the root table, which is aligned to as many."""
        return 8 << self.root_bits

    @property
    def end(self) -> int:
        """Where its addresses end. The upper half of stage 1 is sign-extended, and left alone."""
        bits = 12 + 9 * (self.levels - 1) + self.root_bits
        return 1 << (bits - 1 if self.stage == 1 else bits)

    def index(self, iova: int, level: int) -> int:
        """Which entry of a table of ``level`` (0 is the leaf's) translates ``iova``."""
        bits = self.root_bits if level == self.levels - 1 else 9
        return iova >> 12 + 9 * level & (1 << bits) - 1


SV39: Final = Paging("sv39", stage=1, levels=3, mode=8)
SV48: Final = Paging("sv48", stage=1, levels=4, mode=9)
SV39X4: Final = Paging("sv39x4", stage=2, levels=3, mode=8)
PAGINGS: Final = {paging.name: paging for paging in (SV39, SV48, SV39X4)}
_CAPABILITY: Final = {"sv39": 9, "sv48": 10, "sv39x4": 17}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the capabilities register (5.3) says that matters here."""

    version: int
    pagings: frozenset[str]
    """The names of the formats that it has, among those known here."""
    context_size: int
    """Bytes of a device context: 64 with MSI page tables (MSI_FLAT), else 32."""

    @classmethod
    def unpack(cls, word: int) -> Capabilities:
        """From the 64-bit register."""
        return cls(
            version=word & 0xFF,
            pagings=frozenset(name for name, bit in _CAPABILITY.items() if word >> bit & 1),
            context_size=64 if word >> 22 & 1 else 32,
        )

    @property
    def leaf_bits(self) -> int:
        """Bits of a device id that one page of contexts is indexed by: 6 or 7."""
        return 6 if self.context_size == 64 else 7


def ppn(address: int) -> int:
    """The page number of ``address`` where registers, directory and page tables have it: from bit 10 on."""
    return (address >> 12 & _PPN) << 10


def ddtp(mode: int, root: int = 0) -> int:
    """The device directory's register: ``mode``, and the page of its root."""
    return ppn(root) | mode


def queue_base(address: int, bits: int) -> int:
    """cqb or fqb: a queue of 2**bits entries."""
    return ppn(address) | bits - 1


# -- device directory ----------------------------------------------------------------------------------------------


def directory_entry(page: int) -> bytes:
    """8 bytes of a directory of two levels: ``page`` holds the contexts."""
    return struct.pack("<Q", ppn(page) | 1)


def context(root: int, paging: Paging, size: int, ident: int = 1) -> bytes:
    """A device context of ``size`` bytes: translate by the one stage of ``paging``, through the tables at ``root``.

    ``ident`` tags what is cached: PSCID at the first stage, GSCID at the second. Faults are recorded (DTF 0).
    """
    table = paging.mode << 60 | root >> 12
    words = (1, table | ident << 44, 0, 0) if paging.stage == 2 else (1, 0, ident << 12, table)
    return struct.pack("<4Q", *words).ljust(size, b"\0")


# -- page tables, 8 bytes an entry ---------------------------------------------------------------------------------

_VALID: Final = 1
_READ: Final = 1 << 1
_WRITE: Final = 1 << 2
_USER: Final = 1 << 4
_ACCESSED: Final = 1 << 6
_DIRTY: Final = 1 << 7
NO_ENTRY: Final = bytes(8)


def table_entry(table: int) -> bytes:
    """Points to the table of the next level: none of R, W and X."""
    return struct.pack("<Q", ppn(table) | _VALID)


def page_entry(page: int, *, writable: bool) -> bytes:
    """A 4 KiB page, of either stage. W without R is reserved, so that all pages can be read.

    User pages, as a device's accesses without a process are (2.3); accessed and dirty, so that nobody has to note it.
    """
    flags = _VALID | _READ | _USER | _ACCESSED | (_WRITE | _DIRTY if writable else 0)
    return struct.pack("<Q", ppn(page) | flags)


# -- commands ------------------------------------------------------------------------------------------------------


def iotinval_vma() -> bytes:
    """IOTINVAL.VMA: forget every cached translation of the first stage (3.1.1, GV, AV and PSCV 0)."""
    return struct.pack("<QQ", 0x1, 0)


def iotinval_gvma() -> bytes:
    """IOTINVAL.GVMA: forget every cached translation of the second stage."""
    return struct.pack("<QQ", 0x1 | 1 << 7, 0)


def iodir_inval() -> bytes:
    """IODIR.INVAL_DDT: forget every cached device context (3.1.3)."""
    return struct.pack("<QQ", 0x3, 0)


def iofence() -> bytes:
    """IOFENCE.C: done when everything before it is, reads and writes of devices included (3.1.2, PR and PW)."""
    return struct.pack("<QQ", 0x2 | 1 << 12 | 1 << 13, 0)


# -- fault records -------------------------------------------------------------------------------------------------

CAUSES: Final[dict[int, str]] = {
    5: "read access fault",
    7: "write access fault",
    13: "read page fault",
    15: "write page fault",
    21: "read guest page fault",
    23: "write guest page fault",
    256: "all accesses disallowed",
    257: "device directory unreachable",
    258: "device context not valid",
    259: "device context misconfigured",
    260: "transaction type disallowed",
    261: "MSI page table unreachable",
    262: "MSI page table entry not valid",
    263: "MSI page table entry misconfigured",
    272: "internal data path error",
    273: "IOMMU's own MSI could not be written",
}
_READS: Final = frozenset({1, 5, 12, 13, 20, 21})
_WRITES: Final = frozenset({7, 15, 23})
_TYPE_READS: Final = frozenset({1, 2, 5, 6})
_TYPE_WRITES: Final = frozenset({3, 7})


@dataclass(frozen=True, slots=True)
class Record:
    """A fault record (3.2), decoded."""

    cause: int
    transaction: int
    """TTYP: 2 read, 3 write, both untranslated; 0 if no access was the cause."""
    device: int
    address: int
    """iotval: the IOVA; 0 where there is none."""

    @classmethod
    def unpack(cls, record: bytes) -> Record:
        """From 32 bytes."""
        word, _, address, _ = struct.unpack("<4Q", record)
        return cls(cause=word & 0xFFF, transaction=word >> 34 & 0x3F, device=word >> 40, address=address)

    @property
    def write(self) -> bool | None:
        """Was it a write? What the cause says goes before what the transaction's type says: QEMU gives the type of a
        write to every page fault. None if neither says."""
        if self.cause in _READS | _WRITES:
            return self.cause in _WRITES
        if self.transaction in _TYPE_READS | _TYPE_WRITES:
            return self.transaction in _TYPE_WRITES
        return None

    @property
    def text(self) -> str:
        """The fault in words, with its number."""
        return f"{CAUSES.get(self.cause, 'fault')} (RISC-V IOMMU cause {self.cause})"
