# SPDX-License-Identifier: Apache-2.0
"""Sequences of steps from a seed: the same seed and number give the same sequence, everywhere."""

from __future__ import annotations

import random
from typing import Final

from virtiova.fuzz import wrong
from virtiova.fuzz.findings import Step
from virtiova.fuzz.steps import STEPS

__all__ = ["SETUP", "sequence", "wrong"]

SETUP: Final = "setup"
"""The name of the first step: bit 33 (0 or 1), packed (0 or 1), entries, what is left of the ring's features, and
whether regions are added one by one."""
_SIZES: Final = (8, 8, 16, 64, 256)
_SHORTEST, _LONGEST = 4, 40


_WRONG: Final = (
    ("offer", "desc", "avail", "poke", "table-poke"),
    ("iotlb", "refuse", "forget", "hold"),
    ("message",),
    ("offer", "desc", "avail", "iotlb", "message", "bytes", "back"),
)
"""Kinds of wrong steps that go together: one that closes the connection leaves the others no time."""
_OFTEN: Final = 0.35
"""How many of the steps of a wrong sequence are wrong."""


def sequence(seed: int, number: int) -> list[Step]:
    """Sequence ``number``: half of them are of good steps only, so that every request of theirs is to be used."""
    rng = random.Random(f"virtiova {seed} {number}")
    setup: Step = (
        SETUP,
        int(rng.random() < 0.8),
        int(rng.random() < 0.3),
        rng.choice(_SIZES),
        rng.choice([0, 0, 0, 1, 2, 4, 7]),
        int(rng.random() < 0.15),
    )
    good = [name for name, kind in STEPS.items() if kind.good]
    weights = [STEPS[name].weight for name in good]
    wrong_ones: tuple[str, ...] = () if rng.random() < 0.5 else rng.choice(_WRONG)
    steps = [setup]
    for _ in range(rng.randint(_SHORTEST, _LONGEST)):
        if wrong_ones and rng.random() < _OFTEN:
            name = rng.choices(wrong_ones, [STEPS[each].weight for each in wrong_ones])[0]
        else:
            name = rng.choices(good, weights)[0]
        steps.append((name, *STEPS[name].draw(rng)))
    return steps
