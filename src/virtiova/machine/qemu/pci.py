# SPDX-License-Identifier: Apache-2.0
"""PCI without firmware: this process numbers the buses and places the BARs of a q35 machine itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.machine.qemu.bus import QtestBus
from virtiova.wire import pci

ECAM: Final = 0xB0000000
# The windows of bridges and of the root bus must not overlap, or the machine decodes one of them twice.
BRIDGE_MEMORY: Final = 0xC0000000
BRIDGE_MEMORY_SIZE: Final = 0x1000000
BRIDGE_IO: Final = 0xC000
BRIDGE_IO_SIZE: Final = 0x1000
ROOT_MEMORY: Final = (0xC8000000, 0xD0000000)
ROOT_IO: Final = (0xE000, 0xF000)
_PCIEXBAR: Final = 0x60
_BRIDGE: Final = 1
_HEADER_MASK: Final = 0x7F
EDU: Final = (0x1234, 0x11E8)
_DRIVEN: Final = {EDU}


def _ecam(source: int, offset: int) -> int:
    return ECAM | source << 12 | offset


def open_ecam(bus: QtestBus) -> None:
    """Switch the memory-mapped configuration space of a q35 host bridge on (00:00.0, PCIEXBAR)."""
    for offset, value in ((_PCIEXBAR + 4, 0), (_PCIEXBAR, ECAM | 1)):
        bus.port_out(0xCF8, 4, 0x80000000 | offset)
        bus.port_out(0xCFC, 4, value)


@dataclass(slots=True)
class QemuFunction:
    """One PCI function of a q35 machine, with the BARs as placed here (`ports.PciFunction`)."""

    bus: QtestBus
    source: int
    vendor: int
    device: int
    subsystem: int = 0
    places: dict[int, tuple[bool, int]] = field(default_factory=dict)

    def read_config(self, offset: int, size: int) -> int:
        return self.bus.read(_ecam(self.source, offset), size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.bus.write(_ecam(self.source, offset), size, value)

    def config(self) -> bytes:
        words = self.bus.read_many([(_ecam(self.source, at), 4) for at in range(0, pci.CONFIG_SIZE, 4)])
        return b"".join(word.to_bytes(4, "little") for word in words)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        io, base = self._place(bar)
        return self.bus.port_in(base + offset, size) if io else self.bus.read(base + offset, size)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        io, base = self._place(bar)
        if io:
            self.bus.port_out(base + offset, size, value)
        else:
            self.bus.write(base + offset, size, value)

    def flush(self) -> None:
        self.bus.flush()

    def _place(self, bar: int) -> tuple[bool, int]:
        try:
            return self.places[bar]
        except KeyError:
            raise ProtocolError(f"the device names BAR {bar}, which it does not have") from None


class _Window:
    """Naturally aligned places from a range of addresses."""

    def __init__(self, start: int, end: int) -> None:
        self._next = start
        self._end = end

    def take(self, size: int) -> int:
        at = (self._next + size - 1) & ~(size - 1)
        if at + size > self._end:
            raise MachineError(f"no room for a BAR of 0x{size:x} bytes")
        self._next = at + size
        return at


def enumerate_bus(bus: QtestBus) -> list[QemuFunction]:
    """All functions on bus 0 and behind its bridges, with their BARs placed and memory and I/O decoding on.

    Bus mastering is left off, as after reset: that is the driver's to give.
    """
    open_ecam(bus)
    memory, io = _Window(*ROOT_MEMORY), _Window(*ROOT_IO)
    found = []
    bridges = 0
    for function in _functions(bus, 0):
        found.append(function)
        header = function.read_config(pci.HEADER_TYPE, 1) & _HEADER_MASK
        if header != _BRIDGE:
            _place_bars(function, memory, io)
            continue
        behind = _open_bridge(function, bridges)
        bridges += 1
        found += behind
    return found


def _functions(bus: QtestBus, number: int) -> list[QemuFunction]:
    """The functions on one bus: function 0 of each slot first, the others where it says that there are some."""
    slots = [number << 8 | slot << 3 for slot in range(32)]
    sources = _present(bus, slots)
    headers = bus.read_many([(_ecam(source, pci.HEADER_TYPE), 1) for source, _ in sources])
    more = [
        source | function
        for (source, _), header in zip(sources, headers, strict=True)
        if header & 0x80
        for function in range(1, 8)
    ]
    sources = sorted(sources + _present(bus, more))
    subsystems = bus.read_many([(_ecam(source, 0x2E), 2) for source, _ in sources])
    return [
        QemuFunction(bus, source, ident & 0xFFFF, ident >> 16, subsystem)
        for (source, ident), subsystem in zip(sources, subsystems, strict=True)
    ]


def _present(bus: QtestBus, sources: list[int]) -> list[tuple[int, int]]:
    if not sources:
        return []
    idents = bus.read_many([(_ecam(source, 0), 4) for source in sources])
    return [(s, i) for s, i in zip(sources, idents, strict=True) if i & 0xFFFF not in (0, 0xFFFF)]


def _open_bridge(bridge: QemuFunction, number: int) -> list[QemuFunction]:
    """Give the bridge a bus number and windows of its own, and place what is behind it."""
    secondary = number + 1
    memory = BRIDGE_MEMORY + number * BRIDGE_MEMORY_SIZE
    io = BRIDGE_IO + number * BRIDGE_IO_SIZE
    if memory + BRIDGE_MEMORY_SIZE > ROOT_MEMORY[0] or io + BRIDGE_IO_SIZE > ROOT_IO[0]:
        raise MachineError(f"more than {number} bridges: no windows left")
    bridge.write_config(0x18, 4, secondary << 16 | secondary << 8)
    bridge.write_config(0x1C, 2, (io & 0xF000) | io >> 8)
    last = memory + BRIDGE_MEMORY_SIZE - 0x100000
    bridge.write_config(0x20, 4, (last & 0xFFF00000) | memory >> 16)
    bridge.write_config(pci.COMMAND, 2, 7)
    behind = _functions(bridge.bus, secondary)
    windows = _Window(memory, memory + BRIDGE_MEMORY_SIZE), _Window(io, io + BRIDGE_IO_SIZE)
    for function in behind:
        _place_bars(function, *windows)
    return behind


def _place_bars(function: QemuFunction, memory: _Window, io: _Window) -> None:
    if (function.vendor, function.device) not in _DRIVEN and function.vendor != pci.VENDOR_VIRTIO:
        return
    offsets = [pci.BAR0 + 4 * index for index in range(6)]
    for offset in offsets:
        function.write_config(offset, 4, 0xFFFFFFFF)
    masks = function.bus.read_many([(_ecam(function.source, offset), 4) for offset in offsets])
    index = 0
    while index < 6:
        bar = pci.bar(index, masks[index], masks[index + 1] if index < 5 else 0)
        if bar is not None:
            at = (io if bar.io else memory).take(bar.size)
            function.places[index] = (bar.io, at)
            function.write_config(offsets[index], 4, at)
            if bar.wide:
                function.write_config(offsets[index] + 4, 4, 0)
        index += 2 if bar is not None and bar.wide else 1
    function.write_config(pci.COMMAND, 2, pci.COMMAND_IO | pci.COMMAND_MEMORY)
