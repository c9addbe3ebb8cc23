# SPDX-License-Identifier: Apache-2.0
"""Findings that are not to count: ``ID``, ``ID@device`` or ``ID@machine/device``, with a reason for each in a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from virtiova.errors import UsageError
from virtiova.result.scan import Scan, ScanFinding

_SPEC: Final = re.compile(r"(?P<id>[^@\s]+)(?:@(?P<device>\S+))?")
_LONGEST: Final = 1 << 20
"""Bytes of a file of them."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """One of them. ``device`` is empty where it is about all; ``said`` is where it was said, for messages."""

    id: str
    device: str
    reason: str
    said: str

    def __str__(self) -> str:
        return f"{self.id}@{self.device}" if self.device else self.id

    def covers(self, finding: ScanFinding) -> bool:
        """Is that finding one of those?"""
        names = ("", finding.device, f"{finding.machine}/{finding.device}")
        return self.id == finding.id and self.device in names


def option(word: str, ids: Collection[str]) -> Ignore:
    """``--ignore``. Raises `UsageError` for what is none, and for an id that does not exist."""
    return _parsed(word, "", f"--ignore {word}", ids)


def lines(data: bytes, name: str, ids: Collection[str]) -> Iterator[Ignore]:
    """Those of a file: one a line, the reason after it, comments after ``#`` at a line's start."""
    if len(data) > _LONGEST:
        raise UsageError(f"{name}: more than {_LONGEST} bytes of findings to ignore")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not text in UTF-8 (byte {error.start})") from error
    for number, line in enumerate(text.splitlines(), 1):
        word, reason = [*line.split(maxsplit=1), "", ""][:2]
        if word and not word.startswith("#"):
            yield _parsed(word, reason.strip(), f"{name}:{number}", ids)


def _parsed(word: str, reason: str, said: str, ids: Collection[str]) -> Ignore:
    found = _SPEC.fullmatch(word)
    if found is None:
        raise UsageError(f"{said}: {word!r} is not of the form ID or ID@DEVICE")
    if found["id"] not in ids:
        error = UsageError.unknown("finding", found["id"], ids)
        raise UsageError(f"{said}: {error}")
    return Ignore(found["id"], found["device"] or "", reason or said, said)


def apply(scan: Scan, ignores: Sequence[Ignore]) -> list[Ignore]:
    """Mark the findings that they are about; the first that covers one gives the reason. Those that are about none are
    returned."""
    used: set[Ignore] = set()
    if not ignores:
        return []
    by_id: dict[str, list[Ignore]] = {}
    for each in ignores:
        by_id.setdefault(each.id, []).append(each)
    for number, finding in enumerate(scan.findings):
        covering = [each for each in by_id.get(finding.id, ()) if each.covers(finding)]
        used.update(covering)
        if covering and not finding.ignored:
            scan.findings[number] = replace(finding, ignored=covering[0].reason)
    return [each for each in ignores if each not in used]
