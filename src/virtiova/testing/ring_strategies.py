# SPDX-License-Identifier: Apache-2.0
"""Strategies for rings, chains, and histories of two ends that take turns in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from virtiova.testing.ring_ends import Act, Add, Begin, Push, RingHistory, RingStep, Some
from virtiova.testing.ring_world import Way

Kind = Literal["split", "packed"]
KINDS: Final[tuple[Kind, ...]] = ("split", "packed")
SPLIT_SIZES: Final = (1, 2, 4, 8, 16)
PACKED_SIZES: Final = (1, 2, 3, 7, 8, 16)
_LENGTHS: Final = st.lists(st.integers(1, 120), max_size=4).map(tuple)
_FLAGS: Final = st.booleans()
_WAYS: Final[SearchStrategy[Way]] = st.sampled_from(["direct", "platform"])


def chains() -> SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The lengths in bytes of a request's readable buffers, and of its writable ones; at least one buffer in all."""
    return st.tuples(_LENGTHS, _LENGTHS).filter(any)


def rings(
    kinds: Sequence[Kind] = KINDS,
    *,
    sizes: Sequence[int] | None = None,
    event_idx: bool | None = None,
    in_order: bool = False,
    big: bool = False,
    starts: Sequence[int] = (0,),
    ways: SearchStrategy[Way] = _WAYS,
) -> SearchStrategy[Begin]:
    """Rings of these kinds, of all sorts: a `Begin` each. ``event_idx``: any if None. ``starts``: where they go on."""

    def of_kind(kind: Kind) -> SearchStrategy[Begin]:
        packed = kind == "packed"
        return st.builds(
            Begin,
            packed=st.just(packed),
            size=st.sampled_from(sizes or (PACKED_SIZES if packed else SPLIT_SIZES)),
            order=st.just("big" if big else "little"),
            event_idx=_FLAGS if event_idx is None else st.just(event_idx),
            in_order=st.just(in_order),
            used_align=st.sampled_from((4, 4096) if big else (4,)),
            start=st.sampled_from(starts),
            way=ways,
            reach=st.sampled_from(["mapped", "verbs"]),
        )

    return st.one_of([of_kind(kind) for kind in kinds])


Decode = Callable[[int, int], RingStep]
"""A step, by two bytes."""


def any_add(one: int, other: int) -> RingStep:
    """A request, of up to three buffers of each sort."""
    return Add(_lengths(one & 3, other), _lengths(one >> 2 & 3, other + 1), bool(one >> 4 & 1))


def direct(one: int, other: int) -> RingStep:
    """The same, not through a table."""
    return any_add(one & 15, other)


def indirect(one: int, other: int) -> RingStep:
    """The same, through a table."""
    return any_add(one | 16, other)


def _lengths(count: int, first: int) -> tuple[int, ...]:
    return tuple(1 + (first + 37 * number) % 120 for number in range(count))


def small(_one: int, _other: int) -> RingStep:
    """A request of two buffers."""
    return Add((3,), (5,))


def single(_one: int, _other: int) -> RingStep:
    """A request of one buffer."""
    return Add((), (7,))


def push(one: int, other: int) -> RingStep:
    """One of those at hand, with up to 510 bytes."""
    return Push(one % 16, 2 * other)


def act(what: str) -> Decode:
    """Something without numbers."""
    return lambda _one, _other: Act(what)


def some(what: str) -> Decode:
    """Something up to 12 times."""
    return lambda one, _other: Some(what, 1 + one % 12)


def histories(begin: SearchStrategy[Begin], *steps: Decode) -> SearchStrategy[RingHistory]:
    """A ring, and what is done at it: any of these steps, in any order."""

    def made(first: Begin, chunks: Sequence[bytes]) -> RingHistory:
        raw = b"".join(chunks)
        return [first, *(steps[raw[n] % len(steps)](raw[n + 1], raw[n + 2]) for n in range(0, len(raw), 3))]

    # To draw a step for itself takes ten times as long as to do it.
    chunk = st.binary(min_size=24, max_size=24)
    return st.builds(made, begin, st.lists(chunk, min_size=1, max_size=6))


FLOW: Final = (act("publish"), some("pop"), push, some("poll"))


def ring_histories(
    kinds: Sequence[Kind] = KINDS, *, put_back: bool = False, notify: bool = False
) -> SearchStrategy[RingHistory]:
    """Any history of a ring of these kinds: a `Begin`, and then `Add`, `Act`, `Some` and `Push`, some dozens."""
    steps: list[Decode] = [any_add, any_add, small, *FLOW, act("overfill")]
    steps += [some("put_back")] if put_back else []
    steps += [act("sleep"), act("stay_awake"), act("interrupt")] if notify else []
    return histories(rings(kinds), *steps)
