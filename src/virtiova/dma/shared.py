# SPDX-License-Identifier: Apache-2.0
"""Files of memory that somebody else hands over, mapped so that whoever shortens them later does not end us."""

from __future__ import annotations

import mmap
import os
import stat

from virtiova import _core
from virtiova.errors import ProtocolError


def map_shared(fd: int, offset: int, size: int, what: str) -> tuple[_core.Mapping, _core.Window]:
    """``size`` bytes at ``offset`` (a multiple of 8) of the file ``fd``, to read and write; ``fd`` stays the caller's.

    Release the window, then close the mapping. Raises `ProtocolError`, which begins with ``what``, for a descriptor
    that is no file of memory, a file that is too short, or one that may not be written.
    """
    # Files of huge pages are mapped by huge pages: such a file names its page as its block size.
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise ProtocolError(f"{what}: its descriptor is not open") from error
    if not stat.S_ISREG(info.st_mode):
        raise ProtocolError(f"{what}: its descriptor is no file of memory")
    if offset % 8 or size <= 0 or offset + size > info.st_size:
        raise ProtocolError(f"{what}: 0x{size:x} bytes at 0x{offset:x} of 0x{info.st_size:x} in its file")
    step = max(info.st_blksize, mmap.ALLOCATIONGRANULARITY)
    start = offset - offset % step
    stop = min(-(-(offset + size) // step) * step, info.st_size)
    try:
        mapping = _core.Mapping(fd, start, stop - start, step)
    except (OSError, OverflowError) as error:
        raise ProtocolError(f"{what}: cannot map its file for reading and writing: {error}") from error
    return mapping, mapping.window(offset - start, size)
