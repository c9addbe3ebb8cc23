# SPDX-License-Identifier: Apache-2.0
"""One ring of a served device: what was set, whether it runs, and one look at it. No I/O.

Before a request reaches the device, its ring entries and all its buffers are translated. What is missing
is asked for, in one go for as many requests as are there; the ring is left as it was, and looked at again
when an answer has come. So a device never sees a request that it can do only half of because a mapping is
merely not known yet, and nobody ever waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtiova import _core
from virtiova.addr import Access
from virtiova.device.base import Device
from virtiova.device.host import Drained, answer_with, drain_queue, give, take
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import Feature
from virtiova.ring.chain import Chain
from virtiova.ring.packed_device import PackedDevice
from virtiova.serve.ahead import LOOKAHEAD, look_ahead, unknown
from virtiova.serve.ends import End, native_end, packed_end, ring_parts, split_end
from virtiova.serve.inflight import Inflight
from virtiova.serve.inflight_packed import PackedInflight
from virtiova.serve.misses import Want
from virtiova.serve.platform import Platform, missing
from virtiova.serve.unfinished import Unfinished
from virtiova.wire.vhost_user import VringAddr

BATCH: Final = 32
"""Requests of one ring that are done before the next one is looked at."""
FRUITLESS: Final = 8
"""Requests fewer than which are not worth a worker's waking up: who comes back with fewer is not sent again at once."""
SETTLED: Final = 4
"""Looks in a row that find no page missing, after which a ring is given to its worker again."""
HOME_NANOSECONDS: Final = 2_000_000
"""How long requests are begun at home before the front end is listened to again."""


