# SPDX-License-Identifier: Apache-2.0
"""What of a ring is to be done before anything else: chains that were taken once, and not given back. No I/O.

They come from a back end that died, by the file of what is in flight; or from a worker of our own, whose engine had
begun them and could not give them back, since a page was taken away meanwhile, say. What an engine has done is not
done again: a later write to the same place may be done by now, and would be undone. Its answer waits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from virtiova.addr import Access
from virtiova.device.host import MAX_WALKED
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.ends import End, Left
from virtiova.serve.inflight import Inflight
from virtiova.serve.inflight_packed import PackedInflight
from virtiova.serve.misses import Want
from virtiova.serve.platform import Platform, missing


class Unfinished:
    """Chains that were taken and not given back, oldest first."""

    def __init__(self) -> None:
        self._left: Left = []
        self._answers: dict[int, bytes] = {}
        self.ours = False
        """A worker of ours left them: their ring is past them, and nobody has to be asked where it stands."""

    def __len__(self) -> int:
        return len(self._left)

    def clear(self) -> None:
        """They are nobody's any more, or somebody else's."""
        self._left, self._answers, self.ours = [], {}, False

    def found(self, left: Left) -> None:
        """An earlier back end has left these, by the file's word."""
        self.clear()
        self._left = left

    def add(self, left: Iterable[tuple[int, bytes | None]]) -> None:
        """A worker has left these heads of a split ring: with what was read, or b"" was done, or None of it."""
        heads = self._heads if self.ours else []
        for head, answer in left:
            heads.append(head)
            if answer is not None:
                self._answers[head] = answer
        if heads:
            self._left, self.ours = heads, True

    @property
    def _heads(self) -> list[int]:
        return [head for head in self._left if isinstance(head, int)]

    def note_in(self, notes: Inflight | PackedInflight | None) -> None:
        """Another file of what is in flight: it is to have them, too."""
        if isinstance(notes, Inflight):
            notes.begin(self._heads)

    def chains(self, end: End, count: int) -> Iterator[Chain]:
        """The first of them, looked up once more. Raises as `DeviceRing.pop`; none if they are another ring's."""
        for each in self._left[:count]:
            if isinstance(each, int) and isinstance(end, SplitDevice):
                yield end.chain_at(each)
            elif not isinstance(each, int) and isinstance(end, PackedDevice):
                yield end.chain_of(each)

    def let_go(self, end: End | None, *, noted: bool) -> int:
        """Nothing more is done of what a worker left: whoever goes on with the ring has it from the file, if it is
        ``noted`` there, or takes it anew, if it is what was taken last. How many are neither: they are lost."""
        if not self.ours:
            return 0
        self.ours = False
        if noted or self._last(end):
            return 0
        count = len(self._left)
        self.clear()
        return count

    def _last(self, end: End | None) -> bool:
        heads = self._heads
        try:
            return isinstance(end, SplitDevice) and sorted(end.taken(len(heads))) == sorted(heads)
        except AccessError:
            return False

    def answer(self, chain: Chain) -> bytes | None:
        """What an engine has found for it; None if it is to be done."""
        return self._answers.get(chain.head) if self._left else None

    def buffers(self, chain: Chain) -> Iterator[tuple[int, int, Access]]:
        """Those that are still needed: of one that was done, what its answer goes into."""
        done = self.answer(chain) is not None
        return (buffer for buffer in chain.buffers() if not done or buffer[2] is Access.WRITE)

    def needs(self, end: End, count: int) -> Iterator[tuple[int, int, Access]]:
        """All that is needed for the first of them, up to one that makes no sense: its turn will come."""
        walked = 0
        try:
            for chain in self.chains(end, count):
                yield from self.buffers(chain)
                walked += chain.length
                if walked >= MAX_WALKED:
                    return
        except AccessError as table:
            yield table.address, table.length, Access.READ
        except ProtocolError:
            return

    def ready(self, end: End, platform: Platform) -> Chain | None:
        """The first of them, if it misses nothing; else it is the last from here on. Raises `ProtocolError` if it makes
        no sense."""
        wants: dict[Want, None] = {}
        try:
            (chain,) = self.chains(end, 1)
            missing(self.buffers(chain), platform, wants)
        except AccessError:
            wants[0, Access.NONE] = None
        if not wants:
            return chain
        self._left = self._left[1:] + self._left[:1]  # type: ignore[operator] # all of one kind
        return None

    def given(self) -> None:
        """The first is given back."""
        if self._left:
            first = self._left[0]
            del self._left[0]
            if isinstance(first, int):
                self._answers.pop(first, None)
        self.ours = self.ours and bool(self._left)
