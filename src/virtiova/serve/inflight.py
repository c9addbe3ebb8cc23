# SPDX-License-Identifier: Apache-2.0
"""What a back end notes of the requests that it is at, in memory that outlives it (INFLIGHT_SHMFD, split rings).

The front end keeps the file. A back end that is started after one that died finds in it which requests
were taken and not given back, and does those first, in their order: none is lost. Those whose used index
had become visible are recognised by that index, and are not done again.

The layout and the order of the stores are those of QEMU's ``docs/interop/vhost-user.rst``, "Inflight I/O tracking", so
that another program may go on with what this one left, and the other way round. A process that is killed has done
a prefix of its stores: no fence is needed, only their order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from virtiova import _core
from virtiova.dma.shared import map_shared
from virtiova.errors import ProtocolError
from virtiova.serve import inflight_packed
from virtiova.serve.inflight_packed import PackedInflight
from virtiova.wire.vhost_user import InflightDescription

_HEADER: Final = struct.Struct("<QHHHH")
_ENTRY: Final = struct.Struct("<B5xHQ")
_VERSION: Final = 1
_ALIGN: Final = 64
_VERSION_AT: Final = 8
_LAST_HEAD: Final = 12
_USED_INDEX: Final = 14
"""Offsets in the header."""
_NEXT: Final = 6
_COUNTER: Final = 8
"""Offsets in an entry."""
_LAST: Final = (1 << 64) - 1


def ring_bytes(entries: int, *, packed: bool = False) -> int:
    """Bytes that one ring of ``entries`` has in the file."""
    header, entry = (inflight_packed.HEADER, inflight_packed.ENTRY) if packed else (_HEADER, _ENTRY)
    size = header.size + entries * entry.size
    return (size + _ALIGN - 1) & ~(_ALIGN - 1)


class InflightFile:
    """The file, mapped. Raises `ProtocolError` for one that is too small, or not a file of memory.

    ``packed``: of packed rings. ``fresh``: it was made a moment ago, and is all zero. Then one of split rings stays as
    sparse as it is: the largest has 128 MiB.
    """

    def __init__(self, description: InflightDescription, fd: int, *, packed: bool = False, fresh: bool = False) -> None:
        need = description.queues * ring_bytes(description.queue_size, packed=packed)
        self.packed = packed
        if description.mmap_size < need:
            raise ProtocolError(f"0x{description.mmap_size:x} bytes for what is in flight, wanted 0x{need:x}")
        self._mapping, self._window = map_shared(fd, description.mmap_offset, need, "what is in flight")
        self.queues = description.queues
        self.entries = description.queue_size
        self._fresh = fresh

    def ring(self, index: int) -> Inflight | PackedInflight:
        """The part for ring ``index``."""
        kind = PackedInflight if self.packed else Inflight
        start = index * ring_bytes(self.entries, packed=self.packed)
        return kind(self._window, start, self.entries, fresh=self._fresh)

    def close(self) -> None:
        """Unmap it."""
        self._window.release()
        self._mapping.close()

    @property
    def damaged(self) -> bool:
        """Whether its file was shortened under us: who comes after us does not see what is noted there now."""
        return self._mapping.faults > 0


class Inflight:
    """The part of the file for one ring. Nothing in it is believed beyond what it says of requests."""

    def __init__(self, memory: _core.Window, start: int, entries: int, *, fresh: bool = False) -> None:
        self._memory = memory
        self._start = start
        self.entries = entries
        """Heads that can be noted."""
        self.counter = 0
        """The number of the request that was noted last."""
        if fresh:
            self._begin_file()
            return
        _, version, number, _, _ = _HEADER.unpack(memory.read(start, _HEADER.size))
        if (version, number) != (_VERSION, entries):
            self._start_anew()
        self.counter = max((counter for _, _, counter in self._all()), default=0)

    @property
    def used_before(self) -> bool:
        """Whether requests were noted here, by whomever."""
        return self.counter > 0

    def lend(self, drain: _core.Drain) -> None:
        """Let ``drain`` note here what it takes. Whoever goes on after it sets `counter` to the drain's."""
        drain.note_in(self._memory, self._start, self.entries, self.counter)

    def begin(self, heads: Iterable[int]) -> None:
        """These requests are taken, to be given back together: noted before the device sees them. One that is noted
        already, by a back end that died, keeps its place."""
        memory = self._memory
        for head in heads:
            if head >= self.entries:
                continue
            at = self._at(head)
            # The list of the batch that will be given back next. It is looked at only if the used index has moved and
            # what is noted of it has not, so it may be made before the batch is done.
            memory.store16(at + _NEXT, self._load16(_LAST_HEAD))
            memory.store16(self._start + _LAST_HEAD, head)
            if memory.read(at, 1) != b"\1":
                # The highest that was found is the front end's to write.
                self.counter = (self.counter + 1) & _LAST
                memory.write(at + _COUNTER, self.counter.to_bytes(8, "little"))
                memory.write(at, b"\1")

    def end(self, heads: Iterable[int], used: int) -> None:
        """They are given back, the driver sees it, and its used index is ``used`` now."""
        for head in heads:
            if head < self.entries:
                self._memory.write(self._at(head), b"\0")
        self._memory.store16(self._start + _USED_INDEX, used)

    def unfinished(self, used: int) -> list[int]:
        """The requests that a back end before this one has taken and not given back, oldest first. ``used`` is the
        driver's used index as it is now."""
        given = (used - self._load16(_USED_INDEX)) & 0xFFFF
        if given:
            # It died between the used index and this note. May be repeated, should this die here as well.
            self.end(self._last_batch(given), used)
        found = [(counter, head) for head, (flag, _, counter) in enumerate(self._all()) if flag == 1]
        return [head for _, head in sorted(found)]

    def forget(self, used: int) -> None:
        """What is noted is of another driver's ring: none of it is unfinished."""
        self.end(range(self.entries), used)

    def _last_batch(self, length: int) -> Sequence[int]:
        heads: list[int] = []
        head = self._load16(_LAST_HEAD)
        while head < self.entries and len(heads) < min(length, self.entries):
            heads.append(head)
            head = self._memory.load16(self._at(head) + _NEXT)
        return heads

    def _start_anew(self) -> None:
        # The version last: a file that is only half empty when we die is emptied again.
        self._memory.store16(self._start + _VERSION_AT, 0)
        rest = ring_bytes(self.entries) - _HEADER.size
        self._memory.write(self._start + _HEADER.size, bytes(rest))
        self._begin_file()

    def _begin_file(self) -> None:
        self._memory.write(self._start, _HEADER.pack(0, 0, self.entries, 0, 0))
        self._memory.store16(self._start + _VERSION_AT, _VERSION)

    def _all(self) -> Iterable[tuple[int, int, int]]:
        """Flag, next and counter of each entry."""
        raw = self._memory.read(self._start + _HEADER.size, self.entries * _ENTRY.size)
        return _ENTRY.iter_unpack(raw)

    def _load16(self, offset: int) -> int:
        return self._memory.load16(self._start + offset)

    def _at(self, head: int) -> int:
        return self._start + _HEADER.size + head * _ENTRY.size
