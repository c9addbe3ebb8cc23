# SPDX-License-Identifier: Apache-2.0
"""Starts a QEMU of which nothing has a file name: lines are socket pairs, files anonymous memory, logs a pipe."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from virtiova.machine.qemu.process import QemuProcess, memory_file


class Starter:
    """What a QEMU inherits from us, as it is collected. `close` ends it, and lets go of everything, whatever was
    reached; what was kept last goes first."""

    def __init__(self) -> None:
        self._kept = contextlib.ExitStack()
        self._theirs = contextlib.ExitStack()
        self._kept.callback(self._theirs.close)
        self._inherit: list[int] = []

    def line(self, name: str) -> tuple[socket.socket, list[str]]:
        """Our end of a socket pair, and the options that make the other one QEMU's character device ``name``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._kept.callback(ours.close)
        self._theirs.callback(theirs.close)
        self._inherit.append(theirs.fileno())
        return ours, ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]

    def serial(self, name: str) -> tuple[socket.socket, list[str]]:
        """The same, as the next serial line."""
        ours, options = self.line(name)
        return ours, [*options, "-serial", f"chardev:{name}"]

    def file(self, name: str, content: bytes) -> str:
        """The path under which QEMU finds ``content``; ``name`` is for whoever lists our files."""
        fd = memory_file(f"virtiova-{name}", 0)
        self._kept.callback(os.close, fd)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        self._inherit.append(fd)
        return f"/dev/fd/{fd}"

    def pipe(self) -> tuple[int, str]:
        """Our end of a pipe, which does not block, and the path under which QEMU writes to it."""
        read, write = os.pipe2(os.O_CLOEXEC)
        self._kept.callback(os.close, read)
        self._theirs.callback(os.close, write)
        os.set_blocking(read, False)
        self._inherit.append(write)
        return read, f"/dev/fd/{write}"

    def keep(self, close: Callable[[], object]) -> None:
        """Something else that ends with it."""
        self._kept.callback(close)

    def start(self, argv: list[str]) -> QemuProcess:
        """Start it. QEMU's ends are its own from then on."""
        process = QemuProcess(argv, self._inherit)
        self._kept.callback(process.close)
        self._theirs.close()
        return process

    def close(self) -> None:
        """May be called more than once."""
        self._kept.close()
