# SPDX-License-Identifier: Apache-2.0
"""The probe on real QEMU devices: declared x accepted x observed on VT-d, and what happens in trouble."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from probe_kit import GENERAL, KINDS, ON, VARIANTS, observed, qemu_cells, wrong
from virtiova import probe
from virtiova.errors import UsageError
from virtiova.machine.qemu import bus
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import Experiment, find
from virtiova.probe.rig import Outcome, Rig
from virtiova.result import Cell, Path

pytestmark = pytest.mark.qemu

NEEDS_READS = {"device-reads", "write-only"}

# bit 33 as declared, experiment; offered, accepted, predicted, observed, explained. What the driver writes is in the
# experiment: `never-offered` takes the bit without an offer, `not-taken` declines it, `no-version-1` with VERSION_1.
TABLE = [
    ("", "device-writes", False, False, {"bypass"}, "bypass", None),
    ("", "device-reads", False, False, {"bypass"}, "bypass", None),
    ("", "ring", False, False, {"bypass"}, "bypass", None),
    ("", "indirect", False, False, {"bypass"}, "bypass", None),
    ("", "split-buffer", False, False, {"bypass"}, "bypass", None),
    ("", "never-offered", False, False, {"bypass", "refused"}, "bypass", None),
    ("", "msi", False, False, {"translated"}, "translated", None),
    ("", "empty-tables", False, False, {"bypass"}, "bypass", None),
    ("", "bus-master-off", False, False, {"blocked"}, "bypass", "QEMU-BUS-MASTER"),
    ("", "translation-off", False, False, {"direct"}, "direct", None),
    ("", "renegotiate", False, False, {"bypass"}, "bypass", None),
    (ON, "device-writes", True, True, {"translated"}, "translated", None),
    (ON, "device-reads", True, True, {"translated"}, "translated", None),
    (ON, "ring", True, True, {"translated"}, "translated", None),
    (ON, "indirect", True, True, {"translated"}, "translated", None),
    (ON, "split-buffer", True, True, {"translated"}, "translated", None),
    (ON, "msi", True, True, {"translated"}, "translated", None),
    (ON, "empty-tables", True, True, {"blocked"}, "blocked", None),
    (ON, "unmapped", True, True, {"blocked"}, "blocked", None),
    (ON, "read-only", True, True, {"blocked"}, "blocked", None),
    (ON, "write-only", True, True, {"blocked"}, "blocked", None),
    (ON, "past-end", True, True, {"blocked"}, "blocked", None),
    (ON, "unmap", True, True, {"blocked"}, "blocked", None),
    (ON, "remap", True, True, {"translated"}, "translated", None),
    (ON, "bus-master-off", True, True, {"blocked"}, "blocked", None),
    (ON, "translation-off", True, True, {"direct"}, "direct", None),
    (ON, "not-taken", True, False, {"refused"}, "refused", None),
    (ON, "renegotiate", True, False, {"refused"}, "refused", None),
    (ON, "no-version-1", True, False, {"bypass", "refused"}, "translated", "QEMU-DECIDES-AT-PLUG"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bit", "name", "offered", "accepted", "predicted", "path", "explained"),
    TABLE,
    ids=[f"{'on' if row[0] else 'off'}-{row[1]}" for row in TABLE],
)
def test_declared_accepted_observed(
    kind: str,
    bit: str,
    name: str,
    offered: bool,
    accepted: bool,
    predicted: set[str],
    path: str,
    explained: str | None,
) -> None:
    cell = qemu_cells(f"virtio-{kind}-pci{bit}")[name]
    if kind == "rng" and name in NEEDS_READS:
        assert cell.observed is Path.NOT_APPLICABLE
        return
    assert (cell.offered, cell.accepted) == (offered, accepted)
    assert (set(cell.predicted), cell.observed, cell.explained) == (predicted, path, explained), cell.evidence
    assert (cell.machine, cell.iommu, cell.device) == ("q35", "intel", f"virtio-{kind}-pci")


@pytest.mark.parametrize("kind", KINDS)
def test_who_carries_on_after_the_refusal(kind: str) -> None:
    """blk serves the kick, through the IOMMU; net and rng wait for a DRIVER_OK that does not count."""
    cell = qemu_cells(f"virtio-{kind}-pci{ON}")["carry-on"]
    assert cell.evidence.features_ok is False
    assert cell.evidence.carried_on
    assert cell.predicted == [Path.BLOCKED]
    if kind == "blk":
        assert (cell.observed, cell.explained) == (Path.TRANSLATED, "QEMU-KICK-AFTER-REFUSAL")
    else:
        assert (cell.observed, cell.explained) == (Path.BLOCKED, None)
        assert cell.evidence.live


@pytest.mark.parametrize(("device", "iommu", "interface"), VARIANTS)
def test_every_experiment_is_as_predicted_or_explained(device: str, iommu: str, interface: str) -> None:
    cells = qemu_cells(device, iommu, interface)
    assert list(cells) == GENERAL
    assert wrong(list(cells.values())) == []
    assert all(cell.explained is None or cell.explained.startswith("QEMU-") for cell in cells.values())


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_invalidation_either_page_may_be_reached(kind: str) -> None:
    cells = qemu_cells(f"virtio-{kind}-pci{ON}")
    assert set(cells["unmap-stale"].predicted) == {Path.STALE, Path.BLOCKED}
    assert set(cells["remap-stale"].predicted) == {Path.STALE, Path.TRANSLATED}


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_has_a_proof_of_life_and_the_fault_names_the_address(kind: str) -> None:
    cells = qemu_cells(f"virtio-{kind}-pci{ON}")
    for cell in cells.values():
        assert (cell.observed is not Path.BLOCKED) or cell.evidence.live, cell.experiment
    for name in ("unmapped", "read-only", "past-end"):
        evidence = cells[name].evidence
        assert evidence.x is not None
        assert evidence.x & ~0xFFF in {fault.address & ~0xFFF for fault in evidence.faults}, name
        assert all(len(fault.raw) == 2 and fault.source == 0x100 for fault in evidence.faults)


@pytest.mark.parametrize("kind", KINDS)
def test_translation_off_is_direct_because_the_control_says_so(kind: str) -> None:
    for bit in ("", ON):
        evidence = qemu_cells(f"virtio-{kind}-pci{bit}")["translation-off"].evidence
        touched = {w.page for w in evidence.witnesses if w.role == "control" and w.touched}
        assert (evidence.control, touched) == ("msi-x", {"B"})


# -- other machines, other interfaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interface", ["legacy", "modern"])
def test_transitional_devices_go_around(kind: str, interface: str) -> None:
    names = ("device-writes", "device-reads", "ring", "indirect", "not-taken", "never-offered")
    cells = qemu_cells(f"virtio-{kind}-pci-transitional", "intel", interface, names)
    seen = observed(cells)
    never_offered = seen.pop("never-offered", None)
    assert set(seen.values()) == {"bypass"}
    assert len(seen) == (3 if kind == "rng" else 4)
    assert never_offered == (None if interface == "legacy" else "bypass")
    cell = cells["device-writes"]
    assert (cell.offered, cell.accepted) == (False, False)
    assert (cell.evidence.features_ok is None) is (interface == "legacy")


@pytest.mark.parametrize(
    ("device", "path"),
    [
        ("virtio-blk-pci,disable-modern=on,addr=4", "bypass"),
        ("virtio-blk-pci,disable-legacy=on,addr=4", "bypass"),
        (f"virtio-blk-pci{ON},disable-legacy=on,addr=4", "translated"),
        (f"virtio-net-pci-non-transitional{ON}", "translated"),
        (f"virtio-rng-pci{ON},ats=on", "translated"),
    ],
)
def test_other_ways_to_plug_it(device: str, path: str) -> None:
    cells = qemu_cells(device, "intel", "auto", ("device-writes", "ring"))
    assert observed(cells) == {"device-writes": path, "ring": path}
    assert wrong(list(cells.values())) == []


@pytest.mark.parametrize("iommu", ["intel,aw-bits=48", "intel,caching-mode=on", "intel,device-iotlb=on"])
def test_options_of_the_iommu(iommu: str) -> None:
    for bit, path in (("", "bypass"), (ON, "translated")):
        cells = qemu_cells(f"virtio-blk-pci{bit}", iommu, "auto", ("device-writes", "ring"))
        assert observed(cells) == {"device-writes": path, "ring": path}
        assert {cell.iommu for cell in cells.values()} == {"intel"}
    blocked = qemu_cells(f"virtio-blk-pci{ON}", iommu, "auto", ("unmap", "past-end"))
    assert observed(blocked) == {"unmap": "blocked", "past-end": "blocked"}


@pytest.mark.parametrize("bit", ["", ON])
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_iommu_it_is_direct_not_bypass(kind: str, bit: str) -> None:
    names = ("device-writes", "device-reads", "ring", "unmapped", "translation-off", "not-taken")
    cells = qemu_cells(f"virtio-{kind}-pci{bit}", "none", "auto", names)
    seen = observed(cells)
    assert seen.pop("not-taken", None) == ("refused" if bit else None)
    assert set(seen.values()) == {"direct"}
    assert {"unmapped", "translation-off"}.isdisjoint(seen), "there are no tables"
    assert cells["device-writes"].address == "gpa"
    assert cells["device-writes"].evidence.control == "machine"


@pytest.mark.parametrize("device", ["edu", "rtl8139"])
@pytest.mark.parametrize("iommu", ["intel", "none"])
def test_the_control_device_itself(iommu: str, device: str) -> None:
    (cell,) = probe.qemu(device, iommu=iommu)
    assert cell.device == device
    expected = Path.TRANSLATED if iommu == "intel" else Path.DIRECT
    assert (cell.experiment, cell.predicted, cell.observed) == ("control", [expected], expected)


def test_a_device_without_messages_uses_the_outside_control() -> None:
    names = ("device-writes", "translation-off", "msi")
    cells = qemu_cells("virtio-blk-pci,vectors=0", "intel", "auto", names)
    assert observed(cells) == {"device-writes": "bypass", "translation-off": "direct"}
    assert {cells[name].evidence.control for name in names[:2]} == {"edu"}
    assert cells["msi"].observed is Path.NOT_APPLICABLE
    on = qemu_cells(f"virtio-blk-pci,vectors=0{ON}", "intel", "auto", ("device-writes", "unmapped"))
    assert observed(on) == {"device-writes": "translated", "unmapped": "blocked"}
    none = qemu_cells("virtio-blk-pci,vectors=0", "none", "auto", ("device-writes",))
    assert observed(none) == {"device-writes": "direct"}
    assert none["device-writes"].evidence.control == "machine"


# -- trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [f"virtio-blk-pci{ON},addr=4", f"virtio-net-pci,addr=4,disable-modern=on{ON}"])
def test_qemu_refuses_a_device_that_can_still_be_legacy(device: str) -> None:
    (cell,) = probe.qemu(device, experiments=["device-writes"])
    assert (cell.predicted, cell.observed, cell.mismatch) == ([Path.REFUSED], Path.REFUSED, False)
    assert cell.evidence.refused_by_machine
    assert "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device" in cell.evidence.words[-1]
    assert (cell.offered, cell.accepted) == (None, None), "it never came to an offer"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("virtio-blk-pci,num-queues=0", "num-queues property must be larger than 0"),
        ("virtio-rng-pci,addr=1f.0", "slot 31 function 0 not available"),
    ],
)
def test_other_refusals_say_nothing_of_the_device(device: str, words: str) -> None:
    """They are about what the user typed."""
    with pytest.raises(UsageError, match=words):
        list(probe.qemu(device, experiments=["device-writes"]))


@pytest.mark.parametrize(
    ("device", "near"),
    [
        ("virtio-blk-pci,iommu_platfrom=on", "iommu_platform"),
        ("virtio-net-pci,mqq=on", "mq"),
        ("virtio-blk-pcy", "virtio-blk-pci"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(device: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        list(probe.qemu(device, experiments=["device-writes"]))


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def cell_with(trouble: Callable[[int], object], when: str) -> tuple[Cell, list[int]]:
    """A cell during which ``trouble`` happens to QEMU, before or after the negotiation."""
    pids: list[int] = []
    plain = find("device-writes")

    def run(rig: Rig) -> Outcome:
        machine = rig.machine
        assert isinstance(machine, QemuMachine)
        pids.append(machine.pid)
        if when == "before":
            trouble(machine.pid)
            return plain.run(rig)
        start = rig.start

        def started(**kwargs: bool) -> object:
            trouble(machine.pid)
            return start(**kwargs)

        rig.start = started  # type: ignore[method-assign,assignment]
        return plain.run(rig)

    experiment: Experiment = replace(plain, run=run)
    cell = run_cell(
        lambda: QemuMachine(f"virtio-blk-pci{ON}", "intel"), experiment, machine="q35", iommu="intel", device="blk"
    )
    return cell, pids


@pytest.mark.parametrize("when", ["before", "after"])
def test_qemu_dies_in_the_middle(when: str) -> None:
    with soon(4):
        cell, pids = cell_with(lambda pid: os.kill(pid, signal.SIGKILL), when)
    assert (cell.observed, cell.mismatch) == (Path.UNKNOWN, False)
    assert "exit status -9" in cell.evidence.note
    assert (cell.offered, cell.accepted) == ((True, True) if when == "after" else (None, None))
    assert not alive(pids)


def test_what_qemu_said_before_it_died_is_quoted() -> None:
    plain = find("unmapped")

    def run(rig: Rig) -> Outcome:
        outcome = plain.run(rig)
        assert isinstance(rig.machine, QemuMachine)
        os.kill(rig.machine.pid, signal.SIGKILL)
        rig.transport.read_status()
        return outcome

    device = f"virtio-blk-pci{ON}"
    cell = run_cell(lambda: QemuMachine(device), replace(plain, run=run), machine="q35", iommu="intel", device=device)
    assert cell.observed is Path.UNKNOWN
    assert any("vtd_iova_to_slpte" in line for line in cell.evidence.words)
    assert cell.evidence.words[-1] in cell.evidence.note


@pytest.mark.parametrize("when", ["before", "after"])
def test_qemu_stops_answering(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(bus, "ANSWER_SECONDS", 0.4)
    with soon(4):
        cell, pids = cell_with(lambda pid: os.kill(pid, signal.SIGSTOP), when)
    assert (cell.observed, cell.mismatch) == (Path.UNKNOWN, False)
    assert "did not answer" in cell.evidence.note
    assert "still running" in cell.evidence.note
    assert not alive(pids), "a stopped process must be killed all the same"


def alive(pids: list[int]) -> list[int]:
    assert pids
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_a_qemu_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    """Whatever is called so and ends at once, with words of its own."""
    fake = os.path.join(tmp_path, "qemu-system-x86_64")
    with open(fake, "w", encoding="utf-8") as file:
        file.write("#!/bin/sh\necho 'cannot do that today' >&2\nexit 1\n")
    os.chmod(fake, 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with soon(4):
        (cell,) = probe.qemu("virtio-rng-pci", experiments=["device-writes"])
    assert (cell.observed, cell.evidence.words) == (Path.UNKNOWN, ["cannot do that today"])
