# SPDX-License-Identifier: Apache-2.0
"""The RTL8139C+ network chip as a control: not virtio, and one register makes it write to memory.

Source: RTL8139C+ datasheet, dump tally counter command register and C+ command register; QEMU, hw/net/rtl8139.c.
Its registers are little-endian on every machine, which those of QEMU's ``edu`` are not.
"""

from __future__ import annotations

from typing import Final

from virtiova.errors import AccessError
from virtiova.ports import PciFunction
from virtiova.wire import pci

_BAR: Final = 1
"""BAR 0 holds the same registers in I/O space."""
_TALLY: Final = 0x10
_TALLY_HIGH: Final = 0x14
_DUMP: Final = 1 << 3
_CPLUS: Final = 0xE0
_CPLUS_ON: Final = 3
"""C+ mode, both directions: outside of it the tally register is something else."""
LENGTH: Final = 64
"""Bytes of the tally counters, and their alignment."""


class Rtl8139Function:
    """The tally counters of an RTL8139C+, dumped where they are wanted (`driver.edu.ControlDevice`)."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function

    def enable(self) -> None:
        """Let it be bus master, in C+ mode."""
        value = self._function.read_config(pci.COMMAND, 2)
        self._function.write_config(pci.COMMAND, 2, value | pci.COMMAND_BUS_MASTER)
        self._function.write_bar(_BAR, _CPLUS, 2, _CPLUS_ON)
        self._function.flush()

    def write_ram(self, address: int, length: int) -> None:
        """Write the 64 bytes of the counters to ``address``, which is a multiple of 64."""
        if length != LENGTH or address % LENGTH:
            raise AccessError(address, length, f"the counters are {LENGTH} bytes at a multiple of it")
        self._function.write_bar(_BAR, _TALLY_HIGH, 4, address >> 32)
        self._function.write_bar(_BAR, _TALLY, 4, address & 0xFFFFFFFF | _DUMP)
        self._function.flush()
