# SPDX-License-Identifier: Apache-2.0
"""RAM that notes in a dirty log what was written to it, for a front end that migrates its guest.

The log has one bit for each 4 KiB page of guest-physical memory, whatever addresses the rings hold. As
every write ends up at a guest-physical address here, nothing that a device writes can be forgotten.
"""

from __future__ import annotations

import mmap
import os
import stat

from virtiova import _core
from virtiova.addr import GPA, PAGE_SIZE
from virtiova.dma.ram import ByteOrder
from virtiova.dma.regions import RegionRam
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user import LogDescription

MAX_LOG = 1 << 30
"""Bytes of the longest log that is mapped: for 32 TiB of memory."""


class DirtyLog:
    """A mapped log. It is shared with the front end, which clears it, and with other back ends, which add to it.

    A bit cannot be set alone from here without losing one that somebody else sets beside it; so all bits of
    a byte are set by one store, which marks up to seven pages too many, and never one too few.
    """

    def __init__(self, description: LogDescription, fd: int) -> None:
        size, offset = description.size, description.offset
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or not 0 < size <= MAX_LOG or offset + size > info.st_size:
            raise ProtocolError(f"a dirty log of 0x{size:x} bytes at 0x{offset:x} in a file of 0x{info.st_size:x}")
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            self._mapping = _core.Mapping(fd, offset - skip, skip + size, max(info.st_blksize, PAGE_SIZE))
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"cannot map the dirty log: {error}") from error
        self._map = self._mapping.view()
        self._skip = skip
        self._size = size

    def mark(self, gpa: int, length: int) -> None:
        """Note that ``length`` bytes at ``gpa`` were written. Pages beyond the end of the log are not in it."""
        step = PAGE_SIZE * 8
        for index in range(gpa // step, min((gpa + length - 1) // step + 1, self._size)):
            self._map[self._skip + index] = 0xFF

    def close(self) -> None:
        """Unmap it."""
        self._map.release()
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
