# SPDX-License-Identifier: Apache-2.0
"""The driver for a device, by its type, and the DMA ops that policy chose for it."""

from __future__ import annotations

from typing import Final

from virtiova.dma.ops import DirectOps, DmaOps, PlatformOps
from virtiova.driver.balloon import BalloonDriver
from virtiova.driver.base import Driver
from virtiova.driver.blk import BlkDriver
from virtiova.driver.console import ConsoleDriver
from virtiova.driver.fs import FsDriver
from virtiova.driver.gpu import GpuDriver
from virtiova.driver.memory import MemDriver, PmemDriver
from virtiova.driver.negotiate import Negotiated, begin, driver_ok, finish, give_up
from virtiova.driver.net import NetDriver
from virtiova.driver.rng import RngDriver
from virtiova.driver.vsock import VsockDriver
from virtiova.errors import NegotiationError, NotPossibleError, UsageError
from virtiova.features import DeviceId, driver_features
from virtiova.policy import Facts, Front, predict
from virtiova.ports import Machine, Transport

DRIVER_FEATURES: Final = 0xFFFFFF | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 33 | 1 << 34 | 1 << 35
"""What our drivers take at most: rings are kicked with the plain queue index, whichever way they are laid out."""

DriverClass = (
    type[BlkDriver]
    | type[ConsoleDriver]
    | type[NetDriver]
    | type[RngDriver]
    | type[BalloonDriver]
    | type[GpuDriver]
    | type[FsDriver]
    | type[MemDriver]
    | type[PmemDriver]
    | type[VsockDriver]
)
DRIVERS: Final[dict[int, DriverClass]] = {
    DeviceId.NET: NetDriver,
    DeviceId.BLOCK: BlkDriver,
    DeviceId.CONSOLE: ConsoleDriver,
    DeviceId.ENTROPY: RngDriver,
    DeviceId.BALLOON: BalloonDriver,
    DeviceId.GPU: GpuDriver,
    DeviceId.FS: FsDriver,
    DeviceId.MEMORY: MemDriver,
    DeviceId.PMEM: PmemDriver,
    DeviceId.VSOCK: VsockDriver,
}


def driver_class(device_id: int) -> DriverClass:
    """The driver class for a virtio device type; `UsageError` if there is none."""
    try:
        return DRIVERS[device_id]
    except KeyError:
        raise UsageError(f"there is no driver here for virtio device type {device_id}") from None


def dma_ops(machine: Machine, negotiated: Negotiated) -> DmaOps:
    """The DMA ops for one device, chosen by the rule: one set per device, the design that the patch calls cleanest."""
    offered, accepted = negotiated.bit33
    front = Front.TRANSLATING if machine.iommu.in_front else Front.NONE
    decision = predict(Facts(offered=offered, accepted=accepted, front=front))
    if decision.dma_ops == "bounce":
        raise NotPossibleError("no machine here has restricted memory to bounce through")
    if decision.dma_ops == "platform" and machine.iommu.in_front:
        return PlatformOps(machine.ram, machine.pages, machine.iommu)
    return DirectOps(machine.ram, machine.pages)


def open_device(machine: Machine, features: int | None = None) -> Driver:
    """Bring the machine's device up the way a kernel does, and return its driver, ready for requests.

    ``features`` overrides the transport bits that the driver takes. Raises `NegotiationError` if the device
    refuses them.
    """
    transport = _transport(machine)
    cls = driver_class(transport.device_id)
    offered = begin(transport)
    wanted = driver_features(offered, cls.table, legacy=transport.legacy) & DRIVER_FEATURES
    negotiated = finish(transport, offered, wanted if features is None else features)
    if negotiated.refused:
        give_up(transport)
        raise NegotiationError(f"the device refuses features 0x{negotiated.written:x}")
    if transport.bus_master is not None:
        transport.bus_master.set_bus_master(True)
    machine.iommu.enable()
    driver: Driver = cls(transport, dma_ops(machine, negotiated), negotiated, machine.peer, machine.wait)
    driver.start()
    driver_ok(transport)
    return driver


def _transport(machine: Machine) -> Transport:
    if machine.transport is None:
        raise UsageError(f"{machine.device} is no virtio device")
    return machine.transport
