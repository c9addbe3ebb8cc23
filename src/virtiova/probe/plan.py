# SPDX-License-Identifier: Apache-2.0
"""What to run: cells as small independent tasks, the default table, and running them side by side."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from virtiova.addr import AddressKind
from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.machine.backend import PATH, BackEnd, offers
from virtiova.machine.handed import Handed, OpenedMachine
from virtiova.machine.model import ModelMachine
from virtiova.machine.qemu.boards import BOARDS, find_board
from virtiova.machine.qemu.command import CONTROL_DEVICES, parse_devices
from virtiova.machine.qemu.machine import QemuMachine, find_qemu
from virtiova.machine.qemu.options import OptionSpec
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.policy import RULES, Rules
from virtiova.probe import experiments
from virtiova.probe.cell import run_cell, told
from virtiova.probe.edu import CONTROL_EXPERIMENT, control_cell, control_outcome
from virtiova.probe.experiment import EXPERIMENTS, SEVERAL, find
from virtiova.probe.mix import run_mix, seats
from virtiova.probe.rig import RINGS_SAID
from virtiova.result import Cell, Evidence, Path, Reason

experiments.load()

BEHAVIOURS: Final = ("honest", "quirky", "lying", "stale")
RINGS: Final = ("split", "packed")
_PACKED: Final = "packed"
"""QEMU's option of a device that offers packed rings; the other machines' devices have it by the same name."""
_KINDS: Final = ("blk", "net", "rng")
MODEL_DEVICES: Final = ("blk", "console", "net", "rng")
VHOST_USER: Final = VhostUserMachine.name
_PATHS: Final = ("device-writes", "device-reads", "ring")
_CANNOT_OFFER: Final = Reason(
    "back-end-offers",
    False,
    "the back end does not offer bit 33, so that a device of which it is the other half cannot either",
    "vhost-user protocol, VHOST_USER_GET_FEATURES",
)


@dataclass(frozen=True, slots=True)
class Task:
    """What to run: one machine, one experiment, and a cell for each device. ``device`` is QEMU's ``-device`` text,
    ``behaviour:kind`` of the model, or ``vhost-user-kind``, the last two with ``,packed=on`` if need be; ``qemu`` the
    directory of a QEMU installation other than the machine's own. ``backend`` is what a vhost-user machine connects
    to, or a command (``BackEnd.spawn``) for the other half of one of QEMU's vhost-user devices. ``beside`` are further
    devices in the same machine. ``handed`` is a device that this machine's kernel hands over."""

    machine: str
    iommu: str
    device: str
    experiment: str
    interface: str = "auto"
    qemu: str = ""
    backend: BackEnd | None = None
    beside: tuple[str, ...] = ()
    handed: Handed | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices of the machine."""
        return (self.device, *self.beside)


def check(task: Task) -> None:
    """Raise `UsageError`, with the nearest valid name, for anything that does not exist."""
    if task.experiment != CONTROL_EXPERIMENT:
        find(task.experiment)
    if task.machine == "model":
        _model_parts(task)
        return
    if task.machine == VHOST_USER:
        _backend(task).check()
        return
    if task.handed is not None:
        task.handed.check()
        return
    board = find_board(task.machine)
    specs = parse_devices(task.devices, board, board.iommu(task.iommu), task.interface)
    spec = specs[0]
    if spec.has_back_end != (task.backend is not None):
        wrong = "needs a back end (--backend)" if spec.has_back_end else "has no back end"
        raise UsageError(f"{spec.spec.name} {wrong}")
    if task.backend is not None:
        task.backend.words((PATH,))
    if task.beside:
        if all(each.is_control for each in specs) != (task.experiment == CONTROL_EXPERIMENT):
            raise UsageError(f"these devices have no experiment {task.experiment!r}")
        return
    # A virtio-mmio transport has the interface that we choose.
    if board.slots is None:
        if task.interface == "legacy" and not spec.can_be_legacy:
            raise UsageError(f"{spec.spec.name} has no legacy interface here (see its disable-legacy, or name addr=)")
        if task.interface == "modern" and spec.spec.on("disable-modern"):
            raise UsageError(f"{spec.spec.name} was told to have no modern interface")
    if spec.is_control != (task.experiment == CONTROL_EXPERIMENT):
        raise UsageError(f"{spec.spec.name} has no experiment {task.experiment!r}")


def all_experiments(*devices: str) -> list[str]:
    """The experiments for a device, or for several in one machine, in their order; those that only other kinds of
    device can be asked are left out, and are ``n/a`` for who names them."""
    names = [device.split(",", maxsplit=1)[0] for device in devices]
    if all(name in CONTROL_DEVICES for name in names):
        return [CONTROL_EXPERIMENT]
    words = {word for name in names for word in re.split("[-:?]", name)}
    found = [row.id for row in EXPERIMENTS.values() if not row.kinds or words.intersection(row.kinds)]
    return [*found, *SEVERAL] if len(names) > 1 else found


def with_ring(device: str, ring: str) -> str:
    """A device's text with what makes it offer that kind of ring (`RINGS`); `UsageError` if the text says otherwise.
    Control devices have no rings."""
    if ring not in RINGS:
        raise UsageError.unknown("kind of ring", ring, RINGS)
    spec = OptionSpec.parse(device)
    if ring == "split" or spec.name in CONTROL_DEVICES:
        return device
    if _PACKED not in spec.options:
        return f"{device},{_PACKED}=on"
    if not spec.on(_PACKED):
        raise UsageError(f"{device}: packed rings or not? --ring says so, and the device says otherwise")
    return device


def usual_iommu(machine: str, *, backend: bool = False) -> str:
    """The IOMMU of a machine for who names none. A back end hears of little from VT-d without device IOTLBs."""
    natural = find_board(machine).natural
    return f"{natural},device-iotlb=on" if backend and natural == "intel" else natural


def default_tasks() -> list[Task]:
    """The default table: declared x accepted x direction for blk, net and rng behind VT-d, and the same without."""
    tasks = []
    for kind in _KINDS:
        off, on = f"virtio-{kind}-pci", f"virtio-{kind}-pci,iommu_platform=on"
        paths = [name for name in _PATHS if kind != "rng" or name != "device-reads"]
        tasks += [Task("q35", "intel", off, name) for name in (*paths, "never-offered")]
        tasks += [Task("q35", "intel", on, name) for name in (*paths, "not-taken")]
    tasks.append(Task("q35", "intel", "virtio-blk-pci,iommu_platform=on", "unmapped"))
    tasks.append(Task("q35", "intel", "virtio-blk-pci,iommu_platform=on", "translation-off"))
    tasks += [Task("q35", "none", f"virtio-blk-pci{bit}", "device-writes") for bit in ("", ",iommu_platform=on")]
    tasks += [Task("q35", iommu, "edu", CONTROL_EXPERIMENT) for iommu in ("intel", "none")]
    return tasks


def model_tasks() -> list[Task]:
    """The same questions to the in-process machine's devices, as far as they keep to what they declare.

    The others are left to ``probe model lying`` and so on: a table that everybody sees first must not end as a finding.
    """
    tasks = []
    for behaviour in ("quirky", "honest"):
        for kind in _KINDS:
            paths = [name for name in _PATHS if kind != "rng" or name != "device-reads"]
            last = "not-taken" if behaviour == "honest" else "never-offered"
            tasks += [Task("model", "soft", f"{behaviour}:{kind}", name) for name in (*paths, last)]
    return tasks


def backend_tasks(
    backend: BackEnd, experiments: Sequence[str] | None = None, *, ring: str = "split", guess: bool = True
) -> list[Task]:
    """The tasks for a vhost-user back end. Its type is guessed if it is not given, which takes a connection, and the
    device's name then ends with a question mark; without ``guess`` each machine guesses for itself.

    A socket that is to serve several cells is tried once, so that who is mute costs one wait and not one a cell. Who is
    asked for one cell only is not: there are back ends that serve one connection and end.
    """
    backend.check()
    mark = ""
    several = experiments is None or len(experiments) > 1
    if guess and (not backend.kind or (backend.socket and several)):
        with VhostUserMachine(backend) as machine:
            mark = "" if backend.kind else "?"
            backend = replace(backend, kind=machine.kind, guess=machine.guess)
    device = f"vhost-user-{backend.kind}{mark}"
    names = all_experiments(device) if experiments is None else experiments
    device = with_ring(device, ring)
    return [Task(VHOST_USER, IotlbServer.name, device, name, backend=backend) for name in names]


def handed_tasks(
    handed: Handed, experiments: Sequence[str] | None = None, *, ring: str = "split", look: bool = True
) -> list[Task]:
    """The tasks for a device that the kernel hands over. It is opened once, to see what it is; it does no DMA for that.
    Without ``look`` it is not even opened, and goes by its machine's name.

    Raises as `Handed.look`.
    """
    handed.check()
    device = handed.look() if look else handed.machine
    names = all_experiments(device) if experiments is None else experiments
    device = with_ring(device, ring)
    return [Task(handed.machine, handed.iommu, device, name, handed=handed) for name in names]


class Runner:
    """Runs tasks side by side; one control for each machine and IOMMU setting that needs it from outside."""

    def __init__(self, *, jobs: int | None = None, rules: Rules = RULES) -> None:
        if jobs is not None and jobs < 1:
            raise UsageError("the number of jobs is 1 at least")
        self._jobs = jobs or os.cpu_count() or 1
        self._rules = rules
        self._controls: dict[tuple[str, str, str, str, bool], Evidence] = {}
        self._offers: dict[BackEnd, bool | None] = {}
        self._lock = threading.Lock()
        self._sockets: dict[str, threading.Lock] = {}

    def run(self, tasks: Sequence[Task]) -> Iterator[Cell]:
        """The cells, in the order of the tasks, as they become ready. What cannot be is said at once."""
        for task in tasks:
            check(task)
        for machine, qemu in {(task.machine, task.qemu) for task in tasks if task.machine in BOARDS}:
            find_qemu(BOARDS[machine], qemu)
        return self._run(tasks)

    def _run(self, tasks: Sequence[Task]) -> Iterator[Cell]:
        pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="virtiova-cell")
        try:
            futures = [pool.submit(self.run_all, task) for task in tasks]
            for future in futures:
                yield from future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def run_all(self, task: Task) -> list[Cell]:
        """The cells of a task, one for each device, here and now."""
        return self._run_mix(task) if task.beside else [self.run_one(task)]

    def run_one(self, task: Task) -> Cell:
        """The one cell of a task with one device, here and now."""
        if task.machine == "model":
            return self._run_model(task)
        if task.machine == VHOST_USER:
            return self._run_backend(task)
        if task.handed is not None:
            return self._run_handed(task, task.handed)
        cell = self._run_control(task) if task.experiment == CONTROL_EXPERIMENT else self._run_qemu(task)
        return with_options(cell, task)

    def _run_qemu(self, task: Task) -> Cell:
        board = find_board(task.machine)
        iommu = board.iommu(task.iommu)
        (seat,) = seats(parse_devices([task.device], board, iommu, task.interface), task.devices, task.experiment)
        spec = seat.spec
        cell = run_cell(
            lambda: QemuMachine(
                task.device,
                task.iommu,
                machine=task.machine,
                prefer=task.interface,
                qemu=task.qemu,
                backend=task.backend,
            ),
            find(task.experiment),
            machine=task.machine,
            iommu=iommu.name,
            device=spec.spec.name,
            at_start=seat.at_start,
            outside=lambda on: self._control(task, on, spec.place),
            rules=self._rules,
        )
        if task.backend is None:
            return cell
        return with_back_end(cell, self._offered(task.backend), asked_for=spec.declared)

    def _run_mix(self, task: Task) -> list[Cell]:
        board = find_board(task.machine)
        specs = parse_devices(task.devices, board, board.iommu(task.iommu), task.interface)
        return run_mix(
            lambda: QemuMachine(task.devices, task.iommu, machine=task.machine, prefer=task.interface, qemu=task.qemu),
            None if task.experiment == CONTROL_EXPERIMENT else find(task.experiment),
            seats(specs, task.devices, task.experiment),
            outside=lambda seat, on: self._control(task, on, seat.spec.place),
            rules=self._rules,
        )

    def _offered(self, backend: BackEnd) -> bool | None:
        """Whether the back end offers bit 33, by its own word: asked once. None: it does not say."""
        with self._lock:
            if backend not in self._offers:
                try:
                    self._offers[backend] = offers(backend)
                except MachineError:
                    self._offers[backend] = None
            return self._offers[backend]

    def _run_model(self, task: Task) -> Cell:
        behaviour, kind, iommu = _model_parts(task)
        packed = OptionSpec.parse(task.device).on(_PACKED)
        cell = run_cell(
            lambda: ModelMachine(behaviour, kind, iommu=iommu, packed=packed),  # type: ignore[arg-type]
            find(task.experiment),
            machine="model",
            iommu=task.iommu,
            device=f"model-{kind}",
            rules=self._rules,
        )
        return with_options(cell, task)

    def _run_backend(self, task: Task) -> Cell:
        backend = _backend(task)
        device = OptionSpec.parse(task.device)
        with self._lock:
            # Of a socket that somebody serves, one connection at a time: many back ends let a second one wait.
            turn = self._sockets.setdefault(backend.socket, threading.Lock())
        with contextlib.nullcontext() if backend.spawn else turn:
            cell = run_cell(
                lambda: VhostUserMachine(backend, packed=device.on(_PACKED)),
                find(task.experiment),
                machine=task.machine,
                iommu=task.iommu,
                device=device.name,
                rules=self._rules,
            )
        return with_options(cell, task)

    def _run_handed(self, task: Task, handed: Handed) -> Cell:
        device = OptionSpec.parse(task.device)
        with self._lock:
            # The kernel hands a device to one at a time.
            turn = self._sockets.setdefault(handed.place, threading.Lock())
        with turn:
            cell = run_cell(
                lambda: _again(handed, packed=device.on(_PACKED)),
                find(task.experiment),
                machine=task.machine,
                iommu=task.iommu,
                device=device.name,
                rules=self._rules,
            )
        return with_options(cell, task)

    def _run_control(self, task: Task) -> Cell:
        board = find_board(task.machine)
        iommu = board.iommu(task.iommu)
        (seat,) = seats(parse_devices([task.device], board, iommu), [task.device], CONTROL_EXPERIMENT)
        evidence = _control_evidence(task, enabled=True, device=task.device)
        return control_cell(seat.cell, evidence, seat.front, self._rules)

    def _control(self, task: Task, enabled: bool, place: str = "") -> Evidence:
        """The control device's witness for one IOMMU setting and place, made once."""
        # The places in front of which the IOMMU is are alike to a control.
        around = f",place={place}" if place == "bypass" else ""
        with self._lock:
            key = (task.machine, task.iommu, task.qemu, around, enabled)
            if key not in self._controls:
                control = find_board(task.machine).controls[0] + around
                self._controls[key] = _control_evidence(task, enabled=enabled, device=control)
            return self._controls[key]


