# SPDX-License-Identifier: Apache-2.0
"""virtio over PCI, modern interface (virtio 1.4, 4.1), MSI-X, and the choice between modern and legacy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError, UsageError
from virtiova.features import VIRTIO_F_VERSION_1, has
from virtiova.ports import BusMaster, Msi, PciFunction, Transport
from virtiova.transport.legacy import LegacyPci
from virtiova.transport.status import wait_for_reset
from virtiova.wire import pci

INTERFACES: Final = ("auto", "modern", "legacy")


class PciBusMaster:
    """Bit 2 of the COMMAND register (`ports.BusMaster`)."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function

    def set_bus_master(self, on: bool) -> None:
        value = self._function.read_config(pci.COMMAND, 2)
        value = value | pci.COMMAND_BUS_MASTER if on else value & ~pci.COMMAND_BUS_MASTER
        self._function.write_config(pci.COMMAND, 2, value)
        self._function.flush()


class PciMsix:
    """The MSI-X table of a function (`ports.Msi`)."""

    name = "msi-x"

    def __init__(self, function: PciFunction, cap: pci.MsixCap, changed: Callable[[bool], None]) -> None:
        self._function = function
        self._cap = cap
        self._changed = changed

    def arm(self, vector: int, address: int, data: int) -> None:
        if vector >= self._cap.size:
            raise ProtocolError(f"MSI-X vector {vector}: the table has {self._cap.size} entries")
        entry = self._cap.offset + 16 * vector
        values = (address & 0xFFFFFFFF, address >> 32, data, 0)
        for index, value in enumerate(values):
            self._function.write_bar(self._cap.bar, entry + 4 * index, 4, value)
        self._function.write_config(self._cap.at + 2, 2, 0x8000)
        self._function.flush()
        self._changed(True)

    def disarm(self) -> None:
        self._function.write_config(self._cap.at + 2, 2, 0)
        self._function.flush()
        self._changed(False)


