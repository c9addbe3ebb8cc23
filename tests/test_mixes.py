# SPDX-License-Identifier: Apache-2.0
"""Several devices in one real QEMU machine: each is judged by itself, and none reaches what is another's."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from mix_kit import PLATFORMS, SHARED, WAYS, mixed, skip_if_missing, ways
from probe_kit import ON, wrong
from virtiova import probe
from virtiova.addr import IOVA
from virtiova.cli import exits, main
from virtiova.errors import UsageError
from virtiova.iommu.faults import MOST, FaultSorter
from virtiova.machine.qemu.boards import BOARDS, find_board
from virtiova.machine.qemu.command import PLACES
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.matrix import Selection, answer, plan
from virtiova.ports import Fault
from virtiova.probe import mix as mixing
from virtiova.probe.experiment import find
from virtiova.probe.plan import Task, check
from virtiova.probe.rig import Outcome, Rig
from virtiova.result import Path, Row
from virtiova.run.executor import Done

BEHIND = ("device-writes", "at-once")


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    skip_if_missing(request)


# -- each judged by itself -----------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.parametrize("experiment", BEHIND)
@pytest.mark.parametrize("platform", [*PLATFORMS, *SHARED])
def test_each_device_has_its_own_way(platform: str, experiment: str) -> None:
    cells = mixed(platform, experiment)
    assert wrong(cells) == []
    assert ways(cells) == WAYS[: len(cells)]
    assert len(cells) >= 4
    assert all(list(cell.predicted) == [cell.observed] for cell in cells), "one path is allowed to each"
    for cell in cells[5:]:
        # Seen, and not assumed: its message went around the IOMMU, which is on.
        assert cell.evidence.control == "msi-x"
        assert {w.page for w in cell.evidence.witnesses if w.role == "control" and w.touched} == {"B"}
    assert [cell.number for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.beside) == len(cells) - 1 for cell in cells)


@pytest.mark.qemu
@pytest.mark.parametrize("platform", ["q35 intel", "virt smmuv3", "pseries tce"])
def test_swapping_the_bit_swaps_the_answers(platform: str) -> None:
    machine, iommu = platform.split()
    for bits, seen in ((("", ON), ("bypass", "translated")), ((ON, ""), ("translated", "bypass"))):
        devices = [f"virtio-{kind}-pci{bit}" for kind, bit in zip(("blk", "net"), bits, strict=True)]
        cells = list(probe.qemu(devices, iommu, ["device-writes"], machine=machine))
        assert ways(cells) == seen
        assert [bool(cell.accepted) for cell in cells] == [bool(bit) for bit in bits]
        assert wrong(cells) == []


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("rule", "mismatches"),
    [
        # Whoever has the bit is then said to go around, and whoever has none through.
        ("device-uses-platform", {1, 2, 3, 4, 5}),
        # Then whatever is behind is said to have nothing in front, and whatever is not is said to be behind.
        ("front-translates", {1, 2, 3, 4, 5, 6, 7}),
        ("bus-master", {1, 2, 4, 5, 6, 7}),
    ],
)
def test_with_a_rule_inverted_the_devices_that_it_is_about_mismatch(rule: str, mismatches: set[int]) -> None:
    plain, inverted = mixed("q35 intel", "device-writes"), mixed("q35 intel", "device-writes", rule)
    assert ways(plain) == ways(inverted)
    found = {cell.number for cell in inverted if cell.mismatch}
    # The control is hardware, and never asked about the bus master bit of a virtio device.
    assert found - {3} == mismatches - {3}


@pytest.mark.qemu
def test_every_experiment_beside_others() -> None:
    """All questions that there are, in machines of three: what is seen is what a device alone would show."""
    devices = [f"virtio-net-pci{ON}", "virtio-blk-pci", f"virtio-blk-pci{ON},place=bypass"]
    cells = list(probe.qemu(devices))
    assert wrong(cells) == []
    alone = {cell.experiment: cell for cell in probe.qemu(devices[0], "intel")}
    beside = {cell.experiment: cell for cell in cells if cell.number == 1}
    assert {name: (c.predicted, c.observed) for name, c in beside.items() if name in alone} == {
        name: (c.predicted, c.observed) for name, c in alone.items()
    }


# -- places --------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("device", "seen"),
    [
        (f"virtio-blk-pci{ON},place=bypass", "direct"),
        # Without messages of its own, so that a control from another machine has to go around as well.
        (f"virtio-blk-pci{ON},place=bypass,vectors=0", "direct"),
        (f"virtio-blk-pci{ON},place=root-bus", "translated"),
        (f"virtio-rng-pci{ON},place=root-port", "translated"),
        ("edu,place=bypass", "direct"),
        ("edu,place=root-port", "translated"),
    ],
)
@pytest.mark.parametrize("platform", ["q35 intel", "virt smmuv3", "q35 virtio"])
def test_a_device_alone_has_a_place_too(platform: str, device: str, seen: str) -> None:
    machine, iommu = platform.split()
    experiment = "control" if device.startswith("edu") else "device-writes"
    (cell,) = probe.qemu(device, iommu, [experiment], machine=machine)
    assert (str(cell.observed), wrong([cell])) == (seen, [])
    assert cell.device_options in device
    assert "place=" in cell.device_options


@pytest.mark.qemu
@pytest.mark.parametrize("platform", ["q35 intel", "virt smmuv3"])
@pytest.mark.parametrize(("place", "seen", "page"), [("bypass", "direct", "B"), ("root-bus", "bypass", "A")])
@pytest.mark.parametrize("edu", ["root-bus", "bypass"])
def test_a_control_is_taken_where_the_device_is(platform: str, place: str, seen: str, page: str, edu: str) -> None:
    """A device without messages, and a control beside it on the same side of the IOMMU, or on the other one."""
    machine, iommu = platform.split()
    devices = [f"virtio-blk-pci,vectors=0,place={place}", f"edu,place={edu}"]
    cell = next(iter(probe.qemu(devices, iommu, ["device-writes"], machine=machine)))
    assert (str(cell.observed), cell.evidence.control, wrong([cell])) == (seen, "edu", [])
    assert {w.page for w in cell.evidence.witnesses if w.role == "control" and w.touched} == {page}


@pytest.mark.parametrize(
    ("machine", "devices", "said"),
    [
        ("q35", ["virtio-blk-pci,place=bypas"], "did you mean 'bypass'"),
        ("q35", ["virtio-blk-pci,place=bypass,addr=3"], "name one of them"),
        ("q35", ["virtio-blk-pci", "virtio-blk-pci,addr=3"], "bus= and addr= are not free"),
        ("q35", ["virtio-blk-pci"] * 9, "q35 takes 8 devices at most"),
        ("sun4u", ["virtio-blk-pci"] * 5, "sun4u takes 4 devices at most"),
        ("sun4u", ["virtio-blk-pci,place=bypass"], "sun4u has one place for devices"),
        ("riscv-virt", ["virtio-blk-pci,place=bypass"], "riscv-virt has no bus that is led around its IOMMU"),
        ("virt-mmio", ["virtio-blk-device"] * 2, "virt-mmio takes one device at most"),
        ("q35", ["virtio-blk-pci", "virtio-blx-pci"], "did you mean 'virtio-blk-pci'"),
        ("q35", ["virtio-blk-pci,interface=legcy"], "did you mean 'legacy'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(machine: str, devices: list[str], said: str) -> None:
    task = Task(machine, BOARDS[machine].natural, devices[0], "device-writes", beside=tuple(devices[1:]))
    with pytest.raises(UsageError, match=said):
        check(task)


def test_controls_alone_have_one_experiment() -> None:
    with pytest.raises(UsageError, match="no experiment 'device-writes'"):
        check(Task("q35", "intel", "edu", "device-writes", beside=("edu",)))
    with pytest.raises(UsageError, match="no experiment 'control'"):
        check(Task("q35", "intel", "edu", "control", beside=("virtio-blk-pci",)))


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("platform", "place"),
    [
        *((platform, f",place={place}") for platform in ("q35 intel", "virt smmuv3") for place in PLACES),
        *((platform, "") for platform in SHARED),
    ],
)
def test_as_many_as_a_board_takes(platform: str, place: str) -> None:
    machine, iommu = platform.split()
    board = find_board(machine)
    devices = [f"virtio-{kind}-pci{bit}{place}" for bit in ("", ON) for kind in ("net", "blk", "rng", "blk")]
    cells = list(probe.qemu(devices[: len(board.seats)], iommu, ["at-once"], machine=machine))
    assert wrong(cells) == []
    assert len(cells) == len(board.seats)
    expected = ["direct"] * 8 if "bypass" in place else ["bypass"] * 4 + ["translated"] * 4
    assert list(ways(cells)) == expected[: len(cells)]


# -- trouble -------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_a_device_that_qemu_refuses_is_named_and_the_others_have_no_answer() -> None:
    refused = f"virtio-rng-pci{ON},disable-legacy=off,place=root-bus"
    cells = list(probe.qemu(["virtio-blk-pci", refused, "edu"], "intel", ["device-writes"]))
    assert ways(cells) == ("unknown", "refused", "unknown")
    assert [cell.mismatch for cell in cells] == [False] * 3
    assert "there was no machine to look at: QEMU refused virtio-rng-pci" in cells[0].evidence.note
    assert cells[2].experiment == "control"


@pytest.mark.qemu
def test_a_machine_that_dies_takes_the_answers_of_those_that_were_not_asked() -> None:
    honest = find("device-writes")
    devices = [f"virtio-blk-pci{ON}", "virtio-net-pci", f"virtio-rng-pci{ON}"]
    machines: list[QemuMachine] = []

    def make() -> QemuMachine:
        machines.append(QemuMachine(devices, "intel"))
        return machines[0]

    def run(rig: Rig) -> Outcome:
        outcome = honest.run(rig)
        if rig.machine.device == "virtio-blk-pci":
            os.kill(machines[0].pid, signal.SIGKILL)
        return outcome

    with QemuMachine(devices, "intel") as machine:
        specs = [end.spec for end in machine.ends]
    cells = mixing.run_mix(
        make,
        replace(honest, run=run),
        mixing.seats(specs, devices, "device-writes"),
        outside=lambda seat, on: pytest.fail("they have messages of their own"),
    )
    assert ways(cells) == ("translated", "unknown", "unknown")
    assert all("QEMU" in cell.evidence.note for cell in cells[1:])
    with pytest.raises(ProcessLookupError):
        os.kill(machines[0].pid, 0)


@pytest.mark.qemu
def test_each_gets_its_own_fault_records() -> None:
    """Both try what nobody mapped; VT-d has one record for both, and SMMUv3 a queue."""
    for machine, iommu in (("q35", "virtio"), ("virt", "smmuv3")):
        cells = list(probe.qemu([f"virtio-blk-pci{ON}", f"virtio-net-pci{ON}"], iommu, ["unmapped"], machine=machine))
        assert ways(cells) == ("blocked", "blocked")
        sources = [{fault.source for fault in cell.evidence.faults} for cell in cells]
        assert [len(each) for each in sources] == [1, 1]
        assert sources[0] != sources[1]


def test_faults_are_sorted_and_bounded() -> None:
    sorter = FaultSorter()
    sorter.open(0x100)

    def fault(source: int, address: int = 0) -> Fault:
        return Fault(address, True, source, "", ())

    sorter.add(fault(-1))
    assert len(sorter.take(0x100)) == 1, "there is one device that it can be about"
    sorter.open(0x200)
    for each in (fault(-1), fault(0x300), fault(0x200), fault(0x100, 1), fault(0x100, 2)):
        sorter.add(each)
    assert [each.address for each in sorter.take(0x100)] == [1, 2]
    assert sorter.take(0x100) == []
    assert len(sorter.take(0x200)) == 1
    for number in range(2 * MOST):
        sorter.add(fault(0x100, number))
    assert [each.address for each in sorter.take(0x100)] == list(range(MOST, 2 * MOST))


# -- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_a_machine_has_a_port_for_each_device() -> None:
    devices = [f"virtio-blk-pci{ON}", f"virtio-blk-pci{ON},place=bypass", "virtio-net-pci,place=root-bus", "edu"]
    with QemuMachine(devices, "intel") as machine:
        one, around, at_root, edu = machine.ends
        assert (one.transport, one.iommu, one.peer) == (machine.transport, machine.iommu, machine.peer)
        assert len({id(end.peer) for end in machine.ends}) == 4
        assert [end.iommu.in_front for end in machine.ends] == [True, False, True, True]
        assert [end.bridged for end in machine.ends] == [True, True, False, False]
        assert (edu.transport, edu.control is not None) == (None, True)
        assert {end.product for end in machine.ends} == {machine.product}
        kinds = [end.transport.device_id for end in (one, around, at_root) if end.transport]
        assert kinds == [2, 2, 1]
        page = machine.pages.page()
        one.iommu.map(IOVA(page), page, 4096)
        pid = machine.pid
        around.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -- the matrix and the command ------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_the_matrix_has_a_machine_of_several_for_every_iommu() -> None:
    rows = plan(Selection(only=("mixes",))).tasks
    expected = {(b.name, i) for b in BOARDS.values() for i in b.iommus if i != "none" and b.slots is None}
    # A device that VFIO hands over beside virtual ones: only in a guest, `matrix --guests`.
    expected.add(("vfio", "vfio"))
    assert {(planned.task.machine, planned.task.iommu) for planned in rows} == expected, "run, or n/a with the reason"
    assert all("riscv" in planned.missing for planned in rows if planned.missing and planned.task.iommu == "riscv")
    assert [planned.missing for planned in rows if planned.task.machine == "vfio"], "no guest was asked for"
    tasks = [planned for planned in rows if not planned.missing]
    there = {(planned.task.machine, planned.task.iommu) for planned in tasks}
    assert {("q35", "intel"), ("q35", "amd"), ("q35", "virtio")} <= there
    assert all(planned.span == len(planned.task.devices) >= 4 for planned in tasks)
    lost: Done[list[Row]] = Done(0, None, "the worker died of signal 9")
    answers = answer(tasks[0], lost)
    assert [row.cell.number for row in answers] == list(range(1, tasks[0].span + 1))
    assert {row.cell.observed for row in answers} == {Path.UNKNOWN}


@pytest.mark.qemu
def test_a_second_run_goes_on_in_the_middle_of_a_mix(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    command = ["matrix", "--only", "mixes", "--only", "intel", "--jobs", "2", "-j", "--results", str(path)]
    assert main.main(command) == exits.OK
    first = json.loads(capsys.readouterr().out)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:40])
    assert main.main(command) == exits.OK
    printed = capsys.readouterr()
    assert f"going on after 10 of {len(lines) - 1} cells" in printed.err

    def told(document: dict[str, list[dict[str, object]]]) -> list[tuple[str, ...]]:
        keys = ("machine", "device", "number", "beside", "offered", "experiment", "predicted", "observed")
        return [tuple(str(cell[key]) for key in keys) for cell in document["cells"]]

    assert told(json.loads(printed.out)) == told(first)


@pytest.mark.qemu
def test_the_command_takes_several_devices(capsys: pytest.CaptureFixture[str]) -> None:
    devices = [f"virtio-blk-pci{ON}", "virtio-blk-pci-transitional,place=root-bus,interface=legacy", "edu"]
    words = [word for device in devices for word in ("--device", device)]
    command = ["probe", "qemu", *words, "--experiment", "device-writes"]
    assert main.main([*command, "-j"]) == exits.OK
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["observed"] for cell in cells] == ["translated", "bypass", "translated"]
    assert [cell["number"] for cell in cells] == [1, 2, 3]
    assert cells[1]["beside"] == [devices[0], devices[2]]
    assert cells[1]["device_options"] == "place=root-bus,interface=legacy"
    assert main.main(command) == exits.OK
    printed = capsys.readouterr().out
    assert "2/3 virtio-blk-pci-transitional,place=root-bus,interface=legacy" in printed
    assert "3 cells: 3 as predicted" in printed
    assert main.main([*command, "--script"]) == exits.OK
    assert f"probe.qemu({devices!r}, " in capsys.readouterr().out