def _again(handed: Handed, *, packed: bool) -> OpenedMachine:
    """Have a device that was there when it was looked at: if it is no more, the cells before have their answers."""
    try:
        return handed.open(packed=packed)
    except NotPossibleError as error:
        raise MachineError(" ".join(str(error).split())) from error


def _control_evidence(task: Task, *, enabled: bool, device: str) -> Evidence:
    """The control's evidence. Nobody asked for that device by name, so whatever is wrong with it is no answer."""
    try:
        return control_outcome(task.machine, task.iommu, enabled=enabled, device=device, qemu=task.qemu)
    except (MachineError, ProtocolError, UsageError) as error:
        return Evidence(note=str(error), words=getattr(error, "stderr", "").splitlines()[-20:])


def with_back_end(cell: Cell, offered: bool | None, *, asked_for: bool) -> Cell:
    """A cell with what QEMU made of its back end: what that one offers, beside what QEMU offers the driver."""
    if offered is None:
        said = "back end: does not say what it offers"
    else:
        said = f"back end: {'offers' if offered else 'does not offer'} bit 33"
    if asked_for and offered is False and cell.predicted:
        # By what the back end declares, whatever was seen then.
        cell = replace(cell, predicted=[Path.REFUSED], address=AddressKind.UNKNOWN, reasons=[_CANNOT_OFFER])
    words = [said, *cell.evidence.words]
    disagreements = list(cell.disagreements)
    if cell.evidence.refused_by_machine:
        words.insert(1, "QEMU refused to start with this back end")
    elif asked_for and cell.offered is False:
        words.insert(1, "QEMU was asked for bit 33, and took it away again")
    elif cell.offered and offered is False:
        disagreements.append("QEMU offers bit 33 to the driver although the back end never offered it")
    return replace(cell, evidence=replace(cell.evidence, words=words), disagreements=disagreements)


