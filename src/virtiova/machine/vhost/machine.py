# SPDX-License-Identifier: Apache-2.0
"""A back end in this machine's kernel as a machine with one device (`ports.Machine`): everything else is ours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, Self

from virtiova.dma.space import MediatedSpace
from virtiova.errors import UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.machine.vhost import network, vsock
from virtiova.machine.vhost.device import VhostFile
from virtiova.machine.vhost.frontend import KernelFrontEnd
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.machine.vhost.transport import Behind, VhostTransport
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.ports import Iommu, Peer, Ram, Transport
from virtiova.wire.vhost import BackendFeature

_NAP: Final = 0.001
_KINDS: Final[dict[str, tuple[Callable[[], Behind], str, str]]] = {
    "vhost-net": (network.Network, network.REMEDY, network.IOTLB_SINCE),
    "vhost-vsock": (vsock.Vsock, vsock.REMEDY, vsock.IOTLB_SINCE),
}
"""What is behind each, the command that makes it appear, and when it learnt to ask."""
VHOST_FILES: Final = tuple(f"/dev/{name}" for name in _KINDS)
"""Those that can be probed, where they usually are."""


@dataclass(frozen=True, slots=True)
class VhostDevice:
    """``/dev/vhost-net`` or ``/dev/vhost-vsock`` (`machine.handed.Handed`)."""

    machine: ClassVar[str] = "vhost"
    iommu: ClassVar[str] = IotlbServer.name

    path: str

    @property
    def place(self) -> str:
        """Its path."""
        return self.path

    @property
    def name(self) -> str:
        """What the kernel calls it."""
        return os.path.basename(self.path)

    def check(self) -> None:
        """`UsageError` for what is not one of the two."""
        if self.name not in _KINDS:
            raise UsageError.unknown("vhost device", self.path, VHOST_FILES)

    def open(self, *, packed: bool = False) -> VhostMachine:
        """Have it. The kernel offers no packed rings, so ``packed`` changes nothing."""
        return VhostMachine(self)

    def look(self) -> str:
        """What the device is called; it does no DMA for that."""
        with self.open() as machine:
            return machine.device


class VhostMachine:
    """One device of the kernel's. Use it as a context manager: nothing of it is left when it ends.

    ``wanted`` are the interface's features that are taken where they are offered. Raises `NotPossibleError` with what
    is missing and the command that supplies it.
    """

    name = "vhost"
    bridged = False
    vhost = True
    pass_through = False
    hardware = False
    gave_up = ""
    # drivers/vhost: SET_FEATURES refuses what was not offered, and nothing else.
    insists: bool | None = False

    def __init__(self, handed: VhostDevice, *, wanted: BackendFeature = BackendFeature.IOTLB_MSG_V2) -> None:
        handed.check()
        self._cleanup = contextlib.ExitStack()
        try:
            self._open(handed, wanted)
        except BaseException:
            self.close()
            raise

    def _open(self, handed: VhostDevice, wanted: BackendFeature) -> None:
        made, remedy, since = _KINDS[handed.name]
        memory = self.memory = OwnMemory()
        self._cleanup.callback(memory.close)
        iotlb = IotlbServer(memory.ram)
        front = self.front = KernelFrontEnd(partial(VhostFile, handed.path, remedy), iotlb, memory, wanted)
        self._cleanup.callback(front.close)
        behind = made()
        self._cleanup.callback(behind.close)
        self.registers = VhostTransport(front, memory, behind, MediatedSpace(memory.ram, iotlb))
        # Before memory and the other side go.
        self._cleanup.callback(self.registers.close)
        self.kind = behind.kind
        self.device = f"vhost-{behind.kind}"
        self.ram: Ram = memory.ram
        self.pages = memory.pages
        self.iommu: Iommu = iotlb
        self.peer: Peer = behind.peer
        self.transport: Transport | None = self.registers
        if not has(front.file.features(), VIRTIO_F_ACCESS_PLATFORM):
            front.say(
                f"this kernel's {handed.name} does not offer bit 33: it has no IOTLB, and takes guest-physical "
                f"addresses only ({since})"
            )

    @property
    def product(self) -> str:
        """The kernel, with its release."""
        return f"Linux {os.uname().release} vhost-{self.kind}"

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Serve the kernel until ``done()``, looking at memory now and then, and whenever something comes."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return done()
            self.registers.pump(min(left, _NAP))
        return True

    def words(self) -> list[str]:
        """What went over the file, and what the kernel refused."""
        return self.front.words()

    def close(self) -> None:
        """Give everything back. May be called more than once."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
