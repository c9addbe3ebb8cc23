# SPDX-License-Identifier: Apache-2.0
"""A disk whose every request is handled in Python: ``python -m virtiova.bench.handler IMAGE SOCKET``.

As short as a device of somebody's own may be, and served by the library like any other: `serve` with default options.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

from virtiova.device.base import Device
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain
from virtiova.serve import serve

_HEADER = struct.Struct("<IIQ")
_SECTOR = 512
_OK, _IOERR, _UNSUPP = b"\0", b"\1", b"\2"


class Disk(Device):
    """A read-only disk in a mapped file (virtio 1.4, 5.2.6): reads, and nothing else."""

    device_id, queues, features = DeviceId.BLOCK, 1, 1 << 5

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._data = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def config(self) -> bytes:
        """The capacity in sectors."""
        return struct.pack("<Q", len(self._data) // _SECTOR)

    def handle(self, queue: int, chain: Chain) -> None:
        """One request."""
        kind, _, sector = _HEADER.unpack(chain.read(16))
        start, length = sector * _SECTOR, chain.writable - 1
        if kind != 0 or start + length > len(self._data):
            chain.skip(length)
            chain.write(_IOERR if kind == 0 else _UNSUPP)
            return
        chain.write(self._data[start : start + length])
        chain.write(_OK)


if __name__ == "__main__":
    serve(Disk(sys.argv[1]), sys.argv[2])
