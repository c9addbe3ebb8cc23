# SPDX-License-Identifier: Apache-2.0
"""The physical IOMMU, as a VFIO container lets it be programmed (`ports.Iommu`)."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.space import Miss, Span
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.soft import SoftIommu
from virtiova.machine.vfio.calls import CallError, call
from virtiova.machine.vfio.faults import KernelLog
from virtiova.machine.vfio.limits import Limits
from virtiova.machine.vfio.memory import PhysicalMemory
from virtiova.ports import Fault
from virtiova.wire import vfio

_VTD: Final = "/sys/class/iommu/dmar0"
_FIRST_IOVA: Final = 1 << 36
_GUARD: Final = 16 * PAGE_SIZE
_ACCESS: Final = {
    Access.READ: vfio.DmaFlag.READ,
    Access.WRITE: vfio.DmaFlag.WRITE,
    Access.RW: vfio.DmaFlag.READ | vfio.DmaFlag.WRITE,
}


class VfioIommu:
    """What is mapped is mapped at once, and gone when `unmap` returns: the kernel invalidates by itself. So a table of
    our own says the same (`lookup`), for the message that we write when the device has signalled."""

    name = "vfio"
    present = True
    in_front = True
    caches = False
    page_size = PAGE_SIZE
    can_be_off = False
    shared = False
    own_bit33 = None

    def __init__(self, container: int, limits: Limits, memory: PhysicalMemory, log: KernelLog) -> None:
        # Linux's driver of VT-d sets the bit that allows reading in every entry: what is mapped for
        # writing only is there for reading, too.
        self.write_only = not os.path.exists(_VTD)
        self._container = container
        self._limits = limits
        self._memory = memory
        self._log = log
        self._mapped: set[int] = set()
        self._table = SoftIommu(memory.ram)
        self._table.enable()
        # Past all RAM that a device could take an IOVA for, where the IOMMU reaches that far.
        last = limits.ranges[-1][1]
        self._next = _FIRST_IOVA if last > 2 * _FIRST_IOVA else (last + 1) // 2

    def enable(self) -> None:
        """A container translates from the start."""

    def disable(self) -> None:
        """Raise `NotPossibleError`: VFIO lets nothing through as it is."""
        raise NotPossibleError("VFIO cannot switch the IOMMU off")

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Point ``iova`` at physical ``gpa``, page by page, so that each can be taken away by itself."""
        if not self._limits.holds(iova, size):
            raise AccessError(iova, size, f"the IOMMU maps no such IOVAs; it has {self._limits.words()}")
        for offset in range(0, size, PAGE_SIZE):
            page = iova + offset
            if page in self._mapped:
                self._drop(page)
            self._enter(page, self._memory.address(gpa + offset), access)
        self._table.map(iova, gpa, size, access)

    def _enter(self, page: int, address: int, access: Access) -> None:
        request = vfio.map_dma(page, address, PAGE_SIZE, _ACCESS[access])
        try:
            call(self._container, f"VFIO_IOMMU_MAP_DMA 0x{page:x}", vfio.IOMMU_MAP_DMA, request)
        except CallError as error:
            if error.errno == errno.EINVAL and access is Access.WRITE:
                raise AccessError(page, PAGE_SIZE, "this IOMMU cannot map for writing only") from error
            if error.errno == errno.ENOMEM:
                raise NotPossibleError(_locked()) from error
            raise
        self._mapped.add(page)

    def unmap(self, iova: IOVA, size: int) -> None:
        """Take it away; no device reaches it after that."""
        self._table.unmap(iova, size)
        self._table.invalidate()
        for page in range(iova, iova + size, PAGE_SIZE):
            if page in self._mapped:
                self._drop(page)

    def _drop(self, page: int) -> None:
        answer = vfio.unmap_dma(page, PAGE_SIZE)
        call(self._container, f"VFIO_IOMMU_UNMAP_DMA 0x{page:x}", vfio.IOMMU_UNMAP_DMA, answer)
        if vfio.unmapped(answer) != PAGE_SIZE:
            raise MachineError(f"VFIO unmapped 0x{vfio.unmapped(answer):x} bytes at 0x{page:x}, not 0x{PAGE_SIZE:x}")
        self._mapped.discard(page)

    def invalidate(self) -> None:
        """Done by `unmap` already."""
        self._table.invalidate()

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """What the tables say, for whoever writes in the device's stead."""
        return self._table.lookup(address, length, access)

    def faults(self) -> list[Fault]:
        """What the kernel has logged of this device."""
        return self._log.read()

    def allocate(self, size: int) -> IOVA:
        """An unused range, with a gap behind it."""
        room = size + PAGE_MASK & ~PAGE_MASK
        start = self._limits.place(self._next, room)
        if start is None:
            raise AccessError(self._next, room, f"no IOVAs are left; the IOMMU has {self._limits.words()}")
        self._next = start + room + _GUARD
        return IOVA(start)


def _locked() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    said = "without a limit" if limit == resource.RLIM_INFINITY else f"{limit // 1024} KiB"
    return (
        f"no more memory may be locked for the device to reach (the limit is {said}): ulimit -l unlimited, "
        "before the probe, or CAP_IPC_LOCK"
    )
