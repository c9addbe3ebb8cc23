# SPDX-License-Identifier: Apache-2.0
"""The device's registers, through its descriptor: configuration space and BARs (`ports.PciFunction`)."""

from __future__ import annotations

import os
import struct
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.machine.vfio.calls import CallError, call
from virtiova.wire import pci, vfio

_FORMATS: Final = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


class VfioFunction:
    """One PCI function. Writes are done when they return."""

    def __init__(self, device: int, address: str) -> None:
        self._device = device
        bus, slot, function = int(address[5:7], 16), int(address[8:10], 16), int(address[11], 16)
        self.source = bus << 8 | slot << 3 | function
        info = vfio.device_info()
        call(device, "VFIO_DEVICE_GET_INFO", vfio.DEVICE_GET_INFO, info)
        _size, self.flags, count, _irqs, _caps = struct.unpack_from("<5I", info)
        if not self.flags & vfio.DEVICE_FLAG_PCI:
            raise MachineError(f"{address} is no PCI device to VFIO")
        self._regions = [self._region(index) for index in range(min(count, vfio.CONFIG_REGION + 1))]

    def _region(self, index: int) -> vfio.Region:
        info = vfio.region_info(index)
        try:
            call(self._device, f"VFIO_DEVICE_GET_REGION_INFO {index}", vfio.DEVICE_GET_REGION_INFO, info)
        except CallError:
            # Not every index is there.
            return vfio.Region(0, 0)
        return vfio.decode_region(info)

    def read_config(self, offset: int, size: int) -> int:
        return self._read(vfio.CONFIG_REGION, offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self._write(vfio.CONFIG_REGION, offset, size, value)

    def config(self) -> bytes:
        return self._bytes(vfio.CONFIG_REGION, 0, pci.CONFIG_SIZE)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return self._read(bar, offset, size)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        self._write(bar, offset, size, value)

    def flush(self) -> None:
        """Nothing to wait for."""

    def reset(self) -> None:
        """Function-level reset, where the device has one."""
        if self.flags & vfio.DEVICE_FLAG_RESET:
            call(self._device, "VFIO_DEVICE_RESET", vfio.DEVICE_RESET)

    def _at(self, index: int, offset: int, size: int) -> int:
        region = self._regions[index] if 0 <= index < len(self._regions) else vfio.Region(0, 0)
        if offset < 0 or offset + size > region.size:
            raise ProtocolError(f"the device names 0x{offset:x}+{size} of region {index}, which has 0x{region.size:x}")
        return region.offset + offset

    def _read(self, index: int, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes(index, offset, size), "little")

    def _bytes(self, index: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._device, size, self._at(index, offset, size))
        except OSError as error:
            raise MachineError(f"region {index}, 0x{offset:x}: {error.strerror}") from error
        if len(data) != size:
            raise MachineError(f"region {index}, 0x{offset:x}: {len(data)} bytes came, {size} were asked for")
        return data

    def _write(self, index: int, offset: int, size: int, value: int) -> None:
        try:
            os.pwrite(self._device, struct.pack(_FORMATS[size], value), self._at(index, offset, size))
        except OSError as error:
            raise MachineError(f"region {index}, 0x{offset:x}: {error.strerror}") from error
