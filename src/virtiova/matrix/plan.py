# SPDX-License-Identifier: Apache-2.0
"""Which cells make up the matrix here: platforms x devices x bit 33 x experiments x QEMU installations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu.board import Board
from virtiova.machine.qemu.boards import BOARDS
from virtiova.machine.qemu.installation import Installation, device_types, qemu_version
from virtiova.matrix import guests
from virtiova.matrix.backends import PROGRAMS, Program
from virtiova.matrix.handed import HANDINGS
from virtiova.matrix.negotiate import NEGOTIATE, WITHOUT
from virtiova.matrix.payloads import questions
from virtiova.matrix.systems import BACKENDS, IOMMU, MIXES, MOST, NOTHING, PAYLOADS, SYSTEMS, TYPES, Platform, platforms
from virtiova.probe.plan import VHOST_USER, Task, all_experiments

KINDS: Final = ("blk", "net", "rng")
_ON: Final = ",iommu_platform=on"
# With the bit on or off; what is asked of every device, and of blk besides where there is an IOMMU.
_ALWAYS: Final = ("device-writes", "device-reads", "ring")
_OF_OFF: Final = ("never-offered",)
_OF_ON: Final = ("not-taken",)
_OF_TABLES: Final = ("unmapped", "translation-off")
_OF_MIXES: Final = ("device-writes", "device-reads", "at-once", "others-page")
_TRANSITIONAL: Final = "virtio-blk-pci-transitional"
_ALL_DEVICES: Final = "virtio-*"
_ALL_EXPERIMENTS: Final = "*"


@dataclass(frozen=True, slots=True)
class Planned:
    """Cells to be: their system, the product that they run on, and the task; or why they cannot be had here.

    ``guest`` is the name of a guest platform, if a real kernel is to be booted; one boot gives two cells, or those of
    ``rows``, which are asked inside of it. A machine with several devices gives a cell for each.
    """

    system: str
    product: str
    task: Task
    missing: str = ""
    guest: str = ""
    offline: bool = False
    backend: str = ""
    """Whose process the device is, if it has one of its own."""
    rows: tuple[Task, ...] = ()

    @property
    def span(self) -> int:
        """How many cells come of it: one for each device of the machine; of a boot, one for each state of the bit."""
        if self.rows:
            return len(self.rows)
        return len(guests.BITS) if self.guest else len(self.task.devices)


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of systems, machines and IOMMUs. Names of one kind are alternatives; a cell has to fit every kind that
    is named in ``only``, and none in ``skip``. What is the name of several is the first of these."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()

    def check(self) -> None:
        """Raise `UsageError`, with the nearest valid name, for anything that does not exist."""
        systems, machines, iommus = _names()
        for name in (*self.only, *self.skip):
            if name not in systems | machines | iommus:
                raise UsageError.unknown("system, machine or IOMMU", name, systems | machines | iommus)

    def takes(self, system: str, machine: str, iommu: str) -> bool:
        """Is a cell of these wanted?"""
        for valid, name in zip(_names(), (system, machine, iommu), strict=True):
            wanted = valid.intersection(self.only)
            if name in self.skip or (wanted and name not in wanted):
                return False
        return True


def _names() -> tuple[set[str], set[str], set[str]]:
    rows = list(platforms())
    systems, machines = {system.id for system in SYSTEMS}, {row.machine for row in rows}
    return systems, machines - systems, {row.iommu for row in rows} - machines - systems


@dataclass(frozen=True, slots=True)
class Plan:
    """All tasks of a matrix, in their order."""

    tasks: list[Planned] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many cells come of them."""
        return sum(planned.span for planned in self.tasks)

    def numbered(self) -> Iterator[tuple[int, Planned]]:
        """The tasks, each with the number of its first cell."""
        numbers = accumulate((planned.span for planned in self.tasks), initial=0)
        return zip(numbers, self.tasks, strict=False)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is run. ``full``: every experiment on every device, and every device type behind every IOMMU.
    ``guests``: real kernels are booted, whose packages are fetched unless ``offline``."""

    full: bool = False
    guests: bool = False
    offline: bool = False


def plan(selection: Selection | None = None, qemu: Sequence[Installation] = (), extent: Extent | None = None) -> Plan:
    """The matrix for this machine: its own QEMU, and those of ``qemu`` besides.

    Nothing is started but QEMUs that are asked for their version and device types. Raises `UsageError` for unknown
    names.
    """
    how = extent or Extent()
    chosen = selection or Selection()
    chosen.check()
    installations = [Installation(), *qemu]
    rows = [row for row in platforms() if row.system != TYPES]
    cells: list[Planned] = []
    for system in SYSTEMS:
        for installation in installations:
            if system.id == TYPES:
                cells += _types(installation, chosen, full=how.full)
            elif system.id == MIXES:
                cells += _mixes(installation, chosen, how)
            elif system.id == PAYLOADS:
                cells += _payloads(installation, chosen, full=how.full)
            elif system.id == BACKENDS:
                cells += _backends(installation, chosen)
            else:
                for row in rows:
                    if row.system == system.id and chosen.takes(row.system, row.machine, row.iommu):
                        cells += _platform(row, installation, how)
        cells += _guests(system.id, chosen, how)
    return Plan(cells)


def _guests(system: str, chosen: Selection, how: Extent) -> Iterator[Planned]:
    if not (how.guests and guests.available()):
        return
    for name, machine, iommu, guest in guests.guests():
        if name == system and chosen.takes(system, machine, iommu):
            task = Task(machine, iommu, _ALL_DEVICES, guests.EXPERIMENT)
            yield Planned(system, f"a real kernel: {guest}", task, guest=guest, offline=how.offline)
    for handing in HANDINGS:
        rows = tuple(task for task in handing.tasks if chosen.takes(system, task.machine, task.iommu))
        if handing.system == system and rows:
            product = f"a real kernel: {handing.name}"
            yield Planned(system, product, rows[0], guest=handing.name, offline=how.offline, rows=rows)


def _platform(row: Platform, installation: Installation, how: Extent) -> Iterator[Planned]:
    board = BOARDS.get(row.machine)
    iommu = _with(row.iommu, row.options)
    if board is None or row.iommu not in board.iommus:
        # Only once: another QEMU would not help.
        if not installation.directory and not (row.words and how.guests and guests.available()):
            words = row.words or f"this virtiova does not know {row.machine} with IOMMU {row.iommu}"
            yield _missing(row.system, row.machine, iommu, words)
        return
    product = _product(installation, board, iommu)
    if isinstance(product, NotPossibleError):
        yield _missing(row.system, row.machine, iommu, str(product))
        return
    for kind in KINDS[:1] if row.told else KINDS:
        for bit in ("", _ON):
            device = _with(device_name(board, kind) + bit, row.device)
            for name in _experiments(kind, bit, row, full=how.full):
                yield Planned(row.system, product, Task(board.name, iommu, device, name, qemu=installation.directory))
    if row.system == IOMMU and not row.told:
        # It keeps its legacy interface, which has no bit 33: the machine refuses it before there is a driver.
        both = Task(board.name, iommu, f"{_TRANSITIONAL}{_ON}", "device-writes", qemu=installation.directory)
        yield Planned(row.system, product, both)
    if row.system == NOTHING:
        # The interface before version 1 has no bit 33; on PCI it is among the mixes.
        old = Task(board.name, row.iommu, device_name(board, "blk"), "device-writes", "legacy", installation.directory)
        yield Planned(row.system, product, old)


def _with(name: str, options: str) -> str:
    return ",".join(filter(None, (name, options)))


def mix(board: Board) -> list[str]:
    """As many different devices as a board can have in one machine: with the bit and without, one that is no virtio
    device, a legacy one, and two on a bus that is led around the IOMMU where there can be one."""
    control = "edu" if "edu" in board.controls else board.controls[0]
    at_root = ",place=root-bus" if board.root_port else ""
    legacy = f"{_TRANSITIONAL},interface=legacy{at_root}"
    found = [f"virtio-blk-pci{_ON}", "virtio-blk-pci", control, legacy, f"virtio-net-pci{_ON}"]
    if board.root_port and board.led_around:
        found += [f"virtio-net-pci{_ON},place=bypass", "virtio-blk-pci,place=bypass"]
    return found[: len(board.seats)]


def device_name(board: Board, kind: str) -> str:
    """What a device of that kind is called on a board."""
    return f"virtio-{kind}-{'pci' if board.slots is None else 'device'}"


def _experiments(kind: str, bit: str, row: Platform, *, full: bool) -> list[str]:
    if full:
        return all_experiments(f"virtio-{kind}")
    names = [name for name in _ALWAYS if kind != "rng" or name != "device-reads"]
    names += _OF_ON if bit else _OF_OFF
    tables = kind == "blk" and bit and row.iommu != "none" and row.system not in (NOTHING, MOST)
    return [*names, *(_OF_TABLES if tables else ()), *row.more]


def boards(selection: Selection | None = None) -> list[Board]:
    """The boards that a matrix of this selection may have cells on."""
    chosen = selection or Selection()
    chosen.check()
    names = {
        row.machine
        for row in platforms()
        if any(chosen.takes(system, row.machine, row.iommu) for system in (row.system, MIXES, TYPES))
    }
    return [board for name, board in BOARDS.items() if name in names]


def _mixes(installation: Installation, chosen: Selection, how: Extent) -> Iterator[Planned]:
    """Machines with several devices each, on every platform with an IOMMU and PCI."""
    for row in platforms():
        if row.system == MIXES and chosen.takes(MIXES, row.machine, row.iommu):
            yield from _platform(row, installation, how)
        board = BOARDS.get(row.machine)
        if board is None or row.iommu not in board.iommus or row.iommu == "none" or row.told or board.slots is not None:
            continue
        if not chosen.takes(MIXES, row.machine, row.iommu):
            continue
        product = _product(installation, board, row.iommu)
        if isinstance(product, NotPossibleError):
            yield _missing(MIXES, row.machine, row.iommu, str(product))
            continue
        first, *others = mix(board)
        for name in _OF_MIXES:
            task = Task(row.machine, row.iommu, first, name, qemu=installation.directory, beside=tuple(others))
            yield Planned(MIXES, product, task)


def _payloads(installation: Installation, chosen: Selection, *, full: bool) -> Iterator[Planned]:
    """Devices with addresses inside their requests, behind every IOMMU that is in front of PCI devices."""
    for row in platforms():
        board = BOARDS.get(row.machine)
        if row.system == NOTHING or row.told or row.iommu == "none" or board is None or row.iommu not in board.iommus:
            continue
        if not chosen.takes(PAYLOADS, row.machine, row.iommu):
            continue
        try:
            installation.check(board, board.iommu(row.iommu))
            product = f"QEMU {qemu_version(installation.binary(board))}"
            types = device_types(installation, board)
        except NotPossibleError as error:
            yield _missing(PAYLOADS, row.machine, row.iommu, str(error))
            continue
        for iommu, device, experiment in questions(board, row.iommu, full=full):
            task = Task(row.machine, iommu, device, experiment, qemu=installation.directory)
            name = device.partition(",")[0]
            yield Planned(PAYLOADS, product, task, missing="" if name in types else f"this QEMU has no {name}")


def _backends(installation: Installation, chosen: Selection) -> Iterator[Planned]:
    """Back ends over our own front end, which needs no QEMU, and behind each QEMU's IOMMU."""
    for row in platforms():
        if row.system != BACKENDS or not chosen.takes(BACKENDS, row.machine, row.iommu):
            continue
        for program in PROGRAMS:
            if row.machine == VHOST_USER and not installation.directory:
                yield from _of_backend(row, program, program.product if not program.missing else "", "")
            elif row.machine in BOARDS and program.behind:
                product = _product(installation, BOARDS[row.machine], _with(row.iommu, row.options))
                if isinstance(product, NotPossibleError):
                    yield _missing(BACKENDS, row.machine, row.iommu, str(product))
                    break
                yield from _of_backend(row, program, product, installation.directory)


