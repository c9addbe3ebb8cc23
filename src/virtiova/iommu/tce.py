# SPDX-License-Identifier: Apache-2.0
"""The IOMMU of a PowerPC server under a hypervisor: translation control entries, set by hypercalls only.

There is no state in which an address without an entry goes through, and nothing to enable. Source: LoPAR (Linux on
Power Architecture Reference), 14.5.4.2 (H_PUT_TCE, H_STUFF_TCE), and QEMU, hw/ppc/spapr_iommu.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault

Hypercall = Callable[..., int]
"""Number and arguments in, the 64-bit result as a signed number out."""

H_PUT_TCE: Final = 0x20
H_STUFF_TCE: Final = 0x138
H_SUCCESS: Final = 0
READ: Final = 1
WRITE: Final = 2
LIOBN: Final = 0x80000000
"""Of the default window of the first PCI host bridge."""
WINDOW: Final = 0x40000000
"""Bytes of that window, which begins at bus address 0."""


class TceIommu:
    """The default DMA window of a pseries PCI host bridge (`ports.Iommu`).

    ``hypercall`` makes one; ``ram_end`` is the first address above RAM. A changed entry acts at once.
    """

    name = "tce"
    present = True
    in_front = True
    caches = False
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = False
    shared = True
    own_bit33 = None

    def __init__(self, hypercall: Hypercall, ram_end: int) -> None:
        self.hypercall = hypercall
        self._iovas = IovaRange(ram_end, WINDOW, PAGE_SIZE)

    def beside(self, source: int, *, around: bool = False) -> TceIommu:
        """The same: one window for all devices of the host bridge."""
        return self

    def enable(self) -> None:
        """Nothing to do: it always translates."""

    def disable(self) -> None:
        """Raise `NotPossibleError`: an address without an entry goes nowhere."""
        raise NotPossibleError("TCE: there is no state in which addresses go through as they are")

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa & PAGE_MASK:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        flags = (READ if Access.READ in access else 0) | (WRITE if Access.WRITE in access else 0)
        for offset in self._iovas.pages(iova, size):
            self._call(H_PUT_TCE, iova + offset, gpa + offset | flags if flags else 0)

    def unmap(self, iova: IOVA, size: int) -> None:
        self._call(H_STUFF_TCE, iova, 0, len(self._iovas.pages(iova, size)))

    def invalidate(self) -> None:
        """Nothing to do: the hypervisor does it with every change."""

    def faults(self) -> list[Fault]:
        """None are recorded: the hypervisor keeps them to itself."""
        return []

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    def _call(self, number: int, *arguments: int) -> None:
        result = self.hypercall(number, LIOBN, *arguments)
        if result != H_SUCCESS:
            raise MachineError(f"hypercall 0x{number:x} for bus address 0x{arguments[0]:x} failed: {result}")
