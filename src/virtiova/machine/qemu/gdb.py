# SPDX-License-Identifier: Apache-2.0
"""QEMU's debug stub over an inherited socket: the one processor's registers, one step, go on, stop."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.wire import gdb

ANSWER_SECONDS: Final = 5.0
SIGNAL_STEP: Final = 5


class GdbStub:
    """The debugger's end. The machine is stopped when it starts; ``gone`` says why it is gone, for the error."""

    def __init__(self, sock: socket.socket, gone: Callable[[str], MachineError]) -> None:
        self._sock = sock
        self._sock.settimeout(ANSWER_SECONDS)
        self._gone = gone
        self._packets = gdb.Packets()
        self._ready: deque[bytes] = deque()
        self._open = False

    def open(self, architecture: str) -> None:
        """Greet the stub, once. Before it was asked for its description, QEMU 7.2 knows no single registers."""
        if self._open:
            return
        self._ask(gdb.packet(b"qSupported:xmlRegisters=" + architecture.encode()))
        self._ask(gdb.packet(b"qXfer:features:read:target.xml:0,ffb"))
        gdb.stop_signal(self._ask(gdb.packet(b"?")))
        gdb.expect_ok(self._ask(gdb.packet(b"Hg0")))
        self._open = True

    def write_register(self, number: int, value: int) -> None:
        """Set a 64-bit register of the stopped processor."""
        gdb.expect_ok(self._ask(gdb.write_register(number, value)))

    def read_register(self, number: int) -> int:
        """A 64-bit register of the stopped processor."""
        return gdb.register_value(self._ask(gdb.read_register(number)))

    def step(self) -> None:
        """One instruction, during which the whole machine runs."""
        signal = gdb.stop_signal(self._ask(gdb.STEP))
        if signal != SIGNAL_STEP:
            raise ProtocolError(f"gdb: a step ended with signal {signal}")

    def go(self) -> None:
        """Let the machine run."""
        self._send(gdb.CONTINUE)

    def stop(self) -> None:
        """Stop the running machine."""
        gdb.stop_signal(self._ask(gdb.INTERRUPT))

    # -- the socket ----------------------------------------------------------------------------------------------

    def _ask(self, message: bytes) -> bytes:
        self._send(message)
        try:
            self._collect()
            self._sock.sendall(gdb.ACK)
        except TimeoutError as error:
            raise self._gone(f"QEMU's debug stub did not answer for {ANSWER_SECONDS:g} s") from error
        except OSError as error:
            raise self._gone(f"the connection to QEMU's debug stub broke: {error.strerror or error}") from error
        return self._ready.popleft()

    def _send(self, message: bytes) -> None:
        try:
            self._sock.sendall(message)
        except OSError as error:
            raise self._gone(f"the connection to QEMU's debug stub broke: {error.strerror or error}") from error

    def _collect(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self._ready:
            if time.monotonic() > deadline:
                raise TimeoutError
            data = self._sock.recv(65536)
            if not data:
                raise self._gone("QEMU ended in the middle")
            self._ready.extend(self._packets.feed(data))