class Ring:
    """Ring ``index`` of ``device``."""

    def __init__(self, device: Device, index: int) -> None:
        self.index = index
        self.size = 0
        self.base = 0
        self.address: VringAddr | None = None
        self.kick: int | None = None
        self.call: int | None = None
        self.err: int | None = None
        self.started = False
        self.enabled = False
        self.polled = False
        """No kicks come: look without being asked to."""
        self.broken = ""
        """Why it is not served until it is set up again."""
        self.kicked = False
        """There may be something to do."""
        self.parked = False
        """What to do depends on an answer of the front end."""
        self.awaited: Sequence[Want] = ()
        """What was asked for when it was parked."""
        self.inflight: Inflight | PackedInflight | None = None
        self.lent = False
        """A worker has it: nothing here is up to date, and nothing is to be done, before `take_back`."""
        self.lent_at = 0
        """How many requests its worker had done when it was lent."""
        self.awake: _core.Drain | None = None
        """It had no more, and no kick was asked for: to be looked at again by this, or by `look` before sleeping."""
        self.shy = False
        """What a worker asked about was nothing to be done: it is not lent before something was."""
        self.home: _core.Disk | None = None
        """By what it is served here instead of by a worker, who would come back for missing pages each time."""
        self._smooth = 0
        """Looks at home since pages were missing."""
        self._device = device
        self._end: End | None = None
        self._drain: _core.Drain | None = None
        """The same end natively, where there is a table of translations: for what is well-formed and known."""
        self.stuck: set[Want] = set()
        """Parts of the ring itself that the front end refuses: asked for again when the next kick comes."""
        self._doomed: set[Want] = set()
        self._unfinished = Unfinished()
        """What an earlier back end, or a worker, has left, to be done first."""
        self.lost = 0
        """Of these, those that it stopped without: nobody can say of them where to go on."""
        self._untold = False
        """Somebody before us, or somebody else's descriptor, may have been told of what was given back, or not."""

    # -- state

    @property
    def live(self) -> bool:
        """Whether it may be served."""
        return self.started and self.enabled and not self.broken

    @property
    def begun(self) -> int:
        """Requests that a worker took and could not give back."""
        return len(self._unfinished) if self._unfinished.ours else 0

    @property
    def runnable(self) -> bool:
        """Whether a look would be of use."""
        return self.live and not (self.parked or self.lent) and self.kicked and self._device.pending(self.index)

    def stop(self) -> int:
        """Serve it no more; the available index to go on from."""
        self.rebuild(anew=True)
        self._unfinished.clear()
        self.started = self.parked = self.kicked = self._untold = False
        self.broken = ""
        self.stuck, self._doomed = set(), set()
        return self.base

    def rebuild(self, *, anew: bool = False) -> None:
        """Addresses or the space they are in have changed: find it anew, and go on where it stands. ``anew``: it may be
        another driver's."""
        if anew:
            self.lost = self._unfinished.let_go(self._end, noted=self.inflight is not None)
        if isinstance(self._end, PackedDevice):
            self.base = self._end.next_used
            self._unfinished.clear()
        elif self._end is not None:
            self.base = self._end.next_avail
        if not self._unfinished.ours:
            # What an earlier back end left and is not done yet: by the file's word, or else taken once more.
            self.base = (self.base - len(self._unfinished)) & 0xFFFF
            self._unfinished.clear()
        self._end = None
        self.awake = self.home = None
        if self._drain is not None:
            # Nobody goes by it any more, whoever may still hold a request of it.
            self._drain.note_in(None)
            self._drain = None
        self.parked = False
        self.kicked = True

    def tell_again(self) -> None:
        """The driver may not have been told of what was given back: look, and tell it if it wants to hear of it.

        So when a ring starts, as the one who served it before may have died in between; and whenever the call
        descriptor is another one, as front ends throw away what came by the one before.
        """
        self._untold = True
        self.kicked = True

    def again(self) -> None:
        """Something has come that it may have waited for."""
        if self.parked:
            self.parked = False
            self.kicked = True

    def reset(self) -> None:
        """As before anything was set. The notifications stay."""
        self.stop()
        self.enabled = False
        self.size = self.base = 0
        self.address = None

    # -- lent to a worker

    def lend(self) -> _core.Drain | None:
        """Its native end, for a worker to go on with; None if Python has something to do or to wait for first."""
        end, drain = self._end, self._drain
        if end is None or drain is None or not self.live or self.lent:
            return None
        if self.home is not None or self.parked or self.shy or self._unfinished or self._untold:
            return None
        drain.state = end.state
        if self.inflight is not None:
            drain.counter = self.inflight.counter
        self.lent, self.kicked, self.awake = True, False, None
        return drain

    def take_back(self) -> None:
        """The worker does not touch it any more: go on where it stopped."""
        if not self.lent:
            return
        end, drain = self._end, self._drain
        assert drain is not None, "it was lent"
        assert end is not None, "they come and go together"
        end.state = drain.state
        if self.inflight is not None:
            self.inflight.counter = drain.counter
        # Whether there is more, and the kicks that told so, is the worker's to know.
        self.lent, self.kicked = False, True

    def stay_home(self, engine: _core.Engine | None) -> None:
        """Its worker could not go on: serve it here by ``engine`` until no pages have been missing for some looks."""
        self.home, self._smooth = engine if isinstance(engine, _core.Disk) else None, 0

    def finish(
        self, left: Sequence[tuple[int, bytes | None]], platform: Platform, late: Callable[[], bool] = lambda: False
    ) -> None:
        """Give back what a worker took and could not, where nothing is missing, until it is ``late``. The rest is to be
        done first from here on, and waits for what it misses like any other request.

        Raises `ProtocolError` if a chain makes no sense any more.
        """
        self._unfinished.add(left)
        if not self._unfinished.ours or platform.ram.damaged or (end := self._find(platform)) is None:
            return
        for _ in range(len(self._unfinished)):
            if late():
                return
            if (chain := self._unfinished.ready(end, platform)) is not None:
                self._give((chain,), end, platform)

    # -- at home

    def serve_at_home(self, platform: Platform) -> int | None:
        """Serve it by the engine, and ask for what is missing; how many requests there were. None: `look` is to."""
        engine, end, drain = self.home, self._end, self._drain
        if engine is None:
            return None
        if end is None or drain is None or self._unfinished or self._untold or platform.ram.damaged:
            self.home = None
            return None
        platform.counters.looks += 1
        drain.state = end.state
        if self.inflight is not None:
            drain.counter = self.inflight.counter
        outcome, count, moved = engine.serve(drain, BATCH, HOME_NANOSECONDS)
        end.state = drain.state
        if self.inflight is not None:
            self.inflight.counter = drain.counter
        platform.counters.requests += count
        platform.counters.bytes += moved
        self._smooth += 1
        if outcome == _core.HELP and self._park_for(*drain.missing(1 + LOOKAHEAD), platform):
            self._smooth = 0
        elif outcome == _core.HELP or self._smooth >= SETTLED:
            # Its worker does what has to wait for the disk, too; what that left to us is Python's.
            self.home = None
            return None if self.shy and not count else count
        elif outcome == _core.EMPTY:
            self.kicked = False
        return count

    def _park_for(self, first: int, parts: Sequence[tuple[int, int, int]], platform: Platform) -> bool:
        """Ask for ``parts``, missing in the native table, if that is all that has to be done about it: if the
        ``first`` of them, which the next request needs, are not known by anybody."""
        wants = unknown(first, parts, platform)
        if not wants:
            return False
        self._park(wants, platform)
        return True

    # -- one look

    def look(
        self,
        platform: Platform,
        late: Callable[[], bool] = lambda: False,
        most: int = BATCH,
        *,
        arm: bool = True,
    ) -> int:
        """Serve up to ``most`` requests; how many there were. No more are looked at once it is ``late``. Unless it is
        to ``arm``, the driver may not be asked for a kick where there is nothing left: then it is `awake`.

        Raises `ProtocolError` if the ring makes no sense.
        """
        done = 0
        self.awake = None
        end: End | None = None
        platform.counters.looks += 1
        # Each page of a file that was shortened costs us one of our own: not a whole batch of them.
        while done < most and self._device.pending(self.index) and not platform.ram.damaged:
            if self._drain is not None and not (self._unfinished or self._untold or self._device.wanted(self.index)):
                count, go_on = self._natively(self._drain, most - done, platform, late, arm=arm)
                done += count
                if not go_on:
                    break
            if end is None and (end := self._begin(platform)) is None:
                break
            count, go_on = self._one(end, platform, late)
            done += count
            # Also after what was given up, and after a driver that makes more available each time we look.
            if not go_on or late():
                break
        return done

    def _natively(
        self, drain: _core.Drain, limit: int, platform: Platform, late: Callable[[], bool], *, arm: bool
    ) -> tuple[int, bool]:
        """How many requests were done, and whether the next thing to do is not one for this way."""
        end, total = self._end, Drained()
        assert end is not None, "they come and go together"
        drain.state = end.state
        if self.inflight is not None:
            drain.counter = self.inflight.counter
        try:
            drained = drain_queue(self._device, self.index, drain, limit, late, total, arm=arm)
        finally:
            end.state = drain.state
            if self.inflight is not None:
                self.inflight.counter = drain.counter
            platform.counters.requests += total.chains
            platform.counters.bytes += total.bytes
        if drained:
            self.kicked = False
            self.awake = None if arm else drain
        return total.chains, drained is None

    def _begin(self, platform: Platform) -> End | None:
        """The ring for a look in Python, with no kicks wanted; None if it cannot be reached now."""
        end = self._find(platform)
        if end is None:
            return None
        if self._untold:
            self._untold = False
            if end.next_used or self.base or (self.inflight is not None and self.inflight.used_before):
                end.tell_again()
        end.disable_notify()
        return end

    def _one(self, end: End, platform: Platform, late: Callable[[], bool]) -> tuple[int, bool]:
        """One piece of work: how many requests it was, and whether another look is of use now."""
        mark = end.next_avail
        try:
            chains = self._take(end)
        except AccessError as unread:
            try:
                self._table_missing(unread, end, platform, late)
            finally:
                end.back_to(mark)
            return 0, False
        if chains:
            if self._wait_for(chains, end, platform, late):
                end.back_to(mark)
                return 0, False
            self._give(chains, end, platform)
            return len(chains), True
        if chains is not None and not end.enable_notify(waiting=self._device.wanted(self.index) > 0):
            self.kicked = False
            return 0, False
        return 0, True

    def _take(self, end: End) -> Sequence[Chain] | None:
        if self._unfinished:
            return tuple(self._unfinished.chains(end, 1))
        return take(self._device, self.index, end)

    def wants_call(self) -> bool:
        """Whether the driver is to be told of what was given back since the last call."""
        end, drain = self._end, self._drain
        if end is None or drain is None:
            return end is not None and end.needs_interrupt()
        drain.state = end.state
        wanted = drain.needs_interrupt()
        end.state = drain.state
        return wanted

    def _give(self, chains: Sequence[Chain], end: End, platform: Platform) -> None:
        notes = self.inflight
        if isinstance(notes, PackedInflight):
            notes.begin(chains)
        elif notes is not None:
            notes.begin(chain.head for chain in chains)
        answer = self._unfinished.answer(chains[0])
        if answer is None:
            give(self._device, self.index, end, chains)
        else:
            answer_with(self._device, self.index, end, chains[0], answer)
        if isinstance(notes, PackedInflight):
            notes.end()
        elif notes is not None:
            notes.end((chain.head for chain in chains), end.next_used)
        self._unfinished.given()
        platform.counters.requests += len(chains)
        platform.counters.bytes += sum(chain.moved for chain in chains)
        if answer is not None:
            # Which the engine has read.
            platform.counters.bytes += chains[0].readable
        if self._doomed and platform.misses is not None:
            platform.counters.faults += 1
            platform.tell(self._doomed)
            platform.misses.forgive(self._doomed)
            self._doomed = set()

    # -- what is missing

    def _wait_for(self, chains: Sequence[Chain], end: End, platform: Platform, late: Callable[[], bool]) -> bool:
        """Whether ``chains`` have to wait. What they miss is asked for, with what the requests behind them miss.

        One of which a page was refused does not wait for that: the device finds out, and answers with an error. But
        what it answers into is waited for.
        """
        wants: dict[Want, None] = {}
        missing((buffer for chain in chains for buffer in self._unfinished.buffers(chain)), platform, wants)
        if not wants:
            return False
        if platform.misses is None or all(platform.misses.refused(want) for want in wants):
            self._doomed = set(wants)
            return False
        look_ahead(self._device, self.index, self._unfinished, end, platform, wants, late)
        self._park(wants, platform)
        return True

    def _table_missing(self, unread: AccessError, end: End, platform: Platform, late: Callable[[], bool]) -> None:
        """An indirect table that cannot be read: ask, also for what the requests behind miss, or give the ring up."""
        wants: dict[Want, None] = {}
        missing([(unread.address, unread.length, Access.READ)], platform, wants)
        if not wants or platform.misses is None or any(platform.misses.refused(want) for want in wants):
            if platform.misses is not None:
                platform.tell(wants)
                platform.misses.forgive(wants)
            platform.counters.faults += 1
            raise unread
        look_ahead(self._device, self.index, self._unfinished, end, platform, wants, late)
        self._park(wants, platform)

    def _park(self, wants: Iterable[Want], platform: Platform) -> None:
        """Ask for ``wants``, and do nothing until no answer to them is due: a front end gives one after the other, and
        to look at each of them would cost more than it brings."""
        self.parked = True
        self.awaited = list(wants)
        platform.counters.waits += 1
        platform.ask(self.awaited)

    # -- finding it

    def _find(self, platform: Platform) -> End | None:
        """The ring, if all its parts can be reached now; else they are asked for. `ProtocolError`: no way."""
        if self.address is None or not self.size:
            raise ProtocolError("started without addresses or size")
        if self.inflight is not None and self.inflight.entries < self.size:
            raise ProtocolError(
                f"what is in flight has room for {self.inflight.entries} entries, wanted the ring's {self.size}"
            )
        parts = ring_parts(
            self.address,
            self.size,
            None if platform.iotlb is not None else platform.ram,
            packed=self._device.has(Feature.RING_PACKED),
        )
        wants: dict[Want, None] = {}
        missing(parts, platform, wants)
        if wants:
            if platform.misses is None:
                where = ", ".join(f"0x{at:x}" for at, _, _ in parts)
                raise ProtocolError(f"its parts at {where} cannot be reached, and there is nobody to ask")
            self.parked = True
            self.awaited = []
            self.stuck = {want for want in wants if platform.misses.refused(want)}
            if not self.stuck:
                self._park(wants, platform)
            return None
        if self._end is None:
            self._end = self._make([at for at, _, _ in parts], platform)
        return self._end

    def _make(self, where: Sequence[int], platform: Platform) -> End:
        """The ring's end in Python, and the native one where there is a table of translations."""
        packed = self._device.has(Feature.RING_PACKED)
        event_idx, indirect = self._device.has(Feature.RING_EVENT_IDX), self._device.has(Feature.RING_INDIRECT_DESC)
        space, notes = platform.space, self.inflight
        end: End
        if packed:
            assert not isinstance(notes, Inflight), "the host takes notes of the other kind away"
            end, left = packed_end(space, where, self.size, self.base, notes, event_idx=event_idx, indirect=indirect)
        else:
            assert not isinstance(notes, PackedInflight), "the host takes notes of the other kind away"
            # What a worker left is known better than any file could say.
            word = None if self._unfinished.ours else notes
            end, left = split_end(space, where, self.size, self.base, word, event_idx=event_idx, indirect=indirect)
        if self._unfinished.ours:
            self._unfinished.note_in(notes)
        else:
            self._unfinished.found(left)
            platform.counters.resumed += len(left)
        if platform.radix is not None:
            self._drain = native_end(platform.radix, where, self.size, notes, self._device)
        return end
