# SPDX-License-Identifier: Apache-2.0
"""Lines for people, of which those whom they are about may not cause as many as they like."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from typing import Final

MAX_LINES: Final = 100
LINES_A_SECOND: Final = 5.0
"""Lines at once, and lines a second after that."""

Say = Callable[[str], None]


LONGEST_LINE: Final = 2048
"""Bytes of a line. A pipe that has room at all has room for that (POSIX: for PIPE_BUF, 4096 on Linux)."""


class Journal:
    """Lines on standard error that never wait for who reads it: what does not fit is lost, and counted."""

    def __init__(self) -> None:
        self._lost = 0

    def __call__(self, line: str) -> None:
        """Write ``line``, after how many were lost before it."""
        try:
            if self._full():
                self._lost += 1
                return
            before = f"virtiova: {self._lost} lines were lost: nobody took them\n" if self._lost else ""
            text = f"{before}virtiova: {line}"
            encoded = text.encode(errors="backslashreplace")
            if len(encoded) > LONGEST_LINE:
                text = encoded[:LONGEST_LINE].decode(errors="ignore") + "..."
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self._lost += 1
        else:
            self._lost = 0

    @staticmethod
    def _full() -> bool:
        """Whether a write to standard error would wait now."""
        try:
            fd = sys.stderr.fileno()
        except (OSError, ValueError, AttributeError):
            # Not a file at all: whoever put it there takes what it gets.
            return False
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        return not poll.poll(0)


log: Final = Journal()
"""A line on standard error, without waiting."""


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
