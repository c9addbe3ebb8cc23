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


class Waits:
    """This thread and all threads of process ``pid`` (0: none)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._before = 0
        self.waited = 0
        """Nanoseconds in all."""
        self.looked = 0
        """Nanoseconds that were looked at."""

    def look(self) -> None:
        """Begin here."""
        self._before = self._sum()

    def quiet(self, nanoseconds: int) -> bool:
        """Whether neither side had to wait for long during these last ``nanoseconds``."""
        now = self._sum()
        waited, self._before = max(0, now - self._before), now
        self.waited += waited
        self.looked += nanoseconds
        return waited < _SHARE * nanoseconds

    def _sum(self) -> int:
        total = _wait("/proc/thread-self/schedstat")
        if self.pid:
            folder = f"/proc/{self.pid}/task"
            with contextlib.suppress(OSError):
                total += sum(_wait(f"{folder}/{thread}/schedstat") for thread in os.listdir(folder))
        return total


def _wait(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        # A thread that has ended, or a kernel that does not count.
        return 0
