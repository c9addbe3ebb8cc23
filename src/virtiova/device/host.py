# SPDX-License-Identifier: Apache-2.0
"""What every host of a device does with a queue, whatever brought the kick."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from virtiova.device.base import Device
from virtiova.errors import AccessError
from virtiova.ring.split_device import SplitDevice


@dataclass(frozen=True, slots=True)
class Served:
    """What one look at a queue came to."""

    chains: int
    """How many chains were handled and pushed back."""
    drained: bool
    """The driver has no more, and was asked for a kick. Else buffers may be left that wait for the device."""


def serve_queue(device: Device, index: int, ring: SplitDevice) -> Served:
    """Let ``device`` handle all that it can of queue ``index``, and leave the driver knowing whether to kick.

    A buffer that the device may not touch is no reason to stop: its chain is pushed back with what was
    written, if the device itself did not answer it. Raises `ProtocolError` when ring or request have no
    meaning, or the ring cannot be reached: the host then sets DEVICE_NEEDS_RESET (virtio 1.4, 2.1.2).
    """
    ring.disable_notify()
    chains = 0
    while device.pending(index):
        chain = ring.pop()
        if chain is None:
            if ring.enable_notify():
                continue
            return Served(chains, drained=True)
        # The address space has recorded a miss; the driver sees a chain that is shorter than it asked for.
        with contextlib.suppress(AccessError):
            device.handle(index, chain)
        ring.push(chain, chain.written)
        chains += 1
    return Served(chains, drained=False)
