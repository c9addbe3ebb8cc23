# SPDX-License-Identifier: Apache-2.0
"""A second judge of cells, from their JSON alone: written apart from the first, so that both must be wrong alike.

It works the way a reader with the JSON and a pencil would: write down which page each part of the payload was on,
and look that up in a table. Nothing of virtiova is imported here.
"""

from __future__ import annotations

from typing import Any, Final

Json = dict[str, Any]

NOWHERE: Final = ""
# What the letters of a payload's pages mean. Any other set of letters is two answers at once.
_MEANING: Final = {
    frozenset({"A"}): "translated",
    frozenset({"C"}): "stale",
    frozenset({"B"}): "around",
    frozenset({NOWHERE}): "nothing",
}
_CONTROL: Final = {
    frozenset({"A"}): "bypass",
    frozenset({"B"}): "direct",
}


def judge_again(cell: Json) -> str:
    """The path, from one element of ``cells``."""
    evidence: Json = cell["evidence"]
    # An experiment that makes no sense on a device predicts nothing of it.
    if cell["predicted"] == [] and cell["address"] == "unknown":
        return "n/a"
    said_no = evidence["features_ok"] is False and not evidence["carried_on"]
    if evidence["refused_by_machine"] or said_no:
        return "refused"
    payload = _letters_by_part(evidence)
    if not payload or evidence["note"] or _alone(cell["experiment"], evidence):
        return "unknown"
    meaning = _MEANING.get(frozenset(payload.values()), "mixed")
    if meaning == "nothing":
        # Stopped on the way to the payload, but not on the way to the ring.
        if "B" in _letters_of_structures(evidence) and _front(evidence) != "direct":
            return "mixed"
        return "blocked" if evidence["live"] else "unknown"
    if meaning == "mixed":
        return "mixed"
    around = meaning == "around"
    if any((letter == "B") != around for letter in _letters_of_structures(evidence)):
        return "mixed"
    return _front(evidence) if around else meaning


def _alone(experiment: str, evidence: Json) -> bool:
    """Is the question about other devices, and did those not do their part?"""
    others = evidence.get("neighbours", [])
    if experiment == "at-once":
        idle = [other for other in others if not other["done"] or other["pages"] == []]
        return bool(idle) or sum(other["under_way"] for other in others) == 0
    return experiment == "others-page" and [other["pages"] for other in others if other["done"]] != [["A"]]


def _letters_by_part(evidence: Json) -> dict[str, str]:
    """Part of the payload -> the letters of the pages it was on, in order; empty if on none of them."""
    letters: dict[str, str] = {}
    for witness in evidence["witnesses"]:
        part = "via" if witness["role"][:4] == "via-" else witness["role"]
        if part in {"data", "data2", "via"}:
            letters.setdefault(part, NOWHERE)
            if _changed(witness) and witness["page"] not in letters[part]:
                letters[part] += witness["page"]
    for number, delivery in enumerate(evidence["deliveries"]):
        letters[f"delivery {number}"] = _letters_read(delivery)
    return letters


def _letters_read(delivery: Json) -> str:
    """Which page each 16 bytes that arrived were on; a question mark for those that were on none."""
    arrived = bytes.fromhex(delivery["arrived"])
    letters: set[str] = set()
    for start in range(0, len(arrived), 16):
        piece = arrived[start : start + 16]
        on = [page for page, held in delivery["pages"].items() if piece in _in_pieces(bytes.fromhex(held))]
        letters.update(on or "?")
    return "" if letters <= {"?"} else "".join(sorted(letters))


def _in_pieces(held: bytes) -> list[bytes]:
    return [held[start : start + 16] for start in range(0, len(held), 16)]


def _letters_of_structures(evidence: Json) -> list[str]:
    """Which copy of a ring or table the device was seen to use."""
    letters = []
    for witness in filter(_changed, evidence["witnesses"]):
        if witness["role"] in {"ring", "driver"}:
            letters.append(witness["page"])
        if witness["role"].startswith("via-"):
            letters += witness["role"][4:]
    return letters


def contradictions(cell: Json) -> list[str]:
    """Which of the two halves of ``sides``, as predicted, is not what was seen: of a cell that is mixed, for any other
    has given its answer with the path."""
    if "sides" not in cell or judge_again(cell) != "mixed":
        return []
    seen = ways(cell["evidence"])
    return sorted(half for half in seen if seen[half] != cell["sides"][half])


def ways(evidence: Json) -> dict[str, str]:
    """Which way the payload went, and which the rings and tables."""
    structures = "".join(_letters_of_structures(evidence))
    return {"payload": _way([*_letters_by_part(evidence).values()]), "structures": _way([structures])}


def _way(parts: list[str]) -> str:
    letters = "".join(parts)
    if not letters:
        return "nowhere"
    if "" in parts or "?" in letters:
        return "partly"
    bare = letters.count("B")
    return {0: "through", len(letters): "around"}.get(bare, "both ways")


def _front(evidence: Json) -> str:
    """Around what? The control says."""
    if evidence["control"] == "machine":
        return "direct"
    seen = frozenset(w["page"] for w in evidence["witnesses"] if w["role"] == "control" and _changed(w))
    return _CONTROL.get(seen, "unknown")


def _changed(witness: Json) -> bool:
    return bytes.fromhex(witness["before"]) != bytes.fromhex(witness["after"])


def complaints(cell: Json) -> list[str]:
    """What is wrong with the evidence itself: whoever judges again must be able to rely on it."""
    evidence: Json = cell["evidence"]
    found = []
    homes: dict[tuple[str, str], set[int]] = {}
    for witness in evidence["witnesses"]:
        name = f"{witness['role']} {witness['page']}"
        if not witness["before"] or len(witness["before"]) != len(witness["after"]):
            found.append(f"{name}: before and after are of different lengths, or empty")
        if witness["gpa"] % 4096 or not 0 <= witness["offset"] < 4096:
            found.append(f"{name}: no page and offset")
        homes.setdefault((witness["role"], witness["page"]), set()).add(witness["gpa"])
    for role in {role for role, _ in homes}:
        pages = [gpa for (of, _), gpas in homes.items() if of == role for gpa in gpas]
        if len(pages) != len(set(pages)) or len(pages) < 2:
            found.append(f"{role}: its pages are not told apart")
    bare = homes.get(("data", "B"))
    if bare is not None and bare != {evidence["x"] & ~4095}:
        found.append("page B is not where the bare address points")
    for delivery in evidence["deliveries"]:
        if len(set(delivery["pages"].values())) != len(delivery["pages"]) or len(delivery["pages"]) < 2:
            found.append("two pages held the same bytes")
        if delivery["gpas"].keys() != delivery["pages"].keys() or delivery["gpas"]["B"] != evidence["x"]:
            found.append("the pages that were read are not where they should be")
    if evidence["live"].startswith("fault record") and not any(fault["raw"] for fault in evidence["faults"]):
        found.append("a fault is the proof of life, and there is no fault")
    if cell["observed"] == "unknown" and not (evidence["note"] or evidence["witnesses"] or evidence["deliveries"]):
        found.append("no answer, and not a word why")
    return found
