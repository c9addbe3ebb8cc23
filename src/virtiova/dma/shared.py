# SPDX-License-Identifier: Apache-2.0
"""Files of memory that somebody else hands over, mapped so that whoever shortens them later does not end us."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from typing import Final

from virtiova import _core
from virtiova.addr import Access
from virtiova.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a file of memory is handed over."""

    access: Access = Access.RW
    """Without WRITE nothing is written there. (What may be written can be read, as processors have it.)"""
    kernels: bool = False
    """It may be memory of the kernel's own: a file of no type and no size, and it is the kernel who says how much."""


PLAIN: Final = Terms()
_HOW: Final = {False: "for reading", True: "for reading and writing"}


def map_shared(fd: int, offset: int, size: int, what: str, terms: Terms = PLAIN) -> tuple[_core.Mapping, _core.Window]:
    """``size`` bytes at ``offset`` (a multiple of 8) of the file ``fd``, on ``terms``; ``fd`` stays the caller's.

    Release the window, then close the mapping. Raises `ProtocolError`, which begins with ``what``, for a descriptor
    that is no file of memory, a file that is too short, or one that may not be written.
    """
    # Files of huge pages are mapped by huge pages: such a file names its page as its block size.
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise ProtocolError(f"{what}: its descriptor is not open") from error
    endless = terms.kernels and not stat.S_IFMT(info.st_mode)
    if not (stat.S_ISREG(info.st_mode) or endless):
        raise ProtocolError(f"{what}: its descriptor is no file of memory")
    if offset % 8 or size <= 0 or (offset + size > info.st_size and not endless):
        raise ProtocolError(f"{what}: 0x{size:x} bytes at 0x{offset:x} of 0x{info.st_size:x} in its file")
    step = mmap.ALLOCATIONGRANULARITY if endless else max(info.st_blksize, mmap.ALLOCATIONGRANULARITY)
    start = offset - offset % step
    stop = -(-(offset + size) // step) * step
    if not endless:
        stop = min(stop, info.st_size)
    try:
        mapping = _core.Mapping(fd, start, stop - start, step, writable=Access.WRITE in terms.access)
    except (OSError, OverflowError) as error:
        raise ProtocolError(f"{what}: cannot map its file {_HOW[Access.WRITE in terms.access]}: {error}") from error
    return mapping, mapping.window(offset - start, size)
