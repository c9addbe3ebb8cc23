# SPDX-License-Identifier: Apache-2.0
"""virtio-iommu, programmed from outside: no tables in RAM, but requests to a virtio device that has them."""

from __future__ import annotations

import struct
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.driver.iommu import IommuDriver
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.faults import FaultSorter
from virtiova.ports import Fault
from virtiova.wire import virtio_iommu as wire

_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""


class VirtioUnit:
    """What all endpoints behind one virtio-iommu share: its driver, the numbers of domains, the events."""

    def __init__(self, driver: IommuDriver) -> None:
        self.driver = driver
        self._next = max(1, driver.config.domain_first)
        self._faults = FaultSorter()

    def open_domain(self, source: int) -> int:
        """The number of a domain that no other endpoint has; it does not exist before the first is attached."""
        domain = min(self._next, self.driver.config.domain_last)
        self._next = domain + 1
        self._faults.open(source)
        return domain

    def faults(self, source: int) -> list[Fault]:
        """One endpoint's events since the last call. Others' are kept for them."""
        for event, raw in self.driver.events():
            self._faults.add(_fault(event, raw))
        return self._faults.take(source)


class VirtioIommu:
    """virtio-iommu for one endpoint (`ports.Iommu`): its domain behind ``unit``. ``source`` is its requester id, which
    PCI has as endpoint id.

    Mappings belong to a domain, and a domain lives while an endpoint is attached. So what is mapped while the IOMMU
    is off is kept here, and sent when `enable` attaches the endpoint. Each page is a mapping of its own: UNMAP
    never has to split one, which the device would refuse.
    """

    name = "virtio"
    present = True
    in_front = True
    caches = False
    write_only = True
    """The specification lets a device allow reads on such a mapping; QEMU does not."""
    can_be_off = True
    shared = False

    def __init__(self, unit: VirtioUnit, source: int, *, around: bool = False) -> None:
        """``around``: the endpoint's bus was led around this IOMMU, which may then refuse to know it."""
        self.unit = unit
        self.driver = driver = unit.driver
        self._around = around
        config = driver.config
        self.page_size = max(PAGE_SIZE, config.granule)
        self.reserved = driver.probe(source)
        """Regions that must not be mapped: messages, or what the device said."""
        self._endpoint = source
        self.domain = unit.open_domain(source)
        self._end = config.input_last + 1
        self._start = config.input_first
        self._wanted: dict[int, tuple[GPA, Access]] = {}
        self._attached = False
        self._next_iova = self._up(max(_IOVA_START, config.input_first))

    def beside(self, source: int, *, around: bool = False) -> VirtioIommu:
        """Another endpoint of the same device, with a domain of its own."""
        return VirtioIommu(self.unit, source, around=around)

    @property
    def own_bit33(self) -> tuple[bool, bool]:
        """Bit 33 of the IOMMU's own function: offered, accepted."""
        return self.driver.negotiated.bit33

    @property
    def lost_faults(self) -> int:
        """How often faults may have been lost, for want of event buffers, since the machine was started."""
        return self.driver.overruns

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        if self._attached:
            return
        status = self.driver.attach(self.domain, self._endpoint)
        if status == wire.Status.NOENT and self._around:
            # No endpoint, so there is no domain that mappings could be in. Were it behind the IOMMU after all, it
            # could reach nothing.
            if self.driver.bypass:
                self.driver.set_bypass(False)
            return
        self._must("ATTACH", status)
        self._attached = True
        for iova, (gpa, access) in self._wanted.items():
            self._map_page(iova, gpa, access)

    def disable(self) -> None:
        """Detach, and let unattached endpoints reach everything.

        Raises `NotPossibleError` where the device was not made for that: neither BYPASS_CONFIG nor BYPASS.
        """
        if self.driver.bypass is False:
            self.driver.set_bypass(True)
        elif self.driver.bypass is None and not self.driver.negotiated.has(wire.F_BYPASS):
            raise NotPossibleError("this virtio-iommu has no bypass: it cannot be told to let addresses through")
        self.detach()

    def detach(self) -> None:
        """DETACH only: whether the endpoint is then blocked or goes around is the bypass field's business."""
        if self._attached:
            self._must("DETACH", self.driver.detach(self.domain, self._endpoint))
            self._attached = False

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % self.page_size:
            raise AccessError(gpa, size, f"not the address of a page of {self.page_size} bytes")
        for offset in self._pages(iova, size):
            page, to = iova + offset, GPA(gpa + offset)
            replaces = self._wanted.get(page) is not None
            self._wanted[page] = (to, access)
            if self._attached:
                if replaces:
                    self._unmap(page, self.page_size)
                self._map_page(page, to, access)

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._pages(iova, size):
            self._wanted.pop(iova + offset, None)
        if self._attached:
            self._unmap(iova, size)

    def invalidate(self) -> None:
        """Nothing to tell: UNMAP has acted when its reply is there."""

    def faults(self) -> list[Fault]:
        return self.unit.faults(self._endpoint)

    def allocate(self, size: int) -> IOVA:
        span = self._up(size)
        while True:
            iova = self._next_iova
            if iova + span > self._end:
                raise AccessError(iova, size, "the IOMMU has no IOVAs left")
            inside = [r for r in self.reserved if r.first < iova + span and iova <= r.last]
            if not inside:
                break
            self._next_iova = self._up(max(region.last for region in inside) + 1)
        # A page of nothing after each range: the byte past the end is never somebody else's.
        self._next_iova += span + self.page_size
        return IOVA(iova)

    # -- requests ------------------------------------------------------------------------------------------------

    def _up(self, number: int) -> int:
        return -(-number // self.page_size) * self.page_size

    def _pages(self, iova: int, size: int) -> range:
        if iova % self.page_size or size % self.page_size or size <= 0:
            raise AccessError(iova, size, f"not a range of pages of {self.page_size} bytes")
        if iova < self._start or iova + size > self._end:
            raise AccessError(iova, size, f"outside of the IOMMU's input range 0x{self._start:x}-0x{self._end - 1:x}")
        return range(0, size, self.page_size)

    def _map_page(self, iova: int, gpa: GPA, access: Access) -> None:
        if access:
            last = iova + self.page_size - 1
            self._must(f"MAP of 0x{iova:x}", self.driver.map(self.domain, iova, last, gpa, access))

    def _unmap(self, iova: int, size: int) -> None:
        self._must(f"UNMAP of 0x{iova:x}+0x{size:x}", self.driver.unmap(self.domain, iova, iova + size - 1))

    def _must(self, what: str, status: int) -> None:
        if status != wire.Status.OK:
            raise MachineError(f"virtio-iommu refuses {what}: {wire.status_text(status)}")


def _fault(event: wire.Event, raw: bytes) -> Fault:
    address = -1 if event.address is None else event.address
    # QEMU leaves both flags out where there is no mapping at all.
    write = event.write if event.read or event.write else None
    return Fault(address, write, event.endpoint, event.text, struct.unpack("<QQQ", raw))
