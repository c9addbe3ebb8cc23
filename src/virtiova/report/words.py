# SPDX-License-Identifier: Apache-2.0
"""Evidence and states in words: what a reader wants to know of a cell, in one line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from virtiova.addr import hexaddr
from virtiova.result import Path

if TYPE_CHECKING:
    from virtiova.result import Cell, Evidence, Witness

VERDICTS: Final = (
    "as predicted",
    "not as predicted",
    "a known departure of the product",
    "unknown",
    "not applicable",
)


def verdict(cell: Cell) -> str:
    """What a cell comes to, one of `VERDICTS`."""
    if cell.mismatch:
        return VERDICTS[2] if cell.explained else VERDICTS[1]
    if cell.observed is Path.UNKNOWN:
        return VERDICTS[3]
    return VERDICTS[4] if cell.observed is Path.NOT_APPLICABLE else VERDICTS[0]


# What we say of a back end beside what it says itself.
_OUR_WORDS: Final = re.compile(
    r"back end: (offers|does not offer) bit 33$|back end: does not say what|QEMU (refused to start with|was asked for)"
    r"|SET_FEATURES 0x[0-9a-f]+, \d+ MISS"
)
_LAST: Final = 3
_QUOTED: Final = 200
WAYS: Final = {
    Path.TRANSLATED: "through the IOMMU, as its tables say",
    Path.BYPASS: "around the IOMMU, whose tables are set up: the quirk",
    Path.DIRECT: "straight to memory: nothing in front translates",
    Path.STALE: "through an old mapping, already replaced or taken away",
    Path.MIXED: "partly through the IOMMU and partly around it",
    Path.BLOCKED: "nowhere: the access was stopped, and the device is alive",
    Path.REFUSED: "nowhere: the features, or the device itself, were refused",
    Path.UNKNOWN: "nobody saw where",
    Path.NOT_APPLICABLE: "not asked",
}


def way(cell: Cell) -> str:
    """Where the bytes went, in words for whoever does not know ours."""
    return WAYS[cell.observed]


def plain(text: str) -> str:
    """Text of somebody else's (QEMU's, a device's), fit for a terminal: no control characters, no escapes."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def machine(cell: Cell) -> str:
    """The machine's name; of a booted guest the platform's, as only that says what the kernel was told."""
    return cell.evidence.inside.get("platform", cell.machine)


def iommu(cell: Cell) -> str:
    """The IOMMU, with what it was told."""
    return ",".join(filter(None, (cell.iommu, cell.iommu_options)))


def told(cell: Cell) -> str:
    """The device, with what it was told besides bit 33."""
    return ",".join(filter(None, (cell.device, cell.device_options)))


def device(cell: Cell) -> str:
    """The same; among several in one machine with its number before it."""
    return f"{cell.number}/{len(cell.beside) + 1} {told(cell)}" if cell.number else told(cell)


def bit33(cell: Cell) -> str:
    """Bit 33 as declared: what the device offered and what came of it."""
    if cell.offered is None:
        return "-"
    if not cell.offered:
        return "[not offered]"
    return "on" if cell.accepted else "[offered, not taken]"


def evidence_text(cell: Cell) -> str:
    """What was seen, in one line."""
    return plain(_evidence_text(cell))


def _evidence_text(cell: Cell) -> str:
    evidence = cell.evidence
    if cell.observed is Path.NOT_APPLICABLE:
        return evidence.note
    if evidence.refused_by_machine:
        return f"QEMU: {_last(evidence.words)}"
    if cell.observed is Path.REFUSED:
        return "FEATURES_OK cleared by the device"
    if evidence.note:
        return f"{evidence.note}{_quoted(evidence.note, evidence.words)}"
    if evidence.outside:
        return "; ".join([*cell.disagreements, evidence.outside.get("seen", "")])
    pages = _pages(evidence)
    if cell.observed is Path.UNKNOWN:
        return f"{pages}; nothing shows whether {_doubt(evidence)}"
    if cell.observed is Path.MIXED:
        return "; ".join([f"{pages}{_rings(evidence)}", *cell.disagreements])
    fault = ", no fault" if cell.observed is Path.BYPASS and not evidence.faults else ""
    live = f"; {evidence.live}" if cell.observed is Path.BLOCKED else ""
    busy = sum(neighbour.under_way for neighbour in evidence.neighbours)
    others = f"; {busy} {'other' if busy == 1 else 'others'} under way" if busy else ""
    return f"{pages}{fault}{live}{others}"


