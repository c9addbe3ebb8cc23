# SPDX-License-Identifier: Apache-2.0
"""Intel VT-d, programmed from outside: root, context and page tables in RAM, commands by register or by queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError, MachineError
from virtiova.iommu.faults import FaultSorter
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.transport.ats import Ats
from virtiova.wire import vtd

_POLLS: Final = 1000
_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""
_RECORDS_READ: Final = 64
_QUEUE_ENTRIES: Final = PAGE_SIZE // 16


class VtdUnit:
    """What all devices behind one VT-d share: registers, root and context tables, invalidation, fault records.

    ``base`` is the address of the registers. Invalidates by register, or with ``queued`` through the invalidation
    queue; a machine takes one of the two. ``ats`` finds a device's ATS, if it has it, by requester id. It is turned on
    where the IOMMU knows such devices and there is a queue, for no register invalidates the TLB of a device; from then
    on `invalidate` tells the device as well.
    """

    def __init__(
        self,
        mmio: Mmio,
        ram: Ram,
        tables: PageAllocator,
        base: int,
        *,
        queued: bool = False,
        ats: Callable[[int], Ats | None] | None = None,
    ) -> None:
        self.ram = ram
        self.tables = tables
        self._mmio = mmio
        self._base = base
        self._queued = queued
        self._queue = GPA(0)
        self._tail = 0
        self.caps = vtd.Capabilities.unpack(self._read(vtd.CAP, 8), self._read(vtd.ECAP, 8))
        self._find_ats = ats if queued and self.caps.device_tlb else None
        self._ats: dict[int, Ats] = {}
        self._root = tables.page()
        self._contexts: dict[int, GPA] = {}
        self._domains = 0
        self._faults = FaultSorter()
        self.set_up = False

    def open_domain(self, source: int, table: GPA) -> None:
        """Let a device translate through ``table``, in a domain with a number of its own."""
        self._domains += 1
        bus = source >> 8
        if bus not in self._contexts:
            self._contexts[bus] = self.tables.page()
            self.ram.write(GPA(self._root + 16 * bus), vtd.root_entry(self._contexts[bus]))
        ats = self._find_ats(source) if self._find_ats else None
        if ats:
            self._ats[source] = ats
        entry = vtd.context_entry(table, self.caps.levels, self._domains, device_tlb=ats is not None)
        self.ram.write(GPA(self._contexts[bus] + 16 * (source & 0xFF)), entry)
        self._faults.open(source)
        if self.set_up:
            self._forget_contexts()

    def enable(self) -> None:
        """Translate, for all devices."""
        if not self.set_up:
            self._point_to_tables()
        self._command(vtd.CMD_TRANSLATE, on=True)
        for ats in self._ats.values():
            ats.set(on=True)

    def disable(self) -> None:
        """Let the addresses of all devices through."""
        for ats in self._ats.values():
            ats.set(on=False)
        self._command(vtd.CMD_TRANSLATE, on=False)

    def invalidate(self) -> None:
        """Forget every translation of every domain."""
        if not self.set_up:
            return
        if not self._queued:
            self._register_command(self.caps.iotlb_offset, vtd.IOTLB_GLOBAL)
            return
        # Devices after the IOTLB, or they could ask again and be given the old translation (6.5.2.5).
        told = [vtd.queue_device_tlb_all(source) for source, ats in self._ats.items() if ats.enabled]
        self.submit(vtd.queue_iotlb_global(), *told)

    def faults(self, source: int) -> list[Fault]:
        """One device's fault records since the last call. Others' are kept for them."""
        for _ in range(_RECORDS_READ):
            if not self._read(vtd.FSTS, 4) & vtd.FSTS_PENDING:
                break
            for index in range(self.caps.fault_records):
                fault = self._take_record(self.caps.fault_offset + 16 * index)
                if fault is not None:
                    self._faults.add(fault)
            self._write(vtd.FSTS, 4, vtd.FSTS_CLEAR)
        return self._faults.take(source)

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
            self._queue = self.tables.page()
            self._write(vtd.IQA, 8, self._queue)
            self._command(vtd.CMD_QUEUED, on=True)
        self._forget_contexts()
        self.set_up = True
        self.invalidate()

    def _forget_contexts(self) -> None:
        if self._queued:
            self.submit(vtd.queue_context_global())
        else:
            self._register_command(vtd.CCMD, vtd.CONTEXT_GLOBAL)

    def submit(self, *descriptors: bytes) -> None:
        """Put descriptors of 16 bytes into the invalidation queue, in that order, and wait until all are done."""
        for descriptor in descriptors:
            self.ram.write(GPA(self._queue + 16 * self._tail), descriptor)
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


class VtdIommu:
    """VT-d for one device (`ports.Iommu`): its domain behind ``unit``. ``source`` is its requester id."""

    name = "intel"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = True
    shared = False
    own_bit33 = None

    def __init__(self, unit: VtdUnit, source: int) -> None:
        self.unit = unit
        self._source = source
        self._ram = unit.ram
        self._tables = unit.tables
        top = unit.tables.page()
        self._levels: dict[tuple[int, int], GPA] = {(self.levels, 0): top}
        self._iovas = IovaRange(_IOVA_START, 1 << 12 + 9 * self.levels, PAGE_SIZE)
        unit.open_domain(source, top)

    def beside(self, source: int, *, around: bool = False) -> VtdIommu:
        """Another device behind the same unit, with a domain of its own."""
        return VtdIommu(self.unit, source)

    @property
    def levels(self) -> int:
        """Of the page tables: 3 or 4."""
        return self.unit.caps.levels

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        self.unit.enable()

    def disable(self) -> None:
        self.unit.disable()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % PAGE_SIZE:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        flags = (vtd.READ if Access.READ in access else 0) | (vtd.WRITE if Access.WRITE in access else 0)
        fresh = [self._set(iova + o, vtd.page_entry(gpa + o, flags)) for o in self._iovas.pages(iova, size)]
        # In caching mode absence is cached as well: only with this does the new entry exist. Replacing one is for
        # `invalidate` to tell.
        if self.unit.caps.caching_mode and self.unit.set_up and any(fresh):
            self.invalidate()

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, vtd.page_entry(0, 0))

    def invalidate(self) -> None:
        self.unit.invalidate()

    def faults(self) -> list[Fault]:
        return self.unit.faults(self._source)

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- tables --------------------------------------------------------------------------------------------------

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
