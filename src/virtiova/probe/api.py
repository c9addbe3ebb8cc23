# SPDX-License-Identifier: Apache-2.0
"""The probe as a library: a device's name in, cells out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virtiova.errors import UsageError
from virtiova.machine.backend import BackEnd
from virtiova.machine.vdpa.machine import VdpaDevice
from virtiova.machine.vfio.machine import VfioDevice
from virtiova.machine.vhost.machine import VhostDevice
from virtiova.policy import RULES, Rules
from virtiova.probe.plan import (
    Runner,
    Task,
    all_experiments,
    backend_tasks,
    handed_tasks,
    qemu_or_model,
    usual_iommu,
    with_ring,
)
from virtiova.result import Cell


def qemu(
    device: str | Sequence[str],
    iommu: str | None = None,
    experiments: Sequence[str] | None = None,
    *,
    machine: str = "q35",
    interface: str = "auto",
    qemu: str = "",
    backend: str = "",
    ring: str = "split",
    jobs: int | None = None,
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a QEMU device, named as on QEMU's command line (``virtio-blk-pci,iommu_platform=on``), or a list of them in
    one machine: then each experiment gives a cell for each device, in their order.

    ``iommu`` is one that the machine can have, with options if need be (``intel,aw-bits=48``; ``none``); None: the
    machine's own (q35: ``intel``). ``virtiova probe --list`` names them. Without ``experiments`` all are run.
    ``qemu`` is the directory of a QEMU installation other than the machine's own. ``backend`` is the command that
    serves a ``vhost-user-*-pci`` device: ``{socket}`` is where it is to listen, ``{image}`` a disk image of ours,
    ``{net}`` the number of a datagram socket. ``ring="packed"`` adds ``packed=on`` to each device. Raises
    `UsageError` for unknown names and `NotPossibleError` without QEMU.
    """
    devices = tuple(with_ring(each, ring) for each in ((device,) if isinstance(device, str) else device))
    if not devices:
        raise UsageError("at least one device is wanted")
    names = _names(devices, experiments)
    front = usual_iommu(machine, backend=bool(backend)) if iommu is None else iommu
    served = BackEnd(spawn=backend) if backend else None
    first, beside = devices[0], devices[1:]
    tasks = [Task(machine, front, first, name, interface, qemu, served, beside) for name in names]
    return Runner(jobs=jobs, rules=rules).run(tasks)


def model(
    behaviour: str,
    device: str = "blk",
    experiments: Sequence[str] | None = None,
    *,
    iommu: str = "soft",
    ring: str = "split",
    jobs: int | None = None,
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a device of the in-process machine: ``honest``, ``quirky``, ``lying`` or ``stale``; ``blk``, ``console``,
    ``net`` or ``rng``; with ``split`` rings, or ``packed`` ones."""
    names = _names((device,), experiments)
    tasks = [Task("model", iommu, with_ring(f"{behaviour}:{device}", ring), name) for name in names]
    return Runner(jobs=jobs, rules=rules).run(tasks)


def vhost_user(
    socket: str = "",
    experiments: Sequence[str] | None = None,
    *,
    spawn: str = "",
    kind: str = "",
    write: bool = False,
    echo: bool = False,
    ring: str = "split",
    jobs: int | None = None,
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a vhost-user back end: one that listens on ``socket``, or a command to start one for each cell.

    Of ``spawn`` and the others see `virtiova.machine.backend.BackEnd`. Without ``kind`` the device type is
    guessed, and a question mark says so. ``ring="packed"``: packed rings, if it offers them. Raises
    `UsageError` for what makes no sense, `MachineError` if it does not come up.
    """
    backend = BackEnd(socket, spawn, kind, write=write, echo=echo)
    return Runner(jobs=jobs, rules=rules).run(backend_tasks(backend, _names(("",), experiments), ring=ring))


def vfio(
    address: str,
    experiments: Sequence[str] | None = None,
    *,
    write: bool = False,
    echo: bool = False,
    i_know: bool = False,
    ring: str = "split",
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a device that is bound to vfio-pci, at that PCI address (``0000:03:00.0``): the device, its IOMMU and the
    kernel's log are the real ones. ``write`` allows requests that change its disk, ``echo`` says that its network sends
    frames back, ``i_know`` allows a device without bit 33, which reaches all of memory. Raises `NotPossibleError` with
    what is missing, and the command that supplies it.
    """
    names = None if experiments is None else _names((), experiments)
    tasks = handed_tasks(VfioDevice(address, write, echo, i_know), names, ring=ring)
    return Runner(jobs=1, rules=rules).run(tasks)


def vhost(
    path: str, experiments: Sequence[str] | None = None, *, ring: str = "split", rules: Rules = RULES
) -> Iterator[Cell]:
    """Probe a back end of this machine's kernel, ``/dev/vhost-net`` or ``/dev/vhost-vsock``, as its front end: memory,
    rings, IOMMU and the device's other side are ours. Raises `NotPossibleError` with what is missing, and the command
    that supplies it.
    """
    names = None if experiments is None else _names((), experiments)
    return Runner(jobs=1, rules=rules).run(handed_tasks(VhostDevice(path), names, ring=ring))


def vdpa(
    path: str,
    experiments: Sequence[str] | None = None,
    *,
    write: bool = False,
    echo: bool = False,
    ring: str = "split",
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a vDPA device, in hardware or in user space (VDUSE), that vhost_vdpa hands over as ``path``
    (``/dev/vhost-vdpa-0``). ``write`` allows requests that change its disk, ``echo`` says that its network sends frames
    back. Raises `NotPossibleError` with what is missing, and the command that supplies it.
    """
    names = None if experiments is None else _names((), experiments)
    return Runner(jobs=1, rules=rules).run(handed_tasks(VdpaDevice(path, write, echo), names, ring=ring))


def default(*, jobs: int | None = None, rules: Rules = RULES) -> Iterator[Cell]:
    """The default table: QEMU's devices where there is QEMU, else the in-process machine's."""
    tasks, _ = qemu_or_model()
    return Runner(jobs=jobs, rules=rules).run(tasks)


def _names(devices: Sequence[str], experiments: Sequence[str] | None) -> Sequence[str]:
    if isinstance(experiments, str):
        raise UsageError(f"a list of experiments is wanted, not {experiments!r}")
    return all_experiments(*devices) if experiments is None else experiments
