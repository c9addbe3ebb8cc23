# SPDX-License-Identifier: Apache-2.0
"""PCI without firmware: this process numbers the buses and places the BARs itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.pci_host import PciHost, take_slice
from virtiova.wire import pci

_BRIDGE: Final = 1
_HEADER_MASK: Final = 0x7F
CONTROLS: Final = {"edu": (0x1234, 0x11E8), "rtl8139": (0x10EC, 0x8139)}
RISCV_IOMMU: Final = (0x1B36, 0x0014)
_DRIVEN: Final = frozenset({*CONTROLS.values(), RISCV_IOMMU})


@dataclass(slots=True)
class QemuFunction:
    """One PCI function, with the BARs as placed here (`ports.PciFunction`)."""

    host: PciHost
    bus: QtestBus
    source: int
    vendor: int
    device: int
    subsystem: int = 0
    places: dict[int, tuple[bool, int]] = field(default_factory=dict)
    secondary: int = 0
    """Of a bridge: the number of the bus behind it."""

    @property
    def virtio_type(self) -> int:
        """The virtio device type, if it is a virtio device."""
        return pci.device_type(self.device, self.subsystem)

    def read_config(self, offset: int, size: int) -> int:
        return self.host.read_many([(self.source, offset, size)])[0]

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.host.write(self.source, offset, size, value)

    def config(self) -> bytes:
        words = self.host.read_many([(self.source, at, 4) for at in range(0, pci.CONFIG_SIZE, 4)])
        return b"".join(word.to_bytes(4, "little") for word in words)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        io, base = self._place(bar)
        if io and self.host.windows.io_ports:
            return self.bus.port_in(base + offset, size)
        return self.bus.read(base + offset, size)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        io, base = self._place(bar)
        if io and self.host.windows.io_ports:
            self.bus.port_out(base + offset, size, value)
        else:
            self.bus.write(base + offset, size, value)

    def flush(self) -> None:
        self.bus.flush()

    def _place(self, bar: int) -> tuple[bool, int]:
        """Whether a BAR is in I/O space, and the CPU's address of it."""
        try:
            return self.places[bar]
        except KeyError:
            raise ProtocolError(f"the device names BAR {bar}, which it does not have") from None


class _Window:
    """Naturally aligned places from a range of PCI addresses."""

    def __init__(self, window: tuple[int, int]) -> None:
        self._next, self._end = window

    def take(self, size: int) -> int:
        at = (self._next + size - 1) & ~(size - 1)
        if at + size > self._end:
            raise MachineError(f"no room for a BAR of 0x{size:x} bytes")
        self._next = at + size
        return at


def enumerate_bus(host: PciHost, bus: QtestBus, roots: Sequence[int] = (0,)) -> list[QemuFunction]:
    """All functions on the root buses and behind their bridges, with their BARs placed and memory and I/O decoding on.

    ``roots`` are numbers of root buses, which the machine was made with. Bus mastering is left off, as after reset:
    that is the driver's to give.
    """
    host.open()
    memory, io = _Window(host.windows.root_memory), _Window(host.windows.root_io)
    found = []
    bridges = 0
    for root in roots:
        last = root
        for function in _functions(host, bus, root):
            found.append(function)
            header = function.read_config(pci.HEADER_TYPE, 1) & _HEADER_MASK
            if header != _BRIDGE:
                _place_bars(function, memory, io)
                continue
            last += 1
            found += _open_bridge(function, bridges, last)
            bridges += 1
    return found


def _functions(host: PciHost, bus: QtestBus, number: int) -> list[QemuFunction]:
    """The functions on one bus: function 0 of each slot first, the others where it says that there are some."""
    sources = _present(host, [number << 8 | slot << 3 for slot in range(32)])
    headers = host.read_many([(source, pci.HEADER_TYPE, 1) for source, _ in sources])
    more = [
        source | function
        for (source, _), header in zip(sources, headers, strict=True)
        if header & 0x80
        for function in range(1, 8)
    ]
    sources = sorted(sources + _present(host, more))
    subsystems = host.read_many([(source, 0x2E, 2) for source, _ in sources])
    return [
        QemuFunction(host, bus, source, ident & 0xFFFF, ident >> 16, subsystem)
        for (source, ident), subsystem in zip(sources, subsystems, strict=True)
    ]


def _present(host: PciHost, sources: list[int]) -> list[tuple[int, int]]:
    if not sources:
        return []
    idents = host.read_many([(source, 0, 4) for source in sources])
    return [(s, i) for s, i in zip(sources, idents, strict=True) if i & 0xFFFF not in (0, 0xFFFF)]


def _open_bridge(bridge: QemuFunction, number: int, secondary: int) -> list[QemuFunction]:
    """Give the bridge the ``secondary`` bus number and windows of its own, and place what is behind it."""
    bridge.secondary = secondary
    windows = bridge.host.windows
    memory = take_slice(windows.bridge_memory, number, windows.bridge_memory_size)
    io = take_slice(windows.bridge_io, number, windows.bridge_io_size)
    bridge.write_config(0x18, 4, secondary << 16 | secondary << 8 | bridge.source >> 8)
    bridge.write_config(0x1C, 2, ((io[1] - 0x1000) & 0xF000) | io[0] >> 8)
    bridge.write_config(0x20, 4, ((memory[1] - 0x100000) & 0xFFF00000) | memory[0] >> 16)
    bridge.write_config(pci.COMMAND, 2, 7)
    behind = _functions(bridge.host, bridge.bus, secondary)
    places = _Window(memory), _Window(io)
    for function in behind:
        _place_bars(function, *places)
    return behind


def _place_bars(function: QemuFunction, memory: _Window, io: _Window) -> None:
    if (function.vendor, function.device) not in _DRIVEN and function.vendor != pci.VENDOR_VIRTIO:
        return
    host, source = function.host, function.source
    offsets = [pci.BAR0 + 4 * index for index in range(6)]
    for offset in offsets:
        function.write_config(offset, 4, 0xFFFFFFFF)
    masks = host.read_many([(source, offset, 4) for offset in offsets])
    index = 0
    while index < 6:
        bar = pci.bar(index, masks[index], masks[index + 1] if index < 5 else 0)
        if bar is not None:
            at = (io if bar.io else memory).take(bar.size)
            function.places[index] = (bar.io, at + _cpu_offset(host, io=bar.io))
            function.write_config(offsets[index], 4, at)
            if bar.wide:
                function.write_config(offsets[index] + 4, 4, 0)
        index += 2 if bar is not None and bar.wide else 1
    function.write_config(pci.COMMAND, 2, pci.COMMAND_IO | pci.COMMAND_MEMORY)


def _cpu_offset(host: PciHost, *, io: bool) -> int:
    return host.windows.io_offset if io else host.windows.memory_offset
