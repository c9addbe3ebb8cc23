# SPDX-License-Identifier: Apache-2.0
"""Arm SMMUv3, programmed from outside: stream table, context descriptor and page tables in RAM, two queues."""

from __future__ import annotations

import struct
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.faults import FaultSorter
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.wire import smmuv3

_POLLS: Final = 1000
_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""
_COMMAND_BITS: Final = 8
_EVENT_BITS: Final = 10
"""QEMU records an event for every four bytes of a refused buffer, and drops what does not fit."""
_QUEUES_ON: Final = smmuv3.CR0_CMDQEN | smmuv3.CR0_EVENTQEN


class Smmuv3Unit:
    """What all devices behind one SMMUv3 share: registers, stream table, both queues.

    ``base`` is the address of the registers. Stream ids are requester ids (bus << 8 | devfn); the stream table
    reaches as far as bus ``last_bus``. ``stage`` is 1 or 2; None takes stage 1 if the SMMU has it.
    `NotPossibleError` if it has no such stage.
    """

    def __init__(
        self,
        mmio: Mmio,
        ram: Ram,
        tables: PageAllocator,
        base: int,
        *,
        stage: int | None = None,
        last_bus: int = 1,
    ) -> None:
        self.ram = ram
        self.tables = tables
        self._mmio = mmio
        self._base = base
        self._caps = smmuv3.Capabilities.unpack(*(self._read(at, 4) for at in (smmuv3.IDR0, smmuv3.IDR1, smmuv3.IDR5)))
        self.stage = self._choose(stage)
        self._streams = min(8 + last_bus.bit_length(), self._caps.stream_bits)
        self._command_bits = min(_COMMAND_BITS, self._caps.command_queue_bits)
        self._event_bits = min(_EVENT_BITS, self._caps.event_queue_bits)
        size = smmuv3.STE_SIZE << self._streams
        # A linear stream table is aligned to its own size (IHI 0070, 6.3.23).
        self._stream_table = tables.run(-(-size // PAGE_SIZE), align=max(size, PAGE_SIZE))
        self._commands = tables.page()
        self._events = tables.run(-(-(smmuv3.EVENT_SIZE << self._event_bits) // PAGE_SIZE), align=32 * 1024)
        self._produced = 0
        self._consumed = 0
        self._domains = 0
        self._faults = FaultSorter()
        self._set_up = False

    def open_domain(self, source: int | None, table: GPA) -> None:
        """Let a device translate through ``table``, with a number (ASID, VMID) of its own; None: all streams."""
        number = self._domains + 1
        output = self._caps.output_size
        if self.stage == 1:
            context = self.tables.page()
            self.ram.write(context, smmuv3.context_descriptor(table, output, number))
            entry = smmuv3.ste_stage1(context)
        else:
            entry = smmuv3.ste_stage2(table, output, number)
        if source is None:
            self.ram.write(self._stream_table, entry * (1 << self._streams))
        else:
            self.ram.write(self._stream_entry(source), entry)
        self._domains = number
        self._faults.open(source)
        if self._set_up:
            self._submit(smmuv3.cfgi_all())

    def enable(self) -> None:
        """Translate, for all devices."""
        if not self._set_up:
            self._point_to_tables()
        self._submit(smmuv3.cfgi_all(), smmuv3.tlbi_all())
        self._control(_QUEUES_ON | smmuv3.CR0_SMMUEN)

    def disable(self) -> None:
        """Let the addresses of all devices through."""
        self._control(_QUEUES_ON if self._set_up else 0)

    def invalidate(self) -> None:
        """Forget every translation of every domain."""
        if self._set_up:
            self._submit(smmuv3.tlbi_all())

    def faults(self, source: int | None) -> list[Fault]:
        """One device's events since the last call. Others' are kept for them."""
        if self._set_up:
            self._read_events()
        return self._faults.take(source)

    def _choose(self, stage: int | None) -> int:
        if not self._caps.granule_4k:
            raise NotPossibleError("this SMMUv3 has no tables of 4 KiB pages (IDR5.GRAN4K)")
        has = {1: self._caps.stage1, 2: self._caps.stage2}
        chosen = stage or (1 if has[1] else 2)
        if not has[chosen]:
            raise NotPossibleError(f"this SMMUv3 has no stage {chosen} (IDR0.S{chosen}P)")
        return chosen

    def _stream_entry(self, source: int) -> GPA:
        if source >= 1 << self._streams:
            raise AccessError(source, 1, f"stream id beyond the {self._streams}-bit stream table")
        return GPA(self._stream_table + smmuv3.STE_SIZE * source)

    def _read_events(self) -> None:
        produced = self._read(smmuv3.EVENTQ_PROD, 4)
        if produced == self._consumed:
            return
        lost = produced & smmuv3.OVERFLOW
        index = self._consumed & ~smmuv3.OVERFLOW
        # At most one queue full: a producer index that means nothing must not keep us here.
        for _ in range(1 << self._event_bits):
            if index == produced & ~smmuv3.OVERFLOW:
                break
            place = self._events + smmuv3.EVENT_SIZE * smmuv3.slot(index, self._event_bits)
            record = self.ram.read(GPA(place), smmuv3.EVENT_SIZE)
            event = smmuv3.Event.unpack(record)
            raw = struct.unpack("<8I", record)
            self._faults.add(Fault(event.address, event.write, event.stream, event.text, raw))
            index = smmuv3.advance(index, self._event_bits)
        self._consumed = index | lost
        self._write(smmuv3.EVENTQ_CONS, 4, self._consumed)

    # -- registers and queues ------------------------------------------------------------------------------------

    def _read(self, offset: int, size: int) -> int:
        return self._mmio.read(self._base + offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self._mmio.write(self._base + offset, size, value)

    def _control(self, value: int) -> None:
        self._write(smmuv3.CR0, 4, value)
        for _ in range(_POLLS):
            if self._read(smmuv3.CR0ACK, 4) == value:
                return
        raise MachineError(f"the SMMUv3 did not take CR0 0x{value:x}")

    def _point_to_tables(self) -> None:
        self._control(0)
        self._write(smmuv3.STRTAB_BASE, 8, self._stream_table)
        self._write(smmuv3.STRTAB_BASE_CFG, 4, self._streams)
        self._write(smmuv3.CMDQ_BASE, 8, self._commands | self._command_bits)
        self._write(smmuv3.EVENTQ_BASE, 8, self._events | self._event_bits)
        for register in (smmuv3.CMDQ_PROD, smmuv3.CMDQ_CONS, smmuv3.EVENTQ_PROD, smmuv3.EVENTQ_CONS):
            self._write(register, 4, 0)
        self._control(_QUEUES_ON)
        self._set_up = True

    def _submit(self, *commands: bytes) -> None:
        """Commands, a SYNC after them, and wait until the queue is empty."""
        for command in (*commands, smmuv3.sync()):
            place = self._commands + smmuv3.COMMAND_SIZE * smmuv3.slot(self._produced, self._command_bits)
            self.ram.write(GPA(place), command)
            self._produced = smmuv3.advance(self._produced, self._command_bits)
        self._write(smmuv3.CMDQ_PROD, 4, self._produced)
        consumed = 0
        for _ in range(_POLLS):
            consumed = self._read(smmuv3.CMDQ_CONS, 4)
            if consumed == self._produced:
                return
        error = self._read(smmuv3.GERROR, 4)
        raise MachineError(f"the SMMUv3 did not finish its commands: CMDQ_CONS 0x{consumed:x}, GERROR 0x{error:x}")


class Smmuv3Iommu:
    """An SMMUv3 for one device (`ports.Iommu`): its domain behind ``unit``.

    ``source`` is the device's requester id, which is its stream id; None: all streams that the table has.
    """

    name = "smmuv3"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    can_be_off = True
    shared = False
    own_bit33 = None

    def __init__(self, unit: Smmuv3Unit, source: int | None) -> None:
        self.unit = unit
        self.stage = unit.stage
        # All permissions of stage 1 allow reads (Arm ARM, D8, AP[2:1]).
        self.write_only = self.stage == 2
        self._source = source
        self._ram = unit.ram
        self._tables = unit.tables
        top = unit.tables.page()
        self._levels: dict[tuple[int, int], GPA] = {(smmuv3.TOP, 0): top}
        self._iovas = IovaRange(_IOVA_START, 1 << smmuv3.ADDRESS_BITS, PAGE_SIZE)
        unit.open_domain(source, top)

    def beside(self, source: int, *, around: bool = False) -> Smmuv3Iommu:
        """Another device behind the same unit, with a domain of its own."""
        return Smmuv3Iommu(self.unit, source)

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        self.unit.enable()

    def disable(self) -> None:
        self.unit.disable()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % PAGE_SIZE:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        if access is Access.WRITE and not self.write_only:
            raise AccessError(iova, size, f"stage {self.stage} of an SMMUv3 cannot allow writing without reading")
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, self._page(gpa + offset, access))

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, smmuv3.NO_ENTRY)

    def invalidate(self) -> None:
        self.unit.invalidate()

    def faults(self) -> list[Fault]:
        return self.unit.faults(self._source)

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- tables --------------------------------------------------------------------------------------------------

    def _page(self, gpa: int, access: Access) -> bytes:
        if access is Access.NONE:
            return smmuv3.NO_ENTRY
        writable = Access.WRITE in access
        if self.stage == 1:
            return smmuv3.page_stage1(gpa, writable=writable)
        return smmuv3.page_stage2(gpa, readable=Access.READ in access, writable=writable)

    def _table(self, iova: int, level: int) -> GPA:
        """The table of ``level`` for ``iova``, made and linked if it is missing."""
        key = (level, iova >> 12 + 9 * (smmuv3.LEAF - level + 1))
        if key not in self._levels:
            table = self._tables.page()
            above = self._table(iova, level - 1)
            place = above + 8 * smmuv3.table_index(iova, level - 1)
            self._ram.write(GPA(place), smmuv3.table_entry(table))
            self._levels[key] = table
        return self._levels[key]

    def _set(self, iova: int, entry: bytes) -> None:
        leaf = self._table(iova, smmuv3.LEAF)
        self._ram.write(GPA(leaf + 8 * smmuv3.table_index(iova, smmuv3.LEAF)), entry)
