# SPDX-License-Identifier: Apache-2.0
"""AMD-Vi, programmed from outside: device table and page tables in RAM, commands and events by ring."""

from __future__ import annotations

import struct
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError, MachineError
from virtiova.iommu.faults import FaultSorter
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.wire import amdvi

_POLLS: Final = 1000
_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""
_ENTRIES_PER_BUS: Final = 256
_RUNNING: Final = amdvi.CONTROL_TRANSLATE | amdvi.CONTROL_EVENTS | amdvi.CONTROL_COMMANDS


class AmdViUnit:
    """What all devices behind one AMD-Vi share: registers, device table, command buffer, event log.

    ``base`` is the address of the registers. The device table reaches as far as bus ``last_bus``. An entry of a
    device without a domain stays zero (V=0): the specification lets its addresses through.
    """

    def __init__(self, mmio: Mmio, ram: Ram, tables: PageAllocator, base: int, *, last_bus: int = 0) -> None:
        self.ram = ram
        self.tables = tables
        self._mmio = mmio
        self._base = base
        self._entries = (last_bus + 1) * _ENTRIES_PER_BUS
        self._devices = tables.run(self._entries * amdvi.DEVICE_ENTRY_SIZE // PAGE_SIZE)
        self._commands = tables.page()
        self.event_log = tables.page()
        self._answer = tables.page()
        self._domains: dict[int, int] = {}
        self._tail = 0
        self._event_head = 0
        self._waits = 0
        self._enabled = False
        self._set_up = False
        self._faults = FaultSorter()
        self.lost_faults = 0
        """How often the event log ran over since the machine was started."""

    def open_domain(self, source: int, root: GPA) -> int:
        """Let a device translate through the tables at ``root``, in a domain with a number of its own: that."""
        domain = len(self._domains) + 1
        self._domains[source] = domain
        self._faults.open(source)
        self.set_device_entry(source, amdvi.device_entry(root, domain))
        return domain

    def set_device_entry(self, source: int, entry: bytes) -> None:
        """Replace an entry of the device table; told to the IOMMU by `enable`, or at once if it is on."""
        if source >= self._entries:
            raise AccessError(source, 1, f"requester id beyond the device table of {self._entries} entries")
        self.ram.write(GPA(self._devices + amdvi.DEVICE_ENTRY_SIZE * source), entry)
        if self._enabled:
            self._submit(amdvi.invalidate_device(source))
            self.invalidate(self._domains[source])

    def enable(self) -> None:
        """Translate, for all devices."""
        if not self._set_up:
            self._point_to_tables()
        self._write(amdvi.CONTROL, _RUNNING)
        running = amdvi.STATUS_COMMAND_RUN | amdvi.STATUS_EVENT_RUN
        if self._read(amdvi.STATUS) & running != running:
            raise MachineError("AMD-Vi runs neither command buffer nor event log")
        self._enabled = True
        # Commands run only while it is on, so what happened to the tables before is told now.
        for source, domain in self._domains.items():
            self._submit(amdvi.invalidate_device(source))
            self._submit(amdvi.invalidate_pages(domain))
        self._wait()

    def disable(self) -> None:
        """Let the addresses of all devices through."""
        self._write(amdvi.CONTROL, 0)
        self._mmio.flush()
        self._enabled = False

    def invalidate(self, domain: int) -> None:
        """Forget every translation of a domain."""
        if self._enabled:
            self._submit(amdvi.invalidate_pages(domain))
            self._wait()

    def faults(self, source: int) -> list[Fault]:
        """One device's events since the last call. Others' are kept for them."""
        if self._enabled:
            self._read_events()
        return self._faults.take(source)

    # -- registers -----------------------------------------------------------------------------------------------

    def _read(self, offset: int) -> int:
        return self._mmio.read(self._base + offset, 8)

    def _write(self, offset: int, value: int) -> None:
        self._mmio.write(self._base + offset, 8, value)

    def _point_to_tables(self) -> None:
        self._write(amdvi.DEVICE_TABLE, amdvi.device_table_base(self._devices, self._entries))
        self._write(amdvi.COMMAND_BASE, amdvi.ring_base(self._commands))
        self._write(amdvi.EVENT_BASE, amdvi.ring_base(self.event_log))
        # Writing a base register sets the head and tail of its ring to 0 (3.4.2, 3.4.3).
        self._set_up = True

    def _submit(self, command: bytes) -> None:
        """Put a command into the buffer and let the IOMMU have it; not necessarily done when this returns."""
        self.ram.write(GPA(self._commands + amdvi.RECORD_SIZE * self._tail), command)
        self._tail = (self._tail + 1) % amdvi.RING_ENTRIES
        self._write(amdvi.COMMAND_TAIL, amdvi.RECORD_SIZE * self._tail)

    def _wait(self) -> None:
        """Until all commands are done: the IOMMU stores a number that it has not stored before."""
        self._waits += 1
        self._submit(amdvi.completion_wait(self._answer, self._waits))
        for _ in range(_POLLS):
            self._mmio.flush()
            (stored,) = struct.unpack("<Q", self.ram.read(self._answer, 8))
            if stored == self._waits:
                return
            self._read(amdvi.COMMAND_HEAD)
        raise MachineError("AMD-Vi did not finish its commands")

    # -- events --------------------------------------------------------------------------------------------------

    def _read_events(self) -> None:
        # Most calls find nothing, and then the tail is all that is asked for.
        tail = amdvi.ring_offset(self._read(amdvi.EVENT_TAIL))
        if tail == self._event_head:
            return
        head = amdvi.ring_offset(self._read(amdvi.EVENT_HEAD))
        while head != tail:
            fault = self._event(head)
            if fault is not None:
                self._faults.add(fault)
            head = (head + 1) % amdvi.RING_ENTRIES
        self._event_head = tail
        self._write(amdvi.EVENT_HEAD, tail * amdvi.RECORD_SIZE)
        self._after_overflow()

    def _event(self, index: int) -> Fault | None:
        record = self.ram.read(GPA(self.event_log + amdvi.RECORD_SIZE * index), amdvi.RECORD_SIZE)
        event = amdvi.Event.unpack(record)
        if event is None:
            return None
        raw = struct.unpack("<QQ", record)
        return Fault(event.address, event.write, event.source, event.text, raw)

    def _after_overflow(self) -> None:
        """A log that ran over stands still until it is switched off and on again (3.4.15, EventOverflow)."""
        if self._read(amdvi.STATUS) & amdvi.STATUS_EVENT_OVERFLOW:
            self.lost_faults += 1
            self._write(amdvi.CONTROL, _RUNNING & ~amdvi.CONTROL_EVENTS)
            self._write(amdvi.STATUS, amdvi.STATUS_EVENT_OVERFLOW)
            self._write(amdvi.CONTROL, _RUNNING)


class AmdViIommu:
    """AMD-Vi for one device (`ports.Iommu`): its domain behind ``unit``. ``source`` is its requester id."""

    name = "amd"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = True
    shared = False
    own_bit33 = None

    def __init__(self, unit: AmdViUnit, source: int) -> None:
        self.unit = unit
        self._source = source
        self._ram = unit.ram
        self._tables = unit.tables
        root = unit.tables.page()
        self._levels: dict[tuple[int, int], GPA] = {(amdvi.LEVELS, 0): root}
        self._iovas = IovaRange(_IOVA_START, 1 << amdvi.WIDTH, PAGE_SIZE)
        self._domain = unit.open_domain(source, root)

    def beside(self, source: int, *, around: bool = False) -> AmdViIommu:
        """Another device behind the same unit, with a domain of its own."""
        return AmdViIommu(self.unit, source)

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        self.unit.enable()

    def disable(self) -> None:
        self.unit.disable()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % PAGE_SIZE:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, amdvi.page_entry(gpa + offset, access))

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, amdvi.page_entry(0, Access.NONE))

    def invalidate(self) -> None:
        self.unit.invalidate(self._domain)

    def faults(self) -> list[Fault]:
        return self.unit.faults(self._source)

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- tables --------------------------------------------------------------------------------------------------

    def table(self, iova: int, level: int) -> GPA:
        """The table of ``level`` (1: leaves) for ``iova``, made and linked if it is missing."""
        key = (level, iova >> (12 + 9 * level))
        if key not in self._levels:
            table = self._tables.page()
            parent = self.table(iova, level + 1)
            slot = parent + 8 * amdvi.table_index(iova, level + 1)
            self._ram.write(GPA(slot), amdvi.page_entry(table, Access.RW, level))
            self._levels[key] = table
        return self._levels[key]

    def _set(self, iova: int, entry: bytes) -> None:
        self._ram.write(GPA(self.table(iova, 1) + 8 * amdvi.table_index(iova, 1)), entry)
