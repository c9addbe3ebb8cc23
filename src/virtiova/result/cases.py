# SPDX-License-Identifier: Apache-2.0
"""The result of a conformance case, and what it saw."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from virtiova.result.cells import Witness


class Verdict(enum.StrEnum):
    """The result of a conformance case."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"
    """No answer, or one that one reading of the specification allows and another does not."""
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, slots=True)
class CaseEvidence:
    """What a conformance case saw."""

    seen: str
    """In one sentence."""
    readings: list[str] = field(default_factory=list)
    """Where the specification can be read in two ways: both."""
    witnesses: list[Witness] = field(default_factory=list)
    """The pages that were looked at last, as in `Evidence`."""
    asked: list[str] = field(default_factory=list)
    """What the back end asked for: the last misses, oldest first."""
    words: list[str] = field(default_factory=list)
    """What it said itself, and what there is to say of the connection."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One conformance case, asked of one back end. ``citation`` is the sentence that it rests on."""

    machine: str
    device: str
    product: str
    case: str
    title: str
    result: Verdict
    citation: str
    evidence: CaseEvidence

    @property
    def unanswered(self) -> bool:
        """Whether it was not even asked, or did not get as far: nobody knows. Two readings are an answer."""
        return self.result is Verdict.UNKNOWN and not self.evidence.readings
