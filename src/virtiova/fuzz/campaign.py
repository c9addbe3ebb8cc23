# SPDX-License-Identifier: Apache-2.0
"""A campaign: many sequences of one seed, in pieces that can be played anywhere, until something is found."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from virtiova.errors import MachineError
from virtiova.fuzz.findings import HANG, LOST, Finding, Step
from virtiova.fuzz.generate import sequence
from virtiova.fuzz.minimise import Minimiser
from virtiova.fuzz.play import Player
from virtiova.machine.backend import BackEnd
from virtiova.run.executor import Done, Executor

PIECE: Final = 25
"""Sequences in one task: a second or two."""
MINIMISE_SECONDS: Final = 20.0
_TIMES: Final = 3
_HURRY: Final = 0.7
"""Seconds that are waited while a sequence is made short; the outcome is looked at with all patience."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Sequences ``first`` to ``first + count - 1`` of ``seed``, none begun after ``until`` (seconds of this piece)."""

    backend: BackEnd
    seed: int
    first: int
    count: int
    seconds: float
    minimise: float = MINIMISE_SECONDS
    """Seconds for making short what is found."""


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a piece: how much was done, and what was found, made short, if anything was."""

    sequences: int
    steps: int
    unfit: int
    finding: Finding | None = None


def play(piece: Piece) -> Played:
    """Play a piece, up to the first finding that can be seen again. `MachineError` if the back end does not come up."""
    end = time.monotonic() + piece.seconds
    played = 0
    rare: Finding | None = None
    with Player(piece.backend) as player:
        for number in range(piece.first, piece.first + piece.count):
            if played and time.monotonic() >= end:
                break
            found = player.play(sequence(piece.seed, number))
            played += 1
            if found is None:
                continue
            player.drop()
            found = confirmed(piece.backend, replace(found, sequence=number), piece.minimise)
            if found is not None and found.again:
                return Played(played, player.steps, player.unfit, found)
            # Seen once: what can be seen again is worth more, if there is something.
            rare = rare or found
        return Played(played, player.steps, player.unfit, rare)


def confirmed(backend: BackEnd, found: Finding, seconds: float = MINIMISE_SECONDS) -> Finding | None:
    """The same, of a fresh process, and made short; None for a request or an answer that came the second time."""
    again = once(backend, found.steps, found.kind)
    if again is None:
        return None if found.kind in (HANG, LOST) else found
    shortest = again
    # One process for all tries that bring out nothing: the outcome is looked at of a fresh one.
    with Player(backend, _HURRY) as player:

        def still(steps: Sequence[Step]) -> bool:
            try:
                came = player.play(steps)
            except MachineError:
                # It did not come up again: what there was before has not ended yet, it may be.
                player.drop()
                return False
            return came is not None and came.kind == found.kind

        steps = Minimiser(still, seconds).shorten(found.steps)
    last = once(backend, steps, found.kind)
    if last is not None:
        shortest = last
    return replace(shortest, sequence=found.sequence, again=True)


def once(backend: BackEnd, steps: Sequence[Step], kind: str) -> Finding | None:
    """What ``steps`` bring out of a fresh process, if it is of that kind."""
    for _ in range(_TIMES):
        found = None
        with Player(backend) as player, contextlib.suppress(MachineError):
            found = player.play(steps)
        if found is not None and found.kind == kind:
            return found
    return None


def campaign(
    executor: Executor, backend: BackEnd, seed: int, seconds: float, sequences: int | None = None
) -> Generator[Done[Played], None, None]:
    """Pieces as they come, until the time is over, so many sequences are played, or the caller has seen enough."""
    end = time.monotonic() + seconds

    def pieces() -> Iterator[tuple[int, Piece]]:
        first = 0
        while (left := end - time.monotonic()) > 0 and (sequences is None or first < sequences):
            count = PIECE if sequences is None else min(PIECE, sequences - first)
            yield first, Piece(backend, seed, first, count, left)
            first += count

    yield from executor.run(play, pieces())
