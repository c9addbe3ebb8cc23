# SPDX-License-Identifier: Apache-2.0
"""A pseries machine from outside: PCI configuration by firmware calls, and hypercalls by its own processor.

Firmware calls (RTAS: LoPAR, chapter 7) are a verb of qtest. A hypercall is an instruction, which only the processor
can make: the debug stub sets its registers and lets it take one step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.addr import GPA
from virtiova.errors import MachineError
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.gdb import GdbStub
from virtiova.machine.qemu.pci_host import Register, Windows
from virtiova.wire import qtest

BUID: Final = 0x800000020000000
"""The first PCI host bridge."""
_CALL: Final = 64
"""Bytes of scratch for one call: arguments in the first half, results in the second."""
_CALLS: Final = 64
_CODE: Final = _CALL * _CALLS
"""Where in the scratch area the code lies."""
_FAILED: Final = 0xFFFFFFFF

# sc 1, the hypercall; then nop, never reached.
_HYPERCALL: Final = bytes.fromhex("44000022 60000000")
_R3: Final = 3
_PC: Final = 64
_MSR: Final = 65
_MSR_HYPERCALL: Final = 1 << 63 | 1 << 12
"""64-bit mode, machine checks enabled, supervisor."""


def _words(values: Sequence[int]) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def post_call(bus: QtestBus, name: str, arguments: Sequence[int], wanted: int, at: GPA) -> int:
    """Post a firmware call with 64 bytes of scratch at ``at``; the address where its results will be."""
    results = at + _CALL // 2
    bus.write_bytes(at, _words(arguments).ljust(_CALL // 2, b"\0") + _words([_FAILED] * wanted))
    bus.post(qtest.rtas(name, at, len(arguments), results, wanted))
    return results


class RtasHost:
    """Configuration space by firmware calls. ``scratch``: an unused page of RAM."""

    def __init__(self, bus: QtestBus, windows: Windows, scratch: GPA) -> None:
        self.windows = windows
        self._bus = bus
        self._scratch = scratch

    def open(self) -> None:
        """It is always there."""

    def read_many(self, registers: Sequence[Register]) -> list[int]:
        found: list[int] = []
        for start in range(0, len(registers), _CALLS):
            found += self._read_some(registers[start : start + _CALLS])
        return found

    def write(self, source: int, offset: int, size: int, value: int) -> None:
        arguments = [*self._place(source, offset), size, value]
        post_call(self._bus, "ibm,write-pci-config", arguments, 1, self._scratch)

    def _read_some(self, registers: Sequence[Register]) -> Iterator[int]:
        for index, (source, offset, size) in enumerate(registers):
            at = GPA(self._scratch + _CALL * index)
            post_call(self._bus, "ibm,read-pci-config", [*self._place(source, offset), size], 2, at)
        data = self._bus.read_bytes(self._scratch, _CALL * len(registers))
        for index, (_, _, size) in enumerate(registers):
            status, value = struct.unpack_from(">II", data, _CALL * index + _CALL // 2)
            # The call fails where there is no function: on a bus, the read would give all ones.
            yield value if status == 0 else (1 << 8 * size) - 1

    @staticmethod
    def _place(source: int, offset: int) -> tuple[int, int, int]:
        return source << 8 | offset, BUID >> 32, BUID & 0xFFFFFFFF


class SpaprCpu:
    """The one processor of a pseries machine, which sleeps while the machine runs, and wakes for hypercalls.

    It is parked as a processor that the system does not use (RTAS ``stop-self``), so that the machine can run
    without firmware: devices that serve no requests in a stopped machine work. Each hypercall stops the machine and
    lets it run again, whereupon QEMU looks into the rings of all devices: none may hold a request half prepared.
    """

    def __init__(self, bus: QtestBus, stub: GdbStub, scratch: GPA) -> None:
        self._bus = bus
        self._stub = stub
        self._scratch = scratch
        stub.open("powerpc")
        bus.write_bytes(scratch + _CODE, _HYPERCALL)
        self._park()

    def hypercall(self, number: int, *arguments: int) -> int:
        """One hypercall (LoPAR, chapter 14): its result, 0 for success, negative for an error."""
        self._stub.stop()
        self._wake()
        for index, value in enumerate((number, *arguments)):
            self._stub.write_register(_R3 + index, value)
        self._stub.write_register(_PC, self._scratch + _CODE)
        self._stub.write_register(_MSR, _MSR_HYPERCALL)
        self._stub.step()
        result = self._stub.read_register(_R3)
        self._park()
        return result - (1 << 64) if result >> 63 else result

    def _wake(self) -> None:
        # Where it starts does not matter: the registers are set before its first step.
        results = post_call(self._bus, "start-cpu", [0, self._scratch + _CODE, 0], 1, self._scratch)
        status = int.from_bytes(self._bus.read_bytes(results, 4), "big")
        if status:
            raise MachineError(f"RTAS start-cpu failed: 0x{status:x}")

    def _park(self) -> None:
        post_call(self._bus, "stop-self", [], 0, self._scratch)
        self._bus.flush()
        self._stub.go()
