# SPDX-License-Identifier: Apache-2.0
"""ACPI tables that describe IOMMUs, as bytes: how many units each of them names. No I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from virtiova.errors import ProtocolError

HEADER: Final = 36
"""Bytes of the header that all tables begin with (ACPI 6.5, 5.2.6)."""
OEM: Final = slice(10, 16)
_RECORDS: Final = 4096


def oem(table: bytes) -> str:
    """Who made the table, as it says: six characters, often with spaces behind."""
    return table[OEM].decode("ascii", "replace").strip(" \0")


def units(name: str, table: bytes) -> int | None:
    """How many IOMMU units the table ``name`` describes; None if that is no table of IOMMUs.

    Raises `ProtocolError` if it is cut or does not add up.
    """
    count = _COUNTERS.get(name)
    if count is None:
        return None
    if len(table) < HEADER or table[:4] != name.encode():
        raise ProtocolError(f"{len(table)} bytes are no table {name}")
    (length,) = struct.unpack_from("<I", table, 4)
    if not HEADER <= length <= len(table):
        raise ProtocolError(f"{name} is said to have {length} bytes, of which {len(table)} are there")
    return count(table[:length])


def _records(table: bytes, at: int, form: str, *, limit: int = _RECORDS) -> Iterator[tuple[int, int]]:
    """Type and offset of each record; ``form`` is how type and length begin it. Every one has to be inside."""
    head = struct.calcsize(form)
    for _ in range(limit):
        if at == len(table):
            return
        if at + head > len(table):
            raise ProtocolError(f"{table[:4]!r}: a record is cut at 0x{at:x}")
        kind, length = struct.unpack_from(form, table, at)
        if length < head or at + length > len(table):
            raise ProtocolError(f"{table[:4]!r}: a record of {length} bytes at 0x{at:x}, in a table of {len(table)}")
        yield kind, at
        at += length
    raise ProtocolError(f"{table[:4]!r}: more than {limit} records")


def _dmar(table: bytes) -> int:
    """Remapping hardware units, structure type 0 (Intel VT-d specification, 8.3)."""
    return sum(kind == 0 for kind, _ in _records(table, 48, "<HH"))


def _ivrs(table: bytes) -> int:
    """IOMMUs by their device id: one may be described by blocks of types 10h, 11h and 40h (AMD I/O virtualization
    specification, 5.2.2)."""
    found = set()
    for kind, at in _records(table, 48, "<BxH"):
        if kind in (0x10, 0x11, 0x40) and at + 6 <= len(table):
            found.add(table[at + 4 : at + 6])
    return len(found)


def _iort(table: bytes) -> int:
    """Nodes of type 3 (SMMU) and 4 (SMMUv3) (Arm DEN 0049, 3)."""
    return _nodes(table, "<BH", frozenset({3, 4}), counted_32=True)


def _viot(table: bytes) -> int:
    """Nodes of type 3 (virtio-iommu on PCI) and 4 (on mmio) (ACPI 6.5, 5.2.33)."""
    return _nodes(table, "<BxH", frozenset({3, 4}), counted_32=False)


def _rimt(table: bytes) -> int:
    """Nodes of type 0 (RISC-V I/O Mapping Table, 2)."""
    return _nodes(table, "<BxH", frozenset({0}), counted_32=True)


def _nodes(table: bytes, form: str, wanted: frozenset[int], *, counted_32: bool) -> int:
    """Tables that say how many nodes they have, and where the first one begins."""
    if len(table) < HEADER + 8:
        raise ProtocolError(f"{table[:4]!r} of {len(table)} bytes has no nodes")
    count, start = struct.unpack_from("<II" if counted_32 else "<HH", table, HEADER)
    if not HEADER <= start <= len(table):
        raise ProtocolError(f"{table[:4]!r}: the nodes begin at 0x{start:x}, in a table of {len(table)} bytes")
    found = 0
    for number, (kind, _) in enumerate(_records(table, start, form)):
        if number >= count:
            break
        found += kind in wanted
    return found


_COUNTERS: Final[dict[str, Callable[[bytes], int]]] = {
    "DMAR": _dmar,
    "IVRS": _ivrs,
    "IORT": _iort,
    "VIOT": _viot,
    "RIMT": _rimt,
}
TABLES: Final = tuple(_COUNTERS)
"""The tables that describe IOMMUs."""
