# SPDX-License-Identifier: Apache-2.0
"""A file ``/dev/vhost-vdpa-N``: what it has beyond the other vhost files - status, configuration, queues, IOVAs.

Everything that the device says of itself is bounded here: it may be anybody's program (VDUSE).
"""

from __future__ import annotations

import errno
from typing import Final, Self

from virtiova.addr import IOVA
from virtiova.errors import AccessError, ProtocolError, UsageError
from virtiova.features import DeviceId
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.wire import vhost
from virtiova.wire.vhost import BackendFeature

MAX_QUEUES: Final = 1024
LARGEST_RING: Final = 1024
"""Entries of a ring that we hand out at most, as in other machines."""
MAX_CONFIG: Final = 4096
"""Bytes of a configuration at most: no device type has so many."""
_WANTED: Final = (
    BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH | BackendFeature.IOTLB_ASID | BackendFeature.IOTLB_PERSIST
)
_QUEUES: Final = {DeviceId.NET: 2, DeviceId.CONSOLE: 2}
_UNKNOWN_CALL: Final = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


class VdpaFile(VhostFile):
    """An open ``/dev/vhost-vdpa-N``, owned, with the backend features that both sides have. Opening resets the device.

    Raises as `VhostFile`, `UsageError` for another kind of file, `ProtocolError` for answers that make no sense.
    """

    def __init__(self, path: str, remedy: str) -> None:
        super().__init__(path, remedy)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        try:
            self.device_id = self._number("GET_DEVICE_ID", vhost.VDPA_GET_DEVICE_ID, 4)
        except CallError as error:
            if error.errno != errno.ENOTTY:
                raise
            raise UsageError(f"{self.path} is no vDPA device") from error
        self.own()
        taken = self.backend_features() & _WANTED
        self.set_backend_features(taken)
        self.batches = BackendFeature.IOTLB_BATCH in taken and self.v2
        self.first, self.last = self._range()
        self.queues = self._queues()
        self.largest = self._largest()

    def call(self, what: str, request: int, argument: int | bytes | bytearray = 0) -> None:
        """As of any vhost file; a device in user space may leave us without an answer, too."""
        try:
            super().call(what, request, argument)
        except CallError as error:
            if error.errno not in (errno.EIO, errno.ETIMEDOUT):
                raise
            said = f"{error} (the device does not answer: its program has ended, or hangs)"
            raise CallError(said, error.errno) from error

    def _number(self, what: str, request: int, size: int) -> int:
        return int.from_bytes(self.ask(what, request, size), "little")

    def _queues(self) -> int:
        try:
            count = self._number("GET_VQS_COUNT", vhost.VDPA_GET_VQS_COUNT, 4)
        except CallError as error:
            if error.errno not in _UNKNOWN_CALL:
                raise
            # Kernels before 5.19 do not tell.
            return {int(kind): number for kind, number in _QUEUES.items()}.get(self.device_id, 1)
        if not 1 <= count <= MAX_QUEUES:
            raise ProtocolError(
                f"{self.path}: the device says that it has {count} queues; 1 to {MAX_QUEUES} make sense"
            )
        return count

    def _largest(self) -> int:
        """The largest ring: a power of two, as split rings have to be."""
        largest = self._number("GET_VRING_NUM", vhost.VDPA_GET_VRING_NUM, 2)
        if not largest:
            raise ProtocolError(f"{self.path}: the device says that its rings have no entries")
        return min(1 << largest.bit_length() - 1, LARGEST_RING)

    def _range(self) -> tuple[int, int]:
        first, last = vhost.iova_range(self.ask("GET_IOVA_RANGE", vhost.VDPA_GET_IOVA_RANGE, 16))
        if first > last:
            raise ProtocolError(f"{self.path}: the IOVA range begins at 0x{first:x} and ends at 0x{last:x}")
        return IOVA(first), IOVA(last)

    # -- status

    def status(self) -> int:
        """The device's status byte (GET_STATUS)."""
        return self._number("GET_STATUS", vhost.VDPA_GET_STATUS, 1)

    def set_status(self, status: int) -> None:
        """Write it (SET_STATUS); 0 is a reset."""
        self.call(f"SET_STATUS 0x{status:x}", vhost.VDPA_SET_STATUS, bytes([status]))

    # -- configuration

    def config_size(self) -> int:
        """Bytes of the configuration; `MAX_CONFIG` where the kernel does not tell."""
        try:
            size = self._number("GET_CONFIG_SIZE", vhost.VDPA_GET_CONFIG_SIZE, 4)
        except CallError as error:
            if error.errno not in _UNKNOWN_CALL:
                raise
            return MAX_CONFIG
        if size > MAX_CONFIG:
            raise ProtocolError(f"{self.path}: a configuration of {size} bytes; {MAX_CONFIG} at most make sense")
        return size

    def config(self, offset: int, length: int) -> bytes:
        """Bytes of it, at one moment (GET_CONFIG)."""
        self._inside(offset, length)
        asked = vhost.vdpa_config(offset, bytes(length))
        self.call("GET_CONFIG", vhost.VDPA_GET_CONFIG, asked)
        return bytes(asked[vhost.CONFIG_AT :])

    def set_config(self, offset: int, data: bytes) -> None:
        """Write bytes of it (SET_CONFIG)."""
        self._inside(offset, len(data))
        self.call("SET_CONFIG", vhost.VDPA_SET_CONFIG, vhost.vdpa_config(offset, data))

    def _inside(self, offset: int, length: int) -> None:
        size = self.config_size()
        if offset < 0 or length < 1 or offset + length > size:
            raise AccessError(offset, length, f"the configuration has 0x{size:x} bytes")

    def set_config_event(self, event: int) -> None:
        """The eventfd that tells of a changed configuration (SET_CONFIG_CALL); -1 for none."""
        self.call("SET_CONFIG_CALL", vhost.VDPA_SET_CONFIG_CALL, event.to_bytes(4, "little", signed=True))

    # -- rings

    def enable_ring(self, index: int, *, on: bool = True) -> None:
        """Let the device work on a ring once the driver is up, or not (SET_VRING_ENABLE)."""
        self.call(f"SET_VRING_ENABLE {index}", vhost.VDPA_SET_VRING_ENABLE, vhost.vring_state(index, int(on)))

    def __enter__(self) -> Self:
        return self
