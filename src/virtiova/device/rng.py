# SPDX-License-Identifier: Apache-2.0
"""Entropy device (virtio 1.4, 5.4): fills buffers with random bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from virtiova.device.base import Device
from virtiova.features import DeviceId
from virtiova.ring.chain import Chain

MAX_BYTES: Final = 1 << 16
"""The most that one request gets. A device may use less than the entire buffer (virtio 1.4, 5.4.6.2)."""


class Rng(Device):
    """One queue of buffers, each filled from ``source``, a function from a byte count to that many bytes."""

    device_id = DeviceId.ENTROPY
    queues = 1

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source

    def handle(self, queue: int, chain: Chain) -> None:
        """Fill the buffer, up to `MAX_BYTES`."""
        chain.write(self._source(min(chain.writable, MAX_BYTES)))
