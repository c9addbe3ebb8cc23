# SPDX-License-Identifier: Apache-2.0
"""What is asked of a device that nobody gave requests for: by its type, as the standard drivers do."""

from __future__ import annotations

import struct
from collections.abc import Callable

from virtiova.device.base import Device
from virtiova.features import DeviceId
from virtiova.testing.device_stand import Ask
from virtiova.testing.spaces import payload

SECTOR = 512


def _blk(device: Device) -> list[Ask]:
    """Virtio 1.4, 5.2.6: write a sector, read it back, flush, say who it is, and what no device knows."""
    first = struct.pack("<IIQ", 1, 0, 1)
    asks = [
        Ask("write a sector", first + payload(SECTOR, 3), 1),
        Ask("read a sector", struct.pack("<IIQ", 0, 0, 1), SECTOR + 1),
        Ask("identify", struct.pack("<IIQ", 8, 0, 0), 21),
        Ask("a request that nobody knows", struct.pack("<IIQ", 0x7777, 0, 0), 1),
    ]
    if device.features >> 9 & 1:
        asks.append(Ask("flush", struct.pack("<IIQ", 4, 0, 0), 1))
    return asks


def _rng(device: Device) -> list[Ask]:
    """Virtio 1.4, 5.4.6."""
    return [Ask("random bytes", b"", 64), Ask("one random byte", b"", 1)]


def _net(device: Device) -> list[Ask]:
    """Virtio 1.4, 5.1.6: frames with a header, to be sent."""
    return [
        Ask("send a frame", bytes(12) + payload(60, 1), 0, 1),
        Ask("send another", bytes(12) + payload(1514, 2), 0, 1),
    ]


def _console(device: Device) -> list[Ask]:
    """Virtio 1.4, 5.3.6: output of the first port."""
    return [Ask("print", b"hello, world\r\n", 0, 1)]


KNOWN: dict[int, Callable[[Device], list[Ask]]] = {
    DeviceId.BLOCK: _blk,
    DeviceId.ENTROPY: _rng,
    DeviceId.NET: _net,
    DeviceId.CONSOLE: _console,
}


def default_asks(device: Device) -> list[Ask]:
    """Requests for a device: those of its type; else some bytes, and room for some, on each queue."""
    if int(device.device_id) in KNOWN:
        return KNOWN[int(device.device_id)](device)
    return [Ask(f"bytes to queue {queue}", payload(16, queue), 64, queue) for queue in range(min(device.queues, 8))]
