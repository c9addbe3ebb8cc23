# SPDX-License-Identifier: Apache-2.0
"""The rules about back ends, guests and memory: for each machines that it is about, and the nearest that it is not."""

from __future__ import annotations

from types import ModuleType

import pytest

from scan_rule_cases2 import CASES2, PREMAPPED
from scan_rule_drivers import CASES
from scan_rule_kit import Case, conditions, device, machine, mutants, of
from virtiova.collect.facts import View
from virtiova.result.scan import Severity
from virtiova.scan import history
from virtiova.scan.engine import scan_view
from virtiova.scan.rule import Rule
from virtiova.scan.rules import RULES, backend_bugs, guests, memory

MODULES = (backend_bugs, guests, memory)
OURS = frozenset(rule.id for module in MODULES for rule in module.RULES)


@pytest.mark.parametrize("case", CASES2, ids=lambda case: case.name)
def test_what_is_said(case: Case) -> None:
    assert of(case.view, RULES, OURS) == case.said


@pytest.mark.parametrize("case", CASES2, ids=lambda case: case.name)
def test_fixes_are_filled_in(case: Case) -> None:
    for each in scan_view(case.view).findings:
        assert all(words and "{" not in words for words in each.fix.values()), each.id
        assert each.seen


def test_names() -> None:
    names = [case.name for case in CASES2]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.id in OURS], ids=lambda rule: rule.id)
def test_each_rule_is_met_and_missed(rule: Rule) -> None:
    met = [case for case in CASES2 if any(words == rule.id or words.startswith(f"{rule.id} ") for words in case.said)]
    assert len(met) >= 2
    assert len(met) < len(CASES2)
    assert rule.fix
    assert rule.evidence


def test_the_ids() -> None:
    assert {f"VA{n}" for n in (107, 205, 304, 306, 307, 309, 401, 402, 403, 404, 405, 406, 501, 502, 601, 602)} == OURS


def details(view: View, rules: tuple[Rule, ...]) -> str:
    """All that is said, with what was seen, the fixes and the severity."""
    scan = scan_view(view, rules)
    return repr((scan.findings, scan.undecided))


def kills(made: ModuleType, module: ModuleType, wanted: list[str]) -> bool:
    rules = tuple(rule for each in MODULES for rule in (made if each is module else each).RULES)
    try:
        return any(details(case.view, rules) != said for case, said in zip(CASES2, wanted, strict=True))
    except Exception:
        return True


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_condition_matters(module: ModuleType) -> None:
    """With any condition of a rule inverted, or without one of its parts, some machine is judged otherwise."""
    rules = tuple(rule for each in MODULES for rule in each.RULES)
    wanted = [details(case.view, rules) for case in CASES2]
    alive = [what for what, made in mutants(module) if not kills(made, module, wanted)]
    assert conditions(module) > 3
    assert alive == [], "\n".join(alive)


APART = [
    ({"VA203", "VA204", "VA206"}, {"VA205", "VA401"}),
    ({"VA102", "VA305"}, {"VA304"}),
    ({"VA102"}, {"VA307"}),
    ({"VA108"}, {"VA107"}),
    ({"VA302"}, {"VA306", "VA307"}),
    ({"VA402"}, {"VA406"}),
]


@pytest.mark.parametrize("case", [*CASES, *CASES2], ids=lambda case: case.name)
def test_one_cause_is_one_finding(case: Case) -> None:
    """Rules that are about the same thing never apply to the same device together."""
    found: dict[str, set[str]] = {}
    for each in scan_view(case.view).findings:
        found.setdefault(each.device, set()).add(each.id)
    for ids in found.values():
        for one, other in APART:
            assert not (ids & one and ids & other), ids
    everywhere = set().union(*found.values())
    assert not {"VA301", "VA309"} <= everywhere


def test_severities() -> None:
    def severity(view: View, rule: str) -> Severity:
        return next(each.severity for each in scan_view(view).findings if each.id == rule)

    mixed = device(vfio=True, driver="vfio-pci", offered=True, group_drivers=("vfio-pci", "virtio-pci"))
    assert severity(machine(mixed), "VA107") is Severity.ERROR
    assert severity(machine(device(vfio=True, driver="igb_uio"), iommus=()), "VA107") is Severity.WARNING
    assert severity(machine(swiotlb_slots=10, swiotlb_used=10), "VA601") is Severity.WARNING
    assert severity(machine(log="x: swiotlb buffer is full (sz: 4096 bytes)\n"), "VA601") is Severity.ERROR
    sandbox = machine(device(offered=False), kata=True, restricted="tdx", iommu="none")
    assert severity(sandbox, "VA309") is Severity.ERROR
    assert severity(machine(kata=True, kata_iommu_platform=False, iommu="intel"), "VA309") is Severity.WARNING


def test_twice_the_slots() -> None:
    fix = scan_view(machine(swiotlb_slots=1000, swiotlb_used=1000)).findings[0].fix["kernel"]
    assert fix.startswith("swiotlb=2000 ")
    fix = scan_view(machine(log="x: swiotlb buffer is full (sz: 4096 bytes)\n")).findings[0].fix["kernel"]
    assert fix.startswith("swiotlb=65536 ")
    fix = scan_view(machine(swiotlb_slots=500000, swiotlb_used=500000)).findings[0].fix["kernel"]
    assert fix.startswith("swiotlb=524288 ")
    fix = scan_view(machine(log="x: swiotlb buffer is full (sz: 300000 bytes)\n")).findings[0].fix["kernel"]
    assert "256 KiB" in fix


VERSIONS = {
    "5.0.0": (5, 0, 0, 999),
    "8.0.0-rc0": (8, 0, 0, 0),
    "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)": (7, 2, 22, 999),
    "6.11.0-rc7-amd64": (6, 11, 0, 7),
    "22.11.11": (22, 11, 11, 999),
    "none": None,
    "": None,
    "99999.1": None,
}


@pytest.mark.parametrize("said", VERSIONS)
def test_versions(said: str) -> None:
    assert history.numbers(said) == VERSIONS[said]


def test_when_a_mistake_is_over() -> None:
    tlb = history.DEVICE_TLB
    assert [tlb.has(each) for each in ("7.1.0", "7.2.4", "7.2.5", "8.0.3", "8.0.4", "8.1.0", "?")] == [
        True, True, False, True, False, False, None,
    ]  # fmt: skip
    assert tlb.releases == "QEMU 8.1 or 7.2.5 or 8.0.4"
    assert history.PREMAPPED.has("6.9.9") is False
    assert len(PREMAPPED) > 5
    for row in (*history.DPDK, tlb, history.DIRTY_RING, history.UNCHECKED, history.PREMAPPED, history.DPDK_LOG):
        assert row.has(row.fixed) is False
        assert row.commit
        assert row.subject in str(row.citation)
        assert not row.since or row.has(row.since) is True
