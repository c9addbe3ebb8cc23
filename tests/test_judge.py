# SPDX-License-Identifier: Apache-2.0
"""Judging: every path from hand-made evidence, what must not count, and a second judge that has to agree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge_again import complaints, contradictions, judge_again, ways
from probe_kit import KINDS, VARIANTS, model_cells, qemu_cells
from virtiova import probe
from virtiova.addr import AddressKind
from virtiova.policy import Facts, Payload
from virtiova.probe.cell import filled, names
from virtiova.probe.judge import judge, sides, translating
from virtiova.probe.rig import Outcome
from virtiova.report.json import document
from virtiova.report.words import evidence_text
from virtiova.result import Cell, Delivery, Evidence, FaultRecord, Path, Side, Sides, Witness

X = 0x00A0_0000
HOMES = {"A": 0x0080_0000, "B": X, "C": 0x0081_0000}
PAINT = {page: f"page {page}".encode().hex() for page in HOMES}
ALIVE = "the same request completed once the page was mapped"


def witness(role: str, page: str, *, touched: bool, after: str = "5a" * 6) -> Witness:
    shift = {"data2": 0x1000, "ring": 0x2000, "control": 0x3000, "via-B": 0x4000}.get(role, 0)
    return Witness(role, page, HOMES[page] + shift, 0, PAINT[page], after if touched else PAINT[page])


def seen(role: str, pages: str, candidates: str = "AB") -> list[Witness]:
    """Both homes of something; those in ``pages`` were written to."""
    return [witness(role, page, touched=page in pages) for page in candidates]


def evidence(*groups: Sequence[Witness], control: str = "msi-x", **fields: object) -> Evidence:
    base = Evidence(x=X, transfer="write", features_ok=True, control=control)
    return replace(base, witnesses=[w for group in groups for w in group], **fields)  # type: ignore[arg-type]


def delivered(arrived: str) -> Delivery:
    return Delivery("data", arrived, {page: PAINT[page] for page in "AB"}, {page: HOMES[page] for page in "AB"})


TRANSLATING, NOT_TRANSLATING, SILENT = seen("control", "A"), seen("control", "B"), seen("control", "")

CASES = {
    "page A": (evidence(seen("data", "A"), seen("ring", "A"), TRANSLATING), Path.TRANSLATED),
    "page A, though no control was seen": (evidence(seen("data", "A"), control="none"), Path.TRANSLATED),
    "page B behind an IOMMU": (evidence(seen("data", "B"), seen("ring", "B"), TRANSLATING), Path.BYPASS),
    "page B, IOMMU off": (evidence(seen("data", "B"), seen("ring", "B"), NOT_TRANSLATING), Path.DIRECT),
    "page B, no IOMMU in the machine": (evidence(seen("data", "B"), control="machine"), Path.DIRECT),
    "page B, no control": (evidence(seen("data", "B"), control="none"), Path.UNKNOWN),
    "page B, the control is silent": (evidence(seen("data", "B"), SILENT), Path.UNKNOWN),
    "page B, the control contradicts itself": (evidence(seen("data", "B"), seen("control", "AB")), Path.UNKNOWN),
    "the page before the change": (evidence(seen("data", "C", "ABC"), seen("ring", "A"), TRANSLATING), Path.STALE),
    "the page before the change, ring around": (evidence(seen("data", "C", "ABC"), seen("ring", "B")), Path.MIXED),
    "old and new page": (evidence(seen("data", "AC", "ABC")), Path.MIXED),
    "both pages": (evidence(seen("data", "AB"), TRANSLATING), Path.MIXED),
    "two halves differ": (evidence(seen("data", "A"), seen("data2", "B"), TRANSLATING), Path.MIXED),
    "one half is missing": (evidence(seen("data", "A"), seen("data2", ""), TRANSLATING), Path.MIXED),
    "both halves through": (evidence(seen("data", "A"), seen("data2", "A"), TRANSLATING), Path.TRANSLATED),
    "both halves around": (evidence(seen("data", "B"), seen("data2", "B"), TRANSLATING), Path.BYPASS),
    "data through, used ring around": (evidence(seen("data", "A"), seen("ring", "B")), Path.MIXED),
    "data around, used ring through": (evidence(seen("data", "B"), seen("ring", "A"), TRANSLATING), Path.MIXED),
    "copy A obeyed": (evidence(seen("via-A", "A"), seen("via-B", ""), seen("ring", "A"), TRANSLATING), Path.TRANSLATED),
    "copy B obeyed": (evidence(seen("via-A", ""), seen("via-B", "B"), seen("ring", "B"), TRANSLATING), Path.BYPASS),
    "copy B read, data through": (evidence(seen("via-A", ""), seen("via-B", "A"), TRANSLATING), Path.MIXED),
    "copy A read, data around": (evidence(seen("via-A", "B"), seen("via-B", ""), TRANSLATING), Path.MIXED),
    "page A arrived": (evidence(TRANSLATING, deliveries=[delivered(PAINT["A"])]), Path.TRANSLATED),
    "page B arrived": (evidence(TRANSLATING, deliveries=[delivered(PAINT["B"])]), Path.BYPASS),
    "page B arrived, IOMMU off": (evidence(NOT_TRANSLATING, deliveries=[delivered(PAINT["B"])]), Path.DIRECT),
    "page A arrived, ring around": (evidence(seen("ring", "B"), deliveries=[delivered(PAINT["A"])]), Path.MIXED),
    "zeros arrived": (evidence(TRANSLATING, deliveries=[delivered("00" * 6)]), Path.UNKNOWN),
    "zeros arrived, alive": (evidence(TRANSLATING, deliveries=[delivered("00" * 6)], live=ALIVE), Path.BLOCKED),
    "nothing arrived": (evidence(TRANSLATING, deliveries=[delivered("")]), Path.UNKNOWN),
    "silence": (evidence(seen("data", ""), seen("ring", ""), TRANSLATING), Path.UNKNOWN),
    "silence but for the used ring": (evidence(seen("data", ""), seen("ring", "A"), TRANSLATING), Path.UNKNOWN),
    "nothing, but alive": (evidence(seen("data", ""), seen("ring", ""), TRANSLATING, live=ALIVE), Path.BLOCKED),
    "reached, and alive as well": (evidence(seen("data", "B"), TRANSLATING, live=ALIVE), Path.BYPASS),
    "no evidence at all": (Evidence(), Path.UNKNOWN),
    "only a word": (Evidence(note="QEMU ended in the middle"), Path.UNKNOWN),
    "only a word, and alive": (Evidence(note="QEMU ended in the middle", live=ALIVE), Path.UNKNOWN),
    "nothing was watched, though alive": (Evidence(live=ALIVE), Path.UNKNOWN),
    "only the used ring was watched": (evidence(seen("ring", "A"), TRANSLATING, live=ALIVE), Path.UNKNOWN),
    "FEATURES_OK refused": (Evidence(features_ok=False), Path.REFUSED),
    "carried on, and blocked": (
        evidence(seen("data", ""), TRANSLATING, features_ok=False, carried_on=True, live=ALIVE),
        Path.BLOCKED,
    ),
    "carried on, and served": (
        evidence(seen("data", "A"), TRANSLATING, features_ok=False, carried_on=True),
        Path.TRANSLATED,
    ),
    "the machine would not start": (Evidence(refused_by_machine=True, note="refused"), Path.REFUSED),
    "legacy: no FEATURES_OK": (evidence(seen("data", "B"), TRANSLATING, features_ok=None), Path.BYPASS),
}


@pytest.mark.parametrize(("given_evidence", "path"), CASES.values(), ids=CASES.keys())
def test_each_path(given_evidence: Evidence, path: Path) -> None:
    assert judge(given_evidence) is path


@pytest.mark.parametrize(("given_evidence", "path"), CASES.values(), ids=CASES.keys())
def test_the_second_judge_on_the_same(given_evidence: Evidence, path: Path) -> None:
    assert judge_again(as_json([as_cell(given_evidence)])[0]) == path


def test_every_path_has_a_case() -> None:
    assert {path for _, path in CASES.values()} == set(Path) - {Path.NOT_APPLICABLE}


@pytest.mark.parametrize("given_evidence", [e for e, _ in CASES.values()], ids=CASES.keys())
def test_what_the_device_says_of_itself_does_not_count(given_evidence: Evidence) -> None:
    """Status, faults, words and the used length are for the reader. Memory judges."""
    fault = FaultRecord(X, True, 0x100, "no write permission", [X, 1 << 63])
    path = judge(given_evidence)
    for status, faults, words in itertools.product((None, 0, 0xF, 0x4F), ([], [fault]), ([], ["all is well"])):
        assert judge(replace(given_evidence, status=status, faults=faults, words=words)) is path
    for used in ("00000000", "00020000", "ffffffff"):
        changed = [
            replace(w, after=w.after[:-8] + used) if w.role == "ring" and w.touched else w
            for w in given_evidence.witnesses
        ]
        assert judge(replace(given_evidence, witnesses=changed)) is path


def test_the_control_is_looked_at_alone() -> None:
    assert translating(evidence(TRANSLATING)) is True
    assert translating(evidence(NOT_TRANSLATING)) is False
    assert translating(evidence(SILENT)) is None
    assert translating(evidence(seen("control", "AB"))) is None
    assert translating(evidence(seen("data", "A"), seen("ring", "A"))) is None
    assert translating(evidence(control="machine")) is False


# -- which way round ---------------------------------------------------------------------------------------------------

# What the rule says of a physical address inside a request, and four ways of being mixed that it does not allow.
_HELD = {page: (PAINT[page] * 3)[:32] * 2 for page in "AB"}
WIDE = Delivery("data", _HELD["B"][:32] + "11" * 16, _HELD, {page: HOMES[page] for page in "AB"})
RIGHT = evidence(seen("data", "B"), seen("ring", "A"), TRANSLATING)
WRONG = {
    "the other way round": (
        evidence(seen("data", "A"), seen("ring", "B"), TRANSLATING),
        Sides(Side.THROUGH, Side.AROUND),
        ["payload: through, predicted around", "rings and tables: around, predicted through"],
    ),
    "both pages": (
        evidence(seen("data", "AB"), seen("ring", "A"), TRANSLATING),
        Sides(Side.BOTH, Side.THROUGH),
        ["payload: both ways, predicted around"],
    ),
    "ring around, and nothing": (
        evidence(seen("data", ""), seen("ring", "B"), TRANSLATING),
        Sides(Side.NOWHERE, Side.AROUND),
        ["payload: nowhere, predicted around", "rings and tables: around, predicted through"],
    ),
    "another page of the driver's": (
        evidence(seen("data", ""), seen("ring", "A"), seen("driver", "B"), TRANSLATING),
        Sides(Side.NOWHERE, Side.BOTH),
        ["payload: nowhere, predicted around", "rings and tables: both ways, predicted through"],
    ),
    "half of it": (
        evidence(seen("data", "B"), seen("data2", ""), seen("ring", "A"), TRANSLATING),
        Sides(Side.PARTLY, Side.THROUGH),
        ["payload: partly, predicted around"],
    ),
    "something else beside it": (
        evidence(seen("ring", "A"), TRANSLATING, deliveries=[WIDE]),
        Sides(Side.PARTLY, Side.THROUGH),
        ["payload: partly, predicted around"],
    ),
}
PHYSICAL = (Payload.PAGE_NUMBER, Payload.BLOCK, Payload.REGION, Payload.MAP_TARGET)


def payload_cell(payload: Payload, of: Evidence) -> Cell:
    facts = Facts(True, True, payload=payload)
    return filled(names("q35", "intel", "virtio-balloon-pci", "made up"), Outcome(facts, of))


@pytest.mark.parametrize("payload", PHYSICAL)
def test_the_payload_around_and_the_ring_through_is_what_is_predicted(payload: Payload) -> None:
    cell = payload_cell(payload, RIGHT)
    assert (cell.predicted, cell.observed, cell.mismatch, cell.disagreements) == ([Path.MIXED], Path.MIXED, False, [])
    assert cell.sides == sides(RIGHT) == Sides(payload=Side.AROUND, structures=Side.THROUGH)
    (again,) = as_json([cell])
    assert again["sides"] == {"payload": "around", "structures": "through"}
    assert contradictions(again) == []


@pytest.mark.parametrize("payload", PHYSICAL)
@pytest.mark.parametrize(("wrong", "way", "words"), WRONG.values(), ids=WRONG.keys())
def test_mixed_another_way_is_a_mismatch(payload: Payload, wrong: Evidence, way: Sides, words: list[str]) -> None:
    cell = payload_cell(payload, wrong)
    assert (cell.observed, sides(wrong)) == (Path.MIXED, way)
    assert (cell.predicted, cell.disagreements, cell.mismatch) == ([Path.MIXED], words, True)
    assert all(word in evidence_text(cell) for word in words)
    (again,) = as_json([cell])
    assert len(contradictions(again)) == len(words)


def test_where_mixed_is_not_predicted_the_path_is_the_mismatch() -> None:
    cell = payload_cell(Payload.NONE, RIGHT)
    assert (cell.sides, cell.disagreements, cell.mismatch) == (None, [], True)
    assert "sides" not in as_json([cell])[0]
    around = evidence(seen("data", "B"), seen("ring", "B"), TRANSLATING)
    cell = payload_cell(Payload.BLOCK, around)
    assert (cell.observed, cell.disagreements, cell.mismatch) == (Path.BYPASS, [], True)


# -- any evidence at all -------------------------------------------------------------------------------------------

hexes = st.binary(max_size=4).map(bytes.hex)
roles = st.sampled_from(["data", "data2", "ring", "via-A", "via-B", "control", "something new", ""])
pages = st.sampled_from("ABC")
witnesses = st.builds(Witness, roles, pages, st.integers(0, 2**64), st.integers(0, 4095), hexes, hexes)
deliveries = st.builds(
    Delivery,
    st.just("data"),
    hexes,
    st.dictionaries(pages, hexes, max_size=3),
    st.dictionaries(pages, st.integers(0, 2**64), max_size=3),
)
faults = st.builds(
    FaultRecord, st.integers(0, 2**64), st.booleans(), st.integers(-1, 65535), st.text(), st.lists(st.integers(0))
)
any_evidence = st.builds(
    Evidence,
    x=st.none() | st.integers(0, 2**64),
    transfer=st.sampled_from(["write", "read", "none"]),
    features_ok=st.none() | st.booleans(),
    refused_by_machine=st.booleans(),
    carried_on=st.booleans(),
    witnesses=st.lists(witnesses, max_size=8),
    deliveries=st.lists(deliveries, max_size=2),
    control=st.sampled_from(["msi-x", "edu", "machine", "none"]),
    faults=st.lists(faults, max_size=2),
    live=st.sampled_from(["", ALIVE]),
    status=st.none() | st.integers(0, 255),
    words=st.lists(st.text(), max_size=2),
    note=st.sampled_from(["", "the machine is gone"]),
)


@given(any_evidence)
def test_any_evidence_has_one_answer(any_: Evidence) -> None:
    path = judge(any_)
    assert path is not Path.NOT_APPLICABLE
    assert judge(any_) is path
    if path is Path.BLOCKED:
        assert any_.live
    if path in (Path.TRANSLATED, Path.BYPASS, Path.DIRECT, Path.STALE):
        touched = any(w.touched for w in any_.witnesses)
        arrived = any(d.arrived in d.pages.values() for d in any_.deliveries)
        assert touched or arrived, "no answer about a path without memory to show for it"
    if path is Path.BYPASS:
        assert translating(any_) is True


@given(any_evidence, st.randoms(use_true_random=False), st.none() | st.integers(0, 255))
def test_order_and_status_do_not_matter(any_: Evidence, random: object, status: int | None) -> None:
    shuffled = list(any_.witnesses)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert judge(replace(any_, witnesses=shuffled, status=status, faults=[], words=["OK"])) is judge(any_)


@given(any_evidence)
def test_both_judges_agree_on_anything(any_: Evidence) -> None:
    assert judge_again(as_json([as_cell(any_)])[0]) == judge(any_)


@given(any_evidence, st.sampled_from(PHYSICAL))
def test_both_judges_agree_on_the_way_round(any_: Evidence, payload: Payload) -> None:
    cell = payload_cell(payload, any_)
    (again,) = as_json([cell])
    way = sides(any_)
    assert ways(json.loads(document([cell]))["cells"][0]["evidence"]) == {
        "payload": way.payload,
        "structures": way.structures,
    }
    assert len(contradictions(again)) == len(cell.disagreements)


# -- the second judge on what was really seen ------------------------------------------------------------------------


def as_cell(of: Evidence) -> Cell:
    return Cell(
        "q35", "intel", "virtio-blk-pci", "made up", True, True, AddressKind.IOVA, [Path.BYPASS], judge(of), None, of
    )


def as_json(cells: Sequence[Cell]) -> list[dict[str, object]]:
    decoded = json.loads(document(cells))
    assert decoded["schema"] == "virtiova/probe/1"
    listed: list[dict[str, object]] = decoded["cells"]
    return listed


def disagreements(cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in as_json(cells):
        name = f"{cell['device']} {cell['experiment']}"
        again = judge_again(cell)
        if again != cell["observed"]:
            found.append(f"{name}: {cell['observed']}, judged again: {again}")
        if contradictions(cell) and not cell.get("disagreements"):
            found.append(f"{name}: mixed the other way round, and nobody said so")
        found += [f"{name}: {complaint}" for complaint in complaints(cell)]
    return found


@pytest.mark.parametrize("behaviour", ["honest", "quirky", "lying"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iommu", ["soft", "none"])
def test_the_second_judge_on_the_model(behaviour: str, kind: str, iommu: str) -> None:
    assert disagreements(list(model_cells(behaviour, kind, iommu).values())) == []


@pytest.mark.qemu
def test_the_second_judge_on_the_default_table() -> None:
    cells = list(probe.default())
    assert len(cells) > 20
    assert {cell.machine for cell in cells} == {"q35"}
    assert disagreements(cells) == []


@pytest.mark.qemu
@pytest.mark.parametrize(("device", "iommu", "interface"), VARIANTS)
def test_the_second_judge_on_every_experiment(device: str, iommu: str, interface: str) -> None:
    assert disagreements(list(qemu_cells(device, iommu, interface).values())) == []


def test_the_second_judge_shares_nothing_with_the_first() -> None:
    from pathlib import Path as File

    source = (File(__file__).parent / "judge_again.py").read_text()
    assert "import virtiova" not in source
    assert "from virtiova" not in source
