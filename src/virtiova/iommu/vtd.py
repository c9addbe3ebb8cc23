# SPDX-License-Identifier: Apache-2.0
"""Intel VT-d, programmed from outside: root, context and page tables in RAM, commands by register or by queue."""

from __future__ import annotations

from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError, MachineError
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.transport.ats import Ats
from virtiova.wire import vtd

_DOMAIN: Final = 1
_POLLS: Final = 1000
_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""
_RECORDS_READ: Final = 64
_QUEUE_ENTRIES: Final = PAGE_SIZE // 16


class VtdIommu:
    """VT-d for one device (`ports.Iommu`). ``source`` is its requester id, ``base`` that of the registers.

    Invalidates by register, or with ``queued`` through the invalidation queue; a machine takes one of the two.
    ``ats`` is the device's, if it has it. It is turned on where the IOMMU knows such devices and there is a queue,
    for no register invalidates the TLB of a device; from then on `invalidate` tells the device as well.
    """

    name = "intel"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = True

    def __init__(
        self,
        mmio: Mmio,
        ram: Ram,
        tables: PageAllocator,
        source: int,
        base: int,
        *,
        queued: bool = False,
        ats: Ats | None = None,
    ) -> None:
        self._mmio = mmio
        self._ram = ram
        self._tables = tables
        self._source = source
        self._base = base
        self._queued = queued
        self._queue = GPA(0)
        self._tail = 0
        self._caps = vtd.Capabilities.unpack(self._read(vtd.CAP, 8), self._read(vtd.ECAP, 8))
        self._ats = ats if queued and self._caps.device_tlb else None
        self._root = tables.page()
        self._context = tables.page()
        self._levels: dict[tuple[int, int], GPA] = {(self._caps.levels, 0): tables.page()}
        self._set_up = False
        self._iovas = IovaRange(_IOVA_START, 1 << self._width, PAGE_SIZE)
        self._write_tables()

    @property
    def levels(self) -> int:
        """Of the page tables: 3 or 4."""
        return self._caps.levels

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        if not self._set_up:
            self._point_to_tables()
        self._command(vtd.CMD_TRANSLATE, on=True)
        if self._ats:
            self._ats.set(on=True)

    def disable(self) -> None:
        if self._ats:
            self._ats.set(on=False)
        self._command(vtd.CMD_TRANSLATE, on=False)

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % PAGE_SIZE:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        flags = (vtd.READ if Access.READ in access else 0) | (vtd.WRITE if Access.WRITE in access else 0)
        fresh = [self._set(iova + o, vtd.page_entry(gpa + o, flags)) for o in self._iovas.pages(iova, size)]
        # In caching mode absence is cached as well: only with this does the new entry exist. Replacing one is for
        # `invalidate` to tell.
        if self._caps.caching_mode and self._set_up and any(fresh):
            self.invalidate()

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, vtd.page_entry(0, 0))

    def invalidate(self) -> None:
        if not self._set_up:
            return
        if not self._queued:
            self._register_command(self._caps.iotlb_offset, vtd.IOTLB_GLOBAL)
            return
        descriptors = [vtd.queue_iotlb_global()]
        if self._ats and self._ats.enabled:
            # After the IOTLB, or the device could ask again and be given the old translation (6.5.2.5).
            descriptors.append(vtd.queue_device_tlb_all(self._source))
        self.submit(*descriptors)

    def faults(self) -> list[Fault]:
        found = []
        for _ in range(_RECORDS_READ):
            if not self._read(vtd.FSTS, 4) & vtd.FSTS_PENDING:
                break
            for index in range(self._caps.fault_records):
                fault = self._take_record(self._caps.fault_offset + 16 * index)
                # Other devices' faults say nothing about the one under test.
                if fault is not None and fault.source == self._source:
                    found.append(fault)
            self._write(vtd.FSTS, 4, vtd.FSTS_CLEAR)
        return found

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- tables --------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return 12 + 9 * self._caps.levels

    def _write_tables(self) -> None:
        self._ram.write(GPA(self._root + 16 * (self._source >> 8)), vtd.root_entry(self._context))
        top = self._levels[self._caps.levels, 0]
        entry = vtd.context_entry(top, self._caps.levels, _DOMAIN, device_tlb=self._ats is not None)
        self._ram.write(GPA(self._context + 16 * (self._source & 0xFF)), entry)

    def _table(self, iova: int, level: int) -> GPA:
        """The table of ``level`` for ``iova``, made and linked if it is missing."""
        key = (level, iova >> (12 + 9 * level))
        if key not in self._levels:
            table = self._tables.page()
            parent = self._table(iova, level + 1)
            slot = parent + 8 * vtd.table_index(iova, level + 1)
            self._ram.write(GPA(slot), vtd.page_entry(table, vtd.READ | vtd.WRITE))
            self._levels[key] = table
        return self._levels[key]

    def _set(self, iova: int, entry: bytes) -> bool:
        """Write the leaf entry of ``iova``; was there none before?"""
        slot = GPA(self._table(iova, 1) + 8 * vtd.table_index(iova, 1))
        fresh = not any(self._ram.read(slot, 8))
        self._ram.write(slot, entry)
        return fresh

    # -- registers -----------------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int) -> int:
        return self._mmio.read(self._base + offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self._mmio.write(self._base + offset, size, value)

    def _command(self, bit: int, *, on: bool) -> None:
        status = self._read(vtd.GSTS, 4) & vtd.GSTS_KEEP
        self._write(vtd.GCMD, 4, status | bit if on else status & ~bit)
        for _ in range(_POLLS):
            if bool(self._read(vtd.GSTS, 4) & bit) is on:
                return
        raise MachineError(f"VT-d did not take the global command 0x{bit:x}")

    def _register_command(self, offset: int, command: int) -> None:
        self._write(offset, 8, command)
        for _ in range(_POLLS):
            if not self._read(offset, 8) & vtd.PENDING:
                return
        raise MachineError(f"VT-d did not finish the command in register 0x{offset:x}")

    def _point_to_tables(self) -> None:
        self._write(vtd.RTADDR, 8, self._root)
        self._command(vtd.CMD_SET_ROOT, on=True)
        if self._queued:
            self._queue = self._tables.page()
            self._write(vtd.IQA, 8, self._queue)
            self._command(vtd.CMD_QUEUED, on=True)
            self.submit(vtd.queue_context_global())
        else:
            self._register_command(vtd.CCMD, vtd.CONTEXT_GLOBAL)
        self._set_up = True
        self.invalidate()

    def submit(self, *descriptors: bytes) -> None:
        """Put descriptors of 16 bytes into the invalidation queue, in that order, and wait until all are done."""
        for descriptor in descriptors:
            self._ram.write(GPA(self._queue + 16 * self._tail), descriptor)
            self._tail = (self._tail + 1) % _QUEUE_ENTRIES
        self._write(vtd.IQT, 8, 16 * self._tail)
        for _ in range(_POLLS):
            if self._read(vtd.IQH, 8) == 16 * self._tail:
                return
        if self._read(vtd.FSTS, 4) & vtd.FSTS_QUEUE_ERROR:
            raise MachineError("VT-d does not understand the invalidation descriptor")
        raise MachineError("VT-d did not finish the invalidation")

    def _take_record(self, offset: int) -> Fault | None:
        low, high = self._read(offset, 8), self._read(offset + 8, 8)
        record = vtd.FaultRecord.unpack(low, high)
        if record is None:
            return None
        self._write(offset + 12, 4, 1 << 31)
        return Fault(record.page, record.write, record.source, record.text, (low, high))
