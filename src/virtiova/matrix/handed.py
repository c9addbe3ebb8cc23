# SPDX-License-Identifier: Apache-2.0
"""What is asked inside of guests, of devices that their kernels hand over to user space: knowledge only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.guest import settings
from virtiova.guest.inside import Setting
from virtiova.guest.platforms import PLATFORMS, Platform
from virtiova.matrix.systems import MIXES, PHYSICAL, VDUSE, VHOST
from virtiova.probe.plan import Task

GUEST_DRIVER: Final = "guest-driver"
_VDPA: Final = "vdpa"


@dataclass(frozen=True, slots=True)
class Given:
    """One device that is handed over. ``machine`` is by what: ``vfio``; ``at`` says where it is in the guest, to
    whoever opens it there; ``device`` what it should turn out to be, with the bit as QEMU was told."""

    machine: str
    iommu: str
    device: str
    at: str
    experiments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Handing:
    """A guest, and the questions that are put in it. ``judged`` is how what its own kernel drives is judged, if that
    is asked, too: then there is a cell for each of the setting's disks. ``used`` are the vDPA disks that its own driver
    is given in the end, each with a cell."""

    name: str
    system: str
    setting: Setting
    given: tuple[Given, ...]
    judged: Platform | None = None
    used: tuple[str, ...] = ()

    def asked(self) -> Iterator[tuple[Given, Task]]:
        """The questions in their order, each as a task by its names."""
        for given in self.given:
            for experiment in given.experiments:
                yield given, Task(given.machine, given.iommu, given.device, experiment)

    def uses(self) -> Iterator[tuple[str, Task]]:
        """What is given to the guest's own driver, each as a task by its names."""
        for label in self.used:
            yield label, Task(_VDPA, _VDPA, f"virtio-blk,by={label}{settings.ON}", GUEST_DRIVER)

    def driven(self) -> Iterator[Task]:
        """What the guest's own kernel drives, as tasks by their names."""
        if self.judged is not None:
            for disk in self.setting.disks:
                bit = settings.ON if disk.bit else ""
                yield Task(self.judged.machine, self.judged.iommu, self.judged.device + bit, GUEST_DRIVER)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All of its cells by their names, in their order. No two are alike."""
        return (*(task for _, task in self.asked()), *(task for _, task in self.uses()), *self.driven())

    def neighbours(self, task: Task) -> tuple[int, list[str]]:
        """Which of several devices in one machine a task is about, and the others. 0 if each is looked at alone."""
        if self.judged is None:
            return 0, []
        devices = list(dict.fromkeys((each.machine, each.device) for each in self.tasks))
        own = (task.machine, task.device)
        return devices.index(own) + 1, [device for other, device in devices if (other, device) != own]


SERVED: Final[dict[str, tuple[str, ...]]] = {
    "serve-blk": ("virtiova", "serve", "blk", "{image}", "--vduse", "{name}"),
    "storage-daemon": (
        "qemu-storage-daemon",
        *("--blockdev", "driver=file,node-name=f0,filename={image}"),
        *("--export", "type=vduse-blk,id=e0,node-name=f0,name={name},writable=on"),
    ),
}
"""Commands that make a vDPA device in user space, by the label that its cells carry."""


def _vdpa(label: str, *experiments: str) -> Given:
    return Given(_VDPA, _VDPA, f"virtio-blk,by={label}{settings.ON}", label, experiments)


_VFIO: Final = "vfio"
_MAPPED: Final = ("device-writes", "ring", "indirect", "split-buffer", "past-end", "unmapped", "read-only", "unmap")
_MORE: Final = ("remap", "not-taken", "carry-on", "msi", "empty-tables")
_LOOSE: Final = ("device-writes", "ring", "unmapped", "unmap", "never-offered", "msi", "empty-tables", "bus-master-off")


def _vfio(seat: int, *experiments: str) -> Given:
    device = (settings.HANDED[seat - 1]).device.replace("-pci", "", 1)
    return Given(_VFIO, _VFIO, device, settings.port(seat), experiments)


def _vhost(kind: str, *more: str) -> Given:
    asked = (
        "device-writes",
        "ring",
        "indirect",
        "unmapped",
        "read-only",
        "unmap",
        "unmap-stale",
        "remap",
        "remap-stale",
    )
    device, path = f"vhost-{kind}{settings.ON}", f"/dev/vhost-{kind}"
    return Given("vhost", "iotlb", device, path, (*asked, "not-taken", "translation-off", *more))


HANDINGS: Final = (
    Handing(
        "x86-vfio",
        PHYSICAL,
        settings.VFIO,
        (
            _vfio(1, *_MAPPED, *_MORE),
            _vfio(2, *_LOOSE),
            _vfio(3, "device-writes", "device-reads", "ring", "unmapped", "unmap", "remap", "not-taken"),
            _vfio(4, "device-writes", "device-reads", "ring", "unmapped", "unmap", "never-offered"),
            _vfio(5, "device-writes", "ring", "indirect", "unmapped", "unmap"),
        ),
    ),
    Handing(
        "x86-mix",
        MIXES,
        settings.MIX,
        (_vfio(1, "device-writes", "ring", "unmapped", "unmap"), _vfio(2, "device-writes", "ring", "unmapped")),
        PLATFORMS["x86-vtd"],
    ),
    Handing(
        "x86-vhost",
        VHOST,
        settings.VHOST,
        (
            _vhost("net", "device-reads", "msi"),
            _vhost("vsock", "device-reads"),
        ),
    ),
    Handing(
        "x86-vduse",
        VDUSE,
        settings.VDUSE,
        (
            _vdpa(
                "serve-blk",
                *("device-writes", "device-reads", "ring", "indirect", "split-buffer", "past-end", "unmapped"),
                *("read-only", "unmap", "remap", "not-taken", "renegotiate"),
            ),
            _vdpa("storage-daemon", "device-writes", "device-reads", "ring", "unmapped", "unmap", "not-taken"),
        ),
        used=("serve-blk",),
    ),
)
BY_NAME: Final[dict[str, Handing]] = {row.name: row for row in HANDINGS}
