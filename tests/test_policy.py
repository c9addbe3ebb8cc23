# SPDX-License-Identifier: Apache-2.0
"""The rule itself: the whole truth table with the chain of reasons, and that every link of it matters."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova import policy
from virtiova.addr import Access, AddressKind
from virtiova.features import Generation
from virtiova.policy import DEPARTURES, RULES, Facts, Front, Mapping, Payload, departure, predict
from virtiova.result import Path, Prediction, Side, Sides

GPA, IOVA, MACHINE, UNKNOWN = (AddressKind.GPA, AddressKind.IOVA, AddressKind.MACHINE, AddressKind.UNKNOWN)
BLOCKED, BYPASS, DIRECT, REFUSED = (Path.BLOCKED, Path.BYPASS, Path.DIRECT, Path.REFUSED)
MIXED = Path.MIXED
STALE, TRANSLATED = (Path.STALE, Path.TRANSLATED)

# A chain is written as the ids of the rules asked, in order, with the answer as a sign.
_QUIRK = "-no-quirk -xen-domain"
_DEVICE_QUIRK = "+bus-master -device-uses-platform"
_DEVICE_PLATFORM = "+bus-master +device-uses-platform"


@dataclass(frozen=True)
class Row:
    """One line of the table: facts, and all that follows from them."""

    name: str
    facts: Facts
    address: AddressKind
    paths: set[Path]
    dma_ops: str
    chain: str


# Offered or not, accepted or not, and what is in front of the device: the driver's rule, line by line.
TABLE = [
    Row(
        "not offered, nothing in front",
        Facts(False, False, Front.NONE),
        GPA,
        {DIRECT},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "not offered, IOMMU translates: gone around, not isolated",
        Facts(False, False, Front.TRANSLATING),
        GPA,
        {BYPASS},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "not offered, IOMMU translates, hardware: its address is looked up, and misses",
        Facts(False, False, Front.TRANSLATING, hardware=True, mapping=Mapping.UNMAPPED),
        GPA,
        {BLOCKED},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_PLATFORM} +front-translates -permitted +invalidated",
    ),
    Row(
        "not offered, Xen domain: the DMA API all the same",
        Facts(False, False, Front.NONE, xen=True),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "not offered, Xen domain, emulated IOMMU: the corner that never worked",
        Facts(False, False, Front.TRANSLATING, xen=True),
        MACHINE,
        {BYPASS},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "not offered, restricted memory: the driver gives up",
        Facts(False, False, Front.NONE, restricted=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-restricted-memory",
    ),
    *(
        Row(
            f"accepted, {front}: the DMA API gives out the physical address",
            Facts(True, True, front),
            GPA,
            {DIRECT},
            "platform",
            f"+bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
        )
        for front in (Front.NONE, Front.OFF, Front.PASSTHROUGH)
    ),
    Row(
        "accepted, IOMMU translates",
        Facts(True, True, Front.TRANSLATING),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "accepted, Xen domain",
        Facts(True, True, Front.NONE, xen=True),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
    ),
    Row(
        "accepted, restricted memory: the address of a bounce page, nobody has to translate",
        Facts(True, True, Front.NONE, restricted=True),
        GPA,
        {DIRECT},
        "bounce",
        f"+restricted-memory +bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
    ),
    Row(
        "accepted, restricted memory behind an IOMMU",
        Facts(True, True, Front.TRANSLATING, restricted=True),
        IOVA,
        {TRANSLATED},
        "bounce",
        f"+restricted-memory +bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    *(
        Row(
            f"offered and not taken, {front}: physical addresses, and the device may refuse",
            Facts(True, False, front),
            GPA,
            {path, REFUSED},
            "direct",
            f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} {sign}front-translates",
        )
        for front, path, sign in (
            (Front.NONE, DIRECT, "-"),
            (Front.OFF, DIRECT, "-"),
            (Front.PASSTHROUGH, DIRECT, "-"),
            (Front.TRANSLATING, BYPASS, "+"),
        )
    ),
    Row(
        "offered and not taken, by a device that insists",
        Facts(True, False, insists=True),
        GPA,
        {REFUSED},
        "direct",
        f"-bit-taken {_QUIRK} +insists",
    ),
    Row(
        "offered and not taken, by a device known not to mind",
        Facts(True, False, insists=False),
        GPA,
        {BYPASS},
        "direct",
        f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "offered and not taken, Xen domain",
        Facts(True, False, Front.NONE, xen=True),
        MACHINE,
        {DIRECT, REFUSED},
        "platform",
        f"-bit-taken -no-quirk +xen-domain -insists {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "offered and not taken, restricted memory: the driver gives up first",
        Facts(True, False, restricted=True, insists=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-restricted-memory",
    ),
]

# What the table does not say and the specification does.
BESIDE = [
    Row(
        "neither bit 33 nor VERSION_1: insisting is about modern drivers",
        Facts(True, False, insists=True, version_1=False),
        GPA,
        {BYPASS, REFUSED},
        "direct",
        f"-bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "the driver carries on after the refusal: the device must not touch the queues",
        Facts(True, False, insists=True, carries_on=True),
        GPA,
        {BLOCKED},
        "direct",
        f"-bit-taken {_QUIRK} -driver-ok-first",
    ),
    Row(
        "the driver writes the bit although it was not offered",
        Facts(False, False, wrote_unoffered=True),
        GPA,
        {BYPASS, REFUSED},
        "direct",
        f"-only-offered-bits +bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "the bit asked of a device that can be legacy",
        Facts(False, False, declared=True, can_be_legacy=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-room-for-the-bit",
    ),
    Row(
        "the bit asked of a device that cannot be legacy",
        Facts(True, True, declared=True),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+room-for-the-bit +bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "bus master off, accepted",
        Facts(True, True, bus_master=False),
        IOVA,
        {BLOCKED},
        "platform",
        "+bit-taken +no-quirk -bus-master",
    ),
    Row(
        "bus master off, not offered: no way around that either",
        Facts(False, False, bus_master=False),
        GPA,
        {BLOCKED},
        "direct",
        f"+bit-taken {_QUIRK} -bus-master",
    ),
    Row(
        "hardware behind an IOMMU, its address mapped",
        Facts(False, False, hardware=True),
        GPA,
        {TRANSLATED},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "before the patch: the offer changes nothing for the driver",
        Facts(True, False, Front.NONE, insists=False, generation=Generation.BEFORE),
        GPA,
        {DIRECT},
        "direct",
        f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "before the patch, Xen domain",
        Facts(False, False, Front.NONE, xen=True, generation=Generation.BEFORE),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} -front-translates",
    ),
]

_MAPPINGS = [
    (Mapping.MAPPED, Access.READ, {TRANSLATED}, "+permitted"),
    (Mapping.UNMAPPED, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.UNMAPPED, Access.READ, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.RW, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.READ, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.READ, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.RW, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.WRITE, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.REMOVED, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.REMOVED_UNTOLD, Access.WRITE, {BLOCKED, STALE}, "-permitted -invalidated"),
    (Mapping.REMAPPED, Access.WRITE, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.REMAPPED_UNTOLD, Access.WRITE, {TRANSLATED, STALE}, "+permitted -invalidated"),
]
MAPPINGS = [
    Row(
        f"{mapping}, device {access}",
        Facts(True, True, mapping=mapping, access=access),
        IOVA,
        paths,
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates {chain}",
    )
    for mapping, access, paths, chain in _MAPPINGS
]
_RULE_OF = {
    Payload.PAGE_NUMBER: "page-number-is-physical",
    Payload.BLOCK: "block-is-physical",
    Payload.REGION: "region-is-physical",
}

# Addresses inside requests: the ring is governed by bit 33 as ever.
PAYLOADS = [
    Row(
        "a GPU's backing entry, accepted, IOMMU translates: as in a descriptor",
        Facts(True, True, payload=Payload.BACKING),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+bit-taken +no-quirk +backing-is-accessed {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "a GPU's backing entry that is not mapped",
        Facts(True, True, payload=Payload.BACKING, mapping=Mapping.UNMAPPED),
        IOVA,
        {BLOCKED},
        "platform",
        f"+bit-taken +no-quirk +backing-is-accessed {_DEVICE_PLATFORM} +front-translates -permitted +invalidated",
    ),
    Row(
        "a GPU's backing entry, not offered",
        Facts(False, False, payload=Payload.BACKING),
        GPA,
        {BYPASS},
        "direct",
        f"+bit-taken {_QUIRK} +backing-is-accessed {_DEVICE_QUIRK} +front-translates",
    ),
    *(
        Row(
            f"{payload}, accepted, IOMMU translates: the ring does, this does not",
            Facts(True, True, payload=payload),
            GPA,
            {MIXED},
            "direct",
            f"+bit-taken +no-quirk +{rule} {_DEVICE_PLATFORM} +front-translates",
        )
        for payload, rule in _RULE_OF.items()
    ),
    *(
        Row(
            f"{payload}, not offered: everything goes around",
            Facts(False, False, payload=payload),
            GPA,
            {BYPASS},
            "direct",
            f"+bit-taken {_QUIRK} +{rule} {_DEVICE_QUIRK} +front-translates",
        )
        for payload, rule in _RULE_OF.items()
    ),
    *(
        Row(
            f"{payload}, accepted, nothing in front",
            Facts(True, True, Front.NONE, payload=payload),
            GPA,
            {DIRECT},
            "direct",
            f"+bit-taken +no-quirk +{rule} {_DEVICE_PLATFORM} -front-translates",
        )
        for payload, rule in _RULE_OF.items()
    ),
    *(
        Row(
            f"what virtio-iommu is told to map to, its own bit {'on' if on else 'off'}, IOMMU {front}",
            Facts(on, on, front, payload=Payload.MAP_TARGET),
            GPA,
            paths,
            "direct",
            chain,
        )
        for on in (False, True)
        for front, paths, chain in (
            (Front.TRANSLATING, {MIXED}, "+bus-master +front-translates +map-target-is-physical"),
            (Front.OFF, {DIRECT}, "+bus-master -front-translates"),
        )
    ),
]

ROWS = TABLE + BESIDE + MAPPINGS + PAYLOADS

facts = st.builds(
    Facts,
    offered=st.booleans(),
    accepted=st.booleans(),
    front=st.sampled_from(Front),
    xen=st.booleans(),
    restricted=st.booleans(),
    version_1=st.booleans(),
    insists=st.sampled_from([None, True, False]),
    hardware=st.booleans(),
    declared=st.sampled_from([None, True, False]),
    can_be_legacy=st.booleans(),
    wrote_unoffered=st.booleans(),
    carries_on=st.booleans(),
    bus_master=st.booleans(),
    mapping=st.sampled_from(Mapping),
    access=st.sampled_from([Access.READ, Access.WRITE, Access.RW]),
    generation=st.sampled_from(Generation),
    iommu=st.sampled_from(["", "amd"]),
    bridged=st.booleans(),
    vhost=st.booleans(),
    pass_through=st.booleans(),
    payload=st.sampled_from(Payload),
)


def chain_of(prediction: Prediction) -> str:
    return " ".join(f"{'+' if r.answer else '-'}{r.rule}" for r in prediction.reasons)


def core(prediction: Prediction) -> tuple[AddressKind, frozenset[Path], str]:
    """All but the reasons."""
    return prediction.address, prediction.paths, prediction.dma_ops


@given(facts)
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


@given(facts)
def test_there_is_always_an_answer_and_it_is_always_the_same(facts: Facts) -> None:
    before = dataclasses.asdict(facts)
    prediction = predict(facts)
    assert prediction == predict(facts)
    assert dataclasses.asdict(facts) == before
    assert prediction.paths
    assert prediction.reasons
    ours = {MIXED} if facts.payload in {*_RULE_OF, Payload.MAP_TARGET} else set()
    assert prediction.paths <= {BLOCKED, BYPASS, DIRECT, REFUSED, STALE, TRANSLATED} | ours
    assert (prediction.address is GPA) or prediction.dma_ops != "direct" or prediction.paths == {REFUSED}
    asked = [reason.rule for reason in prediction.reasons]
    assert len(asked) == len(set(asked))


@given(facts)
def test_an_acceptance_that_is_not_known_allows_what_either_answer_would(facts: Facts) -> None:
    # Of an offered bit: without an offer there is nothing to accept.
    facts = replace(facts, offered=True)
    check_union(replace(facts, accepted=None), replace(facts, accepted=True), replace(facts, accepted=False))


@given(facts)
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


# -- departures of products ---------------------------------------------------------------------------------------

QEMU = "QEMU 7.2.22"
OTHERS = ["virtiova model 0.1", "vhost-user 1", "crosvm", "not QEMU", ""]
_PLUG = Facts(True, False, insists=True, version_1=False)
_CARRIES_ON = Facts(True, False, insists=True, carries_on=True)
_BRIDGED = Facts(True, True, iommu="amd", bridged=True)
_REMAPPED = Facts(True, True, mapping=Mapping.REMAPPED, payload=Payload.BACKING)

EXPLAINED = [
    (Facts(False, False, bus_master=False), BYPASS, "QEMU-BUS-MASTER"),
    (Facts(False, False, Front.NONE, bus_master=False), DIRECT, "QEMU-BUS-MASTER"),
    (_CARRIES_ON, TRANSLATED, "QEMU-KICK-AFTER-REFUSAL"),
    (replace(_CARRIES_ON, front=Front.NONE), DIRECT, "QEMU-KICK-AFTER-REFUSAL"),
    (_PLUG, TRANSLATED, "QEMU-DECIDES-AT-PLUG"),
    (_BRIDGED, DIRECT, "QEMU-AMD-BUS-NUMBER"),
    (_BRIDGED, BYPASS, "QEMU-AMD-BUS-NUMBER"),
    (replace(_BRIDGED, offered=False, accepted=False), DIRECT, "QEMU-AMD-BUS-NUMBER"),
    (_REMAPPED, STALE, "QEMU-GPU-BACKING-STAYS"),
    (replace(_REMAPPED, payload=Payload.NONE), STALE, None),
    (replace(_REMAPPED, mapping=Mapping.UNMAPPED), STALE, None),
    (_REMAPPED, BYPASS, None),
    # The other way round: seen, and not explained by anything.
    (replace(_BRIDGED, bridged=False), DIRECT, None),
    (replace(_BRIDGED, iommu="intel"), DIRECT, None),
    (replace(_BRIDGED, front=Front.OFF), BYPASS, None),
    (Facts(True, True, bus_master=False), TRANSLATED, None),
    (_CARRIES_ON, BYPASS, None),
    (Facts(True, True), BYPASS, None),
    (Facts(False, False), TRANSLATED, None),
    (_PLUG, BYPASS, None),
    (replace(_PLUG, version_1=True), TRANSLATED, None),
    (Facts(True, True, mapping=Mapping.UNMAPPED), TRANSLATED, None),
]


@pytest.mark.parametrize(("facts", "observed", "wanted"), EXPLAINED)
def test_departures_of_qemu(facts: Facts, observed: Path, wanted: str | None) -> None:
    assert departure(QEMU, facts, observed) == wanted
    assert observed not in predict(facts).paths or wanted is None


# On the older version only: the newer one gives up, so that nothing can be shown.
_VHOST = replace(_PLUG, vhost=True)
OLDER = [(_VHOST, BLOCKED, "QEMU-VHOST-DECIDES-AT-PLUG")]
NOT_OLDER = [
    (_PLUG, BLOCKED),
    (replace(_VHOST, version_1=True), BLOCKED),
    (replace(_VHOST, front=Front.NONE), BLOCKED),
    (replace(_VHOST, offered=False), BLOCKED),
    (_VHOST, BYPASS),
]
# On that version only: the one before translates.
_PASSED = Facts(True, True, iommu="amd", pass_through=True)
NEWER = [(_PASSED, DIRECT, "QEMU-AMD-PASS-THROUGH")]
NOT_NEWER = [
    (replace(_PASSED, iommu="intel"), DIRECT),
    (_PASSED, BYPASS),
    # As our board tells it: what is seen then is a failure, and nothing excuses it.
    (replace(_PASSED, pass_through=False), DIRECT),
]


def test_a_departure_of_one_version() -> None:
    for facts, observed, wanted in NEWER:
        assert departure("QEMU 10.0.2", facts, observed) == wanted
        assert departure(QEMU, facts, observed) is None
        assert observed not in predict(facts).paths
    for facts, observed in NOT_NEWER:
        assert departure("QEMU 10.0.2", facts, observed) is None
    for facts, observed, wanted in OLDER:
        assert departure(QEMU, facts, observed) == wanted
        assert departure("QEMU 10.0.2", facts, observed) is None
        assert observed not in predict(facts).paths
    for facts, observed in NOT_OLDER:
        assert departure(QEMU, facts, observed) is None


@pytest.mark.parametrize("product", OTHERS)
def test_departures_explain_their_own_product_only(product: str) -> None:
    for facts, observed, _ in EXPLAINED:
        assert departure(product, facts, observed) is None


@pytest.mark.parametrize(
    ("versions", "inside", "outside"),
    [
        ("7.2 to 10.0", ["7.2", "7.2.22", "8.0.0", "9.2.4", "10.0", "10.0.2", "10.0.0-rc1"], ["7.1.0", "10.1", "11.0"]),
        ("7.2", ["7.2", "7.2.22"], ["7.1.9", "7.3", "8.0.0", "72.0"]),
        ("7.2.5 to 7.2.9", ["7.2.5", "7.2.9", "7.2.7 (Debian)"], ["7.2.4", "7.2.10", "7.3"]),
    ],
)  # fmt: skip
def test_a_departure_is_for_the_versions_that_it_was_seen_on(
    versions: str, inside: list[str], outside: list[str]
) -> None:
    row = replace(DEPARTURES[0], versions=versions)
    assert [v for v in inside if not row.covers(f"QEMU {v}")] == []
    assert [v for v in (*outside, "unknown", "", "-1") if row.covers(f"QEMU {v}")] == []
    assert not row.covers("QEMU")
    assert not row.covers("QEMUX 7.2.5")


def test_a_departure_of_another_version_is_a_mismatch_again() -> None:
    facts, observed, wanted = next(row for row in EXPLAINED if row[2])
    assert departure("QEMU 10.0.2", facts, observed) == wanted
    assert departure("QEMU 10.1.0", facts, observed) is None


def test_departures_are_complete_rows() -> None:
    assert len({row.id for row in DEPARTURES}) == len(DEPARTURES)
    assert {row.id for row in DEPARTURES} == {wanted for _, _, wanted in (*EXPLAINED, *OLDER, *NEWER) if wanted}
    for row in DEPARTURES:
        assert all([row.product, row.title, row.source])
        assert re.fullmatch(r"\d+\.\d+( to \d+\.\d+)?", row.versions), "what cannot be compared says nothing"


@pytest.mark.parametrize("product", [QEMU, "QEMU 10.0.2"])
@given(facts=facts.filter(lambda facts: not facts.hardware), observed=st.sampled_from(Path))
def test_a_departure_never_explains_what_is_predicted(product: str, facts: Facts, observed: Path) -> None:
    """What is predicted needs no excuse; an excuse for it would hide that the row is too wide."""
    if departure(product, facts, observed) is not None:
        assert observed not in predict(facts).paths


def test_departures_never_change_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [predict(row.facts) for row in ROWS]
    excuse = replace(DEPARTURES[0], when=lambda *_: True)
    for rows in ((), (excuse,)):
        monkeypatch.setattr(policy.departures, "DEPARTURES", rows)
        assert [predict(row.facts) for row in ROWS] == before
    assert departure(QEMU, Facts(True, True), BYPASS) == excuse.id


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
