# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back end as a machine with one device (`ports.Machine`): everything but the device is ours."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final, Self

from virtiova.dma.space import MediatedSpace
from virtiova.features import Feature
from virtiova.machine.backend import KINDS, BackEnd
from virtiova.machine.vhost_user.connection import Running
from virtiova.machine.vhost_user.frontend import WANTED, FrontEnd
from virtiova.machine.vhost_user.guess import guess_kind
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.machine.vhost_user.memory import SharedMemory
from virtiova.machine.vhost_user.transport import VhostUserTransport
from virtiova.ports import Iommu, Peer, Ram, Transport
from virtiova.wire.vhost_user import ConfigSpace, ProtocolFeature, Request

_NAP: Final = 0.001
"""Seconds between two looks at memory: a back end need not call when it is done."""
_LOOKED_AT: Final = 24
"""Bytes of configuration that a guess needs."""


class VhostUserMachine:
    """One fresh connection to a back end. Use it as a context manager. ``packed``: the driver is offered packed rings
    if the back end offers them; as in other machine monitors, only where somebody asks for it. ``running`` is one that
    runs already, and stays the caller's; ``wanted`` are the protocol features that are used where both sides can;
    ``memory`` makes the machine's.

    Raises `UsageError` for a back end that cannot be, `MachineError` for one that does not come up or answer,
    `NotPossibleError` if its device type is not given and cannot be guessed.
    """

    name = "vhost-user"
    bridged = False
    vhost = True
    pass_through = False
    hardware = False
    gave_up = ""
    insists: bool | None = None

    def __init__(
        self,
        backend: BackEnd,
        *,
        packed: bool = False,
        running: Running | None = None,
        wanted: Iterable[ProtocolFeature] = WANTED,
        memory: Callable[[], SharedMemory] = SharedMemory,
    ) -> None:
        self._packed = packed
        self._cleanup = contextlib.ExitStack()
        self._product = backend.product
        self.guess = ""
        """What the device type was guessed from; empty if it was given."""
        try:
            self._open(backend, running, wanted, memory())
        except BaseException:
            self.close()
            raise

    def _open(
        self, backend: BackEnd, running: Running | None, wanted: Iterable[ProtocolFeature], memory: SharedMemory
    ) -> None:
        self.memory = memory
        self._cleanup.callback(memory.close)
        self.running = Running(backend) if running is None else running
        if running is None:
            self._cleanup.callback(self.running.close)
        sock = self.running.connect()
        self._cleanup.callback(sock.close)
        self._program = self.running.program(sock)
        iotlb = self.iotlb = IotlbServer(memory.ram)
        self.front = self._front_end(sock)
        offered = self.offered = self.front.open(wanted)
        self.kind = backend.kind or self._guess(offered)
        if backend.guess:
            self.front.say(f"device type {self.kind}: a guess, as {backend.guess}")
        self.device = f"vhost-user-{self.kind}"
        self.ram: Ram = memory.ram
        self.pages = memory.pages
        self.iommu: Iommu = iotlb
        self.peer: Peer = self.running.peer(self.kind)
        platform = MediatedSpace(memory.ram, iotlb)
        registers = VhostUserTransport(self.front, memory, KINDS[self.kind], offered & ~self._kept_back, platform)
        self._cleanup.callback(registers.close)
        self.registers = registers
        self.transport: Transport | None = registers

    def _front_end(self, sock: socket.socket) -> FrontEnd:
        front = FrontEnd(sock, self.iotlb.resolve, self.iotlb.failed, self.memory.uva, self.running.gone)
        self.iotlb.tell = front.invalidate
        self._cleanup.callback(front.close)
        return front

    def reconnect(self, wanted: Iterable[ProtocolFeature] = WANTED) -> None:
        """Hang up, and connect again as a front end does whose back end went away: memory, tables and rings stay."""
        self.registers.close()
        self.front.close()
        sock = self.running.connect()
        self._cleanup.callback(sock.close)
        self.front = self._front_end(sock)
        self.front.open(wanted)
        self.registers.adopt(self.front)

    @property
    def _kept_back(self) -> int:
        return 0 if self._packed else 1 << Feature.RING_PACKED

    def _guess(self, offered: int) -> str:
        front = self.front
        queues = front.ask(Request.GET_QUEUE_NUM) if front.speaks(ProtocolFeature.MQ) else None
        config = None
        if front.speaks(ProtocolFeature.CONFIG):
            reply = front.exchange(Request.GET_CONFIG, ConfigSpace(0, 0, bytes(_LOOKED_AT)).encode())
            config = ConfigSpace.decode(reply).data if reply else None
        kind, self.guess = guess_kind(offered, queues, config)
        return kind

    # -- ports.Machine -------------------------------------------------------------------------------------------

    @property
    def product(self) -> str:
        """The program behind the socket, as far as it can be known."""
        return self._product or self._program or "vhost-user back end"

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Serve the back end until ``done()``, looking at memory now and then, and whenever something comes."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return done()
            self.front.pump(min(left, _NAP))
        return True

    def words(self) -> list[str]:
        """What the back end printed, and what went over the connection."""
        return self.running.words() + self.front.words()

    def close(self) -> None:
        """Close the connection, end what was started. May be called more than once."""
        # One step that fails, or is interrupted, does not cost the others.
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
