# SPDX-License-Identifier: Apache-2.0
"""Console device (virtio 1.4, 5.3): one port. Input goes into queue 0, output comes out of queue 1."""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import Final, Protocol

from virtiova.device.base import Device
from virtiova.errors import UsageError
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain

RX: Final = 0
TX: Final = 1
MAX_WAITING: Final = 1 << 16
"""Bytes of input that wait for the driver's buffers."""
MAX_OUTPUT: Final = 1 << 20
"""Bytes of output that are taken from one buffer: a driver may say that it has 4 GiB."""
_STEP: Final = 1 << 14
_F_SIZE: Final = 0
_F_EMERG_WRITE: Final = 2
_CONFIG: Final = struct.Struct("<HHII")
EMERGENCY_AT: Final = 8
"""Offset of ``emerg_wr`` in the configuration."""


class Terminal(Protocol):
    """Where output goes to."""

    def send(self, data: bytes, /) -> None:
        """Take bytes, some thousands at most. Must not wait."""

    def full(self) -> bool:
        """Whether it has so much to pass on that it wants no more for now: output then stays in the driver's ring."""


class Console(Device):
    """A terminal of ``columns`` by ``rows`` characters, or of an unknown size (0).

    Input comes in through `deliver`. A character can also be written to ``emerg_wr`` of the configuration at any
    time, even before the device is set up (virtio 1.4, 5.3.5.1).
    """

    device_id = DeviceId.CONSOLE
    bit_names = MappingProxyType({_F_SIZE: "SIZE", _F_EMERG_WRITE: "EMERG_WRITE"})
    queues = 2

    def __init__(self, terminal: Terminal, *, columns: int = 0, rows: int = 0) -> None:
        if not (0 <= columns < 1 << 16 and 0 <= rows < 1 << 16) or bool(columns) != bool(rows):
            raise UsageError(f"a console of {columns} by {rows} characters, wanted both or none, up to 65535")
        self._terminal = terminal
        self._size = (rows, columns)
        self._input = bytearray()
        self.features = 1 << _F_EMERG_WRITE | (1 << _F_SIZE if columns else 0)
        self.lost = 0
        """Bytes of input that found no room, and of output past `MAX_OUTPUT`, since the device was made."""

    def config(self) -> bytes:
        """``struct virtio_console_config``; ``max_nr_ports`` is 1 although it does not count without MULTIPORT."""
        return _CONFIG.pack(*self._size, 1, 0)

    def configure(self, offset: int, data: bytes) -> None:
        """A character in an emergency: the lower byte of ``emerg_wr``."""
        if offset <= EMERGENCY_AT < offset + len(data):
            self._terminal.send(data[EMERGENCY_AT - offset : EMERGENCY_AT - offset + 1])

    @property
    def room(self) -> int:
        """How many bytes of input `deliver` takes now."""
        return MAX_WAITING - len(self._input)

    def deliver(self, data: bytes) -> None:
        """Input has come: keep it until the driver has a buffer for it. What is more than `room` is lost."""
        self.lost += max(0, len(data) - self.room)
        self._input += data[: self.room]

    def pending(self, queue: int) -> bool:
        """Buffers for input are used when there is some; output as long as somebody takes it."""
        return bool(self._input) if queue == RX else not self._terminal.full()

    def handle(self, queue: int, chain: Chain) -> None:
        """Give the driver what has come, as much as fits; or pass on what is in the buffer.

        Input that misses the driver's memory is lost, output up to the part that cannot be read is passed on.
        """
        if queue == TX:
            self.lost += max(0, chain.readable - MAX_OUTPUT)
            for _ in range(0, min(chain.readable, MAX_OUTPUT), _STEP):
                self._terminal.send(chain.read(_STEP))
            return
        data = bytes(self._input[: chain.writable])
        del self._input[: len(data)]
        chain.write(data)

    def reset(self) -> None:
        """Forget the input that waits."""
        self._input.clear()
