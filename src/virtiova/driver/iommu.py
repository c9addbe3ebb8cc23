# SPDX-License-Identifier: Apache-2.0
"""The virtio-iommu device (virtio 1.4, 5.13), driven like any other: requests, and the events that it reports.

Its queues take guest-physical addresses: it is the IOMMU, and nothing is in front of it.
"""

from __future__ import annotations

from typing import Final

from virtiova.addr import Access, DmaAddr
from virtiova.dma.ops import DmaOps
from virtiova.driver.base import Queue
from virtiova.driver.negotiate import begin, driver_ok, finish, give_up
from virtiova.errors import MachineError, NegotiationError, ProtocolError
from virtiova.features import DeviceId, Feature, mask
from virtiova.ports import Transport
from virtiova.ring.ends import Segment
from virtiova.wire import virtio_iommu as wire

TAKEN: Final = mask([*range(wire.F_BYPASS_CONFIG + 1), Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.RING_PACKED])
"""The bits that this driver takes if they are offered."""
EVENTS: Final = 256
"""Event buffers in flight. QEMU reports every four bytes of a refused access by themselves."""
_POLLS: Final = 20_000
_PENDING: Final = 0xEE
_REQUEST_BYTES: Final = 128
"""Room for the device-readable part of any request."""


class IommuDriver:
    """The driver: brought up when it is made, DRIVER_OK included.

    ``ops`` give memory that the device reaches by guest-physical address, ``taken`` are the feature bits that are
    taken if they are offered. Requests return the device's status
    (`wire.Status`, or a number that the specification does not have) and never raise for it. `NegotiationError` if
    the device refuses its features, `MachineError` if it does not answer.
    """

    def __init__(self, transport: Transport, ops: DmaOps, *, taken: int = TAKEN) -> None:
        if transport.device_id != DeviceId.IOMMU:
            raise ProtocolError(f"a driver for device type {DeviceId.IOMMU} on type {transport.device_id}")
        self.transport = transport
        offered = begin(transport)
        self.negotiated = finish(transport, offered, offered & taken)
        if self.negotiated.refused:
            give_up(transport)
            raise NegotiationError(f"virtio-iommu refuses features 0x{self.negotiated.written:x}")
        if transport.bus_master is not None:
            transport.bus_master.set_bus_master(True)
        self.config = wire.Config.unpack(transport.read_config(0, wire.CONFIG_SIZE), self.negotiated.accepted)
        self._requests = Queue(transport, wire.REQUEST_QUEUE, ops, self.negotiated)
        self._events = Queue(transport, wire.EVENT_QUEUE, ops, self.negotiated, size=EVENTS)
        self._buffer = ops.alloc(_REQUEST_BYTES + self.config.probe_size + wire.TAIL_SIZE)
        self._reports = ops.alloc(EVENTS * wire.EVENT_SIZE)
        self._slots: dict[int, int] = {}
        self.overruns = 0
        """How often every event buffer was found used: later events found none, and are lost."""
        for queue in (self._requests, self._events):
            queue.enable()
        for slot in range(self._events.ring.layout.size):
            self._give(slot)
        driver_ok(transport)
        self._events.go()

    # -- requests ------------------------------------------------------------------------------------------------

    def attach(self, domain: int, endpoint: int, *, flags: int = 0) -> int:
        """ATTACH: the endpoint uses the domain, which is made if it does not exist; its status."""
        return self.request(wire.attach(domain, endpoint, flags))

    def detach(self, domain: int, endpoint: int) -> int:
        """DETACH; its status."""
        return self.request(wire.detach(domain, endpoint))

    def map(self, domain: int, first: int, last: int, physical: int, access: Access = Access.RW) -> int:
        """MAP ``first`` to ``last`` (inclusive); its status."""
        return self.request(wire.map_request(domain, first, last, physical, access))

    def unmap(self, domain: int, first: int, last: int) -> int:
        """UNMAP all that lies in ``first`` to ``last`` (inclusive); its status. It acts at once."""
        return self.request(wire.unmap_request(domain, first, last))

    def probe(self, endpoint: int) -> list[wire.ReservedRegion]:
        """PROBE: the regions that must not be mapped. Empty if the device knows no PROBE, or not the endpoint."""
        if not self.negotiated.has(wire.F_PROBE):
            return []
        status, answer = self._exchange(wire.probe(endpoint), self.config.probe_size)
        return wire.properties(answer) if status == wire.Status.OK else []

    def request(self, body: bytes) -> int:
        """Any request without an answer but its status: the status."""
        return self._exchange(body, 0)[0]

    def _exchange(self, body: bytes, answer: int) -> tuple[int, bytes]:
        """Send a request and wait; its status and the ``answer`` bytes before it."""
        buffer = self._buffer
        buffer.write(0, body)
        buffer.write(_REQUEST_BYTES, bytes([_PENDING]) * (answer + wire.TAIL_SIZE))
        readable = Segment(DmaAddr(buffer.addr), len(body), False)
        writable = Segment(DmaAddr(buffer.addr + _REQUEST_BYTES), answer + wire.TAIL_SIZE, True)
        self._requests.add([readable, writable])
        self._requests.go()
        used = None
        for _ in range(_POLLS):
            used = self._requests.ring.poll()
            if used is not None:
                break
            # Any register will do: it is a round trip, in which the device gets to work.
            self.transport.read_status()
        if used is None:
            raise MachineError("virtio-iommu does not answer its requests")
        tail = buffer.read(_REQUEST_BYTES + answer, wire.TAIL_SIZE)
        return wire.status_of(tail, used.length), buffer.read(_REQUEST_BYTES, answer)

    # -- bypass --------------------------------------------------------------------------------------------------

    @property
    def bypass(self) -> bool | None:
        """``config.bypass``: may endpoints that are not attached reach everything? None without F_BYPASS_CONFIG."""
        if not self.negotiated.has(wire.F_BYPASS_CONFIG):
            return None
        return bool(self.transport.read_config(wire.CONFIG_BYPASS, 1)[0])

    def set_bypass(self, on: bool) -> None:
        """Write ``config.bypass``, and read it back: `MachineError` if the device did not take it."""
        self.transport.write_config(wire.CONFIG_BYPASS, bytes([on]))
        if self.bypass is not on:
            raise MachineError(f"virtio-iommu does not take bypass := {int(on)}")

    # -- events --------------------------------------------------------------------------------------------------

    def events(self) -> list[tuple[wire.Event, bytes]]:
        """The events since the last call, oldest first, each with its raw bytes; their buffers are given back."""
        found = []
        slots = []
        while (used := self._events.ring.poll()) is not None:
            slot = self._slots.pop(used.head)
            data = self._reports.read(slot * wire.EVENT_SIZE, wire.EVENT_SIZE)
            found.append((wire.Event.unpack(data, used.length), data))
            slots.append(slot)
        if slots and not self._slots:
            self.overruns += 1
        for slot in slots:
            self._give(slot)
        if slots:
            self._events.go()
        return found

    def _give(self, slot: int) -> None:
        """Let the device have an event buffer; published with the next `Queue.go`."""
        buffer = DmaAddr(self._reports.addr + slot * wire.EVENT_SIZE)
        self._slots[self._events.ring.add([Segment(buffer, wire.EVENT_SIZE, True)])] = slot
