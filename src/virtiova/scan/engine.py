# SPDX-License-Identifier: Apache-2.0
"""The engine: every rule is asked of every device, and of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Key, View
from virtiova.result.scan import Scan, ScanFinding, ScannedDevice, ScannedMachine, Undecided, merged
from virtiova.scan.backends import fold
from virtiova.scan.join import join
from virtiova.scan.judge import judge
from virtiova.scan.naming import strangers
from virtiova.scan.rule import About, Answer, Hit, Look, Open, Rule
from virtiova.scan.rules import RULES

_PLATFORM: Final[tuple[Key[Any], ...]] = (
    k.OS, k.KERNEL, k.ARCH, k.HYPERVISOR, k.VMM, k.VMM_VERSION, k.MACHINE_TYPE, k.IOMMU, k.IOMMUS, k.RESTRICTED, k.UUID,
    k.UNKNOWN_OPTIONS,
)  # fmt: skip

_OF_VMM: Final = {
    "QEMU": "qemu",
    "libvirt": "qemu",
    "Cloud Hypervisor": "cloud-hypervisor",
    "Firecracker": "firecracker",
}
"""Products whose fix is of use with one VMM only."""
_VMMS: Final = frozenset(_OF_VMM.values())


def scan_views(views: Iterable[View], rules: Sequence[Rule] = RULES) -> Scan:
    """Judge several views; those of one machine are joined first."""
    return merged(scan_view(view, rules) for view in join(fold(list(views))))


def scan_view(view: View, rules: Sequence[Rule] = RULES) -> Scan:
    """Judge one machine."""
    rows = [judge(view, device) for device in view.devices]
    others = [(device, judge(view, device)) for device in strangers(view)]
    scan = Scan(view=view.kind.value, machines=[_machine(view)])
    for rule in rules:
        if rule.about is About.MACHINE:
            _take(scan, rule, view, None, rule.ask(Look(view, None, None, rows)))
            continue
        for device, row in zip(view.devices, rows, strict=True):
            _take(scan, rule, view, row, rule.ask(Look(view, device, row, rows)))
        hit = {each.device for each in scan.findings if each.id == rule.id}
        types = {row.type for row in rows if row.name in hit}
        for device, row in others:
            # What only a log names may be one of the devices, by another name: it is found once. And where there
            # are devices, a log's silence about another is no open question.
            answer = rule.ask(Look(view, device, row, rows)) if row.type not in types else None
            if isinstance(answer, Hit) or not rows:
                _take(scan, rule, view, row, answer)
    found: dict[str, list[str]] = {}
    for each in scan.findings:
        found.setdefault(each.device, []).append(each.id)
    scan.devices = [replace(row, findings=found.get(row.name, [])) for row in rows]
    scan.findings.sort(key=lambda each: (each.severity.rank, each.id))
    return scan


def _machine(view: View) -> ScannedMachine:
    said: dict[str, str] = {}
    for key in _PLATFORM:
        fact = view.machine.fact(key)
        if fact is not None and fact.value:
            said[key.name] = ", ".join(fact.value) if isinstance(fact.value, tuple) else str(fact.value)
    return ScannedMachine(view.name, view.kind.value, view.source.split("\n"), said, list(view.problems))


def _take(scan: Scan, rule: Rule, view: View, row: ScannedDevice | None, answer: Answer) -> None:
    device = row.name if row is not None else ""
    if isinstance(answer, Open):
        scan.undecided.append(Undecided(rule.id, view.name, device, answer.settle.value))
    elif isinstance(answer, Hit):
        vmm = view.machine.get(k.VMM) or ""
        values = {"device": device, "type": row.type if row is not None else "", **answer.values}
        scan.findings.append(
            ScanFinding(
                id=rule.id,
                severity=answer.severity or rule.severity,
                machine=view.name,
                device=device,
                title=rule.title,
                seen=list(answer.seen),
                why=rule.why,
                fix={
                    product: words.format_map(values)
                    for product, words in rule.fix.items()
                    if _OF_VMM.get(product, vmm) == vmm or vmm not in _VMMS
                },
                citation=str(rule.citation),
            )
        )
