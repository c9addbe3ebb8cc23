# SPDX-License-Identifier: Apache-2.0
"""Work for executors in tests. A module of its own, and a light one: every worker imports it."""

from __future__ import annotations

import os
import signal
import time


def work(task: str) -> str:
    """Do what a task says."""
    verb, _, rest = task.partition(" ")
    if verb == "raise":
        raise ValueError(rest)
    if verb == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "exit":
        os._exit(int(rest))
    if verb == "hang":
        time.sleep(60)
    return f"{rest} done"


def pid(_: str) -> int:
    """Who does the work."""
    return os.getpid()
