# SPDX-License-Identifier: Apache-2.0
"""Address kinds are types: mixing a GPA with an IOVA is a type error that costs nothing at run time."""

from __future__ import annotations

import enum
from typing import Final, NewType

GPA = NewType("GPA", int)
"""Guest-physical address: where a byte lives in the machine's RAM."""

IOVA = NewType("IOVA", int)
"""I/O virtual address: what a platform's IOMMU translates."""

UVA = NewType("UVA", int)
"""A vhost-user front end's own virtual address."""

DmaAddr = NewType("DmaAddr", int)
"""An address as a driver puts it into a ring. What it means is an `AddressKind`, decided by policy."""

PAGE_SIZE: Final = 4096
PAGE_MASK: Final = PAGE_SIZE - 1


class AddressKind(enum.StrEnum):
    """The kind of address that a driver put in the ring. The set is open."""

    GPA = "gpa"
    IOVA = "iova"
    MACHINE = "machine"
    OTHER = "other"
    UNKNOWN = "unknown"


class Access(enum.Flag):
    """What a device may do to memory, from the device's point of view."""

    NONE = 0
    READ = 1
    WRITE = 2
    RW = READ | WRITE


def page_of(address: int) -> int:
    """The address of the 4 KiB page that holds ``address``."""
    return address & ~PAGE_MASK


def pages_spanned(address: int, length: int) -> int:
    """How many 4 KiB pages ``length`` bytes at ``address`` touch (0 for no bytes)."""
    if length <= 0:
        return 0
    return (page_of(address + length - 1) - page_of(address)) // PAGE_SIZE + 1


def hexaddr(address: int) -> str:
    """An address as this project prints it: at least eight hex digits."""
    return f"0x{address:08x}"
