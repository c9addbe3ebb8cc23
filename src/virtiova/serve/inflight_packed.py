# SPDX-License-Identifier: Apache-2.0
"""What a back end notes of the requests that it is at, in memory that outlives it: for packed rings.

A used descriptor overwrites what the driver wrote, so that the requests themselves are kept here: copies of their
descriptors, in entries of a list of free ones. Two sets of numbers, the present and the old one, say whether the last
batch was seen by the driver when somebody died; the flags of its first descriptor decide.

Layout and order of the stores are those of QEMU's ``docs/interop/vhost-user.rst``, "Inflight I/O tracking". What a
batch leaves behind is noted before the device is at it: nobody looks at that until the driver can see the batch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova import _core
from virtiova.errors import ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_NEXT, PackedDesc
from virtiova.ring.packed_device import PackedChain

HEADER: Final = struct.Struct("<QHHHHHHBB10x")
ENTRY: Final = struct.Struct("<BxHHHQHHIQ")
_VERSION: Final = 1
_VERSION_AT: Final = 8
_FREE_AT: Final = 12
_OLD_FREE_AT: Final = 14
_USED_AT: Final = 16
_OLD_USED_AT: Final = 18
_WRAP_AT: Final = 20
_OLD_WRAP_AT: Final = 21
"""Offsets in the header."""
_NEXT_AT: Final = 2
_LAST_AT: Final = 4
_NUM_AT: Final = 6
_COUNTER_AT: Final = 8
_DESC_AT: Final = 16
"""Offsets in an entry."""
_DESC: Final = struct.Struct("<HHIQ")
_COUNT: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry, as it was read once."""

    inflight: int
    next: int
    last: int
    num: int
    counter: int
    id: int
    flags: int
    length: int
    addr: int


@dataclass(frozen=True, slots=True)
class Left:
    """Where somebody stood in the ring, and what he left: `used` has the wrap counter in bit 15, ``lists`` are the
    descriptors of the requests that were taken and not given back, oldest first."""

    used: int
    lists: list[list[PackedDesc]]


