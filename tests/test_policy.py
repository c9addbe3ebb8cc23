# SPDX-License-Identifier: Apache-2.0
"""The rule itself: the whole truth table with the chain of reasons, and that every link of it matters."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import pytest
from hypothesis import given

from policy_table import (
    BLOCKED,
    BYPASS,
    DIRECT,
    GPA,
    MACHINE,
    MIXED,
    REFUSED,
    ROWS,
    RULE_OF,
    STALE,
    TABLE,
    TRANSLATED,
    UNKNOWN,
    Row,
    any_facts,
)
from virtiova.addr import Access, AddressKind
from virtiova.features import Generation
from virtiova.policy import RULES, Facts, Front, Mapping, Payload, predict
from virtiova.result import Path, Prediction, Side, Sides


def chain_of(prediction: Prediction) -> str:
    return " ".join(f"{'+' if r.answer else '-'}{r.rule}" for r in prediction.reasons)


def core(prediction: Prediction) -> tuple[AddressKind, frozenset[Path], str]:
    """All but the reasons."""
    return prediction.address, prediction.paths, prediction.dma_ops


@given(any_facts)
def test_where_mixed_is_allowed_it_is_said_which_way_round(given_facts: Facts) -> None:
    prediction = predict(given_facts)
    around = Sides(payload=Side.AROUND, structures=Side.THROUGH)
    assert prediction.sides == (around if MIXED in prediction.paths else None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_truth_table(row: Row) -> None:
    prediction = predict(row.facts)
    assert core(prediction) == (row.address, frozenset(row.paths), row.dma_ops)
    assert chain_of(prediction) == row.chain


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_reason_says_why_and_quotes_its_source(row: Row) -> None:
    reasons = predict(row.facts).reasons
    assert reasons
    for reason in reasons:
        rule = RULES[reason.rule]
        assert reason.text == (rule.yes if reason.answer else rule.no)
        source, _, gist = reason.citation.partition(": ")
        assert len(source) > len("virtio 1.4")
        assert gist
        assert reason.citation == str(rule.citation)


def test_the_table_names_every_row_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({row.facts for row in ROWS}) == len(ROWS)


def test_rules_have_ids_and_two_different_answers() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    for rule in RULES:
        assert rule.yes
        assert rule.no
        assert rule.yes != rule.no
        assert rule.citation.source
        assert rule.citation.place
        assert rule.citation.gist


@pytest.mark.parametrize("generation", list(Generation)[1:])
def test_the_substance_of_the_rule_is_the_same_since_the_patch(generation: Generation) -> None:
    # Restricted memory came later: its check before FEATURES_OK is no part of the patch.
    for row in TABLE:
        if not row.facts.restricted:
            assert predict(replace(row.facts, generation=generation)) == predict(row.facts)


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("xen", [False, True])
def test_before_the_patch_xen_is_all_that_counts_for_the_driver(xen: bool, accepted: bool) -> None:
    prediction = predict(Facts(accepted, accepted, Front.NONE, xen=xen, generation=Generation.BEFORE))
    assert (prediction.address, prediction.dma_ops) == ((MACHINE, "platform") if xen else (GPA, "direct"))
    assert "-no-quirk" in chain_of(prediction).split()


@pytest.mark.parametrize("mapping", Mapping)
@pytest.mark.parametrize("access", [Access.READ, Access.WRITE])
def test_the_tables_mean_nothing_to_a_device_with_the_quirk(mapping: Mapping, access: Access) -> None:
    prediction = predict(Facts(False, False, mapping=mapping, access=access))
    assert prediction.paths == {BYPASS}
    assert "permitted" not in chain_of(prediction)


@pytest.mark.parametrize("front", [Front.NONE, Front.OFF, Front.PASSTHROUGH])
@pytest.mark.parametrize("accepted", [False, True])
def test_without_a_translating_iommu_it_is_direct_and_never_bypass(front: Front, accepted: bool) -> None:
    assert predict(Facts(accepted, accepted, front)).paths == {DIRECT}


# -- the engine ---------------------------------------------------------------------------------------------------


@given(any_facts)
def test_there_is_always_an_answer_and_it_is_always_the_same(facts: Facts) -> None:
    before = dataclasses.asdict(facts)
    prediction = predict(facts)
    assert prediction == predict(facts)
    assert dataclasses.asdict(facts) == before
    assert prediction.paths
    assert prediction.reasons
    ours = {MIXED} if facts.payload in {*RULE_OF, Payload.MAP_TARGET} else set()
    assert prediction.paths <= {BLOCKED, BYPASS, DIRECT, REFUSED, STALE, TRANSLATED} | ours
    assert (prediction.address is GPA) or prediction.dma_ops != "direct" or prediction.paths == {REFUSED}
    asked = [reason.rule for reason in prediction.reasons]
    assert len(asked) == len(set(asked))


@given(any_facts)
def test_an_acceptance_that_is_not_known_allows_what_either_answer_would(facts: Facts) -> None:
    # Of an offered bit: without an offer there is nothing to accept.
    facts = replace(facts, offered=True)
    check_union(replace(facts, accepted=None), replace(facts, accepted=True), replace(facts, accepted=False))


@given(any_facts)
def test_an_offer_that_is_not_known_allows_what_either_answer_would(facts: Facts) -> None:
    # Of a bit that was not accepted: an accepted one was offered.
    facts = replace(facts, accepted=False)
    check_union(replace(facts, offered=None), replace(facts, offered=True), replace(facts, offered=False))


def check_union(unknown: Facts, *known: Facts) -> None:
    prediction, answers = predict(unknown), [predict(facts) for facts in known]
    assert prediction.paths == answers[0].paths | answers[1].paths
    kinds = {answer.address for answer in answers}
    assert prediction.address is (kinds.pop() if len(kinds) == 1 else UNKNOWN)
    assert set(prediction.reasons) == {*answers[0].reasons, *answers[1].reasons}


def test_nothing_known_of_a_device_behind_an_iommu() -> None:
    assert predict(Facts(None, None)).paths == {BYPASS, REFUSED, TRANSLATED}
    assert predict(Facts(None, None)).address is UNKNOWN
    assert predict(Facts(None, None, Front.NONE)).paths == {DIRECT, REFUSED}
    assert predict(Facts(None, None, Front.NONE)).address is GPA


@pytest.mark.parametrize("front", Front)
def test_what_was_not_offered_was_not_accepted(front: Front) -> None:
    """Accepted is defined as offered, written and kept: a known offer of nothing leaves nothing open."""
    assert core(predict(Facts(False, None, front))) == core(predict(Facts(False, False, front)))


@pytest.mark.parametrize("rule", [rule.id for rule in RULES])
def test_every_rule_matters(rule: str) -> None:
    """Turned around, it shows: in rows whose chain holds that rule, and in no other."""
    inverted = RULES.inverted(rule)
    changed = [row for row in ROWS if core(predict(row.facts, inverted)) != core(predict(row.facts))]
    assert changed
    assert all(rule in row.chain for row in changed)


@pytest.mark.parametrize("rule", [rule.id for rule in RULES])
def test_a_rule_turned_around_twice_is_the_rule(rule: str) -> None:
    again = RULES.inverted(rule).inverted(rule)
    assert [r.id for r in again] == [r.id for r in RULES]
    for row in ROWS:
        assert predict(row.facts, again) == predict(row.facts)


def test_inverting_leaves_the_rules_themselves_alone() -> None:
    before = [predict(row.facts) for row in ROWS]
    for rule in RULES:
        RULES.inverted(rule.id)
    assert [predict(row.facts) for row in ROWS] == before


def test_the_whole_table_is_there() -> None:
    """Every combination of the table's own columns has a row."""
    fronts = [Front.NONE, Front.TRANSLATING]
    states = {(False, False), (True, True), (True, False)}
    seen = {(row.facts.offered, row.facts.accepted, row.facts.front) for row in TABLE}
    for (offered, accepted), front in itertools.product(states, fronts):
        assert (offered, accepted, front) in seen
    special = {(r.facts.offered, r.facts.accepted, r.facts.xen, r.facts.restricted) for r in TABLE}
    for offered, accepted in states:
        assert (offered, accepted, True, False) in special
        assert (offered, accepted, False, True) in special
