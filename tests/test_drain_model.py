# SPDX-License-Identifier: Apache-2.0
"""The native end of a ring against its twin in Python: the same requests, memory, interrupts, notes, and errors."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from native_kit import PLACES, POOL, RIGHTS, TAME, Touch, World
from ring_storm import PAGE, RING
from virtiova.addr import Access
from virtiova.ring.layout import PackedLayout, SplitLayout
from virtiova.serve.platform import MAX_PAGES

touches = st.builds(
    Touch, st.sampled_from([0, 1, 15, 16, 17, 5000]), st.integers(0, 600), st.integers(0, 9000), st.booleans()
)


class Twins(RuleBasedStateMachine):
    """Whatever front end and driver do, honest or not."""

    packed = False

    @initialize(
        size=st.sampled_from([1, 2, 8, 8, 64]),
        odd=st.integers(0, 1),
        shift=st.sampled_from([0, 0, 0, PAGE - 16, PAGE - 64, PAGE - 160, 2 * PAGE - 64]),
        index=st.sampled_from([0, 0, 1, 65530]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        noted=st.booleans(),
    )
    def begin(self, size: int, odd: int, shift: int, index: int, event_idx: bool, indirect: bool, noted: bool) -> None:
        self.tame = True
        layout: SplitLayout | PackedLayout = SplitLayout(size)
        if self.packed:
            layout = PackedLayout(size + odd)
            index = index & 1 << 15 | index % layout.size
        self.worlds = [
            World(layout, RING + shift, index, event_idx=event_idx, indirect=indirect, native=native, noted=noted)
            for native in (False, True)
        ]
        for place in PLACES:
            self.answer(place, RIGHTS.get(place, Access.RW))

    @rule(place=st.sampled_from(PLACES), access=st.sampled_from([Access.READ, Access.WRITE, Access.RW, Access.RW]))
    def answer(self, place: int, access: Access) -> None:
        for world in self.worlds:
            world.answer(place, access)

    @rule(place=st.sampled_from(PLACES))
    def take_back(self, place: int) -> None:
        for world in self.worlds:
            world.iotlb.invalidate(place, PAGE)

    @rule()
    def forget_the_native_table(self) -> None:
        for world in self.worlds:
            world.iotlb.radix.clear()

    @rule(seed=st.integers(0, 1 << 32), tame=st.booleans(), odd=st.booleans(), event=st.integers(0, 0xFFFF))
    def offer(self, seed: int, tame: bool, odd: bool, event: int) -> None:
        rng = random.Random(seed)
        size = self.worlds[0].layout.size
        self.tame = tame
        pool = TAME if tame else POOL
        table, indirect = b"".join(rng.choices(pool, k=size)), b"".join(rng.choices(pool, k=4))
        heads = [rng.randrange(size + odd) for _ in range(size)]
        more = rng.choice([size + 1, rng.getrandbits(16)]) if odd and rng.random() < 0.3 else rng.randrange(size + 1)
        if rng.random() < 0.5:
            event = (self.worlds[0].twin.next_used + rng.randrange(-2, 3) ^ rng.getrandbits(1) << 15) & 0xFFFF
        for world in self.worlds:
            world.offer(table, heads, more, event, indirect)

    @rule(touch=touches, count=st.integers(1, 8))
    def serve(self, touch: Touch, count: int) -> None:
        # A hostile driver's buffers are its rings, too: what a request writes there is seen by those taken after it.
        for _ in range(1 if self.tame else count):
            one, other = self.worlds
            came = other.serve(touch, count if self.tame else 1)
            assert one.serve(touch, count if self.tame else 1, other.batches) == came

    @rule(where=st.integers(0, 66), value=st.sampled_from([0, 1, 2, 7, 8, 63, 64, 0xFFFF]))
    def scribble_into_notes(self, where: int, value: int) -> None:
        for world in self.worlds:
            world.scribble(where, value)

    @rule(chains=st.integers(1, 40))
    def missing(self, chains: int) -> None:
        """What is asked for is what Python would ask for; at what looks odd to it the native end stops."""
        python, native = self.worlds
        if native.known() and (said := native.missing(chains)) is not None:
            wants = python.missing(chains)
            assert wants is not None
            # Where so much is wanted both stop somewhere.
            assert said.keys() <= wants.keys() or min(len(said), len(wants)) >= MAX_PAGES // 2

    @rule()
    def interrupt(self) -> None:
        one, other = (world.interrupt() for world in self.worlds)
        assert one == other

    @rule()
    def quiet(self) -> None:
        for world in self.worlds:
            world.quiet()

    @rule()
    def arm(self) -> None:
        one, other = (world.arm() for world in self.worlds)
        assert one == other

    @invariant()
    def same(self) -> None:
        if hasattr(self, "worlds"):
            one, other = self.worlds
            assert one.twin.state == other.twin.state
            assert one.bytes() == other.bytes()


class PackedTwins(Twins):
    """The same over packed rings."""

    packed = True


FEW = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestTwins = Twins.TestCase
TestTwins.settings = FEW
TestPackedTwins = PackedTwins.TestCase
TestPackedTwins.settings = FEW


def test_what_is_missing_is_found_natively_as_a_rule() -> None:
    rng = random.Random(3)
    found = agreed = 0
    for turn in range(200):
        layout = PackedLayout(8) if turn % 2 else SplitLayout(8)
        python, native = (
            World(layout, RING, 0, event_idx=True, indirect=True, native=native) for native in (False, True)
        )
        table, indirect = (b"".join(rng.choices(TAME, k=count)) for count in (8, 4))
        gone = rng.choice(PLACES[2:])
        for world in (python, native):
            for place in PLACES:
                world.answer(place, RIGHTS.get(place, Access.RW))
            world.offer(table, list(range(8)), 8, 0, indirect)
            world.iotlb.invalidate(gone, PAGE)
        wants = python.missing(33)
        found += bool(wants)
        if (said := native.missing(33)) is not None:
            assert wants is not None
            assert said.keys() <= wants.keys()
            agreed += said == wants
    assert found > 50
    assert agreed >= found // 2, (agreed, found)
