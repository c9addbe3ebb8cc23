# SPDX-License-Identifier: Apache-2.0
"""RAM that notes in a dirty log what was written to it, for a front end that migrates its guest.

The log has one bit for each 4 KiB page of guest-physical memory, whatever addresses the rings hold. As
every write ends up at a guest-physical address here, nothing that a device writes can be forgotten.
"""

from __future__ import annotations

from virtiova.addr import GPA, PAGE_SIZE
from virtiova.dma.ram import ByteOrder
from virtiova.dma.regions import RegionRam
from virtiova.dma.shared import map_shared
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user import LogDescription

MAX_LOG = 1 << 30
"""Bytes of the longest log that is mapped: for 32 TiB of memory."""


class DirtyLog:
    """A mapped log. It is shared with the front end, which clears it, and with other back ends, which add to it: a
    bit is set by one access that leaves the others as they are. A log that is shortened costs its bits, not us."""

    def __init__(self, description: LogDescription, fd: int) -> None:
        size = description.size
        if not 0 < size <= MAX_LOG:
            raise ProtocolError(f"a dirty log of 0x{size:x} bytes, wanted 1 to 0x{MAX_LOG:x}")
        self._mapping, self._window = map_shared(fd, description.offset, size, "dirty log")
        self._pages = size * 8

    def mark(self, gpa: int, length: int) -> None:
        """Note that ``length`` bytes at ``gpa`` were written. Pages beyond the end of the log are not in it."""
        last = min((gpa + length - 1) // PAGE_SIZE, self._pages - 1)
        for page in range(gpa // PAGE_SIZE, last + 1):
            self._window.or8(page // 8, 1 << page % 8)

    def close(self) -> None:
        """Unmap it."""
        self._window.release()
        self._mapping.close()

    @property
    def damaged(self) -> bool:
        """Whether its file was shortened under us: nobody sees what is noted there now."""
        return self._mapping.faults > 0


class LoggedRam(RegionRam):
    """Regions of RAM, and a log of what is written as long as there is one in `log`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: DirtyLog | None = None

    def write(self, gpa: GPA, data: bytes) -> None:
        """Copy bytes in, then note it."""
        super().write(gpa, data)
        if self.log is not None and data:
            self.log.mark(gpa, len(data))

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 16-bit store, release; then note it."""
        super().store16(gpa, value, order)
        if self.log is not None:
            self.log.mark(gpa, 2)

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 32-bit store, release; then note it."""
        super().store32(gpa, value, order)
        if self.log is not None:
            self.log.mark(gpa, 4)
