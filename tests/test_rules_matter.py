# SPDX-License-Identifier: Apache-2.0
"""Every rule matters: with one of them inverted, the table shows it in that rule's rows, and in no others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import MappingProxyType

import pytest

from probe_kit import KINDS, ON, model_cells
from virtiova import probe
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.policy import RULES, departure, predict
from virtiova.probe.edu import control_outcome
from virtiova.probe.experiment import find
from virtiova.probe.judge import disagreements, judge
from virtiova.probe.rig import Outcome, Rig
from virtiova.result import Cell, Path

ALL = [rule.id for rule in RULES]
HONEST_ONES = ("honest", "quirky")

# What the probe's machines cannot ask: there is no restricted memory in front of any of them.
NEVER_ASKED = {"restricted-memory"}
# Decided before the machine starts: only a refused command line shows it.
AT_START = {"room-for-the-bit"}
# About the driver's address, not about the path of the device's bytes.
ADDRESS_ONLY = {"no-quirk", "xen-domain"}
# About addresses inside requests: the devices of the in-process model have none.
PAYLOADS = {
    "backing-is-accessed": (f"virtio-gpu-pci{ON}", "gpu-backing"),
    "page-number-is-physical": (f"virtio-balloon-pci{ON}", "balloon-inflate"),
    "block-is-physical": (f"virtio-mem-pci{ON}", "mem-unplug"),
    "region-is-physical": (f"virtio-pmem-pci{ON}", "pmem-region"),
    "map-target-is-physical": (f"virtio-blk-pci{ON}", "map-target"),
}
ON_PATHS = [name for name in ALL if name not in NEVER_ASKED | AT_START | ADDRESS_ONLY]
ON_MODEL = [name for name in ON_PATHS if name not in PAYLOADS]


def asked(cell: Cell) -> set[str]:
    return {reason.rule for reason in cell.reasons}


@functools.cache
def model_table(inverted: str | None = None, iommu: str = "soft") -> tuple[Cell, ...]:
    rules = RULES if inverted is None else RULES.inverted(inverted)
    return tuple(
        cell
        for behaviour in HONEST_ONES
        for kind in KINDS
        for cell in probe.model(behaviour, kind, iommu=iommu, rules=rules)
    )


def said(cell: Cell) -> tuple[object, ...]:
    return (cell.device, cell.experiment, cell.offered, cell.accepted, cell.address, cell.predicted, cell.mismatch)


# -- on the model, all of the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("iommu", ["soft", "none"])
def test_with_the_rules_as_they_are_there_is_no_mismatch(iommu: str) -> None:
    cells = model_table(None, iommu)
    assert not [said(cell) for cell in cells if cell.mismatch]
    assert set().union(*(asked(cell) for cell in cells)) <= set(ALL)


@pytest.mark.parametrize("rule", ON_MODEL)
def test_inverted_it_shows(rule: str) -> None:
    rows = [cell for cell in model_table(rule) if cell.mismatch]
    assert rows, "the table did not notice"
    assert all(rule in asked(cell) for cell in rows)


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("iommu", ["soft", "none"])
def test_inverted_it_changes_nothing_where_it_was_not_asked(rule: str, iommu: str) -> None:
    for before, after in zip(model_table(None, iommu), model_table(rule, iommu), strict=True):
        assert before.observed is after.observed, "what is seen does not depend on what is predicted"
        if rule not in asked(before):
            assert said(before) == said(after)


@pytest.mark.parametrize("rule", sorted(ADDRESS_ONLY))
def test_rules_about_the_driver_show_in_the_address(rule: str) -> None:
    changed = [
        (before, after)
        for before, after in zip(model_table(), model_table(rule), strict=True)
        if before.address != after.address
    ]
    assert changed
    assert all(rule in asked(before) for before, _ in changed)
    assert not any(after.mismatch for _, after in changed), "the device's path is not the driver's choice"


@pytest.mark.parametrize(
    ("rule", "behaviour", "name", "predicted", "seen"),
    [
        ("bit-taken", "honest", "device-writes", {"refused"}, "translated"),
        ("bit-taken", "honest", "not-taken", {"bypass"}, "refused"),
        ("device-uses-platform", "honest", "device-writes", {"bypass"}, "translated"),
        ("device-uses-platform", "quirky", "device-writes", {"translated"}, "bypass"),
        ("front-translates", "honest", "ring", {"direct"}, "translated"),
        ("front-translates", "quirky", "ring", {"direct"}, "bypass"),
        ("front-translates", "quirky", "translation-off", {"bypass"}, "direct"),
        ("permitted", "honest", "unmapped", {"translated"}, "blocked"),
        ("permitted", "honest", "device-reads", {"blocked"}, "translated"),
        ("invalidated", "honest", "unmap-stale", {"blocked"}, "stale"),
        ("invalidated", "honest", "remap-stale", {"translated"}, "stale"),
        ("bus-master", "honest", "bus-master-off", {"translated"}, "blocked"),
        ("bus-master", "quirky", "device-writes", {"blocked"}, "bypass"),
        ("driver-ok-first", "honest", "carry-on", {"bypass"}, "blocked"),
        ("only-offered-bits", "quirky", "never-offered", {"bypass"}, "refused"),
    ],
)
def test_the_rows_one_by_one(rule: str, behaviour: str, name: str, predicted: set[str], seen: str) -> None:
    (cell,) = probe.model(behaviour, "blk", [name], rules=RULES.inverted(rule))
    assert (set(cell.predicted), cell.observed, cell.mismatch) == (predicted, seen, True)
    assert not model_cells(behaviour, "blk")[name].mismatch


def test_a_liar_is_excused_by_the_inverted_rule_only() -> None:
    """The table is not just full of mismatches: what was one before is none now."""
    (cell,) = probe.model("lying", "blk", ["device-writes"], rules=RULES.inverted("device-uses-platform"))
    assert (cell.observed, cell.mismatch) == (Path.BYPASS, False)


# -- on QEMU: observed once, predicted again ---------------------------------------------------------------------------

QEMU_ROWS = (
    ("virtio-blk-pci", "device-writes"),
    ("virtio-net-pci", "device-reads"),
    ("virtio-rng-pci", "ring"),
    ("virtio-blk-pci", "translation-off"),
    ("virtio-blk-pci", "never-offered"),
    (f"virtio-blk-pci{ON}", "device-reads"),
    (f"virtio-net-pci{ON}", "device-writes"),
    (f"virtio-rng-pci{ON}", "ring"),
    (f"virtio-rng-pci{ON}", "unmapped"),
    (f"virtio-net-pci{ON}", "unmap-stale"),
    (f"virtio-blk-pci{ON}", "bus-master-off"),
    (f"virtio-net-pci{ON}", "carry-on"),
    (f"virtio-rng-pci{ON}", "not-taken"),
    ("virtio-gpu-pci", "gpu-backing"),
    ("virtio-balloon-pci", "balloon-inflate"),
    (f"virtio-balloon-pci{ON}", "balloon-report"),
    *PAYLOADS.values(),
)


@functools.cache
def seen_on_qemu() -> MappingProxyType[tuple[str, str], Outcome]:
    # Some devices have no messages of their own.
    controls = {on: control_outcome("q35", "intel", enabled=on) for on in (True, False)}
    outside = controls.__getitem__
    found = {}
    for device, name in QEMU_ROWS:
        with QemuMachine(device, "virtio" if name == "map-target" else None) as machine:
            found[device, name] = find(name).run(Rig(machine, outside))
    return MappingProxyType(found)


def mismatches(inverted: str | None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The rows that are neither predicted nor explained, and those in which the rule was asked."""
    rules = RULES if inverted is None else RULES.inverted(inverted)
    rows, concerned = [], []
    for key, outcome in seen_on_qemu().items():
        path = judge(outcome.evidence)
        assert path is not Path.UNKNOWN, key
        prediction = predict(outcome.facts, rules)
        if disagreements(outcome.evidence, prediction):
            rows.append(key)
        if path not in prediction.paths and departure("QEMU 7.2", outcome.facts, path) is None:
            rows.append(key)
        if inverted in {reason.rule for reason in prediction.reasons}:
            concerned.append(key)
    return rows, concerned