def _rings(evidence: Evidence) -> str:
    """The used rings that were written: what a payload that went another way differs from. Where the experiment is
    about the ring they have been named."""
    if any(witness.role.startswith("via-") for witness in evidence.witnesses):
        return ""
    written = [w for w in evidence.witnesses if w.role == "ring" and w.touched]
    return "".join(f"; used ring {w.page} {hexaddr(w.gpa)} written" for w in written)


def _doubt(evidence: Evidence) -> str:
    reached = any(w.touched for w in evidence.witnesses if w.role != "control")
    return "an IOMMU is in front" if reached else "the device is alive"


def _pages(evidence: Evidence) -> str:
    """Which pages were written or read, and which were not."""
    parts = [_delivery(evidence)] if evidence.deliveries else []
    roles = sorted({w.role for w in evidence.witnesses} - {"control"})
    payload = [role for role in roles if role.startswith("data")]
    for role in payload:
        parts.append(_role([w for w in evidence.witnesses if w.role == role]))
    if any(role.startswith("via-") for role in roles):
        parts += _via(evidence)
    return ", ".join(part for part in parts if part) or "no page touched"


def _role(witnesses: list[Witness]) -> str:
    written = [w for w in witnesses if w.touched]
    if not written:
        names = " and ".join(f"page {w.page} {hexaddr(w.gpa)}" for w in witnesses)
        return f"{names} untouched"
    said = " and ".join(f"page {w.page} {hexaddr(w.gpa)}" for w in written) + " written"
    spared = [w for w in witnesses if not w.touched and w.page != "B"]
    if any(w.page == "B" for w in written) and spared:
        said += ", " + " and ".join(f"page {w.page}" for w in spared) + " untouched"
    return said


def _via(evidence: Evidence) -> list[str]:
    """Of experiments on rings and tables: which copies the device read, and which used ring it wrote."""
    pages = [w for w in evidence.witnesses if w.role.startswith("via-") and w.touched]
    copies = sorted({w.role.removeprefix("via-") for w in pages})
    rings = [w for w in evidence.witnesses if w.role == "ring" and w.touched]
    said = [f"copy {copy} obeyed" for copy in copies]
    said += [f"used ring {w.page} {hexaddr(w.gpa)} written" for w in rings]
    return said + [f"page {w.page} {hexaddr(w.gpa)} written" for w in pages]


def _delivery(evidence: Evidence) -> str:
    said = []
    for delivery in evidence.deliveries:
        pages = [page for page, held in delivery.pages.items() if held == delivery.arrived]
        if pages:
            read = " and ".join(f"page {page} {hexaddr(delivery.gpas.get(page, 0))}" for page in pages)
            others = sorted(delivery.pages.keys() - set(pages))
            spared = f", page {' and '.join(others)} not read" if pages == ["B"] and others else ""
            said.append(f"{read} read{spared}")
        elif delivery.arrived and not delivery.arrived.strip("0"):
            said.append("zeros arrived")
        else:
            said.append("something else arrived" if delivery.arrived else "nothing arrived")
    return ", ".join(said)


def _last(words: list[str]) -> str:
    return words[-1] if words else "ended without a word"


def _quoted(note: str, words: list[str]) -> str:
    """The last words of what died, unless the note has them."""
    said = [line for line in words if not _OUR_WORDS.match(line)]
    if not said or said[-1].removeprefix("back end: ")[:_QUOTED] in note:
        return ""
    return f"; it said: {'; '.join(line[:_QUOTED] for line in said[-_LAST:])}"
