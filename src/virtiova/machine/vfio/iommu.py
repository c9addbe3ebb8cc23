# SPDX-License-Identifier: Apache-2.0
"""The physical IOMMU, as a VFIO container lets it be programmed (`ports.Iommu`)."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, Access
from virtiova.dma.space import Miss, Span
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.soft import SoftIommu
from virtiova.machine.vfio.faults import KernelLog
from virtiova.machine.vfio.memory import PhysicalMemory
from virtiova.ports import Fault
from virtiova.wire import vfio

_INFO: Final = 4096
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

    def __init__(self, container: int, memory: PhysicalMemory, log: KernelLog) -> None:
        # Linux's driver of VT-d (since v5.12) sets the bit that allows reading in every entry: what is mapped for
        # writing only is there for reading, too.
        self.write_only = not os.path.exists(_VTD)
        self._container = container
        self._memory = memory
        self._log = log
        self._mapped: set[int] = set()
        self._table = SoftIommu(memory.ram)
        self._table.enable()
        info = vfio.iommu_info(_INFO)
        fcntl.ioctl(container, vfio.IOMMU_GET_INFO, info)
        if not vfio.page_sizes(info) & PAGE_SIZE:
            raise NotPossibleError(f"this IOMMU maps no pages of {PAGE_SIZE} bytes")
        self.ranges = vfio.iova_ranges(info)
        self._next = self._first()

    def _first(self) -> int:
        """Where our own IOVAs begin: past all RAM that a device could take them for, and where they may be."""
        last = max((end for _, end in self.ranges), default=(1 << 39) - 1)
        return _FIRST_IOVA if last > 2 * _FIRST_IOVA else (last + 1) // 2

    def enable(self) -> None:
        """A container translates from the start."""

    def disable(self) -> None:
        """Raise `NotPossibleError`: VFIO lets nothing through as it is."""
        raise NotPossibleError("VFIO cannot switch the IOMMU off")

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Point ``iova`` at physical ``gpa``, page by page, so that each can be taken away by itself."""
        self._table.map(iova, gpa, size, access)
        for offset in range(0, size, PAGE_SIZE):
            page = iova + offset
            if page in self._mapped:
                self._drop(page)
            request = vfio.map_dma(page, self._memory.address(gpa + offset), PAGE_SIZE, _ACCESS[access])
            try:
                fcntl.ioctl(self._container, vfio.IOMMU_MAP_DMA, request)
            except OSError as error:
                if error.errno == errno.EINVAL and access is Access.WRITE:
                    raise AccessError(page, PAGE_SIZE, "this IOMMU cannot map for writing only") from error
                raise MachineError(f"VFIO does not map IOVA 0x{page:x}: {error.strerror}") from error
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
        try:
            fcntl.ioctl(self._container, vfio.IOMMU_UNMAP_DMA, answer)
        except OSError as error:
            raise MachineError(f"VFIO does not unmap IOVA 0x{page:x}: {error.strerror}") from error
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
        start = self._next
        self._next += (size + PAGE_MASK & ~PAGE_MASK) + _GUARD
        return IOVA(start)
