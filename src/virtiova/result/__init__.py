# SPDX-License-Identifier: Apache-2.0
"""What is said of a device, as data: declared, predicted and observed, never merged.

Everything here is plain and serialisable: bytes are lower-case hex strings, addresses are integers.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from virtiova.addr import AddressKind

if TYPE_CHECKING:
    from virtiova.result.cases import CaseEvidence, CaseResult, Verdict
    from virtiova.result.cells import Cell, Delivery, Evidence, FaultRecord, Neighbour, Row, System, Witness

__all__ = [
    "NO_ANSWER", "SCHEMA", "CaseEvidence", "CaseResult", "Cell", "Delivery", "Evidence", "FaultRecord", "Neighbour",
    "Path", "Prediction", "Reason", "Row", "Side", "Sides", "System", "Verdict", "Witness", "path_order",
]  # fmt: skip

SCHEMA: Final = "virtiova/probe/1"


class Path(enum.StrEnum):
    """Where the bytes went."""

    TRANSLATED = "translated"
    """Through the mapping of the IOMMU in front."""
    BYPASS = "bypass"
    """An IOMMU is in front and was gone around."""
    DIRECT = "direct"
    """Nothing is in front."""
    STALE = "stale"
    """Through a mapping that was already taken away."""
    MIXED = "mixed"
    """Ring and data, or two parts of a buffer, differ."""
    BLOCKED = "blocked"
    """Nothing arrived, and the device was shown to be alive."""
    REFUSED = "refused"
    """FEATURES_OK was refused, or the machine refused the device."""
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "n/a"


class Side(enum.StrEnum):
    """Which way something went at the IOMMU in front."""

    THROUGH = "through"
    AROUND = "around"
    BOTH = "both ways"
    PARTLY = "partly"
    """Not all of it was reached, or something else arrived as well."""
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Sides:
    """What `Path.MIXED` leaves open: which side the payload took, and which the rings and tables that led there."""

    payload: Side
    structures: Side


NO_ANSWER: Final = frozenset({Path.UNKNOWN, Path.NOT_APPLICABLE})


@dataclass(frozen=True, slots=True)
class Reason:
    """One link of a chain: the rule that was applied, its answer, and the sentence it rests on."""

    rule: str
    answer: bool
    text: str
    citation: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the rule and the specification allow, and why."""

    address: AddressKind
    paths: frozenset[Path]
    reasons: tuple[Reason, ...]
    dma_ops: str = "direct"
    sides: Sides | None = None
    """Where `Path.MIXED` is among the paths: which way round."""


def path_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order of the vocabulary."""
    rank = {p: i for i, p in enumerate(Path)}
    return sorted(paths, key=rank.__getitem__)


def __getattr__(name: str) -> Any:
    """What experiments and cases are said with comes from its own file, when it is first asked for: a scan needs none
    of it, and starts the sooner."""
    if name.startswith("__") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from virtiova.result import cases, cells

    for module in (cells, cases):
        if hasattr(module, name):
            globals()[name] = found = getattr(module, name)
            return found
    raise AttributeError(name)
