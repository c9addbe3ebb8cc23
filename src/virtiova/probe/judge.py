# SPDX-License-Identifier: Apache-2.0
"""Judging: from evidence to a path. A pure function that never prints, and asks nobody else.

The only witness that counts is memory. Neither the used ring's length nor the device's status byte is looked at.
"""

from __future__ import annotations

from virtiova.result import Delivery, Evidence, Path, Prediction, Side, Sides

_SIDE = {"A": Side.THROUGH, "C": Side.THROUGH, "B": Side.AROUND}
_PIECE = 32
"""Hex digits of 16 bytes."""


def judge(evidence: Evidence) -> Path:
    """Where the bytes went, as far as the evidence shows."""
    if evidence.refused_by_machine or (evidence.features_ok is False and not evidence.carried_on):
        return Path.REFUSED
    if evidence.note:
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
    side = _SIDE[page]
    if any(_SIDE[other] != side for other in _structures(evidence)):
        return Path.MIXED
    if page == "A":
        return Path.TRANSLATED
    if page == "C":
        return Path.STALE
    front = translating(evidence)
    if front is None:
        return Path.UNKNOWN
    return Path.BYPASS if front else Path.DIRECT


def sides(evidence: Evidence) -> Sides:
    """Which side the payload took, and which the rings and tables, as far as the evidence shows."""
    return Sides(_side(_payload(evidence)), _side([_structures(evidence)]))


def _side(parts: list[set[str]]) -> Side:
    pages = {page for part in parts for page in part}
    if not pages:
        return Side.NOWHERE
    if not all(parts) or not pages <= _SIDE.keys():
        return Side.PARTLY
    found = {_SIDE[page] for page in pages}
    return found.pop() if len(found) == 1 else Side.BOTH


def disagreements(evidence: Evidence, prediction: Prediction) -> list[str]:
    """What the path does not say, and the prediction does not allow: a payload that is mixed the other way round."""
    wanted = prediction.sides
    if wanted is None or judge(evidence) is not Path.MIXED:
        return []
    seen = sides(evidence)
    pairs = (("payload", seen.payload, wanted.payload), ("rings and tables", seen.structures, wanted.structures))
    return [f"{what}: {found}, predicted {side}" for what, found, side in pairs if found is not side]


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
    via = [w for w in evidence.witnesses if w.role.startswith("via-")]
    if via:
        parts.append({w.page for w in via if w.touched})
    for delivery in evidence.deliveries:
        parts.append(_held(delivery))
    return parts


def _held(delivery: Delivery) -> set[str]:
    """The pages of which something arrived; ``?`` beside them if something else did, too.

    Paint repeats every 16 bytes and names its page, so that a part of a page is told as well as all of it.
    """
    arrived = _pieces(delivery.arrived)
    held = {page: _pieces(text) for page, text in delivery.pages.items()}
    found = {page for page, pieces in held.items() if arrived & pieces}
    known = set().union(*held.values())
    return found | {"?"} if found and not arrived <= known else found


def _pieces(text: str) -> set[str]:
    return {text[at : at + _PIECE] for at in range(0, len(text), _PIECE)}


def _structures(evidence: Evidence) -> set[str]:
    """The copies of ring and table that the device used: written to, or read, as its payload betrays."""
    touched = [w for w in evidence.witnesses if w.touched]
    written = {w.page for w in touched if w.role in ("ring", "driver")}
    return written | {copy for w in touched if w.role.startswith("via-") for copy in w.role.removeprefix("via-")}