def with_options(cell: Cell, task: Task) -> Cell:
    """A cell of a task, with what IOMMU and device were told; and if they were told to have packed rings in vain."""
    evidence = cell.evidence
    in_use = cell.accepted is not None and cell.observed not in (Path.REFUSED, Path.NOT_APPLICABLE)
    said = any(word.startswith(RINGS_SAID) for word in evidence.words)
    if in_use and not said and OptionSpec.parse(task.device).on(_PACKED):
        words = [f"{RINGS_SAID} split: packed ones were asked for, and are not offered", *evidence.words]
        cell = replace(cell, evidence=replace(evidence, words=words))
    return told(cell, task.iommu, task.device)


def _backend(task: Task) -> BackEnd:
    if task.backend is None:
        raise UsageError("a vhost-user machine needs a back end")
    return task.backend


def _model_parts(task: Task) -> tuple[str, str, str]:
    spec = OptionSpec.parse(task.device)
    if spec.options.keys() - {_PACKED}:
        raise UsageError(f"{task.device}: a model's device has no options but {_PACKED}=on")
    behaviour, _, kind = spec.name.partition(":")
    if behaviour not in BEHAVIOURS:
        raise UsageError.unknown("behaviour", behaviour, BEHAVIOURS)
    if kind not in MODEL_DEVICES:
        raise UsageError.unknown("model device", kind, MODEL_DEVICES)
    if task.iommu not in ("soft", "none"):
        raise UsageError.unknown("IOMMU of the model", task.iommu, ("soft", "none"))
    return behaviour, kind, task.iommu


def qemu_or_model() -> tuple[list[Task], str]:
    """The default tasks for this machine, and a word on why they are the model's if they are."""
    try:
        find_qemu()
    except NotPossibleError as error:
        return model_tasks(), str(error)
    return default_tasks(), ""
