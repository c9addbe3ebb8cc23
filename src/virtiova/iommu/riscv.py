# SPDX-License-Identifier: Apache-2.0
"""The RISC-V IOMMU, programmed from outside: device directory and page tables in RAM, two queues."""

from __future__ import annotations

import struct
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import PageAllocator, Ram
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.faults import FaultSorter
from virtiova.iommu.iova import IovaRange
from virtiova.ports import Fault, Mmio
from virtiova.wire import riscv_iommu as wire

_POLLS: Final = 1000
_IOVA_START: Final = 1 << 32
"""Above all RAM that this machine has, so that no IOVA equals a guest-physical address."""
_COMMAND_BITS: Final = 8
_FAULT_BITS: Final = 10
"""QEMU records a fault for every part of a refused buffer, and drops what does not fit."""
_VERSION_1: Final = 0x10


class RiscvUnit:
    """What all devices behind one RISC-V IOMMU share: registers, device directory, command queue, fault queue.

    ``base`` is the address of the registers, ``paging`` the format that all domains have, one of `wire.PAGINGS`. The
    context of a device without a domain stays zero (V=0), which lets nothing through. `NotPossibleError` if the IOMMU
    does not have the format.
    """

    def __init__(
        self, mmio: Mmio, ram: Ram, tables: PageAllocator, base: int, *, paging: wire.Paging = wire.SV39
    ) -> None:
        self.ram = ram
        self.tables = tables
        self._mmio = mmio
        self._base = base
        self.capabilities = wire.Capabilities.unpack(self.read(wire.CAPABILITIES, 8))
        if self.capabilities.version < _VERSION_1:
            raise NotPossibleError(f"no RISC-V IOMMU of version 1 at 0x{base:x} (capabilities.version)")
        if paging.name not in self.capabilities.pagings:
            raise NotPossibleError(f"this RISC-V IOMMU has no {paging.name} (capabilities)")
        self.paging = paging
        self._commands = tables.page()
        # The fault queue is aligned to its own size (5.9).
        size = wire.RECORD_SIZE << _FAULT_BITS
        self.records = tables.run(size // PAGE_SIZE, align=size)
        self._produced = 0
        self._consumed = 0
        self._leaves: dict[int, GPA] = {}
        """Pages of contexts, by the upper bits of the device ids in them."""
        self._directory = GPA(0)
        """The upper level, once there is one."""
        self._domains = 0
        self._set_up = False
        self._faults = FaultSorter()
        self.lost = 0
        """How often the fault queue ran over since the machine was started."""

    def open_domain(self, source: int, root: GPA) -> None:
        """Let a device translate through the tables at ``root``. Its number tags what is cached for it, and for no
        other. Told to the IOMMU by `enable`."""
        self._domains += 1
        self._faults.open(source)
        context = wire.context(root, self.paging, self.capabilities.context_size, self._domains)
        bits = self.capabilities.leaf_bits
        place = self._leaf(source >> bits) + len(context) * (source & (1 << bits) - 1)
        self.ram.write(GPA(place), context)

    def _leaf(self, upper: int) -> GPA:
        """The page of contexts for device ids with these upper bits. One level serves 0, two serve all (2.1)."""
        if upper not in self._leaves:
            self._leaves[upper] = self.tables.page()
            if upper and not self._directory:
                self._directory = self.tables.page()
            if self._directory:
                for at, leaf in self._leaves.items():
                    self.ram.write(GPA(self._directory + 8 * at), wire.directory_entry(leaf))
        return self._leaves[upper]

    def enable(self) -> None:
        """Translate, for all devices."""
        if not self._set_up:
            self._start_queues()
        self.submit(wire.iodir_inval(), *self._forget)
        if self._directory:
            self.set_mode(wire.TWO_LEVELS, self._directory)
        else:
            self.set_mode(wire.ONE_LEVEL, self._leaves[0])

    def disable(self) -> None:
        """Let the addresses of all devices through."""
        # From a directory to Bare leads through Off (5.5).
        self.set_mode(wire.OFF)
        self.set_mode(wire.BARE)
        # Contexts may stay in the cache, and QEMU goes on to use them, until they are invalidated.
        if self._set_up:
            self.submit(wire.iodir_inval(), *self._forget)

    def invalidate(self) -> None:
        """Forget every translation, of all devices."""
        if self._set_up:
            self.submit(*self._forget)

    def faults(self, source: int) -> list[Fault]:
        """One device's records since the last call. Others' are kept for them."""
        if self._set_up:
            self._read_records()
        return self._faults.take(source)

    # -- registers and queues ------------------------------------------------------------------------------------

    @property
    def _forget(self) -> tuple[bytes, ...]:
        # VMA covers what has no second stage, GVMA what has one.
        return (wire.iotinval_vma(), wire.iotinval_gvma())

    def read(self, offset: int, size: int) -> int:
        """A register."""
        return self._mmio.read(self._base + offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self._mmio.write(self._base + offset, size, value)

    def _until(self, offset: int, size: int, mask: int, value: int, what: str) -> None:
        seen = 0
        for _ in range(_POLLS):
            seen = self.read(offset, size)
            if seen & mask == value:
                return
        raise MachineError(f"the RISC-V IOMMU did not {what}: 0x{seen:x} in its register 0x{offset:02x}")

    def set_mode(self, mode: int, directory: int = 0) -> None:
        """A mode of the device directory (5.5), with its root where it has one."""
        wanted = wire.ddtp(mode, directory)
        self._write(wire.DDTP, 8, wanted)
        # What is not supported is not taken, and reads back otherwise.
        self._until(wire.DDTP, 8, wire.DDTP_BUSY | 0xF, mode, f"take mode {mode} of its device directory")

    def _start_queues(self) -> None:
        on = wire.QUEUE_ON | wire.QUEUE_BUSY
        self._write(wire.CQB, 8, wire.queue_base(self._commands, _COMMAND_BITS))
        self._write(wire.CQT, 4, 0)
        self._write(wire.CQCSR, 4, wire.QUEUE_ENABLE)
        self._until(wire.CQCSR, 4, on, wire.QUEUE_ON, "start its command queue")
        self._write(wire.FQB, 8, wire.queue_base(self.records, _FAULT_BITS))
        self._write(wire.FQH, 4, 0)
        self._write(wire.FQCSR, 4, wire.QUEUE_ENABLE)
        self._until(wire.FQCSR, 4, on, wire.QUEUE_ON, "start its fault queue")
        self._set_up = True

    def submit(self, *commands: bytes) -> None:
        """Commands, a fence after them, and wait until the head has passed it (3.1.2)."""
        for command in (*commands, wire.iofence()):
            self.ram.write(GPA(self._commands + wire.COMMAND_SIZE * self._produced), command)
            self._produced = (self._produced + 1) & (1 << _COMMAND_BITS) - 1
        self._write(wire.CQT, 4, self._produced)
        head = 0
        for _ in range(_POLLS):
            head = self.read(wire.CQH, 4)
            if head == self._produced:
                return
        status = self.read(wire.CQCSR, 4)
        raise MachineError(f"the RISC-V IOMMU did not finish its commands: cqh 0x{head:x}, cqcsr 0x{status:x}")

    def _read_records(self) -> None:
        mask = (1 << _FAULT_BITS) - 1
        produced = self.read(wire.FQT, 4) & mask
        if produced == self._consumed:
            return
        while self._consumed != produced:
            record = self.ram.read(GPA(self.records + wire.RECORD_SIZE * self._consumed), wire.RECORD_SIZE)
            fault = wire.Record.unpack(record)
            raw = struct.unpack("<8I", record)
            self._faults.add(Fault(fault.address, fault.write, fault.device, fault.text, raw))
            self._consumed = (self._consumed + 1) & mask
        self._write(wire.FQH, 4, self._consumed)
        self._after_overflow()

    def _after_overflow(self) -> None:
        """Nothing more is recorded after an overflow, until it is acknowledged."""
        status = self.read(wire.FQCSR, 4)
        bits = status & (wire.FAULTS_LOST | wire.QUEUE_MEMORY_FAULT)
        if bits:
            self.lost += 1
            self._write(wire.FQCSR, 4, wire.QUEUE_ENABLE | bits)


class RiscvIommu:
    """A RISC-V IOMMU for one device (`ports.Iommu`): its domain behind ``unit``. ``source`` is its requester id, which
    is its device id."""

    name = "riscv"
    present = True
    in_front = True
    caches = True
    page_size = PAGE_SIZE
    write_only = False
    can_be_off = True
    shared = False
    own_bit33 = None

    def __init__(self, unit: RiscvUnit, source: int) -> None:
        self.unit = unit
        self._source = source
        self._ram = unit.ram
        self._tables = unit.tables
        self._paging = paging = unit.paging
        root = unit.tables.run(paging.root_size // PAGE_SIZE, align=paging.root_size)
        self._levels: dict[tuple[int, int], GPA] = {(paging.levels - 1, 0): root}
        self._iovas = IovaRange(_IOVA_START, paging.end, PAGE_SIZE)
        unit.open_domain(source, root)

    def beside(self, source: int, *, around: bool = False) -> RiscvIommu:
        """Another device behind the same unit, with a domain of its own."""
        return RiscvIommu(self.unit, source)

    # -- ports.Iommu ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        self.unit.enable()

    def disable(self) -> None:
        self.unit.disable()

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        if gpa % PAGE_SIZE:
            raise AccessError(gpa, size, "not the address of a 4 KiB page")
        if access is Access.WRITE:
            raise AccessError(iova, size, "a RISC-V IOMMU cannot allow writing without reading")
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, self._page(gpa + offset, access))

    def unmap(self, iova: IOVA, size: int) -> None:
        for offset in self._iovas.pages(iova, size):
            self._set(iova + offset, wire.NO_ENTRY)

    def invalidate(self) -> None:
        self.unit.invalidate()

    def faults(self) -> list[Fault]:
        return self.unit.faults(self._source)

    def allocate(self, size: int) -> IOVA:
        return self._iovas.allocate(size)

    # -- tables --------------------------------------------------------------------------------------------------

    def _page(self, gpa: int, access: Access) -> bytes:
        return wire.NO_ENTRY if access is Access.NONE else wire.page_entry(gpa, writable=Access.WRITE in access)

    def _table(self, iova: int, level: int) -> GPA:
        """The table of ``level`` (0: leaves) for ``iova``, made and linked if it is missing."""
        key = (level, 0 if level == self._paging.levels - 1 else iova >> 12 + 9 * (level + 1))
        if key not in self._levels:
            table = self._tables.page()
            above = self._table(iova, level + 1)
            place = above + 8 * self._paging.index(iova, level + 1)
            self._ram.write(GPA(place), wire.table_entry(table))
            self._levels[key] = table
        return self._levels[key]

    def _set(self, iova: int, entry: bytes) -> None:
        leaf = self._table(iova, 0)
        self._ram.write(GPA(leaf + 8 * self._paging.index(iova, 0)), entry)
