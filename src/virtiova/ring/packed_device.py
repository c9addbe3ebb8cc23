# SPDX-License-Identifier: Apache-2.0
"""The device end of a packed virtqueue (virtio 1.4, 2.8), over an address space.

The driver can change the ring at any moment, so it is read as `ring.split_device` reads the split one: each thing
once, into a value, which is checked, and used. Whether a descriptor is available is its flags' to say; what they say
is what counts for that descriptor from then on, and the rest of it is loaded after them.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Sequence
from typing import Final

from virtiova.dma.space import AddressSpace
from virtiova.errors import ProtocolError
from virtiova.ring.chain import Chain, Segment
from virtiova.ring.ends import MAX_CHAIN, Gathering
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    EVENT_FLAGS,
    PACKED_F_AVAIL,
    PACKED_FLAGS,
    PackedDesc,
    PackedLayout,
)

_USED: Final = struct.Struct("<IH")
_LENGTH_AT: Final = 8
_FLAGS_AT: Final = 14
"""Offsets in a descriptor."""


class PackedChain(Chain):
    """A chain of a packed ring, with what the driver wrote for it: its descriptors, which a used one overwrites."""

    __slots__ = ("descs",)

    def __init__(
        self,
        space: AddressSpace,
        descs: Sequence[PackedDesc],
        readable: Sequence[Segment],
        writable: Sequence[Segment],
    ) -> None:
        super().__init__(space, descs[-1].id, readable, writable, len(descs))
        self.descs = descs


class PackedDevice:
    """Takes chains from the descriptor ring, and writes used descriptors into it.

    ``desc``, ``driver`` and ``device`` are the addresses in ``space`` of the descriptor ring and of the driver's and
    the device's event suppression, each as the driver gave it. ``event_idx`` and ``indirect`` say whether bits 29 and
    28 were accepted; ``next_avail`` and ``next_used`` are where to go on: the index, and the wrap counter in bit 15.
    Raises `ProtocolError` for a part that is not aligned, or an index that is not in the ring.

    A chain's ``head`` is its buffer id. Chains may be pushed in any order.
    """

    def __init__(
        self,
        space: AddressSpace,
        desc: int,
        driver: int,
        device: int,
        layout: PackedLayout,
        *,
        event_idx: bool,
        indirect: bool,
        next_avail: int = 0x8000,
        next_used: int = 0x8000,
    ) -> None:
        for what, address, align in (
            ("descriptor ring", desc, 16),
            ("driver event suppression", driver, 4),
            ("device event suppression", device, 4),
        ):
            if address % align:
                raise ProtocolError(f"{what} at 0x{address:x}, wanted a multiple of {align}")
        self._space = space
        self._desc = desc
        self._driver = driver
        self._device = device
        self._layout = layout
        self._event_idx = event_idx
        self._indirect = indirect
        self._lists: collections.deque[int] = collections.deque(maxlen=layout.size)
        """Descriptors of the chains that were popped, the latest last: as many as could be put back."""
        # Places, as the layout counts them.
        self._stand(next_avail, next_used)
        self._signalled = self._next_used

    @property
    def size(self) -> int:
        """Entries: the most chains that can be made available at a time."""
        return self._layout.size

    @property
    def place(self) -> int:
        """Descriptors that were taken so far, but for whole laps before it was made."""
        return self._next_avail

    @property
    def next_avail(self) -> int:
        """Index of the descriptor that `pop` takes next, and the wrap counter in bit 15."""
        return self._layout.encode(self._next_avail)

    @property
    def next_used(self) -> int:
        """Index of the descriptor that `push` writes next, and the wrap counter in bit 15."""
        return self._layout.encode(self._next_used)

    @property
    def state(self) -> tuple[int, int, int]:
        """Where it stands: `next_avail`, `next_used`, and how many descriptors were used since the driver was told, one
        lap at most.

        May be set, as another end of the same ring (`_core.Drain`) has left it.
        """
        return self.next_avail, self.next_used, min(self._next_used - self._signalled, self.size)

    @state.setter
    def state(self, state: tuple[int, int, int]) -> None:
        avail, used, untold = state
        self._stand(avail, used)
        self._signalled = self._next_used - untold

    def _stand(self, avail: int, used: int) -> None:
        """Go on from there. What is available lies after what is used, by a lap at most."""
        layout = self._layout
        first = layout.decode(used)
        taken = (layout.decode(avail) - first) % (2 * layout.size)
        if taken > layout.size:
            raise ProtocolError(f"a packed ring that is 0x{avail:x} and 0x{used:x}, which lie more than a lap apart")
        self._next_used = first
        self._next_avail = self._seen = first + taken
        self._lists.clear()

    # -- taking

    def pop(self) -> Chain | None:
        """The next chain; None if the driver has made none available.

        Raises `ProtocolError` for a chain that has no meaning, after which the device needs a reset, and
        `AccessError` if the ring cannot be reached.
        """
        place = self._next_avail
        flags = self._flags(place)
        if flags & PACKED_FLAGS != self._layout.available(place):
            self._seen = max(self._seen, place)
            return None
        if place - self._next_used == self.size:
            # Not past it: what is available lies a lap ahead of what is used, at most.
            where = self._desc + self._layout.entry(place)
            raise ProtocolError(f"descriptor at 0x{where:x}: available again, but it was not given back yet")
        # Past it before it is judged, so that nobody judges the same descriptor for ever.
        self._next_avail = place + 1
        self._lists.append(1)
        chain = self._walk(place, flags)
        self._next_avail = place + chain.slots
        self._lists[-1] = chain.slots
        self._seen = max(self._seen, self._next_avail)
        return chain

    def _flags(self, place: int) -> int:
        """A descriptor's flags (acquire: the rest of it, and of its list, is visible then)."""
        return self._space.load16(self._desc + self._layout.entry(place) + _FLAGS_AT)

    def _walk(self, place: int, flags: int) -> PackedChain:
        """Follow a list from ``place`` on, where ``flags`` were found, each descriptor loaded once."""
        descs: list[PackedDesc] = []
        free = self.size - (place - self._next_used)
        while True:
            where = self._desc + self._layout.entry(place)
            if len(descs) == free:
                raise ProtocolError(f"descriptor at 0x{where:x}: available again, but it was not given back yet")
            desc = PackedDesc.unpack(self._space.load_pair(where))
            if not descs:
                desc = PackedDesc(desc.addr, desc.length, desc.id, flags)
            elif desc.flags & PACKED_FLAGS != self._layout.available(place):
                raise ProtocolError(f"descriptor at 0x{where:x}: not available, but the one before it goes on there")
            descs.append(desc)
            if not desc.flags & DESC_F_NEXT:
                return self._chain(place + 1 - len(descs), descs)
            if len(descs) == MAX_CHAIN:
                raise ProtocolError(f"descriptor at 0x{where:x}: a chain of more than {MAX_CHAIN} buffers")
            place += 1

    def chain_of(self, descs: Sequence[PackedDesc]) -> PackedChain:
        """The chain of a list that was taken once and never given back. Raises as `pop`."""
        if not 1 <= len(descs) <= min(self.size, MAX_CHAIN):
            raise ProtocolError(f"a chain of {len(descs)} descriptors, wanted 1 to {min(self.size, MAX_CHAIN)}")
        return self._chain(self._next_used, descs)

    def _chain(self, place: int, descs: Sequence[PackedDesc]) -> PackedChain:
        """The chain of a list that begins at ``place``. Its buffer id is in the last descriptor."""
        found = Gathering(min(self.size, MAX_CHAIN))
        for number, desc in enumerate(descs):
            where = self._desc + self._layout.entry(place + number)
            if desc.flags & DESC_F_INDIRECT:
                self._gather_table(found, desc, where, alone=len(descs) == 1)
            else:
                found.add(where, desc.addr, desc.length, desc.flags)
        return PackedChain(self._space, descs, found.readable, found.writable)

    def _gather_table(self, found: Gathering, desc: PackedDesc, where: int, *, alone: bool) -> None:
        """The buffers of an indirect table: refuse it if it breaks virtio 1.4, 2.8.19.

        Of its descriptors nothing counts but address, length and the write-only flag (virtio 1.4, 2.8.7); the
        write-only flag of the one that refers to it is ignored.
        """
        problem = ""
        if not self._indirect:
            problem = "an indirect table, but bit 28 was not accepted"
        elif not alone:
            problem = "an indirect table in a list, wanted it alone"
        elif not desc.length or desc.length % DESC_SIZE:
            problem = f"an indirect table of {desc.length} bytes, wanted a multiple of {DESC_SIZE}"
        elif desc.length // DESC_SIZE > min(self.size, MAX_CHAIN):
            problem = f"a chain of more than {min(self.size, MAX_CHAIN)} buffers"
        if problem:
            raise ProtocolError(f"descriptor at 0x{where:x}: {problem}")
        # It need not be aligned: copied in one go, then only the copy is used.
        table = self._space.read(desc.addr, desc.length)
        for at in range(0, desc.length, DESC_SIZE):
            inner = PackedDesc.unpack(table[at : at + DESC_SIZE])
            found.add(desc.addr + at, inner.addr, inner.length, inner.flags)

    def put_back(self, count: int = 1) -> None:
        """Forget that the last ``count`` chains were taken: they are popped again. None of them was pushed."""
        for _ in range(count):
            self._next_avail -= self._lists.pop()

    def back_to(self, mark: int) -> None:
        """The same, to where `next_avail` stood at ``mark``. None of the chains from there on was pushed."""
        target = self._next_avail - (self._next_avail - self._layout.decode(mark)) % (2 * self.size)
        while self._next_avail > target:
            self.put_back()

    # -- giving back

    def is_available(self, word: int) -> bool:
        """Whether the descriptor at that place (index, wrap counter in bit 15) is available, by its flags now."""
        place = self._layout.decode(word)
        return self._flags(place) & PACKED_FLAGS == self._layout.available(place)

    def untouched(self) -> bool:
        """Whether no descriptor was ever used: each is all zero, or was made available in the driver's first lap."""
        table = self._space.read(self._desc, DESC_SIZE * self.size)
        rows = (table[at : at + DESC_SIZE] for at in range(0, len(table), DESC_SIZE))
        return all(PackedDesc.unpack(row).flags & PACKED_FLAGS == PACKED_F_AVAIL or not any(row) for row in rows)

    def take_from_dead(self, slots: int) -> None:
        """The next ``slots`` descriptors were taken by another device end, which died: what it marked as used behind
        the first of them, so that the driver has not seen it, is not used any more.

        Else the driver would see that with the first one that is pushed, while it is still to be done.
        """
        for place in range(self._next_used, self._next_used + slots):
            flags = self._flags(place)
            if flags & PACKED_FLAGS == self._layout.used(place):
                where = self._desc + self._layout.entry(place) + _FLAGS_AT
                self._space.store16(where, flags & ~PACKED_FLAGS | self._layout.available(place))

    def push(self, chain: Chain, written: int) -> None:
        """Write a used descriptor for ``chain``; its first ``written`` bytes of room were written.

        Raises `AccessError` if the ring cannot be reached.
        """
        self.push_all(((chain, written),))

    def push_all(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """`push` for several, which the driver sees used all at once: the first of them is marked last."""
        place = self._next_used
        marks = []
        for chain, written in chains:
            where = self._desc + self._layout.entry(place)
            # The length field is 32 bits wide, the chain may be 2**32 long: promising less is always allowed.
            length = min(written, 0xFFFFFFFF)
            self._space.write(where + _LENGTH_AT, _USED.pack(length, chain.head))
            marks.append((where + _FLAGS_AT, self._layout.used(place) | (DESC_F_WRITE if length else 0)))
            place += chain.slots
        for where, flags in reversed(marks):
            self._space.store16(where, flags)
        self._next_used = place

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (virtio 1.4, 2.8.10)."""
        new, old = self._next_used, self._signalled
        if new == old:
            return False
        # The driver's wish must not be loaded before our descriptors are visible: it may sleep in between.
        self._space.fence()
        self._signalled = new
        wish = self._space.load16(self._driver + 2) & EVENT_FLAGS
        if wish == EVENT_DESC and self._event_idx:
            return self._layout.passed(self._space.load16(self._driver), new, old)
        return wish != EVENT_DISABLE

    def tell_again(self) -> None:
        """It is not known of what the driver was told: `needs_interrupt` may tell it once more."""
        self._signalled = self._next_used - self.size

    # -- kicks

    def disable_notify(self) -> None:
        """Ask the driver not to kick while the device is looking at the ring anyway. A hint only."""
        self._space.store16(self._device + 2, EVENT_DISABLE)

    def enable_notify(self, *, waiting: bool = False) -> bool:
        """Ask for a kick with the next chain, then look once more; True: there is more, do not sleep.

        Without the second look a chain made available in between would wait for ever. ``waiting``: the chains that
        are known to be there are not enough, so that only what comes after them counts.
        """
        place = self._seen if waiting else self._next_avail
        if self._event_idx:
            # The place before the flags that give it a meaning.
            self._space.store16(self._device, self._layout.encode(place))
            self._space.store16(self._device + 2, EVENT_DESC)
        else:
            self._space.store16(self._device + 2, EVENT_ENABLE)
        self._space.fence()
        return self._flags(place) & PACKED_FLAGS == self._layout.available(place)
