# SPDX-License-Identifier: Apache-2.0
"""One socket of a vhost-user connection: whole messages in and out, never for longer than it may take.

What the other side sends is hostile: its length is bounded by the framer, descriptors that nobody asked for
are closed at once, and a back end that does not read what it is sent is given up.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtiova.errors import MachineError, ProtocolError
from virtiova.wire.vhost_user import MAX_FDS, Framer, Message

_ROOM: Final = socket.CMSG_SPACE((MAX_FDS + 1) * 4)
_BATCH: Final = 64
"""Messages taken at a time, so that a flood cannot keep us from looking at anything else."""


Gone = Callable[[str], MachineError]
"""Makes the error for a back end that is gone or silent, with its own last words."""


class Channel:
    """A connected stream socket. ``name`` says in error messages which of the two it is."""

    def __init__(self, sock: socket.socket, name: str, gone: Gone = MachineError) -> None:
        self.name = name
        self._gone = gone
        self._socket = sock
        self._framer = Framer()
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor, to be waited for."""
        return self._socket.fileno()

    def send(self, message: Message, seconds: float) -> None:
        """Send the whole message; `MachineError` if the other side is gone, or does not read for ``seconds``."""
        self.send_bytes(message.encode(), seconds, message.fds)

    def send_bytes(self, data: bytes | memoryview, seconds: float, fds: Sequence[int] = ()) -> None:
        """Send messages that are bytes already; the ``fds`` go with the first of them. Else as `send`."""
        data = memoryview(data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        deadline = time.monotonic() + seconds
        while data:
            try:
                sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._gone(f"the back end does not read the {self.name}") from None
                select.select([], [self._socket], [], left)
                continue
            except OSError as error:
                raise self._gone(f"the back end has closed the {self.name}") from error
            # Descriptors go with the first byte, and only once.
            data, ancillary = data[sent:], []

    def receive(self) -> list[Message]:
        """The messages that are there, at most 64, without waiting. The caller owns their descriptors.

        `MachineError` for the end of the stream, `ProtocolError` for bytes that are no message.
        """
        found: list[Message] = []
        try:
            while len(found) < _BATCH:
                got = self._read()
                if got is None:
                    break
                found += self._framer.feed(*got)
        except ProtocolError as error:
            self._abandon(found)
            raise ProtocolError(f"on the {self.name}: {error}") from error
        except BaseException:
            self._abandon(found)
            raise
        return found

    def _read(self) -> tuple[bytes, Sequence[int]] | None:
        """Bytes and descriptors; None if there are none now."""
        try:
            data, ancillary, _flags, _ = self._socket.recvmsg(self._framer.wanted, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone(f"the back end has closed the {self.name}") from error
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
        if not data:
            close_all(fds)
            raise self._gone(f"the back end has closed the {self.name}")
        return data, fds

    def _abandon(self, found: Iterable[Message]) -> None:
        close_all(self._framer.abandon())
        for message in found:
            close_all(message.fds)

    def close(self) -> None:
        """Close the socket, and descriptors of a message that never ended."""
        self._abandon(())
        self._socket.close()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody asked for."""
    for fd in fds:
        os.close(fd)
