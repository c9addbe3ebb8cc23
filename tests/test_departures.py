# SPDX-License-Identifier: Apache-2.0
"""Known departures of products: they explain a mismatch of theirs, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_table import (
    BLOCKED,
    BYPASS,
    DIRECT,
    ROWS,
    STALE,
    TRANSLATED,
    any_facts,
)
from virtiova import policy
from virtiova.addr import Access
from virtiova.policy import DEPARTURES, Facts, Front, Mapping, Payload, departure, predict
from virtiova.result import Path

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


# Of our own programs that are wrong on purpose; of any other it is what it looks like.
_REMOVED = Facts(True, True, mapping=Mapping.REMOVED)
OURS = [
    ("virtiova-leaky 0.1.0", Facts(True, True), BYPASS, "LEAKY-ON-PURPOSE"),
    ("virtiova-stale 0.1.0", _REMOVED, STALE, "STALE-ON-PURPOSE"),
    ("virtiova-stale 0.1.0", replace(_REMOVED, mapping=Mapping.REMAPPED), STALE, "STALE-ON-PURPOSE"),
    ("virtiova-leaky 0.1.0", _REMOVED, STALE, None),
    ("virtiova-leaky 0.1.0", Facts(True, True), DIRECT, None),
    ("virtiova-stale 0.1.0", Facts(True, True), BYPASS, None),
    ("virtiova-blk 0.1.0", Facts(True, True), BYPASS, None),
    ("virtiova-blk 0.1.0", _REMOVED, STALE, None),
    (QEMU, _REMOVED, STALE, None),
]


@pytest.mark.parametrize(("product", "facts", "observed", "wanted"), OURS)
def test_departures_of_ours(product: str, facts: Facts, observed: Path, wanted: str | None) -> None:
    assert departure(product, facts, observed) == wanted
    assert observed not in predict(facts).paths


_WRITE_ONLY = Facts(True, True, mapping=Mapping.WRITE_ONLY, access=Access.READ, iommu="vdpa", hardware=True)
VDUSE = [
    ("VDUSE 6.12.95+deb12-amd64", _WRITE_ONLY, TRANSLATED, "VDUSE-WRITE-ONLY"),
    ("VDUSE 6.13.1", _WRITE_ONLY, TRANSLATED, None),
    ("vdpasim_blk 6.12.95", _WRITE_ONLY, TRANSLATED, None),
    ("VDUSE 6.12.95", replace(_WRITE_ONLY, mapping=Mapping.READ_ONLY, access=Access.WRITE), TRANSLATED, None),
    ("VDUSE 6.12.95", replace(_WRITE_ONLY, mapping=Mapping.REMOVED), TRANSLATED, None),
    ("VDUSE 6.12.95", replace(_WRITE_ONLY, iommu="soft"), TRANSLATED, None),
    ("VDUSE 6.12.95", _WRITE_ONLY, BYPASS, None),
    (QEMU, _WRITE_ONLY, TRANSLATED, None),
]


@pytest.mark.parametrize(("product", "facts", "observed", "wanted"), VDUSE)
def test_departures_of_devices_in_user_space(product: str, facts: Facts, observed: Path, wanted: str | None) -> None:
    assert departure(product, facts, observed) == wanted
    assert observed not in predict(facts).paths


_VHOST = replace(_PLUG, vhost=True)
EXPLAINED.append((_VHOST, BLOCKED, "QEMU-VHOST-DECIDES-AT-PLUG"))
NOT_VHOST = [
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
    for facts, observed in NOT_VHOST:
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
    assert {row.id for row in DEPARTURES} == {row[-1] for row in (*EXPLAINED, *NEWER, *OURS, *VDUSE) if row[-1]}
    for row in DEPARTURES:
        assert all([row.product, row.title, row.source])
        assert re.fullmatch(r"\d+\.\d+( to \d+\.\d+)?", row.versions), "what cannot be compared says nothing"


@pytest.mark.parametrize("product", [QEMU, "QEMU 10.0.2", "virtiova-leaky 0.1.0", "virtiova-stale 0.1.0"])
@given(facts=any_facts.filter(lambda facts: not facts.hardware), observed=st.sampled_from(Path))
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
