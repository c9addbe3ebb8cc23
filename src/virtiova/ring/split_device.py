# SPDX-License-Identifier: Apache-2.0
"""The device end of a split virtqueue (virtio 1.4, 2.7), over an address space.

The driver can change the ring at any moment. So every index, flag and descriptor is loaded exactly
once, into a value; the value is checked; and only the checked value is used. A ring that means
nothing raises `ProtocolError` with the address and what was wanted there, one that cannot be reached
`AccessError`. Neither ever touches memory outside of the address space.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.errors import ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.ends import MAX_CHAIN, Gathering
from virtiova.ring.layout import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_SIZE,
    USED_F_NO_NOTIFY,
    Desc,
    SplitLayout,
    need_event,
)

_USED_ELEMENT: Final[dict[ByteOrder, struct.Struct]] = {
    "little": struct.Struct("<II"),
    "big": struct.Struct(">II"),
}


class SplitDevice:
    """Takes chains from the available ring and puts them into the used ring.

    ``desc``, ``avail`` and ``used`` are addresses in ``space``, each as the driver gave it; ``layout`` gives
    the queue size and the offsets within each part. ``event_idx`` and ``indirect`` say whether bits 29
    and 28 were accepted; ``next_avail`` and ``next_used`` are the indices to go on from (free-running, 16 bits), for a
    ring that was in use before. Raises `ProtocolError` for a part that is not aligned (virtio 1.4, 2.7).
    """

    def __init__(
        self,
        space: AddressSpace,
        desc: int,
        avail: int,
        used: int,
        layout: SplitLayout,
        order: ByteOrder = "little",
        *,
        event_idx: bool,
        indirect: bool,
        next_avail: int = 0,
        next_used: int = 0,
    ) -> None:
        for what, address, align in (
            ("descriptor table", desc, 16),
            ("available ring", avail, 2),
            ("used ring", used, 4),
        ):
            if address % align:
                raise ProtocolError(f"{what} at 0x{address:x}, wanted a multiple of {align}")
        self._space = space
        self._desc = desc
        self._avail = avail
        self._used = used
        self._layout = layout
        self._order = order
        self._event_idx = event_idx
        self._indirect = indirect
        self._element = _USED_ELEMENT[order]
        self._next_avail = next_avail
        self._seen_avail = next_avail
        self._next_used = next_used
        self._signalled_used = next_used

    @property
    def next_avail(self) -> int:
        """Index of the available entry that `pop` takes next."""
        return self._next_avail

    @property
    def next_used(self) -> int:
        """Index of the used element that `push` fills next."""
        return self._next_used

    @property
    def state(self) -> tuple[int, int, int]:
        """Where it stands: next available and next used index, and how many were pushed since the driver was told.

        May be set, as another end of the same ring (`_core.Drain`) has left it.
        """
        return self._next_avail, self._next_used, (self._next_used - self._signalled_used) & 0xFFFF

    @state.setter
    def state(self, state: tuple[int, int, int]) -> None:
        self._next_avail, self._next_used, untold = state
        self._seen_avail = self._next_avail
        self._signalled_used = (self._next_used - untold) & 0xFFFF

    # -- taking

    def pop(self) -> Chain | None:
        """The next chain; None if the driver has made none available.

        Raises `ProtocolError` for a chain or index that has no meaning, after which the device needs a
        reset (virtio 1.4, 2.1.2), and `AccessError` if the ring cannot be reached.
        """
        if self._next_avail == self._seen_avail and not self._look():
            return None
        where = self._avail + self._layout.avail_entry(self._next_avail)
        head = self._space.load16(where, self._order)
        # Past it before it is judged, so that nobody judges the same entry for ever.
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        if head >= self._layout.size:
            raise ProtocolError(f"available ring at 0x{where:x}: head {head}, wanted less than {self._layout.size}")
        return self._walk(head)

    def _look(self) -> bool:
        """Load the available index (acquire: the entries before it are visible then); is there more?"""
        where = self._avail + 2
        index = self._space.load16(where, self._order)
        if (index - self._next_avail) & 0xFFFF > self._layout.size:
            raise ProtocolError(
                f"available index at 0x{where:x} is {index}, wanted {self._next_avail} "
                f"and at most {self._layout.size} more"
            )
        self._seen_avail = index
        return index != self._next_avail

    def chain_at(self, head: int) -> Chain:
        """The chain from descriptor ``head`` on, which was taken once and never given back. Raises as `pop`."""
        if not 0 <= head < self._layout.size:
            raise ProtocolError(f"descriptor {head}, wanted less than {self._layout.size}")
        return self._walk(head)

    def taken(self, count: int) -> list[int]:
        """The heads of the last ``count`` chains that were taken. Raises `AccessError` if they cannot be read."""
        first = self._next_avail - count
        where = (self._avail + self._layout.avail_entry((first + at) & 0xFFFF) for at in range(count))
        return [self._space.load16(entry, self._order) for entry in where]

    def _walk(self, head: int) -> Chain:
        """Follow a chain from ``head``, each descriptor loaded once."""
        size = self._layout.size
        found = Gathering(min(size, MAX_CHAIN))
        table, entries, direct = self._desc, size, True
        index = head
        while True:
            where = table + DESC_SIZE * index
            desc = self._load(where, direct)
            if desc.flags & DESC_F_INDIRECT:
                entries = self._indirect_entries(desc, where, direct)
                table, direct, index = desc.addr, False, 0
                continue
            found.add(where, desc.addr, desc.length, desc.flags)
            if not desc.flags & DESC_F_NEXT:
                return Chain(self._space, head, found.readable, found.writable)
            if desc.next >= entries:
                raise ProtocolError(f"descriptor at 0x{where:x}: next {desc.next}, wanted less than {entries}")
            index = desc.next

    def _load(self, where: int, direct: bool) -> Desc:
        # An indirect table need not be aligned: copied in one go, then only the copy is used.
        data = self._space.load_pair(where) if direct else self._space.read(where, DESC_SIZE)
        return Desc.unpack(data, self._order)

    def _indirect_entries(self, desc: Desc, where: int, direct: bool) -> int:
        """How many descriptors an indirect table holds; refuse it if it breaks virtio 1.4, 2.7.5.3.

        Its write-only flag is ignored, as 2.7.5.3.2 wants.
        """
        problem = ""
        if not self._indirect:
            problem = "an indirect table, but bit 28 was not accepted"
        elif not direct:
            problem = "an indirect table inside an indirect table"
        elif desc.flags & DESC_F_NEXT:
            problem = "an indirect table with a next descriptor, wanted it last"
        elif not desc.length or desc.length % DESC_SIZE:
            problem = f"an indirect table of {desc.length} bytes, wanted a multiple of {DESC_SIZE}"
        if problem:
            raise ProtocolError(f"descriptor at 0x{where:x}: {problem}")
        return desc.length // DESC_SIZE

    @property
    def size(self) -> int:
        """Entries: the most chains that can be made available at a time."""
        return self._layout.size

    # -- giving back

    def put_back(self, count: int = 1) -> None:
        """Forget that the last ``count`` chains were taken: they are popped again. None of them was pushed."""
        self._next_avail = (self._next_avail - count) & 0xFFFF

    def back_to(self, mark: int) -> None:
        """The same, to where `next_avail` stood at ``mark``. None of the chains from there on was pushed."""
        self._next_avail = mark

    def push(self, chain: Chain, written: int) -> None:
        """Put ``chain`` into the used ring; its first ``written`` bytes of room were written.

        Raises `AccessError` if the used ring cannot be reached.
        """
        self.push_all(((chain, written),))

    def push_all(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """`push` for several, which the driver sees used all at once."""
        index = self._next_used
        for chain, written in chains:
            where = self._used + self._layout.used_entry(index)
            # The length field is 32 bits wide, the chain may be 2**32 long: promising less is always allowed.
            length = min(written, 0xFFFFFFFF)
            # Plain bytes: the driver looks at them only once it has seen the index, which is a release store.
            self._space.write(where, self._element.pack(chain.head, length))
            index = (index + 1) & 0xFFFF
        self._space.store16(self._used + 2, index, self._order)
        self._next_used = index

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (virtio 1.4, 2.7.7.2)."""
        new, old = self._next_used, self._signalled_used
        if new == old:
            return False
        # The driver's wish must not be loaded before our used index is visible: it may sleep in between.
        self._space.fence()
        if self._event_idx:
            event = self._space.load16(self._avail + self._layout.used_event, self._order)
            wanted = need_event(event, new, old)
        else:
            wanted = not self._space.load16(self._avail, self._order) & AVAIL_F_NO_INTERRUPT
        self._signalled_used = new
        return wanted

    def tell_again(self) -> None:
        """It is not known of which used elements the driver was told: `needs_interrupt` may tell it once more."""
        self._signalled_used = (self._next_used - self._layout.size) & 0xFFFF

    # -- kicks

    def disable_notify(self) -> None:
        """Ask the driver not to kick while the device is looking at the ring anyway. A hint only."""
        if not self._event_idx:
            self._space.store16(self._used, USED_F_NO_NOTIFY, self._order)

    def enable_notify(self, *, waiting: bool = False) -> bool:
        """Ask for a kick with the next chain, then look once more; True: there is more, do not sleep.

        Without the second look a chain made available in between would wait for ever. ``waiting``: the chains that
        are known to be there are not enough, so that only what comes after them counts.
        """
        known = self._seen_avail if waiting else self._next_avail
        if self._event_idx:
            self._space.store16(self._used + self._layout.avail_event, known, self._order)
        else:
            self._space.store16(self._used, 0, self._order)
        self._space.fence()
        if known == self._seen_avail:
            self._look()
        return known != self._seen_avail
