# SPDX-License-Identifier: Apache-2.0
"""virtio over MMIO: version 2, and the legacy version 1, of which bit 33 cannot be seen (virtio 1.4, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.dma.ram import ByteOrder
from virtiova.errors import MachineError, ProtocolError
from virtiova.ports import BusMaster, Mmio, Msi
from virtiova.ring.layout import SplitLayout
from virtiova.transport.status import wait_for_reset

MAGIC: Final = 0x74726976
"""``virt``, little-endian."""

# Offsets of the registers (virtio 1.4, 4.2.2; those of version 1 only: 4.2.4).
_MAGIC: Final = 0x00
_VERSION: Final = 0x04
_DEVICE_ID: Final = 0x08
_DEVICE_FEATURES: Final = 0x10
_DEVICE_FEATURES_SEL: Final = 0x14
_DRIVER_FEATURES: Final = 0x20
_DRIVER_FEATURES_SEL: Final = 0x24
_GUEST_PAGE_SIZE: Final = 0x28
_QUEUE_SEL: Final = 0x30
_QUEUE_SIZE_MAX: Final = 0x34
_QUEUE_SIZE: Final = 0x38
_QUEUE_ALIGN: Final = 0x3C
_QUEUE_PFN: Final = 0x40
_QUEUE_READY: Final = 0x44
_QUEUE_NOTIFY: Final = 0x50
_STATUS: Final = 0x70
_QUEUE_DESC: Final = 0x80
_QUEUE_DRIVER: Final = 0x90
_QUEUE_DEVICE: Final = 0xA0
_CONFIG: Final = 0x100


@dataclass(frozen=True, slots=True)
class Slots:
    """Where a machine has virtio-mmio transports, with a device or without: ``count`` of them, ``step`` bytes apart."""

    base: int
    step: int
    count: int

    def addresses(self) -> Sequence[int]:
        """Of all of them."""
        return range(self.base, self.base + self.step * self.count, self.step)


class MmioTransport:
    """One virtio-mmio transport at ``base`` (`ports.Transport`).

    ``byte_order`` is the guest's, which counts for version 1 only. There is no bus master bit and no message-signalled
    interrupt. Raises `ProtocolError` if there is no such transport, or one of another version.
    """

    bus_master: BusMaster | None = None
    msi: Msi | None = None

    def __init__(self, mmio: Mmio, base: int, byte_order: ByteOrder = "little") -> None:
        self._mmio = mmio
        self._base = base
        magic, version = self._read(_MAGIC), self._read(_VERSION)
        if magic != MAGIC or version not in (1, 2):
            raise ProtocolError(f"no virtio-mmio at 0x{base:08x}: magic 0x{magic:08x}, version {version}")
        self.legacy = version == 1
        self.confirms = not self.legacy
        self.byte_order: ByteOrder = byte_order if self.legacy else "little"
        self.device_id = self._read(_DEVICE_ID)

    def _read(self, offset: int) -> int:
        return self._mmio.read(self._base + offset, 4)

    def _write(self, offset: int, value: int) -> None:
        self._mmio.write(self._base + offset, 4, value)

    def reset(self) -> None:
        self._write(_STATUS, 0)
        wait_for_reset(self.read_status)
        if self.legacy:
            self._write(_GUEST_PAGE_SIZE, PAGE_SIZE)

    def read_features(self) -> int:
        word = 0
        for half in self._halves:
            self._write(_DEVICE_FEATURES_SEL, half)
            word |= self._read(_DEVICE_FEATURES) << 32 * half
        return word

    def write_features(self, bits: int) -> None:
        for half in self._halves:
            self._write(_DRIVER_FEATURES_SEL, half)
            self._write(_DRIVER_FEATURES, bits >> 32 * half & 0xFFFFFFFF)

    @property
    def _halves(self) -> tuple[int, ...]:
        # The legacy interface has no feature bits past 31 (2.2.3).
        return (0,) if self.legacy else (0, 1)

    def read_status(self) -> int:
        return self._read(_STATUS)

    def write_status(self, status: int) -> None:
        self._write(_STATUS, status)
        self._mmio.flush()

    def queue_size(self, index: int) -> int:
        self._write(_QUEUE_SEL, index)
        return self._read(_QUEUE_SIZE_MAX)

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        if vector is not None:
            raise ProtocolError("virtio-mmio has no vectors")
        self._write(_QUEUE_SEL, index)
        if self._read(_QUEUE_PFN if self.legacy else _QUEUE_READY):
            raise ProtocolError(f"queue {index} is in use already")
        self._write(_QUEUE_SIZE, size)
        if self.legacy:
            layout = SplitLayout(size, used_align=PAGE_SIZE)
            if desc % PAGE_SIZE or avail != desc + layout.avail or used != desc + layout.used:
                raise ProtocolError("a legacy ring lies in one piece, used at the next 4096 (virtio 1.4, 2.7.2)")
            self._write(_QUEUE_ALIGN, PAGE_SIZE)
            self._write(_QUEUE_PFN, desc // PAGE_SIZE)
        else:
            for offset, address in ((_QUEUE_DESC, desc), (_QUEUE_DRIVER, avail), (_QUEUE_DEVICE, used)):
                self._write(offset, address & 0xFFFFFFFF)
                self._write(offset + 4, address >> 32)
            self._write(_QUEUE_READY, 1)
        self._mmio.flush()

    def notify(self, index: int) -> None:
        self._write(_QUEUE_NOTIFY, index)
        self._mmio.flush()

    def read_config(self, offset: int, length: int) -> bytes:
        # Byte by byte, which every field may be read by (4.2.2.2: 8-bit accesses for 8-bit fields, wider if aligned).
        return bytes(self._mmio.read(self._base + _CONFIG + offset + at, 1) for at in range(length))

    def write_config(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data):
            self._mmio.write(self._base + _CONFIG + offset + at, 1, byte)
        self._mmio.flush()


def open_slot(mmio: Mmio, slots: Slots, byte_order: ByteOrder = "little") -> MmioTransport:
    """The first transport that has a device (its DeviceID is not 0); `MachineError` if none has."""
    for base in slots.addresses():
        if mmio.read(base, 4) == MAGIC and mmio.read(base + _DEVICE_ID, 4):
            return MmioTransport(mmio, base, byte_order)
    raise MachineError(f"no device on the {slots.count} virtio-mmio transports from 0x{slots.base:08x} on")
