# SPDX-License-Identifier: Apache-2.0
"""What a sequence of steps brought out, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

Step = tuple[str | int, ...]
"""A name and numbers (or hexadecimal bytes): `steps.STEPS` says what they mean."""

CRASH: Final = "crash"
"""The process ended by a signal, a sanitizer or a panic, or where it should have gone on listening."""
HANG: Final = "hang"
"""It answers no new front end in time."""
STRAY: Final = "stray"
"""It wrote to memory that it was not granted."""
LOST: Final = "lost"
"""A valid request, made in a valid state, was never used; or was used twice, or one that there was not."""
KINDS: Final = (CRASH, STRAY, HANG, LOST)


@dataclass(frozen=True, slots=True)
class Finding:
    """``kind`` is one of `KINDS`, ``seen`` what was seen, ``steps`` what brings it out, of a fresh process."""

    kind: str
    seen: str
    steps: list[Step] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """What the back end printed last."""
    sequence: int = -1
    """The number of the sequence that it was found in."""
    again: bool = False
    """Whether it came again, of a fresh process."""
