# SPDX-License-Identifier: Apache-2.0
"""virtio over PCI, legacy interface: registers in the I/O BAR, 32 feature bits, no FEATURES_OK.

Source: virtio 1.4, 4.1.4.10.
"""

from __future__ import annotations

from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.dma.ram import ByteOrder
from virtiova.errors import ProtocolError
from virtiova.ports import BusMaster, Msi, PciFunction
from virtiova.ring.layout import SplitLayout
from virtiova.transport.status import wait_for_reset
from virtiova.wire import pci

_BAR: Final = 0


class LegacyPci:
    """The legacy interface of a virtio PCI function (`ports.Transport`).

    ``byte_order`` is the guest's: that of rings and configuration on this interface (virtio 1.4, 2.7.3).
    """

    legacy = True
    confirms = False

    def __init__(
        self,
        function: PciFunction,
        device_id: int,
        bus_master: BusMaster,
        byte_order: ByteOrder = "little",
    ) -> None:
        self._function = function
        self._msix = False
        self.device_id = device_id
        self.bus_master: BusMaster | None = bus_master
        self.byte_order: ByteOrder = byte_order
        self.msi: Msi | None = None

    def msix_enabled(self, on: bool) -> None:
        """With MSI-X enabled the header has two more registers, and the configuration moves up."""
        self._msix = on

    def reset(self) -> None:
        self._function.write_bar(_BAR, pci.LEGACY_STATUS, 1, 0)
        wait_for_reset(self.read_status)

    def read_features(self) -> int:
        return self._function.read_bar(_BAR, pci.LEGACY_HOST_FEATURES, 4)

    def write_features(self, bits: int) -> None:
        self._function.write_bar(_BAR, pci.LEGACY_GUEST_FEATURES, 4, bits & 0xFFFFFFFF)

    def read_status(self) -> int:
        return self._function.read_bar(_BAR, pci.LEGACY_STATUS, 1)

    def write_status(self, status: int) -> None:
        self._function.write_bar(_BAR, pci.LEGACY_STATUS, 1, status)
        self._function.flush()

    def queue_size(self, index: int) -> int:
        self._function.write_bar(_BAR, pci.LEGACY_QUEUE_SELECT, 2, index)
        return self._function.read_bar(_BAR, pci.LEGACY_QUEUE_SIZE, 2)

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        if size != self.queue_size(index):
            raise ProtocolError(f"a legacy queue has one size, and it is not {size}")
        layout = SplitLayout(size, used_align=PAGE_SIZE)
        if desc % PAGE_SIZE or avail != desc + layout.avail or used != desc + layout.used:
            raise ProtocolError("a legacy ring lies in one piece, used at the next 4096 (virtio 1.4, 2.7.2)")
        if self._msix:
            value = pci.NO_VECTOR if vector is None else vector
            self._function.write_bar(_BAR, pci.LEGACY_QUEUE_VECTOR, 2, value)
        self._function.write_bar(_BAR, pci.LEGACY_QUEUE_PFN, 4, desc // PAGE_SIZE)
        self._function.flush()

    def notify(self, index: int) -> None:
        self._function.write_bar(_BAR, pci.LEGACY_QUEUE_NOTIFY, 2, index)
        self._function.flush()

    def read_config(self, offset: int, length: int) -> bytes:
        base = pci.LEGACY_CONFIG_MSIX if self._msix else pci.LEGACY_CONFIG
        return bytes(self._function.read_bar(_BAR, base + offset + at, 1) for at in range(length))

    def write_config(self, offset: int, data: bytes) -> None:
        base = pci.LEGACY_CONFIG_MSIX if self._msix else pci.LEGACY_CONFIG
        for at, byte in enumerate(data):
            self._function.write_bar(_BAR, base + offset + at, 1, byte)
        self._function.flush()
