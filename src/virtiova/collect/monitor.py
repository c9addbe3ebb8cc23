# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor at the other end of a socket. What it answers is not to be trusted to have any form."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from virtiova.collect.monitor_words import printable
from virtiova.errors import MachineError

_SECONDS: Final = 20.0
_ANSWER: Final = 16 << 20
"""Bytes of one answer. The memory map of a machine with 1,000 devices has about 2 MiB."""
_WORDS: Final = 200


class CommandError(MachineError):
    """QEMU answered with an error. ``kind`` is its class: ``CommandNotFound``, ``GenericError``."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Monitor:
    """A conversation over a connected socket. Use it as a context manager."""

    def __init__(self, end: socket.socket, seconds: float = _SECONDS) -> None:
        """``seconds`` is for each answer, and for the greeting. Raises `MachineError` where none is given."""
        from qemu.qmp import QMPClient

        self._seconds = seconds
        self._runner = asyncio.Runner()
        # What goes wrong is raised from here; the loop would print it once more.
        self._runner.get_loop().set_exception_handler(lambda _loop, _context: None)
        self._client = QMPClient("virtiova", readbuflen=_ANSWER)
        # Events are not asked for; kept for nobody to read, they would fill memory.
        self._client.events.event_filter = lambda _event: False
        # It logs what it raises, with whole answers in it.
        self._client.logger = _silent()
        try:
            self._run(lambda: self._client.connect(end))
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, **arguments: object) -> Any:
        """One command; the answer. Raises `CommandError` if it is an error, `MachineError` if none comes."""
        return self._run(lambda: self._client.execute(command, arguments or None))

    def human(self, line: str) -> str:
        """One command of the monitor for people."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def _run(self, make: Callable[[], Any]) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        async def bounded() -> Any:
            return await asyncio.wait_for(make(), self._seconds)

        try:
            return self._runner.run(bounded())
        except TimeoutError as error:
            raise MachineError(f"QEMU's monitor did not answer in {self._seconds:.0f} s") from error
        except ExecuteError as error:
            kind = str(getattr(error.error, "class_", ""))
            raise CommandError(f"QEMU's monitor: {_words(error)}", kind) from error
        except (QMPError, OSError, EOFError, ValueError, RecursionError, AssertionError) as error:
            # qemu.qmp 0.0.6 asserts that nobody hangs up while it connects.
            raise MachineError(f"QEMU's monitor: {_words(error)}") from error

    def close(self) -> None:
        """Hang up."""
        try:
            self._run(self._client.disconnect)
        except MachineError:
            return
        finally:
            self._runner.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _words(error: BaseException) -> str:
    """The first line of an error, which may hold all that was received."""
    said = printable(next((line for line in str(error).splitlines() if line.strip()), ""))[:_WORDS]
    return "it hung up" if said in ("", "Disconnected") else said


def _silent() -> logging.Logger:
    logger = logging.getLogger("virtiova.monitor")
    logger.propagate = False
    logger.handlers = [logging.NullHandler()]
    return logger
