# SPDX-License-Identifier: Apache-2.0
"""What a vhost front end has answered so far: IOVAs to RAM, with permission (the device IOTLB).

The back end asks for what it misses, the front end answers with updates, and takes back with
invalidations (vhost-user protocol, "IOMMU support"). A new answer replaces what it overlaps, whether
it allows more or less; nothing is ever joined by being adjacent in IOVAs.

The intervals are the authority. `Iotlb.radix`, the native table that `CachedSpace` accesses memory
through, only remembers what they said: it can be emptied at any time, and loses what they lose. An answer goes into
both at once, as far as `EAGER` leaves go, so that who looks at the native table alone finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from virtiova import _core
from virtiova.addr import GPA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.intervals import Interval, IntervalMap
from virtiova.dma.space import MAX_ACCESS, Miss, Span
from virtiova.errors import AccessError, ProtocolError

MAX_MAPPINGS: Final = 1 << 17
"""Answers kept. One more, and all are forgotten, to be asked for again: a front end may not fill our memory."""

EAGER: Final = 512
"""Leaves of the native table that one answer is entered in at once, as a rule. The others come when they are used."""

_END: Final = 1 << 64


class UserMemory(Protocol):
    """Memory that knows its front end's user addresses, as ``RegionRam`` does."""

    def gpa_of(self, uva: UVA, length: int) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at ``uva``, in order; or the first part that is missing."""

    def window_of(self, gpa: GPA, length: int) -> tuple[_core.Window, int]:
        """The window that holds all of the bytes, and the offset of the first one in it. `AccessError` if none."""

    @property
    def homes(self) -> tuple[tuple[int, int, int, _core.Window], ...]:
        """Regions by user address: that, bytes, GPA, window. Another object as soon as there are other regions."""

    def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` whenever memory goes, while it is still there."""


