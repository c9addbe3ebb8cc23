# SPDX-License-Identifier: Apache-2.0
"""Network device (virtio 1.4, 5.1): frames out of queue 1, frames into queue 0, mergeable buffers, no offloads."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final, Protocol

from virtiova import _core
from virtiova.device.base import Device
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain

RX: Final = 0
TX: Final = 1
MAX_FRAME: Final = 65550
"""Bytes in the largest frame: 64 KiB and an Ethernet header (virtio 1.4, 5.1.6.3.1)."""

_F_MAC: Final = 5
_F_MRG_RXBUF: Final = 15
_F_STATUS: Final = 16
_LINK_UP: Final = 1


class Wire(Protocol):
    """Where frames go to."""

    def send(self, frame: bytes, /) -> None:
        """Take one frame, without the virtio header. Must not wait."""


class Net(Device):
    """Queue 0 receives, queue 1 transmits. Frames that come in through `deliver` wait for a buffer.

    At most ``backlog`` frames wait; what comes on top is dropped and counted, as is a frame that does not
    fit into the buffer that the driver gave, or a transmission of more than `MAX_FRAME` bytes.
    """

    device_id = DeviceId.NET
    bit_names = MappingProxyType({_F_MAC: "MAC", _F_MRG_RXBUF: "MRG_RXBUF", _F_STATUS: "STATUS"})
    queues = 2
    features = 1 << _F_MAC | 1 << _F_MRG_RXBUF | 1 << _F_STATUS

    def __init__(self, wire: Wire, mac: bytes = b"\x52\x54\x00\x76\x69\x6f", *, backlog: int = 256) -> None:
        if len(mac) != 6:
            raise ProtocolError(f"a MAC address of {len(mac)} bytes, wanted 6")
        self._wire = wire
        self._mac = mac
        self._waiting = _core.Backlog(backlog)
        self._engines: tuple[_core.Receive, _core.Transmit] | None = None

    def attach(self, native: _core.Wire) -> None:
        """The wire can be used natively too: this device has engines."""
        self._engines = _core.Receive(native, self._waiting), _core.Transmit(native)
        self.native = True

    def engine(self, queue: int) -> _core.Engine | None:
        """What serves a queue natively, set up for what the driver took; None with a wire that is Python's alone."""
        if self._engines is None or not self.native:
            return None
        receive, transmit = self._engines
        if queue == TX:
            transmit.set_up(self.header_bytes)
            return transmit
        receive.set_up(self.header_bytes, self.has(_F_MRG_RXBUF))
        return receive

    @property
    def listens(self) -> bool:
        """Whether it takes frames off the wire itself now, by its engine."""
        return self._engines is not None and self._engines[0].running

    @property
    def dropped(self) -> int:
        """Frames lost in either direction since the device was made, by this class or an engine."""
        return self._waiting.dropped + (self._engines[1].dropped if self._engines is not None else 0)

    def config(self) -> bytes:
        """``mac`` and ``status`` of ``struct virtio_net_config``; the link is up."""
        return self._mac + _LINK_UP.to_bytes(2, "little")

    def deliver(self, frame: bytes) -> None:
        """A frame has come in from the network: keep it until the driver has a buffer for it."""
        self._waiting.append(frame)

    def pending(self, queue: int) -> bool:
        """Receive buffers are used only when a frame waits; a transmission is always welcome."""
        return queue == TX or bool(self._waiting)

    def handle(self, queue: int, chain: Chain) -> None:
        """Fill one receive buffer, or send one frame."""
        if queue == RX:
            self._receive(chain)
        else:
            self._transmit(chain)

    def reset(self) -> None:
        """Forget the frames that wait."""
        self._waiting.clear()

    @property
    def header_bytes(self) -> int:
        """Size of ``struct virtio_net_hdr``: ``num_buffers`` comes with VERSION_1 or MRG_RXBUF (virtio 1.4, 5.1.6)."""
        return 12 if self.has(Feature.VERSION_1) or self.has(_F_MRG_RXBUF) else 10

    @property
    def room(self) -> int:
        """How many more frames may wait before `deliver` drops one."""
        return self._waiting.limit - len(self._waiting)

    def wanted(self, queue: int) -> int:
        """With mergeable buffers a frame takes as many as it needs (virtio 1.4, 5.1.6.3)."""
        if queue != RX or not self._waiting or not self.has(_F_MRG_RXBUF):
            return 0
        return self.header_bytes + self._waiting.first

    def handle_together(self, queue: int, chains: Sequence[Chain]) -> None:
        """Spread a frame over buffers, all but the last of them full (virtio 1.4, 5.1.6.4)."""
        data = self._header(len(chains)) + self._waiting.popleft()
        done = 0
        try:
            for chain in chains:
                step = min(chain.writable, len(data) - done)
                chain.write(data[done : done + step])
                done += step
        except AccessError:
            self._waiting.drop()
            raise

    def give_up(self, queue: int) -> None:
        """A frame that is larger than all buffers of the ring."""
        self._waiting.popleft()
        self._waiting.drop()

    def _header(self, buffers: int) -> bytes:
        """No flags, no offload; ``num_buffers`` is 1 for a driver that did not take MRG_RXBUF (5.1.6.4.1)."""
        return bytes(10) + buffers.to_bytes(2, "little")[: self.header_bytes - 10]

    def _receive(self, chain: Chain) -> None:
        frame = self._waiting.popleft()
        header = self._header(1)
        if len(header) + len(frame) > chain.writable:
            self._waiting.drop()
            return
        try:
            chain.write(header + frame)
        except AccessError:
            self._waiting.drop()
            raise

    def _transmit(self, chain: Chain) -> None:
        size = self.header_bytes
        if chain.readable < size:
            raise ProtocolError(f"transmission of {chain.readable} bytes, wanted a header of {size} at least")
        if chain.readable - size > MAX_FRAME:
            self._waiting.drop()
            return
        try:
            chain.read(size)
            frame = chain.read()
        except AccessError:
            self._waiting.drop()
            raise
        self._wire.send(frame)
