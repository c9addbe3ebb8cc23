# SPDX-License-Identifier: Apache-2.0
"""The in-process machine: RAM, a software IOMMU, and a device whose behaviour is known by construction.

It needs no QEMU and no privilege, so it runs everywhere. And because it is known which of its devices
lies, it shows whether an experiment can tell.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Literal, Self, get_args

from virtiova import __version__
from virtiova.addr import GPA
from virtiova.device.base import Device
from virtiova.device.blk import Blk
from virtiova.device.console import Console
from virtiova.device.net import Net
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.dma.ram import MappedRam, PageAllocator, Ram, RamBlock
from virtiova.dma.space import AddressSpace, FlatSpace, MediatedSpace
from virtiova.dma.wrong import SPACES
from virtiova.errors import UsageError
from virtiova.features import Feature, has
from virtiova.iommu.none import NoIommu
from virtiova.iommu.soft import SoftIommu
from virtiova.machine.image import disk_image
from virtiova.machine.model_peer import ModelPeer
from virtiova.machine.model_transport import ModelTransport, Offer
from virtiova.ports import Iommu, Peer, Transport

Behaviour = Literal["honest", "quirky", "lying", "stale"]
"""``honest``: goes through the IOMMU if bit 33 was accepted, around it if not. ``quirky``: never offers
bit 33, goes around. ``lying``: offers and accepts bit 33, and goes around all the same, as its address space is
leaky. ``stale``: honest, but deaf to invalidations."""

_SPACE_OF: Final[dict[Behaviour, str]] = {"honest": "honest", "quirky": "leaky", "lying": "leaky", "stale": "stale"}

ModelDevice = Literal["blk", "console", "net", "rng"]
ModelIommu = Literal["soft", "none"]

RAM_BYTES: Final = 16 << 20
"""RAM of the model, from GPA 0; the first 1 MiB is left alone."""

DISK_SECTORS: Final = 2048

_FIRST_PAGE: Final = GPA(1 << 20)


def _known(what: str, name: str, valid: object) -> None:
    names = get_args(valid)
    if name not in names:
        raise UsageError.unknown(what, name, names)


class ModelMachine:
    """The ``Machine`` port, in this process. The behaviour decides only which address space the device gets.

    ``offers``: whether an honest or lying device offers bit 33. ``insists``: whether the device refuses a
    driver that does not take it; None: it does not, and nobody is told so beforehand. ``packed``: whether it offers
    packed rings. With ``iommu="none"`` every address is guest-physical. The IOMMU starts disabled. Raises `UsageError`
    for an unknown name.
    """

    name = "model"
    bridged = False
    vhost = False
    pass_through = False
    hardware = False
    gave_up = ""
    product = f"virtiova model {__version__}"

    def __init__(
        self,
        behaviour: Behaviour,
        device: ModelDevice = "blk",
        *,
        offers: bool = True,
        iommu: ModelIommu = "soft",
        insists: bool | None = True,
        packed: bool = False,
    ) -> None:
        _known("behaviour", behaviour, Behaviour)
        _known("model device", device, ModelDevice)
        _known("IOMMU of the model", iommu, ModelIommu)
        self.device = f"model-{device}"
        self.insists = insists
        self._memory: mmap.mmap | None = mmap.mmap(-1, RAM_BYTES)
        ram = MappedRam(self._memory, [RamBlock(GPA(0), RAM_BYTES, 0)])
        self._release = ram.close
        self.ram: Ram = ram
        self.pages = PageAllocator(ram, _FIRST_PAGE, GPA(RAM_BYTES))
        soft = SoftIommu(ram) if iommu == "soft" else None
        self.iommu: Iommu = soft or NoIommu()
        platform: AddressSpace = MediatedSpace(ram, soft) if soft else FlatSpace(ram)

        def space(accepted: int) -> AddressSpace:
            if soft is None or not has(accepted, Feature.ACCESS_PLATFORM):
                return FlatSpace(ram)
            return SPACES[_SPACE_OF[behaviour]](ram, soft)

        model, self.peer = _make(device)
        offer = Offer(access_platform=offers and behaviour != "quirky", insists=insists is True, packed=packed)
        self._registers = ModelTransport(model, offer, space, platform)
        self.transport: Transport | None = self._registers

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Let the device work until ``done()`` is true; False if it is not after ``seconds``.

        Comes back early once the device has nothing left to do: in one process nothing else can happen.
        """
        end = time.monotonic() + seconds
        while not done():
            if not self._registers.work():
                return done()
            if time.monotonic() > end:
                return done()
        return True

    def words(self) -> Sequence[str]:
        """What the device had to say: refusals, and why it needs a reset."""
        return tuple(self._registers.words)

    def close(self) -> None:
        """Give the memory back. May be called more than once."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._release()
            memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(device: ModelDevice) -> tuple[Device, Peer]:
    """A device and the world on its other side."""
    if device == "blk":
        store = MemoryStore(bytearray(disk_image(DISK_SECTORS)))
        return Blk(store), ModelPeer(store)
    peer = ModelPeer()
    if device == "net":
        net = Net(peer.wire())
        peer.connect(net)
        return net, peer
    if device == "console":
        console = Console(peer.wire(), columns=80, rows=25)
        peer.connect(console)
        return console, peer
    return Rng(), peer
