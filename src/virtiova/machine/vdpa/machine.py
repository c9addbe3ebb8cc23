# SPDX-License-Identifier: Apache-2.0
"""A vDPA device as a machine (`ports.Machine`): driver and memory are ours, what stands in front is the kernel's."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from virtiova.dma.space import MediatedSpace
from virtiova.errors import MachineError, UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.machine.backend import KINDS
from virtiova.machine.vdpa import bus
from virtiova.machine.vdpa.device import VdpaFile
from virtiova.machine.vdpa.iommu import VdpaIommu
from virtiova.machine.vdpa.transport import VdpaTransport
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.machine.vhost_user.connection import BackEndPeer
from virtiova.ports import Iommu, Peer, Ram, Transport

_NAP: Final = 0.001
"""Seconds between two looks at memory: a device need not call when it is done."""


_SOFTWARE: Final = {"vduse": "VDUSE", "": "vDPA"}
"""Makers of devices that are no hardware: programs, and the kernel itself (its simulators)."""


@dataclass(frozen=True, slots=True)
class VdpaDevice:
    """A device that vhost-vdpa hands over (`machine.handed.Handed`). ``write``: its disk may be changed; ``echo``: its
    network sends back each frame."""

    machine: ClassVar[str] = "vdpa"
    iommu: ClassVar[str] = VdpaIommu.name

    path: str
    write: bool = False
    echo: bool = False

    @property
    def place(self) -> str:
        """The file, whatever names it."""
        return os.path.realpath(self.path)

    def check(self) -> None:
        """`UsageError` for what is no path."""
        if not self.path.startswith("/") or "\0" in self.path:
            raise UsageError(f"{self.path!r} is no file such as /dev/vhost-vdpa-0")

    def look(self) -> str:
        """What the device is called; it does no DMA for that. `UsageError` for a type that has no driver here, and for
        one that does not offer bit 33."""
        with self.open() as machine:
            if not machine.kind:
                raise UsageError(
                    f"{self.path} is of virtio device type {machine.registers.device_id}; there are drivers here for "
                    f"{', '.join(f'{name} ({int(number)})' for name, number in sorted(KINDS.items()))}"
                )
            if not machine.offers_bit33:
                raise UsageError(
                    f"{self.path} does not offer bit 33: it takes physical addresses, and ours here are none. What "
                    "it then does to memory shows where that does no harm: bound to vfio-pci, virtiova probe vfio"
                )
            return machine.device

    def open(self, *, packed: bool = False) -> VdpaMachine:
        """Have it from the kernel."""
        self.check()
        return VdpaMachine(self, packed=packed)


class VdpaMachine:
    """One open vDPA device. Use it as a context manager: the device is reset when it ends, and keeps no mapping.
    ``packed``: the driver is offered packed rings if the device offers them. Raises `NotPossibleError` with what is
    missing, and the command that supplies it; `UsageError` for what is no such device; `ProtocolError` for one whose
    answers make no sense.
    """

    name = "vdpa"
    bridged = False
    vhost = True
    pass_through = False
    gave_up = ""
    insists: bool | None = None
    hardware = True
    """Who made the device may be anybody: the kernel lets it reach what was mapped, whatever it says."""

    def __init__(self, handed: VdpaDevice, *, packed: bool = False) -> None:
        self._cleanup = contextlib.ExitStack()
        try:
            self._open(handed, packed=packed)
        except BaseException:
            self.close()
            raise

    def _open(self, handed: VdpaDevice, *, packed: bool) -> None:
        file = self._file = VdpaFile(handed.path, bus.remedy())
        self._cleanup.callback(file.close)
        memory = self._memory = OwnMemory()
        self._cleanup.callback(memory.close)
        self.ram: Ram = memory.ram
        self.pages = memory.pages
        tables = self._tables = VdpaIommu(file, memory)
        self.iommu: Iommu = tables
        self._cleanup.callback(self._let_go)
        self._maker = bus.maker(file.fd)
        space = MediatedSpace(memory.ram, tables)
        self.registers = VdpaTransport(file, space, packed=packed, software=self._maker in _SOFTWARE)
        # Nothing that the device does may go on once its memory is somebody else's.
        self._cleanup.callback(self.registers.close)
        self.transport: Transport | None = self.registers
        kinds: dict[int, str] = {number: kind for kind, number in KINDS.items()}
        self.kind = kinds.get(file.device_id, "")
        self.device = f"virtio-{self.kind or file.device_id}"
        ours = {"blk": handed.write, "net": handed.echo}.get(self.kind, False)
        self.peer: Peer = BackEndPeer("echo" if ours else "none")

    def _let_go(self) -> None:
        """Take all mappings back: closing the file alone does not tell a device in user space."""
        with contextlib.suppress(MachineError):
            self._tables.clear()

    @property
    def offers_bit33(self) -> bool:
        """Whether the device offers bit 33."""
        return has(self._file.features(), VIRTIO_F_ACCESS_PLATFORM)

    @property
    def product(self) -> str:
        """Who made it, with the kernel's version: ``VDUSE 6.12.95``, or the driver of the hardware."""
        return f"{_SOFTWARE.get(self._maker, self._maker)} {os.uname().release}"

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Look at memory now and then, and whenever the device has called."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return done()
            ready, _, _ = select.select(self.registers.events(), [], [], min(left, _NAP))
            self.registers.take(ready)
        return True

    def words(self) -> list[str]:
        """What the kernel said of it."""
        return list(self.registers.words)

    def close(self) -> None:
        """Reset the device, take its mappings away, let go of it. May be called more than once."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
