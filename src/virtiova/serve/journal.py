# SPDX-License-Identifier: Apache-2.0
"""Lines for people, of which those whom they are about may not cause as many as they like."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Final

MAX_LINES: Final = 100
LINES_A_SECOND: Final = 5.0
"""Lines at once, and lines a second after that."""

Say = Callable[[str], None]


def log(line: str) -> None:
    """A line on standard error. If nobody takes it, it is lost."""
    with contextlib.suppress(OSError):
        print(f"virtiova: {line}", file=sys.stderr, flush=True)


class Throttle:
    """``say``, but `LINES_A_SECOND` in the long run: a front end has no right to fill a disk with lines."""

    def __init__(self, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._credit = float(MAX_LINES)
        self._then = clock()
        self._left_out = 0

    def __call__(self, line: str) -> None:
        """Say ``line``, or count it as left out."""
        now = self._clock()
        self._credit = min(float(MAX_LINES), self._credit + (now - self._then) * LINES_A_SECOND)
        self._then = now
        if self._credit < 1:
            self._left_out += 1
            return
        self._credit -= 1
        if self._left_out:
            self._say(f"{self._left_out} lines were left out here")
            self._left_out = 0
        self._say(line)
