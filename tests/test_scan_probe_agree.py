# SPDX-License-Identifier: Apache-2.0
"""Scan and probe agree: the scan of the very command line that a cell is run with predicts what the cell observes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

import pytest

from newer_qemu import SUITE, newer_qemu
from scan_qemu_kit import said
from virtiova.collect.qemu.words import is_qemu
from virtiova.guest.platforms import PLATFORMS
from virtiova.guest.run import run
from virtiova.machine.backend import BackEnd
from virtiova.machine.qemu.boards import BOARDS, Q35, SUN4U
from virtiova.machine.qemu.installation import qemu_version
from virtiova.machine.qemu.options import OptionSpec
from virtiova.machine.qemu.process import QemuProcess
from virtiova.machine.qemu.suites import named
from virtiova.policy import DEPARTURES
from virtiova.probe import Runner, Task
from virtiova.result import Cell, Path
from virtiova.result.scan import Scan, ScannedDevice
from virtiova.scan import scan_view

pytestmark = pytest.mark.qemu

ON = ",iommu_platform=on"
WRITES = "device-writes"
AMD_BUS = "QEMU-AMD-BUS-NUMBER"
AMD_PASS = "QEMU-AMD-PASS-THROUGH"
Wanted = tuple[Task, str]
"""What to run, and the known departure of QEMU's that makes the path another; empty: none does."""


