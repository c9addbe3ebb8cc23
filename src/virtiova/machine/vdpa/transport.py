# SPDX-License-Identifier: Apache-2.0
"""A device's registers, as vhost-vdpa has them (`ports.Transport`): status, features and configuration are its own."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import time
from typing import Final

from virtiova import _core
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import Feature, Status, has
from virtiova.machine.model_transport import ModelMsi
from virtiova.machine.vdpa.device import VdpaFile
from virtiova.machine.vhost.device import CallError
from virtiova.ports import BusMaster, Msi

RESET_SECONDS: Final = 2.0
_NAP: Final = 0.001
_PACKED_BASE: Final = 0x8000_8000
"""Index 0 and wrap counter 1, of what is available and, in the upper half, of what is used."""
_REFUSALS: Final = (errno.EINVAL, errno.EOPNOTSUPP)


class VdpaTransport:
    """The registers of the device behind ``file``. ``platform`` is what a message of ours goes through: a call becomes
    one that this machine writes, which makes it the control. ``packed``: the driver sees an offer of packed rings.
    ``software``: what the device reaches is what the kernel gives it, whatever was negotiated."""

    legacy = False
    byte_order: ByteOrder = "little"
    bus_master: BusMaster | None = None
    confirms = True

    def __init__(self, file: VdpaFile, platform: AddressSpace, *, packed: bool, software: bool) -> None:
        self._file = file
        self.device_id: int = file.device_id
        self._messages = ModelMsi(platform, "call")
        self.msi: Msi | None = self._messages
        self._kept_back = 0 if packed else 1 << Feature.RING_PACKED
        self._software = software
        self._accepted = 0
        self._refused = ""
        self._rings: dict[int, _Ring] = {}
        self.words: list[str] = []
        """What the kernel said that a driver does not see."""
        self.calls: collections.Counter[int] = collections.Counter()
        """By queue, how often the device called: at most as often as it did."""
        self.changes = 0
        """How often the device said that its configuration changed: at most as often as it did."""
        self._changed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # -- features and status

    @property
    def refusal(self) -> str:
        """Why the last features were refused; empty if they were not."""
        return self._refused

    def reset(self) -> None:
        """Status 0, and wait for it. All rings are taken back."""
        self._file.set_status(0)
        self._accepted, self._refused = 0, ""
        self._messages.disarm()
        self._close_rings()
        deadline = time.monotonic() + RESET_SECONDS
        while status := self._file.status():
            if time.monotonic() > deadline:
                raise MachineError(f"{self._file.path}: status 0x{status:x} after a reset, wanted 0")
            time.sleep(_NAP)
        # The kernel forgets this one at a reset, too.
        self._file.set_config_event(self._changed)

    def read_features(self) -> int:
        """The bits that the device offers."""
        return self._file.features() & ~self._kept_back

    def write_features(self, bits: int) -> None:
        """Pass the driver's word on as it is. Where the kernel does not take it, FEATURES_OK reads as refused.

        `MachineError` for a word without bit 33 to hardware: it is not asked that.
        """
        if not self._software and not has(bits, Feature.ACCESS_PLATFORM):
            raise MachineError(
                f"{self._file.path} is hardware: without bit 33 it might take our addresses for physical ones, and "
                "write to memory that is not ours. It is not asked that"
            )
        try:
            self._file.set_features(bits)
        except CallError as error:
            if error.errno not in _REFUSALS:
                raise
            self._refused = str(error)
            self.words.append(self._refused)
            return
        self._accepted = bits

    def read_status(self) -> int:
        """The device's own, without FEATURES_OK where the kernel did not take the features."""
        status = self._file.status()
        return status & ~Status.FEATURES_OK if self._refused else status

    def write_status(self, status: int) -> None:
        """Pass it on; what the device makes of it is read back."""
        if self._refused:
            # Nothing was agreed on: what a driver writes all the same is not to read as if it had been.
            status &= ~Status.FEATURES_OK
        # The kernel lets no bit go before a reset, so that those which the device has set itself are kept.
        self._file.set_status(status | self._file.status() if status else 0)

    # -- queues

    def queue_size(self, index: int) -> int:
        """The largest size, for a queue that exists."""
        return self._file.largest if 0 <= index < self._file.queues else 0

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """Hand the ring over: always by IOVAs. The device works on it from DRIVER_OK on."""
        if not 1 <= size <= self.queue_size(index):
            raise ProtocolError(f"queue {index} of size {size}, wanted at most {self.queue_size(index)}")
        if index in self._rings:
            raise ProtocolError(f"queue {index} is enabled already")
        base = _PACKED_BASE if has(self._accepted, Feature.RING_PACKED) else 0
        self._file.set_ring(index, size, (desc, avail, used), base)
        ring = self._rings[index] = _Ring(vector)
        self._file.set_events(index, ring.kick, ring.call, ring.error)
        self._file.enable_ring(index)

    def notify(self, index: int) -> None:
        """Kick."""
        ring = self._rings.get(index)
        if ring is None:
            self.words.append(f"kick of queue {index}, which was not enabled: nobody to tell")
        else:
            _core.tell(ring.kick)

    # -- what the device signals

    def events(self) -> list[int]:
        """The eventfds to wait for."""
        return [self._changed, *(fd for ring in self._rings.values() for fd in (ring.call, ring.error))]

    def take(self, ready: list[int]) -> None:
        """Some of them are ready: a call becomes the message of that ring's vector."""
        if self._changed in ready and _drain(self._changed):
            self.changes += 1
        for index, ring in self._rings.items():
            if ring.call in ready and _drain(ring.call):
                self.calls[index] += 1
                self._messages.fire(ring.vector)
            if ring.error in ready and _drain(ring.error):
                self.words.append(f"the device reported an error of ring {index}")

    # -- configuration

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration, within what the device says that it has."""
        return self._file.config(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Bytes of the configuration. The kernel does not say whether the device took them."""
        self._file.set_config(offset, data)

    def _close_rings(self) -> None:
        for index, ring in self._rings.items():
            # The kernel holds on to a descriptor until it is told otherwise.
            with contextlib.suppress(MachineError):
                self._file.set_events(index, -1, -1, -1)
            ring.close()
        self._rings.clear()

    def close(self) -> None:
        """Reset the device, whatever it says to that, and let go of all descriptors. May be called more than once."""
        with contextlib.suppress(MachineError):
            self._file.set_status(0)
        with contextlib.suppress(MachineError):
            self._file.set_config_event(-1)
        self._close_rings()
        event, self._changed = self._changed, -1
        if event >= 0:
            os.close(event)


class _Ring:
    """The three eventfds of a ring."""

    def __init__(self, vector: int | None) -> None:
        self.vector = vector
        self._fds: list[int] = []
        try:
            self.kick, self.call, self.error = (self._eventfd() for _ in range(3))
        except BaseException:
            self.close()
            raise

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _drain(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
        return True
    return False
