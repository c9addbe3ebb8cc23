# SPDX-License-Identifier: Apache-2.0
"""The other side of ``/dev/vhost-vsock``: a stream socket of this process, which connects to the guest."""

from __future__ import annotations

import errno
import secrets
import socket
from typing import Final, Literal, Self

from virtiova.driver.vsock import GUEST_PORT
from virtiova.errors import MachineError, NotPossibleError
from virtiova.features import DeviceId
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.wire import vhost

REMEDY: Final = "modprobe vhost_vsock"
IOTLB_SINCE: Final = "since Linux 5.11: e13a6915a03f, vhost/vsock: add IOTLB API support"
_FIRST_CID: Final = 0x1000
_LAST_CID: Final = 0x7FFF_FFFF
_TRIES: Final = 16
_BUFFER_SIZE: Final = 0
_BUFFER_MAX_SIZE: Final = 2
_ROOM: Final = 16 << 20
"""So much fits in before the kernel says how much it has read: a message that takes a buffer of the guest's."""
_AT_MOST: Final = 1024
_PIECE: Final = 1 << 16


class Vsock:
    """The device's `Behind` and its `Peer`. Its address (CID) is one that nobody else has."""

    kind = "vsock"
    device_id = DeviceId.VSOCK
    # The third is for events such as a migration, and is never the kernel's.
    queues = 2
    own_bits = 0
    reach: Literal["own", "echo", "none"] = "own"

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.cid = 0
        self._socket: socket.socket | None = None

    # -- Behind

    @property
    def peer(self) -> Self:
        """Itself."""
        return self

    def settle(self, file: VhostFile) -> None:
        """Choose an address."""
        for _ in range(_TRIES):
            cid = _FIRST_CID + secrets.randbelow(_LAST_CID - _FIRST_CID)
            try:
                file.call(f"VSOCK_SET_GUEST_CID {cid}", vhost.VSOCK_SET_GUEST_CID, cid.to_bytes(8, "little"))
            except CallError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            self.cid = cid
            return
        raise MachineError(f"{file.path}: {_TRIES} addresses were all taken")

    def start(self, file: VhostFile, rings: list[int], features: int) -> None:
        """All rings at once: 0 receives, 1 transmits."""
        file.call("VSOCK_SET_RUNNING", vhost.VSOCK_SET_RUNNING, (1).to_bytes(4, "little"))

    def config(self) -> bytes:
        """``struct virtio_vsock_config``: the address (virtio 1.4, 5.10.4)."""
        return self.cid.to_bytes(8, "little")

    def reset(self) -> None:
        """Hang up: the other end is gone."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def close(self) -> None:
        """Hang up."""
        self.reset()

    # -- Peer

    def send(self, data: bytes) -> None:
        """Bytes for the driver. The first time, and if there are none: only begin to connect."""
        if self._socket is None:
            self._socket = self._connect()
        if not data:
            return
        try:
            sent = self._socket.send(data)
        except OSError as error:
            raise MachineError(f"the connection does not take {len(data)} bytes ({error.strerror})") from error
        if sent != len(data):
            raise MachineError(f"the connection took {sent} of {len(data)} bytes")

    def _connect(self) -> socket.socket:
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise NotPossibleError(
                f"no vsock sockets: {error.strerror}. This makes them:\n    modprobe vsock"
            ) from error
        try:
            sock.setsockopt(socket.AF_VSOCK, _BUFFER_MAX_SIZE, _ROOM)
            sock.setsockopt(socket.AF_VSOCK, _BUFFER_SIZE, _ROOM)
            number = sock.connect_ex((self.cid, GUEST_PORT))
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, errno.errorcode.get(number, ""))
        except OSError as error:
            sock.close()
            raise MachineError(f"cannot connect to CID {self.cid}: {error}") from error
        return sock

    def received(self) -> list[bytes]:
        """Bytes from the driver, as they came."""
        pieces: list[bytes] = []
        while self._socket is not None and len(pieces) < _AT_MOST:
            try:
                data = self._socket.recv(_PIECE)
            except OSError:
                break
            if not data:
                break
            pieces.append(data)
        return pieces

    def stored(self, offset: int, length: int) -> bytes:
        """A connection stores nothing."""
        return b""

    def shown(self) -> bytes:
        """Nor has it a screen."""
        raise NotPossibleError("a connection has no screen")
