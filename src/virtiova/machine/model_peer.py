# SPDX-License-Identifier: Apache-2.0
"""The world on the other side of the model's device: a disk image, or a network or terminal that only the test uses."""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, Protocol

from virtiova.device.store import MemoryStore
from virtiova.errors import NotPossibleError

MAX_RECEIVED: Final = 1024
"""Frames, or pieces of output, kept until they are asked for; older ones are lost."""


class Listener(Protocol):
    """A device that hears from outside."""

    def deliver(self, data: bytes, /) -> None:
        """Something has come in."""


class ModelPeer:
    """The ``Peer`` port over what the device was made of; anything else raises `NotPossibleError`."""

    reach: Literal["own", "echo", "none"] = "own"

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.kept: dict[int, bytes] = {}
        self._store = store
        self._listener: Listener | None = None
        self._frames: deque[bytes] = deque(maxlen=MAX_RECEIVED)

    def wire(self) -> _Wire:
        """The wire that a network device is to send to, or the terminal of a console."""
        return _Wire(self._frames)

    def connect(self, listener: Listener) -> None:
        """What is sent from here on goes to ``listener``."""
        self._listener = listener

    def send(self, data: bytes) -> None:
        """Hand the device one network frame, or some input."""
        if self._listener is None:
            raise NotPossibleError("this device has no network or terminal to send from")
        self._listener.deliver(data)

    def received(self) -> list[bytes]:
        """The frames, or pieces of output, that the device has sent since the last call, at most `MAX_RECEIVED`."""
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def stored(self, offset: int, length: int) -> bytes:
        """Bytes of the disk image."""
        if self._store is None:
            raise NotPossibleError("this device stores nothing")
        return self._store.read(offset, length)

    def shown(self) -> bytes:
        """There is no device with a screen here."""
        raise NotPossibleError("this device has no screen")


class _Wire:
    def __init__(self, frames: deque[bytes]) -> None:
        self._frames = frames

    def send(self, data: bytes, /) -> None:
        self._frames.append(data)

    def full(self) -> bool:
        return False
