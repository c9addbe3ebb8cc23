# SPDX-License-Identifier: Apache-2.0
"""The IOMMU of a vhost-user front end: tables here, a cache in the back end, and messages in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.space import BlockRam, Miss, flat_spans
from virtiova.iommu.soft import Reason, SoftIommu
from virtiova.ports import Fault

EVERYTHING: Final = ((1 << 63, 1 << 63), (0, 1 << 63))
"""Base and size of the two messages that cover all addresses: a size of 2**64 does not fit its field."""


class IotlbServer(SoftIommu):
    """Tables like the software IOMMU's, whose cache (IOTLB) is the back end's.

    The back end asks (MISS, `resolve`) and is told (UPDATE); it may use what it was told until it has acknowledged
    that it was told otherwise (INVALIDATE, `invalidate`). Faults are the misses that the tables did not allow.
    ``tell`` is whoever can send an INVALIDATE for a base and a size, and returns once it is acknowledged.
    """

    name = "iotlb"

    def __init__(self, ram: BlockRam) -> None:
        super().__init__(ram)
        self.tell: Callable[[int, int], None] = lambda base, size: None
        self._told: set[int] = set()
        """Pages that the back end has been told of and may hold."""
        self._changed: set[int] = set()
        """Of these, those whose entry went away or changed after that: the ones that `invalidate` is about."""

    # -- the platform's side

    def enable(self) -> None:
        """Start to translate. What was told of the state before is taken back."""
        super().enable()
        self._forget_all()

    def disable(self) -> None:
        """Stop to translate: a MISS is answered with the address itself, as by a platform whose IOMMU is off."""
        super().disable()
        self._forget_all()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """As the software IOMMU's."""
        super().map(iova, gpa, size, access)
        self._changed.update(self._told.intersection(range(iova, iova + size, PAGE_SIZE)))

    def unmap(self, iova: IOVA, size: int) -> None:
        """As the software IOMMU's."""
        super().unmap(iova, size)
        self._changed.update(self._told.intersection(range(iova, iova + size, PAGE_SIZE)))

    def invalidate(self) -> None:
        """Take back what the back end was told and is no longer so, and wait until it has acknowledged that."""
        super().invalidate()
        stale = sorted(self._changed)
        self._changed.clear()
        self._told.difference_update(stale)
        for page in stale:
            self.tell(page, PAGE_SIZE)

    def _forget_all(self) -> None:
        self._changed.clear()
        if self._told:
            self._told.clear()
            for base, size in EVERYTHING:
                self.tell(base, size)

    # -- the back end's side

    def resolve(self, iova: int, access: Access) -> tuple[IOVA, GPA, Access] | None:
        """The page of ``iova``, where it is, and all that it allows; None, and a fault, if not ``access``."""
        page = iova & ~PAGE_MASK
        if not self._enabled:
            if isinstance(flat_spans(self._ram, page, PAGE_SIZE, access), Miss):
                return None
            found, allowed = GPA(page), Access.RW
        else:
            entry = self._table.get(page)
            lacking = access.value if entry is None else access.value & ~entry.allowed
            if entry is None or lacking:
                self._fault(iova, access, _reason(lacking, mapped=entry is not None))
                return None
            found, allowed = entry.gpa, Access(entry.allowed)
        self._told.add(page)
        return IOVA(page), found, allowed

    def failed(self, iova: int, access: Access) -> None:
        """The back end says that an access was not allowed (ACCESS_FAIL): a fault as well."""
        write = Access.WRITE in access
        self._faults.append(Fault(iova, write, self._source, "access fail, says the back end", (iova, access.value)))
        del self._faults[:-_KEPT]


_KEPT: Final = 256


def _reason(lacking: int, *, mapped: bool) -> Reason:
    if not mapped:
        return Reason.NOT_MAPPED
    return Reason.NOT_WRITABLE if lacking & Access.WRITE.value else Reason.NOT_READABLE
