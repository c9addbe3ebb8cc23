# SPDX-License-Identifier: Apache-2.0
"""A software IOMMU for the in-process machine. A fake that hurts: what real hardware forgives, it does not.

* An IOVA is never equal to an address of RAM, so an untranslated address cannot work by luck.
* A removed mapping poisons its page, so a stale use reads 0xDB and not what it hoped for.
* There is a gap behind every allocation, so the byte past the end faults.
* It caches like hardware does: a mapping that the device used stays usable until `SoftIommu.invalidate`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.space import BlockRam, Miss, Span, flat_spans
from virtiova.errors import AccessError
from virtiova.ports import Fault

POISON: Final = 0xDB
"""The byte that fills a page whose mapping was removed."""

MAX_FAULTS: Final = 256
"""Fault records kept between two calls of `SoftIommu.faults`; what comes later is counted and lost."""

_END: Final = 1 << 64
_FIRST_IOVA: Final = 1 << 36
_GUARD: Final = 16 * PAGE_SIZE


class Reason(enum.IntEnum):
    """Why an access was refused, as it stands in a fault record."""

    NOT_MAPPED = 1
    NOT_READABLE = 2
    NOT_WRITABLE = 3

    @property
    def text(self) -> str:
        """In words."""
        return self.name.lower().replace("_", " ")


class _Entry(NamedTuple):
    gpa: GPA
    allowed: int
    """The value of an `Access`: a test of plain numbers, as this is done for every access."""


class SoftIommu:
    """Tables and a device-side cache (IOTLB) for one device. Starts disabled, as hardware does.

    ``source`` is the requester id in fault records (bus << 8 | devfn). The raw words of a fault are
    the address, and ``source << 16 | write << 8 | reason`` (see `Reason`).

    As in hardware, only translations that were used are cached, and a miss never is: new mappings
    and wider permissions take effect at once, removed, moved or narrowed ones on `invalidate`.
    """

    name = "soft"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = True
    shared = False
    own_bit33 = None

    def __init__(self, ram: BlockRam, *, source: int = 0x0008) -> None:
        self._ram = ram
        self._source = source
        self._enabled = False
        self._table: dict[int, _Entry] = {}
        self._iotlb: dict[int, _Entry] = {}
        self._faults: list[Fault] = []
        self.lost_faults = 0
        """Faults that found no room in the list, since the machine was started."""
        end = max((block.gpa + block.size for block in ram.blocks), default=0)
        self._next = max(_FIRST_IOVA, 1 << (end.bit_length() + 1))

    # -- the platform's side

    def enable(self) -> None:
        """Start to translate, with whatever is mapped and nothing cached."""
        self._iotlb.clear()
        self._enabled = True

    def disable(self) -> None:
        """Stop to translate: addresses go through as they are."""
        self._enabled = False

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Point ``size`` bytes at ``iova`` to RAM at ``gpa``; an existing mapping there is replaced.

        A replaced mapping is not poisoned, and may be seen by the device until `invalidate`. Raises
        `AccessError`, with nothing changed, for zero or unaligned numbers, a range that wraps, or no RAM.
        """
        self._check(iova, size)
        if gpa & PAGE_MASK:
            raise AccessError(gpa, size, f"RAM address is not a multiple of {PAGE_SIZE}")
        missing = flat_spans(self._ram, gpa, size, access)
        if isinstance(missing, Miss):
            raise AccessError(missing.address, missing.length, f"cannot map 0x{iova:x} there: no RAM")
        for offset in range(0, size, PAGE_SIZE):
            self._table[iova + offset] = _Entry(GPA(gpa + offset), access.value)

    def unmap(self, iova: IOVA, size: int) -> None:
        """Take a range out of the tables and poison the RAM page behind every mapping in it.

        The page is filled with 0xDB at once, also if another IOVA still points there: whoever wants to
        paint it (canaries) does so after this call. Holes in the range are fine. The device may use
        what it has cached until `invalidate`. Raises `AccessError` as `map` does.
        """
        self._check(iova, size)
        for page in range(iova, iova + size, PAGE_SIZE):
            entry = self._table.pop(page, None)
            if entry is not None:
                self._ram.write(entry.gpa, bytes((POISON,)) * PAGE_SIZE)

    def invalidate(self) -> None:
        """Empty the cache: from here on only the tables count."""
        self._iotlb.clear()

    def faults(self) -> list[Fault]:
        """The fault records since the last call, oldest first, at most `MAX_FAULTS`; reading clears them."""
        faults, self._faults = self._faults, []
        return faults

    def allocate(self, size: int) -> IOVA:
        """An unused range of ``size`` bytes (whole pages), far above RAM, with a gap behind it."""
        self._check(self._next, size)
        iova = IOVA(self._next)
        self._next += size + _GUARD
        return iova

    def _check(self, iova: int, size: int) -> None:
        if size <= 0 or size & PAGE_MASK or iova & PAGE_MASK:
            raise AccessError(iova, size, f"wanted a multiple of {PAGE_SIZE} bytes, at such an address")
        if not 0 <= iova <= _END - size:
            raise AccessError(iova, size, "the range wraps around the end of the 64-bit address space")

    # -- the device's side

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """What the device reaches with ``length`` bytes at ``address``: one span a page, or the first miss.

        Records a fault for a miss. While disabled, addresses go through and nothing is recorded: an
        address without RAM is then no matter of the IOMMU. Implements ``Translator``.
        """
        if not self._enabled:
            return flat_spans(self._ram, address, length, access)
        offset = address & PAGE_MASK
        if 0 < length <= PAGE_SIZE - offset:
            # Nearly all accesses: within one page, used before.
            entry = self._iotlb.get(address - offset)
            if entry is not None and access.value & ~entry.allowed == 0:
                return (Span(GPA(entry.gpa + offset), length),)
        spans: list[Span] = []
        end = address + length
        while address < end:
            offset = address & PAGE_MASK
            step = min(end - address, PAGE_SIZE - offset)
            found = self._walk(address - offset, access)
            if isinstance(found, Reason):
                self._fault(address, access, found)
                return Miss(address, end - address, access, f"{found.text} in the soft IOMMU")
            spans.append(Span(GPA(found + offset), step))
            address += step
        return spans

    def _walk(self, page: int, access: Access) -> GPA | Reason:
        entry = self._iotlb.get(page)
        # A cached entry without the permission is looked up again, as hardware does: widening needs no flush.
        if entry is None or access.value & ~entry.allowed:
            entry = self._table.get(page)
            if entry is None:
                return Reason.NOT_MAPPED
            lacking = access.value & ~entry.allowed
            if lacking:
                return Reason.NOT_WRITABLE if lacking & Access.WRITE.value else Reason.NOT_READABLE
            self._iotlb[page] = entry
        return entry.gpa

    def _fault(self, address: int, access: Access, reason: Reason) -> None:
        if len(self._faults) >= MAX_FAULTS:
            self.lost_faults += 1
            return
        write = Access.WRITE in access
        raw = (address, self._source << 16 | write << 8 | reason)
        self._faults.append(Fault(address, write, self._source, reason.text, raw))
