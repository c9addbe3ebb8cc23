# SPDX-License-Identifier: Apache-2.0
"""The two files of VDUSE: ``/dev/vduse/control``, which makes devices, and ``/dev/vduse/NAME``, which one is served by.

Every refusal of the kernel's is an error in words, with the command that supplies what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import Final

from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.features import DeviceId
from virtiova.serve.descriptors import Bell
from virtiova.wire import vduse as wire
from virtiova.wire.vduse import DeviceConfig, IotlbEntry, QueueInfo

FOLDER: Final = "/dev/vduse"
_U64: Final = struct.Struct("=Q")
_U32: Final = struct.Struct("=I")


class Control:
    """``/dev/vduse/control``, open. `NotPossibleError` where there is none, or not for us."""

    def __init__(self, folder: str = FOLDER) -> None:
        path = f"{folder}/control"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotPossibleError(
                f"there is no {path}: load the module (modprobe vduse), or boot a kernel that has it "
                "(CONFIG_VDPA_USER; Linux 5.15 or newer)"
            ) from None
        except OSError as error:
            raise NotPossibleError(f"{path}: {error.strerror}; run this as root") from error
        try:
            fcntl.ioctl(self._fd, wire.SET_API_VERSION, _U64.pack(wire.API_VERSION))
        except OSError as error:
            os.close(self._fd)
            raise NotPossibleError(f"{path} does not take VDUSE API version {wire.API_VERSION}") from error

    def create(self, config: DeviceConfig) -> None:
        """Make the device. `FileExistsError` if there is one of that name, `NotPossibleError` for what VDUSE does not
        take."""
        data = config.encode()
        try:
            fcntl.ioctl(self._fd, wire.CREATE_DEV, data if len(data) <= 1024 else bytearray(data))
        except FileExistsError:
            raise
        except OSError as error:
            raise _uncreated(config, error) from error

    def destroy(self, name: str) -> bool:
        """Whether there is no such device any more; not as long as it is on the vDPA bus, or open."""
        try:
            fcntl.ioctl(self._fd, wire.DESTROY_DEV, wire.name_bytes(name))
        except OSError as error:
            return error.errno == errno.EINVAL
        return True

    def close(self) -> None:
        """Close it. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _uncreated(config: DeviceConfig, error: OSError) -> Exception:
    """Why the kernel makes no such device, as far as it can be known."""
    if error.errno == errno.EINVAL:
        kind = DeviceId(config.device_id).name.lower()
        return NotPossibleError(
            f"the kernel makes no VDUSE device of type {config.device_id} ({kind}) with features "
            f"0x{config.features:x}: it takes block and net, and others only where it is newer"
        )
    if error.errno == errno.EPERM:
        return NotPossibleError("the kernel lets only who has CAP_NET_ADMIN make a network device: run this as root")
    return MachineError(f"VDUSE: {config.name} cannot be made: {error.strerror}")


class Node:
    """``/dev/vduse/NAME``, open: one process at a time. `MachineError` if somebody else has it."""

    def __init__(self, name: str, queues: int, folder: str = FOLDER) -> None:
        path = f"{folder}/{name}"
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise MachineError(f"{path} is served by another process already") from error
            raise MachineError(f"{path}: {error.strerror}") from error
        self.calls = [-1] * queues
        """For each ring an eventfd: whoever signals it wants the driver to be told."""
        self._kicks = [-1] * queues
        try:
            for index in range(queues):
                # All are made here: what serves has no right to make any.
                self.calls[index] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._kicks[index] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self.close()
            raise

    def set_up(self, sizes: int) -> None:
        """Say how many entries each ring may have."""
        for index in range(len(self.calls)):
            fcntl.ioctl(self.fd, wire.VQ_SETUP, wire.queue_config(index, sizes))

    # -- messages

    def read(self) -> bytes:
        """One message of the kernel's; ``BlockingIOError`` if there is none."""
        return os.read(self.fd, wire.MESSAGE_SIZE)

    def write(self, response: bytes) -> None:
        """Answer. One that nobody waits for any more is no error: the kernel has given it up."""
        with contextlib.suppress(FileNotFoundError):
            os.write(self.fd, response)

    # -- what it lets itself be asked

    def features(self) -> int:
        """What the driver wrote as accepted features."""
        data = bytearray(_U64.size)
        fcntl.ioctl(self.fd, wire.DEV_GET_FEATURES, data)
        return int(_U64.unpack(data)[0])

    def ring(self, index: int, *, packed: bool) -> QueueInfo:
        """What the driver set of a ring."""
        data = QueueInfo.ask(index)
        fcntl.ioctl(self.fd, wire.VQ_GET_INFO, data)
        return QueueInfo.decode(data, packed=packed)

    def region(self, start: int, last: int) -> tuple[IotlbEntry, int] | None:
        """The first region that has one of these addresses, and a descriptor of its file, the caller's; None: none."""
        data = IotlbEntry.ask(start, last)
        try:
            fd = fcntl.ioctl(self.fd, wire.IOTLB_GET_FD, data)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise
            return None
        try:
            return IotlbEntry.decode(data), fd
        except ProtocolError:
            os.close(fd)
            raise

    def kicks(self, index: int) -> int:
        """An eventfd, the caller's, by which the kernel tells of kicks from here on."""
        fcntl.ioctl(self.fd, wire.VQ_SETUP_KICKFD, wire.queue_eventfd(index, self._kicks[index]))
        return os.dup(self._kicks[index])

    def call(self, index: int) -> int:
        """A descriptor, the caller's, to signal when the driver is to be told."""
        return os.dup(self.calls[index])

    @property
    def bell(self) -> Bell:
        """What `inject` does, for who serves a ring."""
        return Bell(self.fd, wire.VQ_INJECT_IRQ)

    def inject(self, index: int) -> bool:
        """Tell the driver to look at a ring; whether that was possible: not before its DRIVER_OK has arrived."""
        try:
            fcntl.ioctl(self.fd, wire.VQ_INJECT_IRQ, _U32.pack(index))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def close(self) -> None:
        """Close all. May be called more than once."""
        for fd in (self.fd, *self.calls, *self._kicks):
            if fd >= 0:
                os.close(fd)
        self.fd = -1
        self.calls = self._kicks = [-1] * len(self.calls)
