# SPDX-License-Identifier: Apache-2.0
"""The network behind ``/dev/vhost-net``: a tap interface in a network of its own, and a socket on it.

Tap and socket are made in a new network namespace, by a thread that ends: nobody else is in it, nothing of the
machine's network is touched, and it ends with the last of its descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, Literal, Self

from virtiova.errors import MachineError, NotPossibleError
from virtiova.features import VIRTIO_F_VERSION_1, DeviceId, has
from virtiova.machine.vhost.device import VhostFile
from virtiova.wire import vhost

REMEDY: Final = "modprobe vhost_net"
IOTLB_SINCE: Final = "since Linux 4.8: 6b1e6cc7855b, vhost: new device IOTLB API"
F_NET_HDR: Final = 27
"""VHOST_NET_F_VIRTIO_NET_HDR: the kernel makes the header that stands before each frame, and not the tap. A device's
bit of the same number, ANY_LAYOUT, is offered by it as well."""
_F_MRG_RXBUF: Final = 15
_NAME: Final = b"virtiova0"
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETVNETLE: Final = 0x400454DC
_TAP: Final = 0x0002 | 0x1000 | 0x4000
"""IFF_TAP, IFF_NO_PI, IFF_VNET_HDR."""
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_UP: Final = 0x1 | 0x40 | 0x80
"""IFF_UP, IFF_RUNNING, IFF_NOARP."""
_MTU: Final = 65521
_ALL: Final = 3
_OUTGOING: Final = 4
_AT_MOST: Final = 1024
_MAX_FRAME: Final = 65536


class Network:
    """The tap, its interface, and the socket that sees all frames on it: the device's `Behind` and its `Peer`.
    Raises `NotPossibleError` with what is missing."""

    kind = "net"
    device_id = DeviceId.NET
    queues = 2
    own_bits = 1 << F_NET_HDR
    reach: Literal["own", "echo", "none"] = "own"

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self._cleanup = contextlib.ExitStack()
        try:
            _apart(self._open)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """In the new namespace."""
        # Else a new interface says so to all its neighbours, and the device would get that.
        with contextlib.suppress(OSError), open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "wb") as file:
            file.write(b"1")
        try:
            self._tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NotPossibleError(f"/dev/net/tun: {error.strerror}. This makes it:\n    modprobe tun") from error
        self._cleanup.callback(os.close, self._tap)
        fcntl.ioctl(self._tap, _TUNSETIFF, struct.pack("16sH22x", _NAME, _TAP))
        fcntl.ioctl(self._tap, _TUNSETVNETLE, struct.pack("=i", 1))
        try:
            frames = self._frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            raise NotPossibleError(
                f"no socket for frames: {error.strerror}. This makes them:\n    modprobe af_packet"
            ) from error
        self._cleanup.callback(frames.close)
        fcntl.ioctl(frames, _SIOCSIFMTU, struct.pack("16si20x", _NAME, _MTU))
        fcntl.ioctl(frames, _SIOCSIFFLAGS, struct.pack("16sH22x", _NAME, _UP))
        frames.bind((_NAME.decode(), _ALL))

    # -- Behind

    @property
    def peer(self) -> Self:
        """Itself."""
        return self

    def settle(self, file: VhostFile) -> None:
        """There is nothing that it has to know."""

    def start(self, file: VhostFile, rings: list[int], features: int) -> None:
        """Hand the tap over, ring by ring: 0 receives, 1 transmits."""
        long = features & (1 << VIRTIO_F_VERSION_1 | 1 << _F_MRG_RXBUF)
        fcntl.ioctl(self._tap, _TUNSETVNETHDRSZ, struct.pack("=i", 12 if long else 10))
        fcntl.ioctl(self._tap, _TUNSETVNETLE, struct.pack("=i", has(features, VIRTIO_F_VERSION_1)))
        for index in rings:
            file.call(f"NET_SET_BACKEND {index}", vhost.NET_SET_BACKEND, vhost.vring_file(index, self._tap))

    def config(self) -> bytes:
        """No feature that we offer has any."""
        return b""

    def reset(self) -> None:
        """Forget the frames that nobody took."""
        self.received()

    def close(self) -> None:
        """The interface, and the namespace, end with this."""
        self._cleanup.close()

    # -- Peer

    def send(self, data: bytes) -> None:
        """A frame to the device."""
        try:
            self._frames.send(data)
        except OSError as error:
            raise MachineError(f"the tap does not take a frame of {len(data)} bytes ({error.strerror})") from error

    def received(self) -> list[bytes]:
        """Frames from the device, at most 1024 at a time. What was sent to it is seen as well, and left out."""
        frames: list[bytes] = []
        for _ in range(_AT_MOST):
            try:
                frame, address = self._frames.recvfrom(_MAX_FRAME)
            except OSError:
                break
            if address[2] != _OUTGOING:
                frames.append(frame)
        return frames

    def stored(self, offset: int, length: int) -> bytes:
        """A network stores nothing."""
        return b""

    def shown(self) -> bytes:
        """Nor has it a screen."""
        raise NotPossibleError("a network has no screen")


def _apart(what: Callable[[], None]) -> None:
    """Do something in a new network namespace, and pass on what it raises."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(_CLONE_NEWNET):
                number = ctypes.get_errno()
                hint = "run it as root (CAP_SYS_ADMIN)" if number == errno.EPERM else os.strerror(number)
                raise NotPossibleError(f"a network of our own cannot be made: {hint}")
            what()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="virtiova-network")
    thread.start()
    thread.join()
    if failed:
        error = failed[0]
        if isinstance(error, OSError):
            raise NotPossibleError(f"a tap interface cannot be made: {error.strerror}") from error
        raise error
