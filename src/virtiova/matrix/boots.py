# SPDX-License-Identifier: Apache-2.0
"""Our end of a `Handing`: boots the guest, hears its cells, and believes none of them unread."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.guest.inside import Inside, files
from virtiova.guest.run import judge_disks, look_with
from virtiova.machine.qemu.installation import qemu_version
from virtiova.matrix import driven
from virtiova.matrix.handed import Handing
from virtiova.packages.store import Store
from virtiova.policy import RULES, Rules
from virtiova.probe.cell import names, told
from virtiova.probe.judge import judge
from virtiova.probe.plan import Task
from virtiova.result import Cell, Evidence, Path

MODULE: Final = "virtiova.matrix.inside"
_EMULATOR: Final = "qemu-system-x86_64"
_CELL_LIMIT: Final = 1 << 20
_WORDS: Final = 300
_LINES: Final = 4
"""Lines that a guest may send besides those with a cell."""


def product() -> str:
    """What the devices of such a guest are, and their version."""
    path = shutil.which(_EMULATOR)
    return f"QEMU {qemu_version(path)}" if path else ""


def run(
    handing: Handing, tasks: Sequence[Task] = (), *, offline: bool = False, rules: Rules = RULES
) -> tuple[str, list[Cell]]:
    """Boot it once; what its cells were seen on, and the cells of ``tasks``, which are some of its own (none: all of
    them), whatever comes of it.

    What cannot be had is `n/a` with the reason; what a guest that hangs or ends did not say is `unknown`.
    """
    heard = Heard(handing, tasks or handing.tasks, rules)
    try:
        boot = files(handing.setting, Store(offline=offline))
        with Inside(handing.setting, boot, MODULE, (handing.name,)) as guest:
            _hear(guest, heard, rules)
            if handing.judged is not None:
                guest.facts()
                looked = look_with(guest.monitor, handing.setting.disks, guest.translations)
                for task, cell in zip(
                    handing.driven(), judge_disks(handing.judged, guest.console, looked, rules).values(), strict=True
                ):
                    heard.judged(task, cell)
    except NotPossibleError as reason:
        return "", heard.cells(Path.NOT_APPLICABLE, str(reason))
    except (MachineError, ProtocolError, OSError) as error:
        return heard.product, heard.cells(Path.UNKNOWN, str(error))
    return heard.product, heard.cells(Path.UNKNOWN, "the guest said nothing of it")


def without(handing: Handing, tasks: Sequence[Task], observed: Path, note: str) -> list[Cell]:
    """The cells of a guest that was not seen."""
    return Heard(handing, tasks).cells(observed, note)


def _hear(guest: Inside, heard: Heard, rules: Rules) -> None:
    """All that it says, until it says that it is over."""
    kernel = str(guest.hear().get("kernel", "unknown"))[:_WORDS]
    heard.product = f"{product()} with Linux {kernel}"
    inverted = [rule.id for rule in rules if rule is not RULES[rule.id]]
    guest.tell({"product": product(), "inverted": inverted, "wanted": heard.numbers})
    for count, line in enumerate(guest.lines()):
        if count > len(heard.numbers) + _LINES:
            raise ProtocolError("the guest says more than it was asked")
        if "n" in line:
            heard.take(line)


class Heard:
    """The cells of a guest as they come in; nothing of them is taken that is not of the form that they must have."""

    def __init__(self, handing: Handing, tasks: Sequence[Task], rules: Rules = RULES) -> None:
        self._rules = rules
        self.product = ""
        self._handing = handing
        self._tasks = tasks
        own = [task for _, task in (*handing.asked(), *handing.uses())]
        self._numbered = {number: task for number, task in enumerate(own) if task in tasks}
        self._cells: dict[Task, Cell] = {}

    @property
    def numbers(self) -> list[int]:
        """The questions that the guest is to put, by their numbers."""
        return list(self._numbered)

    def take(self, line: dict[str, Any]) -> None:
        """One line: the cell of a task by its number, or why there is none. `ProtocolError` for anything else."""
        number = line["n"]
        task = self._numbered.get(number) if type(number) is int else None
        if task is None or task in self._cells:
            raise ProtocolError(f"the guest tells of cell {number!r:.40}, which is none, or which it has told of")
        if "cell" in line:
            self._cells[task] = checked(line["cell"], task)
        elif "used" in line:
            self._cells[task] = driven.judged(_named(task, Path.UNKNOWN, ""), driven.used(line["used"]), self._rules)
        else:
            note = str(line.get("lost", "the guest has no cell"))[:_WORDS]
            self._cells[task] = _named(task, Path.UNKNOWN, note)

    def judged(self, task: Task, cell: Cell) -> None:
        """One that was judged here."""
        self._cells[task] = cell

    def cells(self, observed: Path, note: str) -> list[Cell]:
        """All that are wanted; for those that there are none of, cells of which nothing is known but why."""
        return [self._placed(task, self._cells.get(task) or _named(task, observed, note)) for task in self._tasks]

    def _placed(self, task: Task, cell: Cell) -> Cell:
        number, beside = self._handing.neighbours(task)
        return replace(cell, number=number, beside=beside)


def checked(said: object, task: Task) -> Cell:
    """What a guest says is the cell of a task. What it says was observed must follow from its evidence."""
    wanted = _named(task, Path.UNKNOWN, "")
    if len(msgspec.json.encode(said)) > _CELL_LIMIT:
        raise ProtocolError(f"the guest sent a cell of more than 0x{_CELL_LIMIT:x} bytes")
    try:
        cell = msgspec.convert(said, Cell)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the guest sent what is no cell: {error}") from error
    if _key(cell) != _key(wanted):
        raise ProtocolError(f"the guest was asked for {_key(wanted)}, and answers {_key(cell)}"[: 2 * _WORDS])
    if cell.observed not in (Path.NOT_APPLICABLE, judge(cell.evidence)):
        note = f"the guest says {cell.observed}, and its evidence {judge(cell.evidence)}"
        return replace(cell, observed=Path.UNKNOWN, evidence=replace(cell.evidence, note=note))
    return cell


def _key(cell: Cell) -> tuple[str, ...]:
    return (cell.machine, cell.iommu, cell.iommu_options, cell.device, cell.device_options, cell.experiment)


def _named(task: Task, observed: Path, note: str) -> Cell:
    """A cell of a task of which nothing is known but why."""
    iommu, device = task.iommu.partition(",")[0], task.device.partition(",")[0]
    cell = told(names(task.machine, iommu, device, task.experiment), task.iommu, task.device)
    return replace(cell, observed=observed, evidence=Evidence(note=note))
