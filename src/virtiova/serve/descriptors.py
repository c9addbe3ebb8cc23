# SPDX-License-Identifier: Apache-2.0
"""Descriptors that a front end has sent: which of them may be used, telling somebody by one, letting go of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

from virtiova import _core
from virtiova.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Bell:
    """By what a front end is told of any ring: the ``ioctl`` ``request`` on ``fd``, with the ring's number (u32).

    For who takes no eventfds. Where it fails, the ring's call is signalled, and whoever reads that tries again.
    """

    fd: int
    request: int

    def ring(self, index: int) -> bool:
        """Whether it was possible."""
        try:
            fcntl.ioctl(self.fd, self.request, struct.pack("=I", index))
        except OSError:
            return False
        return True


def present(*fds: int | None) -> list[int]:
    """Those that there are."""
    return [fd for fd in fds if fd is not None]


def close(*fds: int) -> None:
    """Let go of all of them, whatever comes of one."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def replace(old: int | None) -> None:
    """Let go of an earlier descriptor."""
    if old is not None:
        close(old)


def check_notifier(fd: int) -> None:
    """See to it that a kick, call or error descriptor is one that can be, and never makes us wait.

    An eventfd has a file of no type; a pipe is what front ends take that have no eventfd. Anything else could wait
    for ever, or mean something else by what we write. Closes it and raises `ProtocolError` then.
    """
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (0, stat.S_IFIFO):
            raise ProtocolError(f"a notification by a file of type 0o{kind:o}, wanted an eventfd or a pipe")
        os.set_blocking(fd, False)
    except OSError as error:
        close(fd)
        raise ProtocolError(f"a notification by a descriptor that cannot be used: {error.strerror}") from error
    except ProtocolError:
        close(fd)
        raise


def signal(fd: int | None) -> bool:
    """Tell whoever waits there; a counter that is full tells him already."""
    return fd is None or _core.tell(fd)