class ModernPci:
    """The modern interface of a virtio PCI function (`ports.Transport`).

    Rings are little-endian once VERSION_1 was taken. Without it a device is a legacy one behind new registers, and
    its rings are in the guest's ``byte_order`` (Linux, ``virtio_is_little_endian``).
    """

    legacy = False
    confirms = True

    def __init__(self, function: PciFunction, config: bytes, byte_order: ByteOrder = "little") -> None:
        caps = pci.virtio_caps(config)
        missing = [kind for kind in (pci.COMMON, pci.NOTIFY) if kind not in caps]
        if missing:
            raise ProtocolError(f"the device has no virtio structure of type {missing[0]}")
        self._function = function
        self._guest_order = byte_order
        self.byte_order: ByteOrder = "little"
        self._common = caps[pci.COMMON]
        self._notify = caps[pci.NOTIFY]
        self._device = caps.get(pci.DEVICE)
        self._notify_at: dict[int, int] = {}
        self.device_id = _device_type(config)
        self.bus_master: BusMaster | None = PciBusMaster(function)
        msix = pci.msix_cap(config)
        self.msi: Msi | None = PciMsix(function, msix, lambda _: None) if msix else None

    def _read(self, offset: int, size: int) -> int:
        return self._function.read_bar(self._common.bar, self._common.offset + offset, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        self._function.write_bar(self._common.bar, self._common.offset + offset, size, value)

    def reset(self) -> None:
        self._write(pci.COMMON_STATUS, 1, 0)
        wait_for_reset(self.read_status)
        self._notify_at.clear()

    def read_features(self) -> int:
        word = 0
        for half in (0, 1):
            self._write(pci.COMMON_DEVICE_FEATURE_SELECT, 4, half)
            word |= self._read(pci.COMMON_DEVICE_FEATURE, 4) << 32 * half
        return word

    def write_features(self, bits: int) -> None:
        self.byte_order = "little" if has(bits, VIRTIO_F_VERSION_1) else self._guest_order
        for half in (0, 1):
            self._write(pci.COMMON_DRIVER_FEATURE_SELECT, 4, half)
            self._write(pci.COMMON_DRIVER_FEATURE, 4, bits >> 32 * half & 0xFFFFFFFF)

    def read_status(self) -> int:
        return self._read(pci.COMMON_STATUS, 1)

    def write_status(self, status: int) -> None:
        self._write(pci.COMMON_STATUS, 1, status)
        self._function.flush()

    def queue_size(self, index: int) -> int:
        self._write(pci.COMMON_QUEUE_SELECT, 2, index)
        return self._read(pci.COMMON_QUEUE_SIZE, 2)

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        self._write(pci.COMMON_QUEUE_SELECT, 2, index)
        self._write(pci.COMMON_QUEUE_SIZE, 2, size)
        self._write(pci.COMMON_QUEUE_MSIX_VECTOR, 2, pci.NO_VECTOR if vector is None else vector)
        parts = (
            (pci.COMMON_QUEUE_DESC, desc),
            (pci.COMMON_QUEUE_DRIVER, avail),
            (pci.COMMON_QUEUE_DEVICE, used),
        )
        for offset, address in parts:
            self._write(offset, 4, address & 0xFFFFFFFF)
            self._write(offset + 4, 4, address >> 32)
        place = self._read(pci.COMMON_QUEUE_NOTIFY_OFF, 2) * self._notify.multiplier
        if self._notify.length and place + 2 > self._notify.length:
            raise ProtocolError(f"the notification register of queue {index} lies outside of its structure")
        self._notify_at[index] = self._notify.offset + place
        self._write(pci.COMMON_QUEUE_ENABLE, 2, 1)
        self._function.flush()

    def notify(self, index: int) -> None:
        self._function.write_bar(self._notify.bar, self._notify_at[index], 2, index)
        self._function.flush()

    def read_config(self, offset: int, length: int) -> bytes:
        bar, base = self._config_at(offset, length)
        return bytes(self._function.read_bar(bar, base + at, 1) for at in range(length))

    def write_config(self, offset: int, data: bytes) -> None:
        bar, base = self._config_at(offset, len(data))
        for at, byte in enumerate(data):
            self._function.write_bar(bar, base + at, 1, byte)
        self._function.flush()

    def _config_at(self, offset: int, length: int) -> tuple[int, int]:
        """BAR and offset of a part of the device configuration."""
        if self._device is None or offset + length > self._device.length:
            raise ProtocolError(f"the device has no configuration at 0x{offset:x}+0x{length:x}")
        return self._device.bar, self._device.offset + offset


def _device_type(config: bytes) -> int:
    device = int.from_bytes(config[2:4], "little")
    subsystem = int.from_bytes(config[0x2E:0x30], "little")
    return pci.device_type(device, subsystem)


def open_transport(function: PciFunction, prefer: str = "auto", byte_order: ByteOrder = "little") -> Transport:
    """The interface of a virtio PCI function: ``auto`` takes the modern one where there is one.

    ``byte_order`` is the guest's: that of rings unless VERSION_1 is taken.
    """
    if prefer not in INTERFACES:
        raise UsageError.unknown("interface", prefer, INTERFACES)
    config = function.config()
    modern = pci.COMMON in pci.virtio_caps(config)
    if prefer == "modern" and not modern:
        raise UsageError("the device has no modern interface")
    if modern and prefer != "legacy":
        return ModernPci(function, config, byte_order)
    if not config[pci.BAR0] & 1:
        raise UsageError("the device has no legacy interface: BAR 0 is not in I/O space")
    msix = pci.msix_cap(config)
    legacy = LegacyPci(function, _device_type(config), PciBusMaster(function), byte_order)
    if msix:
        legacy.msi = PciMsix(function, msix, legacy.msix_enabled)
    return legacy
