# SPDX-License-Identifier: Apache-2.0
"""What the IOMMU behind a container can map: its pages, and which IOVAs. The window of the interrupt messages is none
of them, nor what firmware keeps for itself."""

from __future__ import annotations

from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.errors import MachineError, NotPossibleError
from virtiova.machine.vfio.calls import call
from virtiova.wire import vfio

_ROOM: Final = 4096
_MOST: Final = 1 << 20
_MESSAGES: Final = (0xFEE00000, 0xFEEFFFFF)
"""Where an x86 processor takes interrupt messages: never to be mapped, whether the kernel says so or not."""
_UNTOLD: Final = [(0, _MESSAGES[0] - 1), (_MESSAGES[1] + 1, (1 << 39) - 1)]
"""Where the kernel names no ranges: what the smallest of these IOMMUs has."""


class Limits:
    """The IOVAs that may be mapped. Raises `NotPossibleError` for an IOMMU without pages of 4 KiB."""

    def __init__(self, container: int) -> None:
        info = _info(container)
        if not vfio.page_sizes(info) & PAGE_SIZE:
            raise NotPossibleError(
                f"this IOMMU maps no pages of {PAGE_SIZE} bytes (sizes 0x{vfio.page_sizes(info):x}), which the "
                "experiments are made of"
            )
        self.ranges = sorted(vfio.iova_ranges(info)) or list(_UNTOLD)
        """First and last address of each."""

    def holds(self, start: int, size: int) -> bool:
        """Does all of it lie in one range?"""
        return any(first <= start and start + size - 1 <= last for first, last in self.ranges)

    def place(self, start: int, size: int) -> int | None:
        """The first page from ``start`` on, whence ``size`` bytes may be mapped; None if there is none."""
        for first, last in self.ranges:
            at = -(-max(first, start) // PAGE_SIZE) * PAGE_SIZE
            if at + size - 1 <= last:
                return at
        return None

    def words(self) -> str:
        """The ranges, as they are said to a user."""
        return ", ".join(f"0x{first:x}-0x{last:x}" for first, last in self.ranges[:8])


def _info(container: int) -> bytearray:
    """What the kernel says of the IOMMU, in as much room as that takes."""
    room = _ROOM
    while room <= _MOST:
        info = vfio.iommu_info(room)
        call(container, "VFIO_IOMMU_GET_INFO", vfio.IOMMU_GET_INFO, info)
        wanted = vfio.info_size(info)
        if wanted <= room:
            return info
        room = wanted
    raise MachineError(f"VFIO wants {room} bytes to say what the IOMMU can")
