# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor beside qtest: its own view of its devices, a witness apart from ours.

It goes through qemu.qmp, which is asynchronous; here one question is asked at a time, and waited for, bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine

from qemu.qmp import QMPClient, QMPError

from virtiova.errors import MachineError
from virtiova.machine.qemu import bus

_CLOSE_SECONDS = 1.0


class Monitor:
    """A QMP session over an inherited socket. ``gone`` makes the error that says how the machine is."""

    def __init__(self, sock: socket.socket, gone: Callable[[str], MachineError]) -> None:
        self._gone = gone
        self._runner = asyncio.Runner()
        self._client = QMPClient("virtiova")
        try:
            self._wait(self._client.connect(sock), "connecting to QMP")
        except BaseException:
            self._runner.close()
            raise

    def execute(self, name: str, arguments: dict[str, object]) -> object:
        """The answer to one command; `MachineError` if there is none in time, or an error in its place."""
        return self._wait(self._client.execute(name, arguments or None), f"QMP {name}")

    def close(self) -> None:
        """End the session. A machine that is gone is no error any more."""
        with contextlib.suppress(Exception):
            self._runner.run(asyncio.wait_for(self._client.disconnect(), _CLOSE_SECONDS))
        self._runner.close()

    def _wait(self, question: Coroutine[object, object, object], what: str) -> object:
        try:
            return self._runner.run(asyncio.wait_for(question, bus.ANSWER_SECONDS))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise self._gone(f"{what} failed: {str(error) or type(error).__name__}") from error
