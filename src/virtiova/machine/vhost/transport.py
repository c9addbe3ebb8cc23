# SPDX-License-Identifier: Apache-2.0
"""A device's registers where the kernel serves its rings: what vhost does not have is ours, as in a machine monitor."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova import _core
from virtiova.addr import UVA
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import VIRTIO_F_VERSION_1, DeviceId, Status, has
from virtiova.machine.model_transport import ModelMsi
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.machine.vhost.frontend import KernelFrontEnd
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.ports import BusMaster, Msi, Peer
from virtiova.wire.vhost_user import F_LOG_ALL

QUEUE_SIZE: Final = 1024
"""The largest ring that we hand out: the kernel takes up to 32768 entries, and says nothing of a limit."""
_STARTS: Final = 16
"""Tries to start: each may ask for one more page of a ring."""


class Behind(Protocol):
    """What is at the device's other side, and how the kernel is told of it."""

    kind: str
    device_id: DeviceId
    queues: int
    """How many of its virtqueues the kernel serves."""
    own_bits: int
    """Feature bits that are the interface's, and none of the device's."""

    @property
    def peer(self) -> Peer:
        """The other side, as an experiment sees it."""

    def settle(self, file: VhostFile) -> None:
        """Tell a new file who it is."""

    def start(self, file: VhostFile, rings: list[int], features: int) -> None:
        """Let the kernel serve the rings; `CallError` with EFAULT if it has to ask where they are."""

    def config(self) -> bytes:
        """The device's configuration, which is ours to give."""

    def reset(self) -> None:
        """End what went on over the device."""

    def close(self) -> None:
        """Leave nothing. May be called more than once."""


@dataclass(frozen=True, slots=True)
class _Ring:
    """A ring as the driver handed it over."""

    size: int
    desc: int
    avail: int
    used: int
    vector: int | None


class VhostTransport:
    """The `ports.Transport` of a kernel back end. Rings start at DRIVER_OK, or, if the kernel cannot find them then, at
    the next kick."""

    legacy = False
    confirms = True
    byte_order: ByteOrder = "little"
    bus_master: BusMaster | None = None

    def __init__(self, front: KernelFrontEnd, memory: OwnMemory, behind: Behind, platform: AddressSpace) -> None:
        self._front = front
        self._memory = memory
        self._behind = behind
        self.device_id: int = behind.device_id
        # A call becomes a message that this machine writes, through the same tables: the control.
        self._messages = ModelMsi(platform, "call")
        self.msi: Msi | None = self._messages
        self._own_bits = behind.own_bits | 1 << F_LOG_ALL
        self._status = 0
        self._refused = ""
        self._rings: dict[int, _Ring] = {}
        self._events: dict[int, _Events] = {}
        self._waiting = False
        """The kernel could not find the rings when it was to start."""
        behind.settle(front.file)

    # -- features and status

    def reset(self) -> None:
        """Give the device back and have another one: vhost knows no reset."""
        self.stop()
        self._messages.disarm()
        self._rings.clear()
        self._status, self._refused = 0, ""
        self._behind.reset()
        self._front.renew()
        self._behind.settle(self._front.file)

    def read_features(self) -> int:
        """What the kernel offers, without the bits that are the interface's."""
        return self._front.file.features() & ~self._own_bits

    def write_features(self, bits: int) -> None:
        """Pass the driver's word on as it is, also a bit that was never offered: the answer is the kernel's."""
        self._refused = self._front.set_features(bits)
        # Whose order it is otherwise: virtio 1.4, 2.4.3.
        self.byte_order = "little" if has(bits, VIRTIO_F_VERSION_1) else sys.byteorder

    def read_status(self) -> int:
        """What the driver wrote, without FEATURES_OK if the kernel did not take the features."""
        return self._status & ~Status.FEATURES_OK if self._refused else self._status

    def write_status(self, status: int) -> None:
        """DRIVER_OK starts the rings."""
        starting = status & Status.DRIVER_OK and not self._status & Status.DRIVER_OK
        self._status = status
        if starting:
            self._set_up()
            self._start()

    # -- queues

    def queue_size(self, index: int) -> int:
        """`QUEUE_SIZE` for a queue that the kernel serves."""
        return QUEUE_SIZE if 0 <= index < self._behind.queues else 0

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """Take the ring's addresses; the kernel gets them at DRIVER_OK."""
        if not 1 <= size <= self.queue_size(index):
            raise ProtocolError(f"queue {index} of size {size}, wanted at most {self.queue_size(index)}")
        if self._status & Status.DRIVER_OK:
            raise ProtocolError(f"queue {index} enabled after DRIVER_OK, wanted before")
        self._rings[index] = _Ring(size, desc, avail, used, vector)

    def _set_up(self) -> None:
        file = self._front.file
        file.set_memory(self._memory.table)
        # With bit 33 rings are looked up as all else is; without it only they have addresses of ours.
        where: Callable[[int], int] = UVA if self._front.translating else self._memory.uva
        for index, ring in sorted(self._rings.items()):
            file.set_ring(index, ring.size, (where(ring.desc), where(ring.avail), where(ring.used)))
            events = self._events[index] = _Events()
            file.set_events(index, events.kick, events.call, events.error)

    def _start(self) -> None:
        """The kernel writes to the used ring before it starts: it asks where that is, and says EFAULT meanwhile."""
        for _ in range(_STARTS):
            try:
                self._behind.start(self._front.file, sorted(self._rings), self._front.accepted)
            except CallError as error:
                if error.errno != errno.EFAULT or not self._front.translating:
                    raise
                self._waiting = True
                if self._front.serve():
                    # It has also reported that as an error of the ring.
                    for events in self._events.values():
                        events.drain(events.error)
                    continue
                self._front.say(f"{error}: it does not start without its rings")
                return
            self._waiting = False
            return

    def stop(self) -> None:
        """Take all rings back: the file is closed for that."""
        if self._events:
            self._front.file.close()
        for events in self._events.values():
            events.close()
        self._events.clear()
        self._waiting = False

    def notify(self, index: int) -> None:
        """Kick."""
        events = self._events.get(index)
        if events is None:
            self._front.say(f"kick of queue {index}, which does not run: nobody to tell")
            return
        if self._waiting:
            self._start()
        _core.tell(events.kick)

    def pump(self, seconds: float) -> None:
        """Wait so long for the kernel to ask, to call, or to report an error; deal with all of that."""
        poll = select.poll()
        poll.register(self._front.file.fd, select.POLLIN)
        for events in self._events.values():
            poll.register(events.call, select.POLLIN)
            poll.register(events.error, select.POLLIN)
        poll.poll(seconds * 1000)
        self._front.serve()
        for index, events in self._events.items():
            if events.drain(events.error):
                self._front.say(f"the kernel reports an error of ring {index}")
            if events.drain(events.call):
                self._messages.fire(self._rings[index].vector)

    # -- configuration

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration, which vhost leaves to us."""
        config = self._behind.config()
        if offset < 0 or length < 0 or offset + length > len(config):
            raise AccessError(offset, length, f"this device's configuration has {len(config)} bytes")
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing of it can be written (virtio 1.4, 5.1.4 and 5.10.4)."""

    def close(self) -> None:
        """Let go of the rings. May be called more than once."""
        self.stop()


class _Events:
    """The three eventfds of a ring."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        try:
            for _ in range(3):
                self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            self.close()
            raise
        self.kick, self.call, self.error = self._fds

    @staticmethod
    def drain(fd: int) -> bool:
        """Whether somebody has counted it up."""
        try:
            return os.eventfd_read(fd) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Close them."""
        while self._fds:
            os.close(self._fds.pop())