class Iotlb:
    """A table of a front end's answers. Implements ``Translator``. Forgets all when some of ``memory`` goes.

    ``eager``: how many leaves of the native table one answer is entered in at once.
    """

    def __init__(self, memory: UserMemory, eager: int = EAGER) -> None:
        self._memory = memory
        self._eager = eager
        self._map = IntervalMap()
        self.radix: Final = _core.Radix(MAX_ACCESS)
        """Where `lookup` led, as host addresses."""
        memory.watch(self.flush)
        self._answers = _core.Answers(self.radix, self._map, Interval, eager)
        self._homes: object = None
        self.misses = 0
        """Look-ups that found no mapping, or not the permission, so far."""
        self.updates = 0
        """Answers taken so far."""
        self.invalidates = 0
        """Invalidations so far."""
        self.flushes = 0
        """How often all was forgotten so far."""

    def __len__(self) -> int:
        return len(self._map)

    # -- the front end's side

    def update(self, iova: int, size: int, uva: UVA, access: Access) -> None:
        """Map ``size`` bytes at ``iova`` to the front end's ``uva``, in place of what was there.

        No access at all (``Access.NONE``) leaves nothing there. Raises `ProtocolError` if there are no
        bytes or they wrap, with nothing changed; `AccessError` if they are not in the memory table: then
        what was at ``iova`` is gone, as the front end's answer for it is another one now.
        """
        self._check(iova, size)
        self.updates += 1
        spans = self._memory.gpa_of(uva, size)
        if isinstance(spans, Miss):
            self._cut(iova, iova + size)
            raise AccessError(spans.address, spans.length, f"IOTLB update of 0x{iova:x}: {spans.reason}")
        self.map(iova, spans, access)

    def map(self, iova: int, spans: Sequence[Span], access: Access) -> None:
        """Map the bytes of ``spans``, in order, at ``iova``, in place of what was there. Raises as `update`."""
        size = sum(span.length for span in spans)
        self._check(iova, size)
        self._cut(iova, iova + size)
        if access is Access.NONE:
            return
        if len(self._map) + len(spans) > MAX_MAPPINGS:
            self.flush()
        for span in spans:
            end = iova + span.length
            self._map.put(Interval(iova, end, span.gpa, access.value))
            try:
                window, offset = self._memory.window_of(span.gpa, span.length)
            except AccessError:
                pass
            else:
                self.radix.fill_all(iova, end - 1, window, offset, access.value, self._eager)
            iova = end

    def invalidate(self, iova: int, size: int) -> int:
        """Forget ``size`` bytes at ``iova``, and say how many mappings that touched.

        Never refused: what would go past the end of 2**64 starts again at 0, and a size of 0, which is what
        2**64 looks like in 64 bits, means all. Too much forgotten costs a miss, too little a stale access.
        """
        self.invalidates += 1
        if size <= 0 or size >= _END:
            count = len(self._map)
            self._cut(0, _END)
            return count
        end = iova + size
        count = self._cut(iova, min(end, _END))
        return count + self._cut(0, end - _END) if end > _END else count

    def take(self, messages: bytes | bytearray | memoryview) -> tuple[int, int, int, int]:
        """Do what the leading vhost-user messages of a run say that are plain updates and invalidations.

        The same as `update` and `invalidate` by turns, in a hundredth of the time. The first message that is anything
        else, or that these would refuse, ends it with nothing of it done. Returns how many messages that were; how many
        of them updates; how many invalidations; and how many want an acknowledgement.
        """
        came = self.answers().take(messages, MAX_MAPPINGS)
        self.took(came[1], came[2])
        return came

    def answers(self) -> _core.Answers:
        """Who does what `take` does, for as long as the memory stays as it is. What was done, `took` is to be told."""
        if self._homes is not self._memory.homes:
            self._homes = self._memory.homes
            self._answers.memory(self._memory.homes)
        return self._answers

    def took(self, updates: int, invalidates: int) -> None:
        """So much was done by `answers`."""
        self.updates += updates
        self.invalidates += invalidates

    def flush(self) -> None:
        """Forget all: features, memory table or ring have changed."""
        self.flushes += 1
        self._map.clear()
        self.radix.clear()

    def _cut(self, start: int, end: int) -> int:
        """Forget from ``start`` up to ``end``, in both tables."""
        if start < end:
            self.radix.drop(start, end - 1)
        return self._map.cut(start, end)

    @staticmethod
    def _check(iova: int, size: int) -> None:
        if size <= 0 or not 0 <= iova <= _END - size:
            raise ProtocolError(f"IOTLB update of 0x{size:x} bytes at 0x{iova:x}: none, or they wrap")

    # -- the device's side

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """The RAM behind ``length`` bytes at ``address``, one span a mapping; or the first part that is missing."""
        wanted = access.value
        found = self._map.find(address)
        if found is not None and address + length <= found.end and not wanted & ~found.allowed:
            # Nearly all accesses: within one mapping.
            return (Span(GPA(found.target + (address - found.start)), length),) if length else ()
        spans: list[Span] = []
        end = address + length
        while address < end:
            if found is None or wanted & ~found.allowed:
                self.misses += 1
                why = "no such mapping" if found is None else "not allowed by the mapping"
                return Miss(address, end - address, access, f"{why} in the IOTLB")
            step = min(end, found.end) - address
            spans.append(Span(GPA(found.target + (address - found.start)), step))
            address += step
            found = self._map.find(address)
        return spans

    def knows(self, address: int) -> bool:
        """Whether there is a mapping of the byte at ``address``, whatever it allows."""
        return self._map.find(address) is not None

    def missing(self, address: int, length: int, access: Access, limit: int) -> list[int]:
        """Pages (their addresses) of ``length`` bytes at ``address`` to ask the front end for, at most ``limit``.

        They are all counted as misses. To ask for all at once costs one wait; `lookup` names the first only.
        """
        pages: list[int] = []
        wanted = access.value
        if self.radix.covers(address, length, wanted):
            return pages
        end = min(address + length, _END)
        while address < end and len(pages) < limit:
            found = self._map.find(address)
            if found is not None and not wanted & ~found.allowed:
                address = found.end
                continue
            page = address & ~PAGE_MASK
            pages.append(page)
            address = page + PAGE_SIZE
        self.misses += len(pages)
        return pages

    def remember(self, address: int, length: int) -> None:
        """Put what the intervals say of ``length`` bytes at ``address`` into the native table."""
        end = address + length
        while address < end:
            found = self._map.find(address)
            if found is None:
                return
            try:
                window, offset = self._memory.window_of(GPA(found.target), found.end - found.start)
            except AccessError:
                return
            leaf = self.radix.fill(address, found.start, found.end - 1, window, offset, found.allowed)
            # Without a leaf (the page's beginning is not in it) the next one may begin at the next page.
            address = (address & -(leaf or PAGE_SIZE)) + (leaf or PAGE_SIZE)
