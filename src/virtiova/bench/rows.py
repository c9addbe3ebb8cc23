# SPDX-License-Identifier: Apache-2.0
"""What came out, as data: a row per subject, setting and figure, and whether the run can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

SCHEMA: Final = "virtiova/bench/1"
Bench = Literal["blk", "net", "iotlb", "guest", "vfio"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a figure was measured with. ``mappings`` is 0 without bit 33; where there are more than ``pages``, which
    are host pages, several mappings share one. Of ``vfio`` ``pages`` are those of one mapping, and ``depth`` mappings
    are taken back at once. A field that has no meaning for a figure is 0 or empty."""

    mappings: int = 0
    pages: int = 0
    depth: int = 0
    front: Literal["poll", "sleep", ""] = ""
    """``poll`` or ``sleep``: what the front end does while it waits."""
    ring: Literal["split", "packed"] = "split"

    @property
    def bit(self) -> bool:
        """Whether bit 33 was negotiated."""
        return self.mappings > 0


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio is to be, at least or at most."""

    value: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        """Whether it is."""
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: its samples are one a round. None of ``low mid high`` if there are none, and ``note`` says why.

    A ratio is made of the samples of the same round; ``beside`` is whose, and ``beside_setting`` with what, if not the
    same.
    """

    bench: Bench
    subject: str
    setting: Setting
    figure: str
    unit: str
    samples: tuple[float, ...] = ()
    note: str = ""
    beside: str = ""
    beside_setting: Setting | None = None
    target: Target | None = None

    @property
    def mid(self) -> float | None:
        """The median."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def low(self) -> float | None:
        """The least."""
        return min(self.samples) if self.samples else None

    @property
    def high(self) -> float | None:
        """The most."""
        return max(self.samples) if self.samples else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or nothing to say."""
        return None if self.target is None or self.mid is None else self.target.met(self.mid)

    @property
    def spread(self) -> float:
        """(most - least) / median."""
        if len(self.samples) < 2 or not self.mid:
            return 0.0
        return (max(self.samples) - min(self.samples)) / self.mid


@dataclass(slots=True)
class Trust:
    """What speaks against a run."""

    waited: int = 0
    """Nanoseconds that our two sides waited for a processor that somebody else had."""
    looked: int = 0
    stolen: float = 0.0
    """The share of the processors' time that the hypervisor kept."""
    disturbed: int = 0
    """Samples in which less than half of the time was quiet."""
    samples: int = 0
    reasons: list[str] = field(default_factory=list)
    """What was known before: one processor, for one."""

    def verdict(self, rows: Iterable[Row]) -> list[str]:
        """Why the run is not to be trusted; empty if nothing speaks against it."""
        rows = list(rows)
        found = list(self.reasons)
        if self.samples and self.disturbed > _DISTURBED * self.samples:
            share = 100 * self.waited / max(1, self.looked)
            found.append(
                f"others had the processors during more than half of the time of {self.disturbed} of {self.samples} "
                f"samples (waited for one: {share:.0f} % of the time)"
            )
        if self.stolen > _STOLEN:
            found.append(f"the hypervisor kept {100 * self.stolen:.0f} % of the processors' time")
        wide = [row for row in rows if row.unit not in ("x",) and row.figure in _STEADY and len(row.samples) > 2]
        spread = [row for row in wide if row.spread > _SPREAD]
        if wide and len(spread) > _DISTURBED * len(wide):
            found.append(f"{len(spread)} of {len(wide)} figures have a spread of more than {100 * _SPREAD:.0f} %")
        most = max((len(row.samples) for row in rows), default=0)
        failed = [row for row in wide if len(row.samples) < most and row.note]
        if failed:
            found.append(f"{len(failed)} of {len(wide)} figures lack rounds that failed")
        if most < _FEWEST:
            found.append(f"fewer than {_FEWEST} rounds: nothing is known of the spread")
        return found


_FEWEST: Final = 3
"""Samples of a figure that can say how steady it is."""
_DISTURBED: Final = 0.2
_STOLEN: Final = 0.05
_SPREAD: Final = 1.0
"""(most - least) / median of a figure that is not steady."""
_STEADY: Final = ("requests/s", "pair")


@dataclass(frozen=True, slots=True)
class Document:
    """All of a run. ``about`` says on what and how it was measured, ``against`` what speaks against it."""

    rows: Sequence[Row]
    about: Sequence[str]
    against: Sequence[str]