class Watched:
    """The command lines of all QEMUs that are started."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lines: list[Sequence[str]] = []
        start = QemuProcess.__init__

        def watched(process: QemuProcess, argv: Sequence[str], *rest: object) -> None:
            self.lines.append(list(argv))
            start(process, argv, *rest)  # type: ignore[arg-type]

        patch.setattr(QemuProcess, "__init__", watched)

    def line_of(self, devices: Sequence[str]) -> Sequence[str]:
        """The one with these devices; control devices have machines of their own."""
        names = [OptionSpec.parse(each).name for each in devices]

        def has_all(line: Sequence[str]) -> bool:
            return all(any(word.split(",")[0] == name for word in line) for name in names)

        return next(line for line in self.lines if has_all(line))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def disagreements(watched: Watched, wanted: Sequence[Wanted]) -> list[str]:
    """Where the scan says one thing and the probe sees another, in words."""
    runner, found = Runner(jobs=1), []
    for task, departure in wanted:
        watched.lines.clear()
        cells = runner.run_all(task)
        line = watched.line_of(task.devices)
        scan = scan_view(said(line, version=qemu_version(line[0])))
        # The IOMMU may be a virtio device, too.
        rows = [row for row in scan.devices if row.type != "iommu"]
        assert len(rows) == len(cells), task
        for cell, row in zip(cells, rows, strict=True):
            if why := _differ(cell, row, departure) or _unnamed(scan, row, departure):
                found.append(f"{task.machine} {task.iommu} {row.name} {task.devices} {task.interface}: {why}")
    return found


def _differ(cell: Cell, row: ScannedDevice, departure: str) -> str:
    if cell.observed is Path.UNKNOWN:
        return f"the probe has no answer: {cell.evidence.note}"
    if (cell.explained or "") != departure:
        return f"explained by {cell.explained}, and not by {departure or 'nothing'}; observed {cell.observed}"
    if cell.offered is not None and row.offered is not None and cell.offered != row.offered:
        return f"offered {cell.offered} to the driver, {row.offered} to the scan"
    if departure:
        return "" if [row.verdict] == cell.predicted else f"scan {row.verdict}, probe's prediction {cell.predicted}"
    return "" if row.verdict is cell.observed else f"scan {row.verdict}, probe {cell.observed}"


def _unnamed(scan: Scan, row: ScannedDevice, departure: str) -> str:
    """A departure does not change what is predicted: a finding names it, and where there is none there is none."""
    found = [each for each in scan.findings if each.id == "VA903" and each.device == row.name]
    if not departure:
        return f"VA903 {found[0].seen}" if found else ""
    (known,) = (each for each in DEPARTURES if each.id == departure)
    named = [each for each in found if any(known.title in seen.text for seen in each.seen)]
    return "" if named else f"no VA903 names {departure}"


def test_a_handful_of_cells(watched: Watched) -> None:
    wanted: list[Wanted] = [
        (Task("q35", "intel", f"virtio-rng-pci{ON}", WRITES), ""),
        (Task("q35", "intel", "virtio-rng-pci", WRITES), ""),
        (Task("q35", "none", f"virtio-rng-pci{ON}", WRITES), ""),
        (Task("q35", "amd,place=root-port", f"virtio-rng-pci{ON}", WRITES), AMD_BUS),
        (Task("q35", "intel", f"virtio-rng-pci,place=bypass{ON}", WRITES), ""),
        (Task("q35", "intel", f"virtio-rng-pci-transitional{ON}", WRITES), ""),
        (Task("virt", "smmuv3,bypass-bus=on", f"virtio-rng-pci{ON}", WRITES), ""),
        (Task("virt-mmio", "smmuv3", f"virtio-rng-device{ON}", WRITES), ""),
        (Task("sun4u", "sabre", f"virtio-rng-pci{ON}", WRITES), ""),
        (Task("pseries", "tce", "virtio-rng-pci", WRITES), ""),
    ]
    assert disagreements(watched, wanted) == []


def _boards() -> Iterator[Wanted]:
    """Every board, IOMMU, place and interface, with the bit and without, for two kinds of device."""
    for board in BOARDS.values():
        if board.suite:
            continue
        suffix = "device" if board.slots is not None else "pci"
        for iommu, choice in board.iommus.items():
            bus = ("", ",bypass-bus=on") if "bypass-bus" in choice.ours and board.slots is None else ("",)
            for extra in bus:
                places = ("", ",place=root-port", ",place=root-bus", ",place=bypass") if board.has_places else ("",)
                for place in places:
                    for bit in ("", ON):
                        yield _expected(Task(board.name, f"{iommu}{extra}", f"virtio-rng-{suffix}{place}{bit}", WRITES))
        first = board.natural
        for kind in ("blk", "net"):
            for bit in ("", ON):
                yield _expected(Task(board.name, first, f"virtio-{kind}-{suffix}{bit}", WRITES))
        if board.slots is not None:
            for bit in ("", ON):
                yield _expected(Task(board.name, first, f"virtio-rng-device{bit}", WRITES, "legacy"))
        else:
            yield _expected(Task(board.name, first, "virtio-blk-pci-transitional", WRITES, "legacy"))
            yield _expected(Task(board.name, first, f"virtio-blk-pci-transitional{ON}", WRITES))
            yield _expected(Task(board.name, first, f"virtio-blk-pci-non-transitional{ON}", WRITES))


def _expected(task: Task) -> Wanted:
    """AMD-Vi behind a bridge is known not to translate."""
    amd, bridged = task.iommu.startswith("amd"), "place=root-port" in task.device
    leaves = amd and bridged and "bypass-bus" not in task.iommu
    return task, AMD_BUS if leaves else ""


@pytest.mark.sweep
def test_every_board_iommu_and_place(watched: Watched) -> None:
    wanted = list(_boards())
    assert len(wanted) > 100
    assert disagreements(watched, wanted) == []


@pytest.mark.sweep
def test_mixes(watched: Watched) -> None:
    mixed = (f"virtio-blk-pci{ON}", "virtio-rng-pci", f"virtio-net-pci,place=bypass{ON}", "virtio-blk-pci-transitional")
    wanted = [Task("q35", iommu, mixed[0], WRITES, beside=mixed[1:]) for iommu in ("intel", "virtio", "none")] + [
        Task("virt", "smmuv3", mixed[0], WRITES, beside=mixed[1:])
    ]
    assert disagreements(watched, [(task, "") for task in wanted]) == []


@pytest.mark.sweep
def test_back_ends(watched: Watched) -> None:
    serve = f"{shlex.quote(sys.executable)} -m virtiova serve"
    wanted: list[Wanted] = [
        (Task("q35", iommu, f"vhost-user-{kind}-pci{bit}", WRITES, backend=BackEnd(spawn=f"{serve} {words}")), "")
        for kind, words in (("blk", "blk {image} --socket-path {socket}"), ("rng", "rng --socket-path {socket}"))
        for iommu in ("intel,device-iotlb=on", "none", "virtio")
        for bit in ("", ON)
    ]
    assert disagreements(watched, wanted) == []


@pytest.mark.sweep
def test_newer_qemu(watched: Watched, pytestconfig: pytest.Config) -> None:
    newer = newer_qemu(pytestconfig).directory
    tasks = [
        Task("riscv-virt", iommu, f"virtio-rng-pci{bit}", WRITES, qemu=newer)
        for iommu in ("none", "riscv", "riscv,kind=pci", "virtio")
        for bit in ("", ON)
    ] + [
        Task("virt", iommu, f"virtio-rng-pci{bit}", WRITES, qemu=newer)
        for iommu in ("smmuv3", "smmuv3,stage=2", "virtio", "none")
        for bit in ("", ON)
    ]
    assert disagreements(watched, [(task, "") for task in tasks]) == []
    x86 = named(SUITE, [Q35]).directory
    device = f"virtio-rng-pci{ON}"
    wanted = [
        (Task("q35", "amd,pt=on", device, WRITES, qemu=x86), AMD_PASS),
        (Task("q35", "amd", device, WRITES, qemu=x86), ""),
        (Task("q35", "intel", device, WRITES, qemu=x86), ""),
    ]
    sparc = named(SUITE, [SUN4U]).directory
    # One that is put somewhere by hand is left to QEMU, which has another default from 9.1 on.
    for words in ("virtio-rng-pci", device, "virtio-rng-pci,bus=pciB,addr=1"):
        wanted.append((Task("sun4u", "sabre", words, WRITES, qemu=sparc), ""))
    assert disagreements(watched, wanted) == []


@pytest.mark.sweep
@pytest.mark.parametrize("name", PLATFORMS)
def test_booted_guests(name: str, watched: Watched) -> None:
    """The guest's own kernel drives the disks here, and programs the IOMMU as its command line tells it."""
    platform = PLATFORMS[name]
    cells = run(platform, [True, False])
    line = watched.lines[-1]
    if not is_qemu(line[0]):
        line = [platform.emulator.binary, *line[1:]]
    rows = {row.name: row for row in scan_view(said(line)).devices}
    for cell, disk in zip(cells, ("bit-on", "bit-off"), strict=True):
        row = rows[disk]
        assert (row.verdict, row.offered) == (cell.observed, cell.offered), cell.evidence.note
        # The number of a bus behind a bridge is the guest's to give.
        assert "/" in row.address or row.address == cell.evidence.inside["dev"]
