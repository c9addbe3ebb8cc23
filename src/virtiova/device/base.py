# SPDX-License-Identifier: Apache-2.0
"""The class that users subclass: a virtio device without any I/O, which any host can carry.

::

    class Rng(Device):
        device_id, queues = DeviceId.ENTROPY, 1

        def handle(self, queue: int, chain: Chain) -> None:
            chain.write(os.urandom(min(chain.writable, 4096)))

What a driver says that there is room for need not be there: a device bounds what it takes in memory by itself.
A device does not know who hosts it, nor where its bytes come from: that is the address space's matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from virtiova._core import Engine
from virtiova.errors import AccessError
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain


class Source(Protocol):
    """Something outside that a device hears from: a network, a terminal. The host waits for it, along with the kicks.

    After `ready` the host looks at `Device.pending` of every queue again: what came may be waited for there.
    """

    def fileno(self) -> int:
        """What to wait for; the same number until `events` has said 0."""

    def events(self) -> int:
        """``selectors.EVENT_READ | selectors.EVENT_WRITE``, asked again before each wait; 0 for nothing now."""

    def ready(self, events: int) -> None:
        """Some of those events are there. Moves bytes between the outside and the device; never waits."""


class Device:
    """A virtio device: its type, its own feature bits, its configuration, and what it does with a request."""

    device_id: DeviceId
    """The virtio device type (virtio 1.4, 5)."""
    queues: int = 1
    """Number of virtqueues."""
    features: int = 0
    """Device-specific feature bits that it offers. Ring and transport bits are the host's to add."""
    bit_names: Mapping[int, str] = MappingProxyType({})
    """What the specification calls device-specific bits, for logs."""
    accepted: int = 0
    """All feature bits that the driver took; set by the host before the first request, 0 after a reset."""
    native: bool = False
    """Whether `engine` may say something else than None. Then a host makes a thread for each queue."""
    sources: Sequence[Source] = ()
    """What the host is to wait for on the device's behalf."""

    def config(self) -> bytes:
        """The device-specific configuration as the driver reads it, little-endian."""
        return b""

    def configure(self, offset: int, data: bytes) -> None:
        """The driver wrote ``data`` at ``offset`` of the configuration, within its length.

        Without effect unless a device has fields that are the driver's to write.
        """

    def handle(self, queue: int, chain: Chain) -> None:
        """Do what ``chain`` asks for. The host pushes it back when this returns.

        An `AccessError` may be let through: the host then pushes the chain with what was written. Any
        other `ProtocolError` means that the request makes no sense, and leaves the device in need of a reset.
        """
        raise NotImplementedError

    def handle_batch(self, queue: int, chains: Sequence[Chain]) -> None:
        """`handle` for several, in the order in which they came. The host pushes them all back when this returns.

        A device that does better with many at a time than one by one says here how. It gets as many as are there, up
        to a few dozen, of a queue that is always `pending`; and one at a time, too, in hosts that have no more.
        """
        for chain in chains:
            # One that is out of reach is no reason to leave the others.
            with contextlib.suppress(AccessError):
                self.handle(queue, chain)

    def pending(self, queue: int) -> bool:
        """Whether a chain of ``queue`` would be used now. The host pops none while this is false.

        True for a queue of requests. A queue of buffers that wait for the outside world (network
        receive) says here whether the world has sent anything: such work comes without a kick.
        """
        return True

    def wanted(self, queue: int) -> int:
        """Bytes of room that the next piece of work of ``queue`` takes, in as many chains as it may be.

        0, as usual: one chain, whatever its room. Else the host pops chains until they have that room, hands them to
        `handle_together`, and leaves them in the ring as long as there are not enough of them.
        """
        return 0

    def handle_together(self, queue: int, chains: Sequence[Chain]) -> None:
        """`handle` for chains with room for what was `wanted`. The driver sees all of them used at once.

        After an `AccessError` the driver is told of none of what was written.
        """
        raise NotImplementedError

    def give_up(self, queue: int) -> None:
        """The ring has not the room that was `wanted`, or in too many pieces, and never will: drop that work."""
        raise NotImplementedError

    def engine(self, queue: int) -> Engine | None:
        """What serves ``queue`` without Python, by the features that were taken and the state that the device is in.

        None, as usual: `handle` does. Else a host may let a thread run it, and call `handle` for what it leaves; so
        whatever it changes has to be such as another thread may change. Asked for anew after each thing that may
        make a difference, while no engine runs.
        """
        return None

    def finish(self, queue: int, chain: Chain, found: bytes) -> None:
        """Answer a chain that an engine has done, and could not give back: ``found`` is what was read, or b"".

        From the start, as usual. A device whose engine leaves chains with an answer says here how it is given.
        """
        self.handle(queue, chain)

    def reset(self) -> None:
        """Back to the state after power-on. What is stored on a medium stays."""

    def has(self, bit: Feature | int) -> bool:
        """Whether the driver took feature ``bit`` (a bit number)."""
        return bool(self.accepted >> bit & 1)