def _of_backend(row: Platform, program: Program, product: str, qemu: str) -> Iterator[Planned]:
    iommu, device = _with(row.iommu, row.options), program.device(row.machine)
    if program.missing:
        task = Task(row.machine, iommu, device, _ALL_EXPERIMENTS)
        yield Planned(BACKENDS, "", task, program.missing, backend=program.label)
        return
    for told, name in program.asked(row.machine):
        task = Task(row.machine, iommu, device + told, name, qemu=qemu, backend=program.back_end())
        yield Planned(BACKENDS, product, task, backend=program.label)


def _types(installation: Installation, chosen: Selection, *, full: bool) -> Iterator[Planned]:
    """Negotiation with every type that a QEMU lists: behind the first IOMMU of the first board, or behind all."""
    for row in platforms():
        board = BOARDS.get(row.machine)
        if row.system == NOTHING or row.told or row.iommu == "none" or board is None or row.iommu not in board.iommus:
            continue
        if not chosen.takes(TYPES, row.machine, row.iommu):
            continue
        try:
            installation.check(board, board.iommu(row.iommu))
            product = f"QEMU {qemu_version(installation.binary(board))}"
            types = device_types(installation, board)
        except NotPossibleError as error:
            yield _missing(TYPES, row.machine, row.iommu, str(error))
            continue
        for name in types:
            for bit, experiment in (("", NEGOTIATE), (_ON, NEGOTIATE), (_ON, WITHOUT)):
                task = Task(row.machine, row.iommu, name + bit, experiment, qemu=installation.directory)
                yield Planned(TYPES, product, task)
        if not full:
            return


def _product(installation: Installation, board: Board, iommu: str) -> str | NotPossibleError:
    """Name and version of a board's QEMU that has the IOMMU, or why there is none."""
    try:
        installation.check(board, board.iommu(iommu))
        return f"QEMU {qemu_version(installation.binary(board))}"
    except NotPossibleError as error:
        return error


def _missing(system: str, machine: str, iommu: str, why: str) -> Planned:
    return Planned(system, "", Task(machine, iommu, _ALL_DEVICES, _ALL_EXPERIMENTS), why)


__all__ = ["Extent", "Plan", "Planned", "Selection", "boards", "device_name", "plan"]
