# SPDX-License-Identifier: Apache-2.0
"""Whether others had the processors: time that our two sides were ready to run and did not, as the kernel counts it.

``schedstat`` has three numbers: time on a processor, time spent waiting for one, time slices (kernel,
``Documentation/scheduler/sched-stats.rst``).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

_SHARE: Final = 0.1
"""Of a slice of time, that may be waited for a processor: a wake-up costs a little, too."""
_Times = dict[str, tuple[int, int]]
"""Nanoseconds on a processor, and waiting for one, by thread."""


class Waits:
    """This thread, and all threads of process ``pid`` (0: none), which have one processor between them.

    If it ``shares``, all but one of its threads are on the front end's: then these are no others.
    """

    def __init__(self, pid: int, *, shares: bool = False) -> None:
        self.pid = pid
        self._shares = shares
        self._front, self._back = _times("/proc", ["thread-self"]), self._threads()
        self.waited = 0
        """Nanoseconds in all."""
        self.looked = 0
        """Nanoseconds that were looked at."""

    def look(self) -> None:
        """Begin here."""
        self._front, self._back = _times("/proc", ["thread-self"]), self._threads()

    def quiet(self, nanoseconds: int) -> bool:
        """Whether neither side had to wait for others for long during these last ``nanoseconds``."""
        front, back = self._front, self._back
        self.look()
        lost = _waited(front, self._front, nanoseconds)
        if self._shares:
            ran = sorted(runs - back.get(thread, (runs, 0))[0] for thread, (runs, _) in self._back.items())
            lost = max(0, lost - sum(ran[:-1]))
        waited = lost + _waited(back, self._back, nanoseconds)
        self.waited += waited
        self.looked += nanoseconds
        return waited < _SHARE * nanoseconds

    def _threads(self) -> _Times:
        folder = f"/proc/{self.pid}/task"
        if self.pid:
            with contextlib.suppress(OSError):
                return _times(folder, os.listdir(folder))
        return {}


def _waited(before: _Times, now: _Times, nanoseconds: int) -> int:
    """What one side lost to others: as long as the thread that waited longest did, but not while another one of its own
    ran."""
    ran = longest = 0
    for thread, (runs, waits) in now.items():
        # A thread that is new has not waited for long, or is one of many that come and go.
        runs_before, waits_before = before.get(thread, (runs, waits))
        ran += runs - runs_before
        longest = max(longest, waits - waits_before)
    return max(0, min(longest, nanoseconds - ran))


def _times(folder: str, names: list[str]) -> _Times:
    found: _Times = {}
    for name in names:
        # A thread that has ended, or a kernel that does not count.
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"{folder}/{name}/schedstat", "rb") as file:
            runs, waits, *_ = file.read().split()
            found[name] = int(runs), int(waits)
    return found
