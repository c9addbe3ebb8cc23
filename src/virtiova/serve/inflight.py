# SPDX-License-Identifier: Apache-2.0
"""What a back end notes of the requests that it is at, in memory that outlives it (INFLIGHT_SHMFD, split rings).

The front end keeps the file. A back end that is started after one that died finds in it which requests
were taken and not given back, and does those first, in their order: none is lost. One whose used index had
become visible is recognised by that index, and is not done again.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from virtiova import _core
from virtiova.addr import PAGE_SIZE
from virtiova.errors import ProtocolError
from virtiova.wire.vhost_user import InflightDescription

_HEADER: Final = struct.Struct("<QHHHH")
_ENTRY: Final = struct.Struct("<B5xHQ")
_VERSION: Final = 1
_ALIGN: Final = 64
_LAST_HEAD: Final = 12
_USED_INDEX: Final = 14


def ring_bytes(entries: int) -> int:
    """Bytes that one ring of ``entries`` has in the file."""
    size = _HEADER.size + entries * _ENTRY.size
    return (size + _ALIGN - 1) & ~(_ALIGN - 1)


class InflightFile:
    """The file, mapped. Raises `ProtocolError` for one that is too small, or not a file of memory."""

    def __init__(self, description: InflightDescription, fd: int) -> None:
        info = os.fstat(fd)
        need = description.queues * ring_bytes(description.queue_size)
        size, offset = description.mmap_size, description.mmap_offset
        if not stat.S_ISREG(info.st_mode) or size < need or offset + need > info.st_size:
            raise ProtocolError(f"0x{size:x} bytes at 0x{offset:x} for what is in flight, wanted 0x{need:x}")
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            self._mapping = _core.Mapping(fd, offset - skip, skip + need, max(info.st_blksize, PAGE_SIZE))
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"cannot map what is in flight: {error}") from error
        self._map = self._mapping.view()
        self._skip = skip
        self.queues = description.queues
        self.entries = description.queue_size

    def ring(self, index: int) -> Inflight:
        """The part for ring ``index``."""
        return Inflight(self._map, self._skip + index * ring_bytes(self.entries), self.entries)

    def close(self) -> None:
        """Unmap it."""
        self._map.release()
        self._mapping.close()

    @property
    def damaged(self) -> bool:
        """Whether its file was shortened under us: who comes after us does not see what is noted there now."""
        return self._mapping.faults > 0


class Inflight:
    """The part of the file for one ring."""

    def __init__(self, memory: memoryview, start: int, entries: int) -> None:
        self._map = memory
        self._start = start
        self._entries = entries
        _, version, _, _, _ = _HEADER.unpack_from(memory, start)
        if version != _VERSION:
            memory[start : start + ring_bytes(entries)] = bytes(ring_bytes(entries))
            struct.pack_into("<HH", memory, start + 8, _VERSION, entries)
        self._counter = max((counter for _, _, counter in self._all()), default=0)

    def _all(self) -> Iterable[tuple[int, int, int]]:
        for head in range(self._entries):
            flag, following, counter = _ENTRY.unpack_from(self._map, self._at(head))
            yield flag, following, counter

    def _at(self, head: int) -> int:
        return self._start + _HEADER.size + head * _ENTRY.size

    def begin(self, heads: Iterable[int]) -> None:
        """These requests are taken: noted before the device sees them."""
        for head in heads:
            if head >= self._entries:
                continue
            self._counter += 1
            struct.pack_into("<Q", self._map, self._at(head) + 8, self._counter)
            struct.pack_into("<H", self._map, self._start + _LAST_HEAD, head)
            self._map[self._at(head)] = 1

    def end(self, heads: Iterable[int], used: int) -> None:
        """They are given back, the driver sees it, and its used index is ``used`` now."""
        for head in heads:
            if head < self._entries:
                self._map[self._at(head)] = 0
        struct.pack_into("<H", self._map, self._start + _USED_INDEX, used)

    def unfinished(self, used: int) -> list[int]:
        """The requests that a back end before this one has taken and not given back, oldest first. ``used`` is the
        driver's used index as it is now."""
        (noted,) = struct.unpack_from("<H", self._map, self._start + _USED_INDEX)
        if noted != used:
            # It died between the used index and this note.
            (last,) = struct.unpack_from("<H", self._map, self._start + _LAST_HEAD)
            if last < self._entries:
                self._map[self._at(last)] = 0
            struct.pack_into("<H", self._map, self._start + _USED_INDEX, used)
        found = [(counter, head) for head, (flag, _, counter) in enumerate(self._all()) if flag == 1]
        return [head for _, head in sorted(found)]
