# SPDX-License-Identifier: Apache-2.0
"""A model machine with a ring and two pages, driven register by register.

As in the probe, the device is given the bare address of page B, and the IOMMU points that address at
page A. Ring and request header are mapped one to one, so that only the data tells behaviours apart.
"""

from __future__ import annotations

import struct

from virtiova.addr import IOVA, PAGE_SIZE
from virtiova.dma.ram import MappedRam
from virtiova.features import Feature, Status, mask
from virtiova.machine.model import Behaviour, ModelDevice, ModelIommu, ModelMachine
from virtiova.ports import Transport
from virtiova.testing.raw_rings import RawRing

V1 = mask([Feature.VERSION_1])
BIT33 = mask([Feature.ACCESS_PLATFORM])
SET_UP = Status.ACKNOWLEDGE | Status.DRIVER
LIVE = SET_UP | Status.FEATURES_OK | Status.DRIVER_OK


class Rig:
    """A machine, a ring that any behaviour can reach, and the pages A and B."""

    def __init__(
        self,
        behaviour: Behaviour = "honest",
        device: ModelDevice = "blk",
        *,
        iommu: ModelIommu = "soft",
        offers: bool = True,
        insists: bool | None = True,
    ) -> None:
        self.machine = ModelMachine(behaviour, device, iommu=iommu, offers=offers, insists=insists)
        transport = self.machine.transport
        assert transport is not None
        self.transport: Transport = transport
        assert isinstance(self.machine.ram, MappedRam)
        self.ram = self.machine.ram
        self.iommu = self.machine.iommu
        base = self.machine.pages.page()
        self.ring = RawRing(self.ram, base)
        self.head = self.machine.pages.page()
        self.a = self.machine.pages.page()
        self.b = self.machine.pages.page()
        for page in (base, self.head):
            self.iommu.map(IOVA(page), page, PAGE_SIZE)
        self.iommu.map(IOVA(self.b), self.a, PAGE_SIZE)
        self.iommu.enable()

    def negotiate(self, bits: int) -> int:
        """Up to FEATURES_OK; the status then."""
        self.transport.reset()
        self.transport.write_status(Status.ACKNOWLEDGE)
        self.transport.write_status(SET_UP)
        self.transport.write_features(bits)
        self.transport.write_status(SET_UP | Status.FEATURES_OK)
        return self.transport.read_status()

    def queue(self, index: int = 0, vector: int | None = None) -> None:
        ring = self.ring
        self.transport.enable_queue(index, ring.layout.size, ring.desc, ring.avail, ring.used, vector)

    def start(self, bits: int | None = None, vector: int | None = None) -> None:
        """Live, taking all that is offered but event indices, or just ``bits``."""
        offered = self.transport.read_features() & ~mask([Feature.RING_EVENT_IDX])
        assert self.negotiate(offered if bits is None else bits) == SET_UP | Status.FEATURES_OK
        self.queue(0, vector)
        self.transport.write_status(LIVE)
        assert self.transport.read_status() == LIVE

    def ask(self, *, kind: int = 0, sector: int = 7, kick: bool = True) -> None:
        """Read (or write) one sector at the address of page B."""
        self.ram.write(self.head, struct.pack("<IIQ", kind, 0, sector))
        write = kind == 0
        self.ring.put_chain(0, (self.head, 16, False), (self.b, 512, write), (self.head + 64, 1, True))
        self.ring.offer(0)
        if kick:
            self.transport.notify(0)

    def done(self, count: int = 1) -> bool:
        return self.machine.wait(lambda: self.ring.used_index == count, 5)

    def landed(self) -> str:
        """Which page was written to."""
        pages = {"A": self.a, "B": self.b}
        return "".join(name for name, gpa in pages.items() if any(self.ram.read(gpa, PAGE_SIZE)))
