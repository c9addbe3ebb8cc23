# SPDX-License-Identifier: Apache-2.0
"""Making a sequence that brings something out as short, and its numbers as plain, as that still does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from virtiova.fuzz.findings import Step

Still = Callable[[Sequence[Step]], bool]
"""Whether a sequence still brings it out."""


class Minimiser:
    """Delta debugging: ``still`` is asked until no part can go, or ``seconds`` are over."""

    def __init__(self, still: Still, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._still = still
        self._clock = clock
        self._end = clock() + seconds
        self.tries = 0

    def shorten(self, steps: Sequence[Step]) -> list[Step]:
        """The first step, which is the set-up, and as few of the others as are needed, with plain numbers."""
        setup, *rest = steps
        rest = self._drop([setup], rest)
        kept = self._plain([setup, *rest])
        return [kept[0], *self._drop(kept[:1], kept[1:])]

    def _try(self, steps: Sequence[Step]) -> bool:
        if self._clock() >= self._end:
            return False
        self.tries += 1
        return self._still(steps)

    def _drop(self, head: list[Step], rest: list[Step]) -> list[Step]:
        size = max(1, len(rest))
        while rest:
            at = len(rest)
            gone = False
            # From the end: what comes last is most often of no use any more.
            while at > 0:
                first = max(0, at - size)
                shorter = rest[:first] + rest[at:]
                if self._try([*head, *shorter]):
                    rest, gone = shorter, True
                at = first
            if size == 1 and not gone:
                break
            size = max(1, size // 2)
        return rest

    def _plain(self, steps: list[Step]) -> list[Step]:
        for index, (name, *numbers) in enumerate(steps):
            for place, number in enumerate(numbers):
                for plainer in _plainer(number):
                    candidate: Step = (name, *numbers[:place], plainer, *numbers[place + 1 :])
                    if self._try([*steps[:index], candidate, *steps[index + 1 :]]):
                        numbers[place] = plainer
                        steps = [*steps[:index], candidate, *steps[index + 1 :]]
                        break
        return steps


def _plainer(number: str | int) -> list[str | int]:
    if isinstance(number, str):
        return []
    return [plain for plain in (0, 1, number & (1 << max(0, number.bit_length() - 1))) if plain < number]
