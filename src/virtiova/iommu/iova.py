# SPDX-License-Identifier: Apache-2.0
"""The range of I/O virtual addresses that an IOMMU translates: checked, and handed out."""

from __future__ import annotations

from virtiova.addr import IOVA
from virtiova.errors import AccessError


class IovaRange:
    """IOVAs from ``first`` (where none equals an address of RAM) up to ``end``, in pages of ``page_size`` bytes.

    ``allocate`` goes upwards only: a range that was handed out is its owner's to use again.
    """

    def __init__(self, first: int, end: int, page_size: int) -> None:
        self._next = first
        self._end = end
        self._page_size = page_size

    def allocate(self, size: int) -> IOVA:
        """An unused range; `AccessError` if none is left."""
        iova = self._next
        # A page of nothing after each range: the byte past the end is never somebody else's.
        following = iova + -(-size // self._page_size) * self._page_size + self._page_size
        if following > self._end:
            raise AccessError(iova, size, "the IOMMU has no IOVAs left")
        self._next = following
        return IOVA(iova)

    def pages(self, iova: int, size: int) -> range:
        """Offsets of the pages of a range; `AccessError` if it is not one that the IOMMU translates."""
        if iova % self._page_size or size % self._page_size or size <= 0:
            raise AccessError(iova, size, f"not a range of {self._page_size >> 10} KiB pages")
        if iova < 0 or iova + size > self._end:
            raise AccessError(iova, size, f"beyond the IOMMU's address width, which ends at 0x{self._end:x}")
        return range(0, size, self._page_size)
