# SPDX-License-Identifier: Apache-2.0
"""How a machine reaches PCI configuration space, and where its windows are. Registers are little-endian numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from virtiova.errors import MachineError
from virtiova.machine.qemu.bus import QtestBus

Register = tuple[int, int, int]
"""Requester id, offset, size in bytes."""


@dataclass(frozen=True, slots=True)
class Windows:
    """PCI address ranges (start, end) for memory and I/O, of bridges (a slice each) and of the root bus.

    They must not overlap, or the machine decodes an address twice. ``memory_offset`` and ``io_offset`` make a CPU
    address of a PCI address; ``io_ports``: I/O is reached by the CPU's ports instead.
    """

    bridge_memory: tuple[int, int]
    bridge_io: tuple[int, int]
    root_memory: tuple[int, int]
    root_io: tuple[int, int]
    memory_offset: int = 0
    io_offset: int = 0
    io_ports: bool = False
    bridge_memory_size: int = 0x1000000
    bridge_io_size: int = 0x1000


class PciHost(Protocol):
    """A host bridge."""

    windows: Windows

    def open(self) -> None:
        """Make configuration space reachable."""

    def read_many(self, registers: Sequence[Register]) -> list[int]:
        """Several registers, in as few round trips as can be."""

    def write(self, source: int, offset: int, size: int, value: int) -> None:
        """Post a write."""


class EcamHost:
    """Configuration space mapped into memory: ``base | source << shift | offset``."""

    def __init__(self, bus: QtestBus, base: int, windows: Windows, *, shift: int = 12) -> None:
        self.windows = windows
        self._bus = bus
        self._base = base
        self._shift = shift

    def open(self) -> None:
        """It is always there."""

    def read_many(self, registers: Sequence[Register]) -> list[int]:
        return self._bus.read_many([(self._at(source, offset), size) for source, offset, size in registers])

    def write(self, source: int, offset: int, size: int, value: int) -> None:
        self._bus.write(self._at(source, offset), size, value)

    def _at(self, source: int, offset: int) -> int:
        return self._base + (source << self._shift) + offset


class Q35Host(EcamHost):
    """The q35 host bridge, whose ECAM is opened through the configuration ports first (00:00.0, PCIEXBAR)."""

    ECAM = 0xB0000000

    def __init__(self, bus: QtestBus) -> None:
        windows = Windows(
            bridge_memory=(0xC0000000, 0xC8000000),
            bridge_io=(0x4000, 0xE000),
            root_memory=(0xC8000000, 0xD0000000),
            root_io=(0xE000, 0xF000),
            io_ports=True,
        )
        super().__init__(bus, self.ECAM, windows)

    def open(self) -> None:
        for offset, value in ((0x64, 0), (0x60, self.ECAM | 1)):
            self._bus.port_out(0xCF8, 4, 0x80000000 | offset)
            self._bus.port_out(0xCFC, 4, value)


def take_slice(window: tuple[int, int], number: int, size: int) -> tuple[int, int]:
    """The slice of a window for bridge ``number``; `MachineError` if there are more bridges than slices."""
    start = window[0] + number * size
    if start + size > window[1]:
        raise MachineError(f"more than {number} PCI bridges: no windows left")
    return start, start + size
