# SPDX-License-Identifier: Apache-2.0
"""Entropy device (virtio 1.4, 5.4): fills buffers with random bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from virtiova.device.base import Device
from virtiova.errors import UsageError
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain

MAX_BYTES: Final = 1 << 16
"""The most that one request gets. A device may use less than the entire buffer (virtio 1.4, 5.4.6.2)."""


class Rng(Device):
    """One queue of buffers, each filled from ``source``, a function from a byte count to that many bytes.

    One request gets ``most`` bytes and no more: what a driver asks for is not what its host must spend.
    """

    device_id = DeviceId.ENTROPY
    queues = 1

    def __init__(self, source: Callable[[int], bytes] = os.urandom, *, most: int = MAX_BYTES) -> None:
        if not 1 <= most <= MAX_BYTES:
            raise UsageError(f"{most} bytes for a request, wanted 1 to {MAX_BYTES}: a device uses each buffer")
        self._source = source
        self._most = most

    def handle(self, queue: int, chain: Chain) -> None:
        """Fill the buffer, as far as the limit goes."""
        chain.write(self._source(min(chain.writable, self._most)))
