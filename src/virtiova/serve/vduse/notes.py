# SPDX-License-Identifier: Apache-2.0
"""What outlives whoever serves a VDUSE device: what it is, the status, and which requests were begun.

The kernel keeps a device whose process was killed, with its rings, and lets another one open it. It does not tell that
one what the device is, nor the status, nor what was taken out of the rings. So that is noted in a file, which is
removed with the device. The requests are noted as a vhost-user front end keeps them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from typing import Final

from virtiova.errors import NotPossibleError
from virtiova.serve.inflight import ring_bytes
from virtiova.wire.vduse import DeviceConfig
from virtiova.wire.vhost_user import InflightDescription

_MAGIC: Final = b"VIRTIOVA/VDUSE/1"
_HEAD: Final = struct.Struct("=16sII")
_STATUS_AT: Final = 16
_RINGS_AT: Final = 16384
"""A page of the file's own for what is noted of rings; before it, who it is."""


def folder() -> str:
    """Where notes are kept: memory that goes when the machine does, as the devices do."""
    if os.geteuid() == 0:
        return "/run/virtiova"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.geteuid()}'}/virtiova"


def identity(config: DeviceConfig, ring_size: int, medium: str) -> bytes:
    """What has to be the same for one process to go on where another one stopped."""
    words = {
        "type": config.device_id,
        "features": config.features,
        "queues": config.queues,
        "entries": ring_size,
        "config": config.config.hex(),
        "medium": medium,
    }
    return json.dumps(words, sort_keys=True).encode()


class Notes:
    """The file for the device ``name``, open and mapped. ``fresh``: it begins anew. Else `FileNotFoundError`, if
    nothing was noted."""

    def __init__(self, name: str, queues: int, ring_size: int, who: bytes, *, fresh: bool) -> None:
        self.path = f"{folder()}/vduse-{name}"
        self._rings = queues * max(ring_bytes(ring_size), ring_bytes(ring_size, packed=True))
        self._description = InflightDescription(self._rings, _RINGS_AT, queues, ring_size)
        size = _RINGS_AT + self._rings
        self._fd = _open(self.path, fresh=fresh)
        try:
            if fresh:
                if _HEAD.size + len(who) > _RINGS_AT:
                    raise NotPossibleError(f"{self.path}: what the device is has no room there")
                os.ftruncate(self._fd, size)
                os.pwrite(self._fd, _HEAD.pack(_MAGIC, 0, len(who)) + who, 0)
            elif os.fstat(self._fd).st_size != size:
                raise FileNotFoundError(self.path)
            self._map = mmap.mmap(self._fd, _HEAD.size + len(who) if fresh else _RINGS_AT)
        except BaseException:
            os.close(self._fd)
            raise

    def same(self, who: bytes) -> bool:
        """Whether they are notes of that device."""
        magic, _, length = _HEAD.unpack_from(self._map)
        return magic == _MAGIC and length == len(who) and self._map[_HEAD.size : _HEAD.size + length] == who

    @property
    def status(self) -> int:
        """The device status that was answered last."""
        return self._map[_STATUS_AT]

    @status.setter
    def status(self, status: int) -> None:
        self._map[_STATUS_AT] = status & 0xFF

    def lend(self, *, fresh: bool) -> tuple[InflightDescription, int]:
        """Where requests are to be noted, with a descriptor, the caller's. ``fresh``: none has been so far."""
        if fresh:
            os.ftruncate(self._fd, _RINGS_AT)
            os.ftruncate(self._fd, _RINGS_AT + self._rings)
        return self._description, os.dup(self._fd)

    def close(self, *, remove: bool) -> None:
        """Close it; ``remove``: there is no such device any more. May be called more than once."""
        if self._fd < 0:
            return
        self._map.close()
        os.close(self._fd)
        self._fd = -1
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _open(path: str, *, fresh: bool) -> int:
    try:
        if fresh:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if fresh else 0)
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        if not fresh:
            raise
        raise NotPossibleError(f"{path}: there is no folder for it") from None
    except OSError as error:
        raise NotPossibleError(f"{path}: {error.strerror}; what is under way is noted there") from error
