# SPDX-License-Identifier: Apache-2.0
"""The probe as a library: a device's name in, cells out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virtiova.policy import RULES, Rules
from virtiova.probe.plan import Runner, Task, all_experiments, qemu_or_model
from virtiova.result import Cell


def qemu(
    device: str,
    iommu: str = "intel",
    experiments: Sequence[str] | None = None,
    *,
    machine: str = "q35",
    interface: str = "auto",
    jobs: int | None = None,
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a QEMU device, named as on QEMU's command line (``virtio-blk-pci,iommu_platform=on``).

    ``iommu`` is ``none`` or one that the machine can have (q35: ``intel``, ``amd``, ``virtio``; virt and virt-mmio:
    ``smmuv3``), with options if need be (``intel,aw-bits=48``; ``smmuv3,bypass-bus=on``). Without ``experiments``
    all are run. Raises `UsageError` for unknown names and `NotPossibleError` without QEMU.
    """
    names = all_experiments(device) if experiments is None else experiments
    tasks = [Task(machine, iommu, device, name, interface) for name in names]
    return Runner(jobs=jobs, rules=rules).run(tasks)


def model(
    behaviour: str,
    device: str = "blk",
    experiments: Sequence[str] | None = None,
    *,
    iommu: str = "soft",
    jobs: int | None = None,
    rules: Rules = RULES,
) -> Iterator[Cell]:
    """Probe a device of the in-process machine: ``honest``, ``quirky`` or ``lying``; ``blk``, ``net`` or ``rng``."""
    names = all_experiments(device) if experiments is None else experiments
    tasks = [Task("model", iommu, f"{behaviour}:{device}", name) for name in names]
    return Runner(jobs=jobs, rules=rules).run(tasks)


def default(*, jobs: int | None = None, rules: Rules = RULES) -> Iterator[Cell]:
    """The default table: QEMU's devices where there is QEMU, else the in-process machine's."""
    tasks, _ = qemu_or_model()
    return Runner(jobs=jobs, rules=rules).run(tasks)
