# SPDX-License-Identifier: Apache-2.0
"""With one rule of the policy inverted at a time, the matrix shows mismatches in that rule's rows, and in no others."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping as MappingType
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Final

import pytest

from probe_kit import ON
from virtiova.errors import NotPossibleError
from virtiova.guest.boot import Boot, assets
from virtiova.guest.platforms import find
from virtiova.guest.run import disks_for, judge_boot, look_at
from virtiova.matrix import Extent, Planned, Selection, guests, plan
from virtiova.matrix.systems import platforms
from virtiova.matrix.work import run_with
from virtiova.packages.store import Store
from virtiova.policy import RULES, Rules
from virtiova.probe.plan import Runner, Task
from virtiova.result import Cell, Path

IN_GUESTS: Final = {"no-quirk": "x86-vtd", "xen-domain": "xen-pv"}
"""About the address that a real driver passes, which nobody sees but where a real kernel is booted: which one."""
ON_MODEL: Final = {"only-offered-bits": Task("model", "soft", "quirky:blk", "never-offered")}
"""An unoffered bit may be refused or ignored. QEMU ignores it, so that the answer that allows the refusal besides is
no mismatch on any row of QEMU's; our own device, in a machine without a QEMU, refuses."""
NO_ROW: Final = {
    "restricted-memory": "no machine that can be had here keeps its memory from devices: that takes a processor with "
    "SEV, TDX or an ultravisor, none of which QEMU emulates, or a Xen domain that shares memory by grants only"
}
"""Rules about a platform that no row is: by name, with the reason. `policy_table` has them."""
BY_QTEST: Final = [rule.id for rule in RULES if rule.id not in {*IN_GUESTS, *ON_MODEL, *NO_ROW}]

Key = tuple[str, str]
"""A cell by device and experiment."""


@functools.cache
def sample() -> tuple[Planned, ...]:
    """Devices behind VT-d, with the bit and without, out of the matrix itself: a row for every rule that it has one
    for."""
    tasks = plan(Selection(only=("q35", "intel", "iommu")), extent=Extent(full=True)).tasks
    off = {"device-writes", "never-offered"}
    on = {"device-writes", "not-taken", "carry-on", "bus-master-off", "unmapped", "unmap-stale", "translation-off"}
    asked = {
        "virtio-rng-pci": off,
        f"virtio-rng-pci{ON}": on,
        f"virtio-blk-pci-transitional{ON}": {"device-writes"},
    }
    inside = {"gpu-backing", "balloon-inflate", "mem-unplug", "pmem-region", "map-target"}
    payloads = [
        planned
        for iommu in ("intel", "virtio")
        for planned in plan(Selection(only=("payloads", "q35", iommu))).tasks
        if planned.task.device.endswith(ON) and planned.task.experiment in inside
    ]
    behind = {planned.task.experiment: planned for planned in payloads}
    return (*(p for p in tasks if p.task.experiment in asked.get(p.task.device, ())), *behind.values())


@functools.cache
def matrix_with(inverted: str | None) -> MappingProxyType[Key, Cell]:
    runner = Runner(jobs=1, rules=inverse(inverted))
    rows = ((p.task, run_with(runner, inverse(inverted), p)[0]) for p in sample())
    return MappingProxyType({(task.device, task.experiment): row.cell for task, row in rows})


def inverse(rule: str | None) -> Rules:
    """The rules as they are, or with that one inverted."""
    return RULES if rule is None else RULES.inverted(rule)


def shows(rule: str, plain: MappingType[Key, Cell], inverted: MappingType[Key, Cell]) -> set[Key]:
    """The cells that are mismatches because of the inverted rule; all of them have asked it, and no others changed."""
    wrong = {key for key, cell in inverted.items() if cell.mismatch}
    new = {key for key in wrong if not plain[key].mismatch or plain[key].predicted != inverted[key].predicted}
    changed = {key for key, cell in inverted.items() if cell.predicted != plain[key].predicted}
    asked = {key for key, cell in inverted.items() if rule in {reason.rule for reason in cell.reasons}}
    assert new <= asked
    assert changed <= asked
    assert all(cell.observed is plain[key].observed for key, cell in inverted.items())
    return new


