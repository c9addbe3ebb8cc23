# SPDX-License-Identifier: Apache-2.0
"""A back end that is killed between any two of its stores, as in `test_serve_crash`, over a packed ring."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator

import pytest

from packed_serve_kit import INITIAL, PACKED, driver_of, segment, start
from serve_kit import PLAIN, WITH_BIT, FrontEnd
from test_serve_crash import DATA, EVENTS, STATUS, Driver, Steps, step
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.blk import Request as BlkRequest
from virtiova.errors import ProtocolError
from virtiova.ring.packed_driver import PackedDriver
from virtiova.serve import ends
from virtiova.serve.inflight_packed import PackedInflight
from virtiova.wire.vhost_user import InflightDescription, Request

__all__ = ["step"]

SIZE = 7
SLOTS = 3


class PackedGuest(Driver):
    """The same guest over a packed ring, in which three of its requests have room."""

    def __init__(self, step: Steps, features: int, total: int) -> None:
        super().__init__(step, features | PACKED, total)
        self.ring: PackedDriver | None = None
        self.slots: dict[int, int] = {}
        self.description = InflightDescription(0, 0, 1, SIZE)

    @contextlib.contextmanager
    def backend(self, base: int | None = None) -> Iterator[FrontEnd]:
        with FrontEnd(Blk(self.disk)) as end:
            os.ftruncate(self.ram, os.fstat(end.file).st_size)
            os.dup2(self.ram, end.file)
            os.dup2(self.call, end.call)
            end.negotiate(self.features)
            if self.ring is None:
                self.ring = driver_of(end, SIZE, self.features, file=self.ram)
            if self.file is None:
                (answer,) = end.send(Request.GET_INFLIGHT_FD, self.description.encode())
                self.description = InflightDescription.decode(answer.payload)
                (self.file,) = answer.fds
            end.ok(Request.SET_INFLIGHT_FD, self.description.encode(), (self.file,))
            # QEMU knows no better after a back end died: nothing in the ring says where it stood.
            start(end, SIZE, INITIAL if base is None else base)
            yield end

    def offer(self, end: FrontEnd) -> None:
        assert self.ring is not None
        kick = False
        while self.offered < self.total and len(self.pending) < SLOTS:
            number, self.offered = self.offered, self.offered + 1
            slot = min(set(range(SLOTS)) - set(self.slots.values()))
            at = DATA + 0x400 * slot
            end.put(at, struct.pack("<IIQ", BlkRequest.OUT, 0, number) + struct.pack("<Q", number) * 64)
            end.put(STATUS + slot, b"\xee")
            parts = [segment(end, at, 16 + SECTOR, False), segment(end, STATUS + slot, 1, True)]
            head = self.ring.add(parts)
            self.pending[head], self.slots[head] = number, slot
            kick = self.ring.publish() or kick
        if kick:
            end.host.rounds.kicked(0)

    def reap(self, end: FrontEnd) -> bool:
        try:
            os.eventfd_read(self.call)
        except BlockingIOError:
            return False
        assert self.ring is not None
        while (used := self.ring.poll()) is not None:
            slot = self.slots.pop(used.head)
            assert end.get(STATUS + slot, 1) == b"\0"
            self.completed.append(self.pending.pop(used.head))
            end.put(DATA + 0x400 * slot, struct.pack("<IIQ", BlkRequest.OUT, 0, 63) + b"POISON!!" * 64)
        return True


@contextlib.contextmanager
def guest_of(step: Steps, features: int, total: int) -> Iterator[PackedGuest]:
    guest = PackedGuest(step, features, total)
    try:
        yield guest
        guest.check()
    finally:
        step.limit(None)
        guest.close()


MODES = pytest.mark.parametrize("features", [PLAIN, WITH_BIT | EVENTS], ids=["plain", "bit 33, event index"])


@MODES
@pytest.mark.sweep
def test_killed_before_each_of_its_stores(step: Steps, features: int) -> None:
    with guest_of(step, features, 11) as guest:
        assert not guest.live(None)
        most = step.done
    for last in range(most):
        with guest_of(step, features, 11) as guest:
            assert guest.live(last)
            assert not guest.live(None)


@MODES
def test_killed_before_any_of_its_stores(step: Steps, features: int) -> None:
    """Every other one of them; the sweep has all."""
    with guest_of(step, features, 7) as guest:
        assert not guest.live(None)
        most = step.done
    assert most > 7 * 15
    for last in range(features & EVENTS > 0, most, 2):
        with guest_of(step, features, 7) as guest:
            assert guest.live(last)
            assert not guest.live(None)


def test_killed_again_while_it_picks_up_the_pieces(step: Steps) -> None:
    """The second one dies at each of its stores, too, for each end of the first: as far as one request goes."""
    for first, second in itertools.product(range(0, 44, 4), range(1, 30, 2)):
        with guest_of(step, PLAIN | EVENTS, 3) as guest:
            guest.live(first)
            guest.live(second)
            assert not guest.live(None)


def test_killed_all_the_time(step: Steps) -> None:
    """As often as it takes, with always a few stores more than to begin one request."""
    with guest_of(step, PLAIN, 30) as guest:
        while guest.live(45):
            assert guest.killed < 300
        assert guest.killed > 15


def test_a_reset_that_nobody_told_of(step: Steps) -> None:
    """The notes are of another driver's ring: this one has a fresh ring, and its own first requests."""
    guest = PackedGuest(step, PLAIN, 2)
    try:
        assert guest.live(60)
        step.limit(None)
        with FrontEnd(Blk(guest.disk)) as end:
            os.pwrite(guest.ram, bytes(0x8000), 0)
            os.dup2(guest.ram, end.file)
            os.dup2(guest.call, end.call)
            end.negotiate(guest.features)
            assert guest.file is not None
            guest.ring, guest.pending, guest.slots, guest.completed, guest.offered = None, {}, {}, [], 0
            guest.ring = driver_of(end, SIZE, guest.features, file=guest.ram)
            end.ok(Request.SET_INFLIGHT_FD, guest.description.encode(), (guest.file,))
            start(end, SIZE)
            guest.run(end)
            assert guest.completed == [0, 1]
            assert end.host.counters.resumed == 0
    finally:
        step.limit(None)
        guest.close()


MUTANTS = {
    "what is given back is not noted": (PackedInflight, "end", None),
    "what was half done is taken for done": (PackedInflight, "_commit", None),
    "the place in the ring is the front end's to know": (ends, "packed_end", "base"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_would_be_seen(step: Steps, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """Each of these is needed: for some end of the first back end the second goes wrong without it."""
    where, name, instead = MUTANTS[mutant]
    if instead == "base":
        original = ends.packed_end

        def naive(space, where, size, base, notes, **features):  # type: ignore[no-untyped-def]
            return original(space, where, size, base, None, **features)

        monkeypatch.setattr("virtiova.serve.rings.packed_end", naive)
        monkeypatch.setattr(PackedInflight, "begin", lambda *_: None)
        monkeypatch.setattr(PackedInflight, "end", lambda *_: None)
    else:
        monkeypatch.setattr(where, name, lambda *_: instead)
    failures = 0
    for last in range(0, 90, 3):
        guest = PackedGuest(step, PLAIN, 7)
        try:
            guest.live(last)
            guest.live(None)
            guest.check()
        except (AssertionError, KeyError, ProtocolError):
            failures += 1
        finally:
            step.limit(None)
            guest.close()
    assert failures