@pytest.mark.qemu
def test_qemu_keeps_to_the_rules_as_they_are() -> None:
    assert mismatches(None)[0] == []


@pytest.mark.qemu
@pytest.mark.parametrize("rule", [name for name in ON_PATHS if name != "only-offered-bits"])
def test_qemu_contradicts_an_inverted_rule_in_its_rows_only(rule: str) -> None:
    rows, concerned = mismatches(rule)
    assert rows, "the table did not notice"
    assert set(rows) <= set(concerned)


@pytest.mark.qemu
@pytest.mark.parametrize("rule", PAYLOADS)
def test_a_rule_about_addresses_inside_requests_shows_in_its_rows_only(rule: str) -> None:
    """The same device with the bit off, and what it does by descriptors, have nothing to do with it."""
    rows, _ = mismatches(rule)
    assert rows == [PAYLOADS[rule]]


@pytest.mark.qemu
def test_what_bit_33_means_to_the_device() -> None:
    """The rule itself, row by row."""
    rows, _ = mismatches("device-uses-platform")
    moved = [(d, n) for d, n in QEMU_ROWS if n in ("device-writes", "device-reads", "ring", "unmapped", "unmap-stale")]
    assert set(moved) <= set(rows)
    assert (f"virtio-rng-pci{ON}", "not-taken") not in rows, "refused before any byte moved"


def table(rules: str | None, rows: Sequence[tuple[str, str]]) -> list[Cell]:
    chosen = RULES if rules is None else RULES.inverted(rules)
    return [cell for device, name in rows for cell in probe.qemu(device, experiments=[name], rules=chosen)]


@pytest.mark.qemu
def test_the_table_itself_with_an_inverted_rule() -> None:
    rows = [
        ("virtio-blk-pci", "device-writes"),
        (f"virtio-blk-pci{ON}", "device-writes"),
        (f"virtio-rng-pci{ON}", "msi"),
    ]
    assert [cell.mismatch for cell in table(None, rows)] == [False, False, False]
    assert [cell.mismatch for cell in table("device-uses-platform", rows)] == [True, True, True]
    assert [cell.mismatch for cell in table("driver-ok-first", rows)] == [False, False, False], "it was not asked"


@pytest.mark.qemu
def test_the_rule_about_the_command_line() -> None:
    row = [(f"virtio-blk-pci{ON},addr=4", "device-writes"), (f"virtio-blk-pci{ON}", "device-writes")]
    assert [cell.mismatch for cell in table(None, row)] == [False, False]
    assert [cell.mismatch for cell in table("room-for-the-bit", row)] == [True, False]
