# SPDX-License-Identifier: Apache-2.0
"""The class that users subclass: a virtio device without any I/O, which any host can carry.

::

    class Rng(Device):
        device_id, queues = DeviceId.ENTROPY, 1

        def handle(self, queue: int, chain: Chain) -> None:
            chain.write(os.urandom(chain.writable))

A device does not know who hosts it, nor where its bytes come from: that is the address space's matter.
"""

from __future__ import annotations

from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain


class Device:
    """A virtio device: its type, its own feature bits, its configuration, and what it does with a request."""

    device_id: DeviceId
    """The virtio device type (virtio 1.4, 5)."""
    queues: int = 1
    """Number of virtqueues."""
    features: int = 0
    """Device-specific feature bits that it offers. Ring and transport bits are the host's to add."""
    accepted: int = 0
    """All feature bits that the driver took; set by the host before the first request, 0 after a reset."""

    def config(self) -> bytes:
        """The device-specific configuration as the driver reads it, little-endian."""
        return b""

    def handle(self, queue: int, chain: Chain) -> None:
        """Do what ``chain`` asks for. The host pushes it back when this returns.

        An `AccessError` may be let through: the host then pushes the chain with what was written. Any
        other `ProtocolError` means that the request makes no sense, and leaves the device in need of a reset.
        """
        raise NotImplementedError

    def pending(self, queue: int) -> bool:
        """Whether a chain of ``queue`` would be used now. The host pops none while this is false.

        True for a queue of requests. A queue of buffers that wait for the outside world (network
        receive) says here whether the world has sent anything: such work comes without a kick.
        """
        return True

    def reset(self) -> None:
        """Back to the state after power-on. What is stored on a medium stays."""

    def has(self, bit: Feature | int) -> bool:
        """Whether the driver took feature ``bit`` (a bit number)."""
        return bool(self.accepted >> bit & 1)
