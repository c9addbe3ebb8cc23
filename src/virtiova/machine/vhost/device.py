# SPDX-License-Identifier: Apache-2.0
"""A file of the kernel's vhost interface: what can be asked of it and told, with its errors in words.

``/dev/vhost-net`` and ``/dev/vhost-vsock``, and ``/dev/vhost-vdpa-N``, which has the same calls and some of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from typing import Final, Self

from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.wire import vhost
from virtiova.wire.vhost import BackendFeature, BatchKind
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

_WORD: Final = 8


class CallError(MachineError):
    """The kernel did not do what it was asked for. ``errno`` is its reason."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


class VhostFile:
    """An open file of that kind. Use it as a context manager. ``remedy`` is the command that makes it appear.

    Raises `NotPossibleError` with what is missing, `UsageError` for what is no device at all. Each call that the kernel
    refuses is a `CallError`. Nothing is set up yet: see `own`.
    """

    def __init__(self, path: str, remedy: str) -> None:
        self.path = path
        self.fd = -1
        self.v2 = False
        """IOTLB messages are of the second form (`BackendFeature.IOTLB_MSG_V2` was taken)."""
        self.fd = _open(path, remedy)

    # -- any call

    def call(self, what: str, request: int, argument: int | bytes | bytearray = 0) -> None:
        """One ioctl, ``what`` is its name for the error. A ``bytearray`` holds the answer after it."""
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            number = error.errno or 0
            raise CallError(f"{self.path}: {what}: {error.strerror}", number) from error

    def ask(self, what: str, request: int, size: int = _WORD) -> bytes:
        """One ioctl that answers ``size`` bytes."""
        answer = bytearray(size)
        self.call(what, request, answer)
        return bytes(answer)

    # -- features

    def features(self) -> int:
        """The feature word that is offered (GET_FEATURES)."""
        return int.from_bytes(self.ask("GET_FEATURES", vhost.GET_FEATURES), "little")

    def set_features(self, word: int) -> None:
        """Take features (SET_FEATURES). There is no status: this call's answer is all there is."""
        self.call(f"SET_FEATURES 0x{word:x}", vhost.SET_FEATURES, word.to_bytes(_WORD, "little"))

    def backend_features(self) -> BackendFeature:
        """What the interface itself can do (GET_BACKEND_FEATURES); nothing where it does not know the question."""
        try:
            word = int.from_bytes(self.ask("GET_BACKEND_FEATURES", vhost.GET_BACKEND_FEATURES), "little")
        except CallError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
                return BackendFeature(0)
            raise
        return BackendFeature(word & sum(BackendFeature))

    def set_backend_features(self, bits: BackendFeature) -> None:
        """Take some of them, before there are IOTLB messages."""
        if bits:
            self.call("SET_BACKEND_FEATURES", vhost.SET_BACKEND_FEATURES, bits.to_bytes(_WORD, "little"))
        self.v2 = BackendFeature.IOTLB_MSG_V2 in bits

    def own(self) -> None:
        """The first call of all (SET_OWNER): from here on addresses are those of this process."""
        self.call("SET_OWNER", vhost.SET_OWNER)

    # -- memory and rings

    def set_memory(self, regions: Sequence[tuple[int, int, int]]) -> None:
        """Say where guest memory is: (guest-physical address, size, our own address) of each region."""
        self.call("SET_MEM_TABLE", vhost.SET_MEM_TABLE, vhost.memory_table(regions))

    def set_ring(self, index: int, size: int, addresses: tuple[int, int, int], base: int = 0) -> None:
        """The number of entries, the first index, and where descriptors, available and used ring are."""
        desc, avail, used = addresses
        self.call(f"SET_VRING_NUM {index}", vhost.SET_VRING_NUM, vhost.vring_state(index, size))
        self.call(f"SET_VRING_BASE {index}", vhost.SET_VRING_BASE, vhost.vring_state(index, base))
        self.call(f"SET_VRING_ADDR {index}", vhost.SET_VRING_ADDR, vhost.vring_addr(index, desc, used, avail))

    def set_events(self, index: int, kick: int, call: int, err: int) -> None:
        """The three eventfds of a ring; -1 for none."""
        self.call(f"SET_VRING_ERR {index}", vhost.SET_VRING_ERR, vhost.vring_file(index, err))
        self.call(f"SET_VRING_CALL {index}", vhost.SET_VRING_CALL, vhost.vring_file(index, call))
        self.call(f"SET_VRING_KICK {index}", vhost.SET_VRING_KICK, vhost.vring_file(index, kick))

    def ring_base(self, index: int) -> int:
        """Where the device would go on in the available ring."""
        state = vhost.vring_state(index, 0)
        self.call(f"GET_VRING_BASE {index}", vhost.GET_VRING_BASE, state)
        return vhost.state_value(state)

    # -- the IOTLB

    def tell(self, message: IotlbMessage) -> None:
        """An UPDATE or INVALIDATE. When this returns the kernel uses nothing that it was told before otherwise."""
        self._write(vhost.encode_iotlb(message, v2=self.v2), message.kind.name)

    def batch(self, kind: BatchKind) -> None:
        """A border of a batch (`BackendFeature.IOTLB_BATCH`)."""
        self._write(vhost.encode_batch(kind), f"batch {kind.name}")

    def _write(self, data: bytes, what: str) -> None:
        try:
            written = os.write(self.fd, data)
        except OSError as error:
            raise CallError(f"{self.path}: IOTLB {what}: {error.strerror}", error.errno or 0) from error
        if written != len(data):
            raise MachineError(f"{self.path}: IOTLB {what}: {written} of {len(data)} bytes were taken")

    def asked(self) -> IotlbMessage | None:
        """The next MISS; None if there is none now. `ProtocolError` for what nobody can ask for."""
        try:
            data = os.read(self.fd, vhost.MESSAGE_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise CallError(f"{self.path}: read: {error.strerror}", error.errno or 0) from error
        if not data:
            return None
        message = vhost.decode_iotlb(data)
        if message.kind != IotlbKind.MISS:
            raise ProtocolError(f"{self.path}: asks for an IOTLB {message.kind.name}, wanted a MISS")
        return message

    # -- the end

    def close(self) -> None:
        """Close it: the kernel stops all rings and lets go of memory. May be called more than once."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: str, remedy: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _why_not(path, remedy, error) from error
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no device of the kernel")
    return fd


def _why_not(path: str, remedy: str, error: OSError) -> NotPossibleError | UsageError:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            said = "there is no such device" if error.errno == errno.ENOENT else "nothing is behind it"
            return NotPossibleError(f"{path}: {said}. This makes it:\n    {remedy}")
        case errno.EACCES | errno.EPERM:
            return NotPossibleError(
                f"{path}: not for this user: run it as root, or as a member of the group that owns it:\n"
                f"    ls -l {path}"
            )
        case errno.EBUSY:
            return NotPossibleError(f"{path}: somebody else has it. This says who:\n    fuser -v {path}")
        case errno.EIO | errno.ETIMEDOUT:
            return NotPossibleError(
                f"{path}: its device does not answer: the program that it is has ended, or hangs. "
                "Start it again, or take the device away:\n    vdpa dev show"
            )
        case errno.EISDIR | errno.ENOTDIR | errno.ELOOP | errno.ENAMETOOLONG:
            return UsageError(f"{path} is no device of the kernel")
        case _:
            return NotPossibleError(f"{path}: {error.strerror}. This may show why:\n    ls -l {path}")
