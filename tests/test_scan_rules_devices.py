# SPDX-License-Identifier: Apache-2.0
"""The rules about isolation, start, drivers and views: for each a machine that it is about, and the nearest that it is
not. All that is said of a machine is compared: one cause is one finding."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from scan_rule_cases import INTEL, OFF, REFUSED
from scan_rule_drivers import CASES, PROVIDE
from scan_rule_kit import Case, conditions, device, machine, mutants, of
from virtiova.collect.facts import View, ViewKind
from virtiova.result.scan import Severity
from virtiova.scan.engine import scan_view
from virtiova.scan.rule import Rule
from virtiova.scan.rules import RULES, isolation, negotiation, start, topology, views

MODULES = (isolation, topology, start, negotiation, views)
OURS = frozenset(rule.id for module in MODULES for rule in module.RULES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_said(case: Case) -> None:
    assert of(case.view, RULES, OURS) == case.said


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.id in OURS], ids=lambda rule: rule.id)
def test_each_rule_is_met_and_missed(rule: Rule) -> None:
    met = [case for case in CASES if any(words.startswith(rule.id + " ") or words == rule.id for words in case.said)]
    missed = [case for case in CASES if case not in met]
    assert met
    assert missed
    assert rule.fix
    assert rule.why
    assert rule.evidence or rule.id.startswith("VA90")


def test_the_ids() -> None:
    assert {"VA101", "VA102", "VA103", "VA104", "VA105", "VA106", "VA108"} <= OURS
    assert {"VA201", "VA202", "VA203", "VA204", "VA206", "VA301", "VA302", "VA303", "VA305", "VA308"} <= OURS
    assert {"VA901", "VA902", "VA903"} <= OURS


def with_module(old: ModuleType, new: ModuleType) -> tuple[Rule, ...]:
    return tuple(rule for module in MODULES for rule in (new if module is old else module).RULES)


def kills(made: ModuleType, module: ModuleType, wanted: list[str]) -> bool:
    rules = with_module(module, made)
    try:
        return any(details(case.view, rules) != said for case, said in zip(CASES, wanted, strict=True))
    except Exception:
        return True


def details(view: View, rules: tuple[Rule, ...]) -> str:
    """All that is said, with what was seen, the fixes and the severity."""
    scan = scan_view(view, rules)
    return repr((scan.findings, scan.undecided))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_condition_matters(module: ModuleType) -> None:
    """With any condition of a rule inverted, or without one of its parts, some machine is judged otherwise."""
    rules = with_module(module, module)
    wanted = [details(case.view, rules) for case in CASES]
    alive = [what for what, made in mutants(module) if not kills(made, module, wanted)]
    assert conditions(module) > 3
    assert alive == [], "\n".join(alive)


def severity(view: View, rule: str) -> Severity:
    return next(each.severity for each in scan_view(view).findings if each.id == rule)


def test_severities() -> None:
    assert severity(machine(device(**OFF), **INTEL), "VA101") is Severity.WARNING
    balloon: dict[str, Any] = {**OFF, "type": "balloon"}
    assert severity(machine(device(**balloon), **INTEL), "VA303") is Severity.NOTE
    assert (
        severity(machine(device(type="balloon", iommu_platform=True, offered=True), **INTEL), "VA303")
        is Severity.WARNING
    )
    assert severity(machine(device(type="balloon", **REFUSED), iommu="none"), "VA303") is Severity.ERROR


def test_open_answers_are_for_machines_that_the_rule_is_about() -> None:
    for case in CASES[:3]:
        assert not scan_view(case.view).undecided or case.name == "ordinary, nothing known"


def test_fixes_are_filled_in() -> None:
    for case in CASES:
        for each in scan_view(case.view).findings:
            for product, words in each.fix.items():
                assert "{" not in words, (each.id, product)
    found = scan_view(machine(device(model="virtio-blk-pci", can_be_legacy=True, **OFF), **INTEL)).findings[0]
    assert "iommu_platform=on,disable-legacy=on to -device virtio-blk-pci (virtio0)" in found.fix["QEMU"]
    found = scan_view(machine(device(model="virtio-blk-pci-non-transitional", **OFF), **INTEL)).findings[0]
    assert "add iommu_platform=on to -device" in found.fix["QEMU"]


def test_a_log_about_a_guest_is_no_view() -> None:
    view = machine(log=PROVIDE, kind=ViewKind.LOG)
    scan = scan_view(view)
    assert [each.device for each in scan.findings] == ["virtio2"]
    assert not scan.devices
