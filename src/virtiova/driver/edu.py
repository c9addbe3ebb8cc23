# SPDX-License-Identifier: Apache-2.0
"""QEMU's ``edu`` device: not virtio, and DMA is all it does, so it shows what the platform does to any device.

Registers as in QEMU, docs/specs/edu.rst: it copies between RAM and a buffer of its own, 100 ms after the command.
"""

from __future__ import annotations

from typing import Final, Protocol

from virtiova.dma.ram import ByteOrder
from virtiova.ports import PciFunction
from virtiova.wire import pci

_BUFFER: Final = 0x40000
_SOURCE: Final = 0x80
_DESTINATION: Final = 0x88
_COUNT: Final = 0x90
_COMMAND: Final = 0x98
_START: Final = 1
_TO_RAM: Final = 2
SECONDS: Final = 2.0
"""Its timer is 100 ms; this bounds the wait on a busy machine."""


class ControlDevice(Protocol):
    """A device that is not virtio and writes where it is told: it shows what the platform does to any device."""

    def enable(self) -> None:
        """Let it be bus master."""

    def write_ram(self, address: int, length: int) -> None:
        """Start to write ``length`` bytes of its own to ``address``."""


class EduFunction:
    """The DMA engine of an edu device. Its registers are in the ``byte_order`` of the machine's processor, which no
    real PCI device would know (QEMU, hw/misc/edu.c: DEVICE_NATIVE_ENDIAN)."""

    def __init__(self, function: PciFunction, byte_order: ByteOrder = "little") -> None:
        self._function = function
        self._byte_order = byte_order

    def enable(self) -> None:
        """Let it be bus master."""
        value = self._function.read_config(pci.COMMAND, 2)
        self._function.write_config(pci.COMMAND, 2, value | pci.COMMAND_BUS_MASTER)
        self._function.flush()

    def read_ram(self, address: int, length: int) -> None:
        """Start to copy up to 4096 bytes at ``address`` into the device."""
        self._start(address, _BUFFER, length, _START)

    def write_ram(self, address: int, length: int) -> None:
        """Start to copy the device's buffer to ``address``."""
        self._start(_BUFFER, address, length, _START | _TO_RAM)

    def busy(self) -> bool:
        """Is a copy under way?"""
        return bool(self._register(self._function.read_bar(0, _COMMAND, 8)) & _START)

    def _start(self, source: int, destination: int, length: int, command: int) -> None:
        for offset, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, length)):
            self._function.write_bar(0, offset, 8, self._register(value))
        self._function.write_bar(0, _COMMAND, 8, self._register(command))
        self._function.flush()

    def _register(self, value: int) -> int:
        """The number that a little-endian register with the same bytes has; its own inverse."""
        return int.from_bytes(value.to_bytes(8, self._byte_order), "little")