@pytest.mark.qemu
def test_with_the_rules_as_they_are_there_is_no_mismatch() -> None:
    cells = matrix_with(None)
    assert len(cells) == 15
    assert not [key for key, cell in cells.items() if cell.mismatch and cell.explained is None]
    assert not [key for key, cell in cells.items() if cell.observed is Path.UNKNOWN]


@pytest.mark.qemu
@pytest.mark.parametrize("rule", BY_QTEST)
def test_an_inverted_rule_shows_in_its_rows(rule: str) -> None:
    assert shows(rule, matrix_with(None), matrix_with(rule)), "the matrix did not notice"


@pytest.mark.parametrize("rule", ON_MODEL)
def test_an_inverted_rule_shows_where_only_the_model_machine_asks_it(rule: str) -> None:
    planned = Planned("iommu", "", ON_MODEL[rule])

    def cells(inverted: str | None) -> dict[Key, Cell]:
        (row,) = run_with(Runner(jobs=1, rules=inverse(inverted)), inverse(inverted), planned)
        return {(planned.task.device, planned.task.experiment): row.cell}

    plain = cells(None)
    assert not any(cell.mismatch for cell in plain.values())
    assert len(shows(rule, plain, cells(rule))) == 1


@pytest.mark.qemu
@pytest.mark.parametrize("rule", ON_MODEL)
def test_on_qemu_such_a_rule_shows_in_what_is_predicted_only(rule: str) -> None:
    plain, inverted = matrix_with(None), matrix_with(rule)
    assert {key for key, cell in inverted.items() if cell.predicted != plain[key].predicted}
    assert shows(rule, plain, inverted) == set(), "then it needs no model machine any more"


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(700)
@pytest.mark.parametrize("rule", IN_GUESTS)
def test_an_inverted_rule_shows_in_the_rows_of_real_kernels(rule: str) -> None:
    """One boot, judged by both: what the driver did is the same."""
    platform = find(IN_GUESTS[rule])
    assert platform.name in {guest for *_, guest in guests.guests()}, "it is in the matrix"
    try:
        files = assets(platform, Store())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    with Boot(platform, files, disks_for(guests.BITS)) as boot:
        assert boot.run(600)
        looked = look_at(boot)
    plain, inverted = (
        {(platform.name, str(bit)): cell for bit, cell in judge_boot(boot, looked, inverse(each)).items()}
        for each in (None, rule)
    )
    assert [cell.mismatch for cell in plain.values()] == [False, False]
    assert not any(cell.observed is Path.UNKNOWN for cell in plain.values())
    assert shows(rule, plain, inverted), "the matrix did not notice"


def test_a_boot_of_the_matrix_is_judged_by_the_rules_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Rules] = []

    def run(platform: object, bits: object, *, store: object, rules: Rules) -> list[Cell]:
        seen.append(rules)
        return []

    monkeypatch.setattr("virtiova.guest.run.run", run)
    rules = RULES.inverted("no-quirk")
    task = Task("q35", "intel", "virtio-*", guests.EXPERIMENT)
    run_with(Runner(jobs=1), rules, Planned("iommu", "", task, guest="x86-vtd"))
    assert seen == [rules]


def test_every_rule_is_shown_or_named_with_the_reason() -> None:
    ids = [rule.id for rule in RULES]
    assert sorted([*BY_QTEST, *IN_GUESTS, *ON_MODEL, *NO_ROW]) == sorted(ids)
    assert list(NO_ROW) == ["restricted-memory"]
    assert not {"sev", "tdx", "s390-pv"} & {row.machine for row in platforms()}, "then it has a row"


def test_the_page_says_where_each_rule_shows() -> None:
    text = (FilePath(__file__).parent.parent / "docs" / "matrix.md").read_text()
    section = text[text.index("## Every rule counts") :]
    section = section[: section.index("\n## ", 3)]
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE)) == sorted(rule.id for rule in RULES)
    for rule in NO_ROW:
        assert re.search(rf"^\| `{rule}` \| nowhere: ", section, re.MULTILINE)
    for rule, platform in IN_GUESTS.items():
        assert re.search(rf"^\| `{rule}` \| `{platform}`", section, re.MULTILINE)
    for rule in ON_MODEL:
        assert re.search(rf"^\| `{rule}` \| the in-process model", section, re.MULTILINE)
