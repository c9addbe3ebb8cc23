# SPDX-License-Identifier: Apache-2.0
"""The IOMMU of SPARC64's sabre host bridge, programmed from outside: one table in RAM, three registers."""

from __future__ import annotations

from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.wire import sabre
from virtiova.wire.sabre import PAGE, Entry

_ALIGN: Final = 1 << 20
"""Of the table: that of the largest one, so that it fits whatever its size."""


class SabreIommu:
    """Sabre's IOMMU (`ports.Iommu`). ``base`` is the host bridge's, ``ram_end`` the first address above RAM.

    The table is as large as RAM and the IOVAs above it ask for: the index has no more bits than the table has
    entries, so that an address out of its reach is translated by the entry of another one.
    """

    name = "sabre"
    present = True
    in_front = True
    caches = False
    page_size = PAGE
    write_only = False
    can_be_off = True
    shared = True
    own_bit33 = None

    def __init__(self, mmio: Mmio, ram: Ram, tables: PageAllocator, base: int, ram_end: int) -> None:
        self._mmio = mmio
        self._ram = ram
        self._base = base
        self._size = sabre.size_for(2 * ram_end)
        self._tsb = tables.run(sabre.table_bytes(self._size) // PAGE_SIZE, align=_ALIGN)
        self._iovas = IovaRange(ram_end, sabre.reach(self._size), PAGE)

    def beside(self, source: int, *, around: bool = False) -> SabreIommu:
        """The same: one table for all devices."""
        return self

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        self._write(sabre.TSB_BASE, self._tsb)
        self._write(sabre.CONTROL, sabre.control(self._size, on=True))
        self.invalidate()

    def disable(self) -> None:
        self._write(sabre.CONTROL, sabre.control(self._size, on=False))
        self._mmio.flush()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if Access.WRITE in access and Access.READ not in access:
            raise AccessError(iova, size, "sabre cannot allow writing without reading")
        for offset in self._iovas.pages(iova, size):
            entry = Entry(Access.READ in access, gpa + offset, Access.WRITE in access)
            self._set(iova + offset, entry)

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, Entry(False, 0, False))

    def invalidate(self) -> None:
        self._write(sabre.FLUSH, 0)
        self._mmio.flush()

    def faults(self) -> list[Fault]:
        """None are recorded: QEMU's sabre has no fault registers."""
        return []

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- table and registers -------------------------------------------------------------------------------------

    def _set(self, iova: int, entry: Entry) -> None:
        self._ram.write(GPA(self._tsb + sabre.entry_offset(iova, self._size)), entry.pack())

    def _write(self, offset: int, value: int) -> None:
        # The port takes the number that a little-endian register would have.
        self._mmio.write(self._base + offset, 8, int.from_bytes(sabre.register(value), "little"))
