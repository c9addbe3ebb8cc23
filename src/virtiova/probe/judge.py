# SPDX-License-Identifier: Apache-2.0
"""Judging: from evidence to a path. A pure function that never prints, and asks nobody else.

The only witness that counts is memory. Neither the used ring's length nor the device's status byte is looked at.
"""

from __future__ import annotations

from virtiova.result import Evidence, Path

_THROUGH = {"A": "through", "C": "through", "B": "around"}


def judge(evidence: Evidence) -> Path:
    """Where the bytes went, as far as the evidence shows."""
    if evidence.refused_by_machine or (evidence.features_ok is False and not evidence.carried_on):
        return Path.REFUSED
    if evidence.note and not evidence.witnesses and not evidence.deliveries:
        return Path.UNKNOWN
    parts = _payload(evidence)
    reached = [part for part in parts if part]
    if not parts:
        return Path.UNKNOWN
    if not reached:
        if "B" in _structures(evidence) and translating(evidence) is not False:
            # The payload was stopped, the ring was not: it went around.
            return Path.MIXED
        return Path.BLOCKED if evidence.live else Path.UNKNOWN
    pages = {page for part in reached for page in part}
    if len(pages) > 1 or len(reached) != len(parts):
        return Path.MIXED
    (page,) = pages
    side = _THROUGH[page]
    if any(_THROUGH[other] != side for other in _structures(evidence)):
        return Path.MIXED
    if page == "A":
        return Path.TRANSLATED
    if page == "C":
        return Path.STALE
    front = translating(evidence)
    if front is None:
        return Path.UNKNOWN
    return Path.BYPASS if front else Path.DIRECT


def translating(evidence: Evidence) -> bool | None:
    """Did the control go through an IOMMU? None if there was no control, or it was not seen anywhere."""
    if evidence.control == "machine":
        return False
    touched = {w.page for w in evidence.witnesses if w.role == "control" and w.touched}
    if len(touched) != 1:
        return None
    return touched == {"A"}


def _payload(evidence: Evidence) -> list[set[str]]:
    """For each part of the payload, the pages that the device reached."""
    roles = {w.role for w in evidence.witnesses if w.role in ("data", "data2")}
    parts = [{w.page for w in evidence.witnesses if w.role == role and w.touched} for role in sorted(roles)]
    via = [w for w in evidence.witnesses if w.role in ("via-A", "via-B")]
    if via:
        parts.append({w.page for w in via if w.touched})
    for delivery in evidence.deliveries:
        parts.append({page for page, held in delivery.pages.items() if held == delivery.arrived})
    return parts


def _structures(evidence: Evidence) -> set[str]:
    """The copies of ring and table that the device used: written to, or read, as its payload betrays."""
    touched = [w for w in evidence.witnesses if w.touched]
    ring = {w.page for w in touched if w.role == "ring"}
    return ring | {w.role.removeprefix("via-") for w in touched if w.role.startswith("via-")}
