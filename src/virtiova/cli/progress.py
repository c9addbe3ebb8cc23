# SPDX-License-Identifier: Apache-2.0
"""What is being fetched, on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Progress:
    """One line on a terminal that says what is being fetched; shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown = ""

    def __call__(self, what: str, so_far: int, size: int) -> None:
        shown = f"{so_far / 1e6:.1f} of {size / 1e6:.1f} MB" if size else f"{so_far / 1e6:.1f} MB"
        line = f"fetching {what}: {shown}" if so_far else f"fetching {what}"
        with self._lock:
            if line != self._shown:
                self._shown = line
                sys.stderr.write(f"\r\x1b[K{line}")
                sys.stderr.flush()


def on_terminal() -> Callable[[str, int, int], None] | None:
    """A line on standard error, or nothing if that is no terminal."""
    return Progress() if sys.stderr.isatty() else None


def clear() -> None:
    """Take the line away."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
