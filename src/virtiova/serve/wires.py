# SPDX-License-Identifier: Apache-2.0
"""Where a network device's frames go to, and come from: a tap interface, datagrams between sockets, or nowhere.

A wire is made, then the device on it, then the two are connected::

    wire = DatagramWire(sock)
    net = wire.connect(Net(wire))
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import os
import selectors
import socket
import struct
from typing import Final

from virtiova import _core
from virtiova.device.net import MAX_FRAME, Net
from virtiova.errors import NotPossibleError, UsageError
from virtiova.serve import sockets

TURN: Final = 64
"""Frames taken in at a time: the driver's own are not to wait for a flood."""
_TUN: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_NAME_BYTES: Final = 16
"""Linux, ``include/uapi/linux/if_tun.h`` and ``if.h``."""
_PATH_BYTES: Final = 108
"""``sun_path`` of ``struct sockaddr_un``, with the zero that ends it."""
_GONE: Final = frozenset({errno.EBADF, errno.EBADFD, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE})


class FrameWire:
    """A descriptor that takes and gives one whole frame with each ``write`` and ``read``. Owns it.

    As on any wire, a frame that nobody takes now is lost, and counted. ``kind`` and ``name`` are those of `_core.Wire`,
    by which the device's engines do the same natively: then nothing is read here. Usually it is a datagram socket.
    """

    def __init__(self, fd: int, kind: int = _core.Wire.SOCKET, name: bytes = b"") -> None:
        self._fd = fd
        self._native = _core.Wire(kind, fd, name)
        self._net: Net | None = None
        self._gone = False
        self._lost = 0
        os.set_blocking(fd, False)

    def connect(self, net: Net) -> Net:
        """Let ``net`` hear from this wire; returns it."""
        self._net = net
        net.sources = (self,)
        net.attach(self._native)
        return net

    @property
    def lost(self) -> int:
        """Frames of the driver's that found nobody, since the start."""
        return self._lost + self._native.lost

    def send(self, frame: bytes, /) -> None:
        """Put a frame on the wire, or lose it."""
        try:
            if os.write(self._fd, frame) == len(frame):
                return
        except OSError:
            # Nobody listens, the other one's queue is full, or the frame is nothing that this wire carries.
            pass
        self._lost += 1

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def events(self) -> int:
        """Frames are taken in while the device has room for them; the rest waits in the kernel."""
        net = self._net
        wanted = net is not None and net.room > 0 and not net.listens and not self._gone
        return selectors.EVENT_READ if wanted else 0

    def ready(self, events: int) -> None:
        """Take in what is there, `TURN` frames at most."""
        net = self._net
        for _ in range(TURN):
            if net is None or net.room <= 0 or net.listens:
                return
            try:
                frame = os.read(self._fd, MAX_FRAME + 1)
            except OSError as error:
                # Anything else (a neighbour that has gone, an interface that is down) may pass.
                self._gone = error.errno in _GONE
                return
            if frame:
                net.deliver(frame)

    def close(self) -> None:
        """Let go of the descriptor. May be called more than once."""
        fd, self._fd = self._fd, -1
        self._gone = True
        self._native.close()
        if fd >= 0:
            os.close(fd)


class Discard:
    """A wire with nobody on it: frames are counted and forgotten, and none ever comes. For measuring a driver's end."""

    def __init__(self) -> None:
        self._native = _core.Wire(_core.Wire.DISCARD)
        self._frames = self._bytes = 0

    @property
    def frames(self) -> int:
        """Frames of the driver's, since the start."""
        return self._frames + self._native.frames

    @property
    def bytes(self) -> int:
        """Bytes of them, headers of the ring not included."""
        return self._bytes + self._native.bytes

    def connect(self, net: Net) -> Net:
        """Nothing to hear of; returns ``net``."""
        net.attach(self._native)
        return net

    def send(self, frame: builtins.bytes, /) -> None:
        """Count a frame. It was copied out of the driver's memory by then, as for any other wire."""
        self._frames += 1
        self._bytes += len(frame)

    def close(self) -> None:
        """Nothing to let go of."""


class Tap(FrameWire):
    """A tap interface of this machine, made if it is not there; it ends with the process unless it was made before.

    Needs CAP_NET_ADMIN in the network namespace, or an interface that was made for this user
    (``ip tuntap add NAME mode tap user USER``). Raises `UsageError` for a name that no interface can have, and
    `NotPossibleError` with what is missing.
    """

    def __init__(self, name: str) -> None:
        encoded = name.encode()
        if not encoded or len(encoded) >= _NAME_BYTES or "/" in name or "%" in name or not name.isprintable():
            raise UsageError(f"{name!r} is no name of an interface: 1 to {_NAME_BYTES - 1} bytes, without / and %")
        try:
            fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NotPossibleError(f"{_TUN}: {error.strerror}; a tap interface needs it") from error
        try:
            request = struct.pack(f"{_NAME_BYTES}sH22x", encoded, _IFF_TAP | _IFF_NO_PI)
            fcntl.ioctl(fd, _TUNSETIFF, request)
        except OSError as error:
            os.close(fd)
            hint = f"; as root: ip tuntap add {name} mode tap user $USER" if error.errno == errno.EPERM else ""
            raise NotPossibleError(f"tap interface {name}: {error.strerror}{hint}") from error
        super().__init__(fd, _core.Wire.TAP)
        self.name = name


class DatagramWire(FrameWire):
    """A connected datagram socket: one end of a pair, or one of two with names (`between`). Takes the socket over."""

    def __init__(self, sock: socket.socket, name: bytes = b"") -> None:
        if sock.type != socket.SOCK_DGRAM:
            raise UsageError("wanted a datagram socket: a frame is a datagram")
        super().__init__(sock.detach(), _core.Wire.NAMED if name else _core.Wire.SOCKET, name)


def between(local: str, remote: str) -> DatagramWire:
    """Datagrams from ``local``, which is made here, to ``remote``, which may come later: paths of Unix sockets.

    The other end is a program of that kind, or QEMU's
    ``-netdev dgram,local.type=unix,local.path=REMOTE,remote.type=unix,remote.path=LOCAL``.
    """
    return _Named(local, remote)


class _Named(DatagramWire):
    """Its neighbour may come and go."""

    def __init__(self, local: str, remote: str) -> None:
        name = os.fsencode(remote)
        if not 0 < len(name) < _PATH_BYTES or b"\0" in name:
            raise UsageError(f"{remote!r} is no path of a socket: 1 to {_PATH_BYTES - 1} bytes")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sockets.bind(sock, local)
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self._local, self._remote = local, remote
        super().__init__(socket.socket(fileno=os.dup(sock.fileno())), name)

    def send(self, frame: bytes, /) -> None:
        """Send a frame to the neighbour if it is there."""
        try:
            self._socket.sendto(frame, self._remote)
        except OSError:
            self._lost += 1

    def close(self) -> None:
        """Take the name away, too."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._local)
        super().close()
