# SPDX-License-Identifier: Apache-2.0
"""The machine's buses over one qtest socket. Writes are posted and sent in one piece; reads wait."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.wire import qtest
from virtiova.wire.qtest import Answer

ANSWER_SECONDS: Final = 5.0
"""How long QEMU may take for an answer. It takes microseconds, and tens of milliseconds to start."""
_BATCH: Final = 32 * 1024
"""Bytes sent before answers are read, so that neither side blocks on a full socket."""


class QtestBus:
    """Memory, ports and registers of a QEMU machine. ``gone`` says why the machine is gone, for the error."""

    def __init__(self, sock: socket.socket, gone: Callable[[str], MachineError]) -> None:
        self._sock = sock
        self._sock.settimeout(ANSWER_SECONDS)
        self._gone = gone
        self._answers = qtest.Answers()
        self._ready: deque[Answer] = deque()
        self._out = bytearray()
        self._posted = 0
        self.operations = 0
        """Accesses made so far."""

    # -- posted writes -------------------------------------------------------------------------------------------

    def write(self, address: int, size: int, value: int) -> None:
        """Post a write of a little-endian register of 1, 2, 4 or 8 bytes."""
        self._post(qtest.write(address, value.to_bytes(size, "little")))

    def port_out(self, port: int, size: int, value: int) -> None:
        """Post a write to an x86 I/O port."""
        self._post(qtest.port_out(port, size, value))

    def write_bytes(self, address: int, data: bytes) -> None:
        """Post a write of bytes in bus order."""
        if len(data) > 64 and data.count(0) == len(data):
            self._post(qtest.fill(address, len(data), 0))
            return
        for start in range(0, len(data), 4096):
            self._post(qtest.write(address + start, data[start : start + 4096]))

    def post(self, command: bytes) -> None:
        """Post any verb that answers with OK."""
        self._post(command)

    def flush(self) -> None:
        """Wait until every posted write is done."""
        if self._posted:
            self._exchange([])

    # -- reads ---------------------------------------------------------------------------------------------------

    def read(self, address: int, size: int) -> int:
        """A little-endian register of 1, 2, 4 or 8 bytes."""
        return int.from_bytes(self.read_bytes(address, size), "little")

    def read_many(self, accesses: Sequence[tuple[int, int]]) -> list[int]:
        """Several registers, (address, size) each, in one round trip."""
        answers = self._exchange([qtest.read(address, size) for address, size in accesses])
        return [
            int.from_bytes(answer.data(size), "little") for answer, (_, size) in zip(answers, accesses, strict=True)
        ]

    def read_bytes(self, address: int, length: int) -> bytes:
        """Bytes in bus order."""
        (answer,) = self._exchange([qtest.read(address, length)])
        return answer.data(length)

    def port_in(self, port: int, size: int) -> int:
        """Read an x86 I/O port."""
        (answer,) = self._exchange([qtest.port_in(port, size)])
        return answer.number()

    def ping(self) -> str:
        """One verb that touches nothing: the target's byte order. It also lets the machine's main loop turn."""
        (answer,) = self._exchange([qtest.ENDIANNESS])
        return answer.text

    # -- the socket ----------------------------------------------------------------------------------------------

    def _post(self, command: bytes) -> None:
        self._out += command
        self._posted += 1
        if len(self._out) >= _BATCH:
            self.flush()

    def _exchange(self, commands: Sequence[bytes]) -> list[Answer]:
        """Send what was posted and ``commands``; the answers to ``commands``."""
        out = bytes(self._out) + b"".join(commands)
        posted, self._posted = self._posted, 0
        self._out.clear()
        wanted = posted + len(commands)
        self.operations += wanted
        try:
            self._sock.sendall(out)
            self._collect(wanted)
        except TimeoutError as error:
            raise self._gone(f"QEMU did not answer for {ANSWER_SECONDS:g} s") from error
        except OSError as error:
            raise self._gone(f"the connection to QEMU broke: {error.strerror or error}") from error
        for _ in range(posted):
            answer = self._ready.popleft()
            if not answer.ok:
                raise ProtocolError(f"qtest: a command failed: {answer.text[:80]!r}")
        return [self._ready.popleft() for _ in commands]

    def _collect(self, wanted: int) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(self._ready) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError
            data = self._sock.recv(65536)
            if not data:
                raise self._gone("QEMU ended in the middle")
            self._ready.extend(self._answers.feed(data))
