# SPDX-License-Identifier: Apache-2.0
"""One device of a QEMU machine, as the ports want it: what is its own, and what it shares with the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from virtiova.dma.ram import PageAllocator
from virtiova.driver.edu import ControlDevice
from virtiova.machine.qemu.command import DeviceSpec
from virtiova.ports import Iommu, Peer, Ram, Transport


class Shared(Protocol):
    """What the devices of one machine have in common: each member is as in `ports.Machine`."""

    name: str
    ram: Ram
    pages: PageAllocator
    pass_through: bool

    @property
    def product(self) -> str: ...

    @property
    def gave_up(self) -> str: ...

    def wait(self, done: Callable[[], bool], seconds: float) -> bool: ...

    def words(self) -> list[str]: ...

    def close(self) -> None: ...


class DeviceEnd:
    """A device of ``machine`` (`ports.Machine`).

    Registers, peer and IOMMU domain are its own; RAM, pages, time and the process are the machine's, and so is its end:
    `close` ends the machine for all of its devices.
    """

    insists: bool | None = True
    # Evidence: QEMU, hw/virtio/virtio.c, virtio_validate_features(): -EFAULT when bit 33 is offered and not taken.

    def __init__(self, machine: Shared, spec: DeviceSpec, peer: Peer, *, bridged: bool) -> None:
        self.name = machine.name
        self.spec = spec
        self.device = spec.spec.name
        self.bridged = bridged
        self.vhost = spec.has_back_end
        self.pass_through = machine.pass_through
        self.hardware = False
        self.ram = machine.ram
        self.pages = machine.pages
        self.peer = peer
        self.iommu: Iommu
        """Set when the machine has taken its IOMMU in hand, for all devices."""
        self.transport: Transport | None = None
        self.control: ControlDevice | None = None
        """For a control device: how it is told to write."""
        self._machine = machine

    @property
    def product(self) -> str:
        """QEMU and its version."""
        return self._machine.product

    @property
    def gave_up(self) -> str:
        """What QEMU said when it gave a device with a back end up."""
        return self._machine.gave_up

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Let the machine work until ``done()`` is true; False if it is not after ``seconds``."""
        return self._machine.wait(done, seconds)

    def words(self) -> list[str]:
        """What the machine said so far, for all of its devices."""
        return self._machine.words()

    def close(self) -> None:
        """Stop the machine, with all of its devices."""
        self._machine.close()