class PackedInflight:
    """The part of the file for one packed ring. Nothing in it is believed beyond what it says of requests."""

    def __init__(self, memory: _core.Window, start: int, entries: int, *, fresh: bool = False) -> None:
        self._memory = memory
        self._start = start
        self.entries = entries
        """Descriptors that can be noted."""
        self.counter = 0
        """The number of the request that was noted last."""
        self._resumed: list[int] = []
        """The entries of what is left, which is done first, and in this order."""
        self._at_hand: list[int] = []
        self._size = entries
        """Of the ring itself: there may be room for more."""
        header = HEADER.unpack(memory.read(start, HEADER.size))
        if fresh or (header[1], header[2]) != (_VERSION, entries):
            self._start_anew(0x8000)
            return
        self.counter = max((self._entry(at).counter for at in range(entries)), default=0)

    @property
    def used_before(self) -> bool:
        """Whether requests were noted here, by whomever."""
        return self.counter > 0

    def lend(self, drain: _core.Drain) -> None:
        """Let ``drain`` note here what it takes. Whoever goes on after it sets `counter` to the drain's."""
        drain.note_in(self._memory, self._start, self.entries, self.counter)

    def begin(self, chains: Sequence[Chain]) -> None:
        """These requests are taken, to be given back together, in this order: noted before the device sees them."""
        self.give(chains, [self._resumed.pop(0) if self._resumed else self.take(chain) for chain in chains])

    def give(self, chains: Sequence[Chain], entries: Sequence[int]) -> None:
        """What is left behind when the driver sees these used, all at once, which `take` has noted there. Nothing is
        taken before `end`."""
        self._at_hand = list(entries)
        for entry in self._at_hand:
            # The entries are free again, as soon as the driver has seen what was done.
            last = self._load(entry, _LAST_AT)
            self._store(self._checked(last), _NEXT_AT, self._header(_FREE_AT))
            self._set(_FREE_AT, entry)
        slots = sum(chain.slots for chain in chains)
        index = self._header(_USED_AT) + slots
        self._set(_USED_AT, index % self._size)
        if index >= self._size:
            wrap = self._memory.read(self._start + _WRAP_AT, 1)[0]
            self._memory.write(self._start + _WRAP_AT, bytes([not wrap]))

    def take(self, chain: Chain) -> int:
        """Copy a request's descriptors into free entries; the first of them."""
        assert isinstance(chain, PackedChain)  # of a packed ring there are no others
        head = self._checked(self._header(_OLD_FREE_AT))
        self._store(head, _NUM_AT, 0)
        # The highest that was found is the front end's to write.
        self.counter = (self.counter + 1) & _COUNT
        at = self._at(head)
        self._memory.write(at + _COUNTER_AT, self.counter.to_bytes(8, "little"))
        self._memory.write(at, b"\1")
        free = head
        for number, desc in enumerate(chain.descs, 1):
            free = self._checked(free)
            if number == len(chain.descs):
                self._store(head, _LAST_AT, free)
            self._store(head, _NUM_AT, number)
            kept = _DESC.pack(desc.id, desc.flags, desc.length, desc.addr)
            self._memory.write(self._at(free) + _DESC_AT, kept)
            free = self._load(free, _NEXT_AT)
            self._set(_FREE_AT, free)
        self._set(_OLD_FREE_AT, free)
        return head

    def end(self) -> None:
        """What was begun last is given back, and the driver sees it."""
        for entry in self._at_hand:
            self._memory.write(self._at(entry), b"\0")
        self._at_hand = []
        self._commit()

    def _commit(self) -> None:
        """The present is the past. The free list is first: see `resume`."""
        self._set(_OLD_FREE_AT, self._header(_FREE_AT))
        self._set(_OLD_USED_AT, self._header(_USED_AT))
        self._memory.write(self._start + _OLD_WRAP_AT, self._memory.read(self._start + _WRAP_AT, 1))

    # -- after somebody died

    def resume(self, size: int, available: Callable[[int], bool]) -> Left:
        """Where a back end before this one stood in a ring of ``size`` descriptors. ``available`` says whether the
        descriptor at a place (index, wrap counter in bit 15) is the driver's no more, and the device's not yet.

        May be repeated, should this one die here as well. Raises `ProtocolError` for notes that make no sense.
        """
        self._size = size
        self._resumed, self._at_hand = [], []
        old = self._word(_OLD_USED_AT, _OLD_WRAP_AT)
        # Index and wrap counter are two stores: between them the old place is none that ever was. But then the free
        # list is the new one already.
        begun = self._header(_FREE_AT) == self._header(_OLD_FREE_AT)
        if self._word(_USED_AT, _WRAP_AT) != old and (begun or not available(old)):
            self._commit()
        # For the same reason the free list is last here.
        self._set(_USED_AT, self._header(_OLD_USED_AT))
        self._memory.write(self._start + _WRAP_AT, self._memory.read(self._start + _OLD_WRAP_AT, 1))
        self._set(_FREE_AT, self._header(_OLD_FREE_AT))
        free, seen = self._header(_FREE_AT), 0
        while free < self.entries and seen < self.entries:
            self._memory.write(self._at(free), b"\0")
            free, seen = self._load(free, _NEXT_AT), seen + 1
        entries = [self._entry(at) for at in range(self.entries)]
        heads = sorted((each.counter, at) for at, each in enumerate(entries) if each.inflight == 1)
        lists = [self._list(entries, at) for _, at in heads]
        if sum(map(len, lists)) > size:
            raise ProtocolError(f"more descriptors are noted as in flight than the ring's {size}")
        self._resumed = [at for _, at in heads]
        return Left(self._word(_USED_AT, _WRAP_AT), lists)

    def _list(self, entries: Sequence[_Entry], at: int) -> list[PackedDesc]:
        """The descriptors of the request whose first entry is there."""
        found: list[PackedDesc] = []
        num = entries[at].num
        for _ in range(num):
            if at >= len(entries):
                break
            each = entries[at]
            found.append(PackedDesc(each.addr, each.length, each.id, each.flags))
            at = each.next
        if not found or len(found) != num or any(not desc.flags & DESC_F_NEXT for desc in found[:-1]):
            raise ProtocolError("what is noted as in flight makes no sense")
        return found

    def forget(self, used: int) -> None:
        """What is noted is of another driver's ring: none of it is unfinished, and this one stands at ``used``."""
        self._start_anew(used)

    # -- bytes

    def _start_anew(self, used: int) -> None:
        # The version last: a file that is only half made when we die is made again.
        self._set(_VERSION_AT, 0)
        entries = [ENTRY.pack(0, at + 1, 0, 0, 0, 0, 0, 0, 0) for at in range(self.entries)]
        self._memory.write(self._start + HEADER.size, b"".join(entries))
        index, wrap = used & 0x7FFF, used >> 15
        header = HEADER.pack(0, 0, self.entries, 0, 0, index, index, wrap, wrap)
        self._memory.write(self._start, header)
        self._set(_VERSION_AT, _VERSION)
        self.counter = 0

    def _entry(self, at: int) -> _Entry:
        return _Entry(*ENTRY.unpack(self._memory.read(self._at(at), ENTRY.size)))

    def _checked(self, entry: int) -> int:
        if entry >= self.entries:
            raise ProtocolError(f"what is in flight: entry {entry}, wanted less than {self.entries}")
        return entry

    def _at(self, entry: int) -> int:
        return self._start + HEADER.size + entry * ENTRY.size

    def _load(self, entry: int, offset: int) -> int:
        return self._memory.load16(self._at(entry) + offset)

    def _store(self, entry: int, offset: int, value: int) -> None:
        self._memory.store16(self._at(entry) + offset, value)

    def _header(self, offset: int) -> int:
        return self._memory.load16(self._start + offset)

    def _set(self, offset: int, value: int) -> None:
        self._memory.store16(self._start + offset, value)

    def _word(self, index: int, wrap: int) -> int:
        """A place in the ring, with its wrap counter in bit 15."""
        return self._header(index) & 0x7FFF | (self._memory.read(self._start + wrap, 1)[0] & 1) << 15
