# SPDX-License-Identifier: Apache-2.0
"""The device's interrupts, as the kernel passes them on: events of ours.

The kernel has the MSI-X table, so that a message cannot be pointed at memory of ours. What is seen of one is that it
came. A device without MSI-X has its line (INTx): the kernel masks that when it fires, and the device holds it until its
ISR register is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from virtiova.machine.vfio.calls import call
from virtiova.wire import vfio
from virtiova.wire.vfio import Irq

_VECTORS: Final = 1


class Interrupts:
    """``kind`` is ``msi-x``, ``intx``, or empty if the device has neither; ``fd`` is an eventfd.

    ``acknowledge`` reads the ISR register; it is called for INTx only.
    """

    def __init__(self, device: int, *, msix: bool, acknowledge: Callable[[], object]) -> None:
        self._device = device
        self._acknowledge = acknowledge
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kind = ""
        try:
            if msix and self._count(Irq.MSIX):
                self._ask(Irq.MSIX, "msi-x")
            elif self._count(Irq.INTX):
                self._ask(Irq.INTX, "intx")
        except BaseException:
            self.close()
            raise

    def _count(self, index: Irq) -> int:
        info = vfio.irq_info(index)
        call(self._device, f"VFIO_DEVICE_GET_IRQ_INFO {index.name}", vfio.DEVICE_GET_IRQ_INFO, info)
        return vfio.irq_count(info)

    def _ask(self, index: Irq, kind: str) -> None:
        request = vfio.set_irq_events(index, [self.fd] * _VECTORS)
        call(self._device, f"VFIO_DEVICE_SET_IRQS {index.name}", vfio.DEVICE_SET_IRQS, request)
        self.kind = kind

    def taken(self) -> bool:
        """Has the device signalled since the last call?"""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        if self.kind == "intx":
            self._acknowledge()
            call(self._device, "VFIO_DEVICE_SET_IRQS unmask", vfio.DEVICE_SET_IRQS, vfio.unmask_irq(Irq.INTX))
        return True

    def close(self) -> None:
        """Have no more of them. May be called more than once."""
        kind, self.kind = self.kind, ""
        if kind:
            index = Irq.MSIX if kind == "msi-x" else Irq.INTX
            with contextlib.suppress(Exception):
                call(self._device, "VFIO_DEVICE_SET_IRQS", vfio.DEVICE_SET_IRQS, vfio.clear_irqs(index))
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
