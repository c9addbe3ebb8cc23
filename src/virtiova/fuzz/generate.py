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


def sequence(seed: int, number: int) -> list[Step]:
    """Sequence ``number``: half of them are of good steps only, so that every request of theirs is to be used."""
    rng = random.Random(f"virtiova {seed} {number}")
    good_only = rng.random() < 0.5
    setup: Step = (
        SETUP,
        int(rng.random() < 0.8),
        int(rng.random() < 0.3),
        rng.choice(_SIZES),
        rng.choice([0, 0, 0, 1, 2, 4, 7]),
        int(rng.random() < 0.15),
    )
    kinds = {name: kind for name, kind in STEPS.items() if kind.good or not good_only}
    names, weights = list(kinds), [kind.weight for kind in kinds.values()]
    chosen = rng.choices(names, weights, k=rng.randint(_SHORTEST, _LONGEST))
    return [setup, *((name, *kinds[name].draw(rng)) for name in chosen)]
