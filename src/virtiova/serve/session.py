# SPDX-License-Identifier: Apache-2.0
"""The back end's half of a vhost-user connection, without any I/O: bytes and descriptors in, events and replies out.

The session knows the protocol and nothing else: it judges the form of every message, answers what
needs nobody's help, and hands the rest to its host as events with tokens. A message that is wrong in a
way that the front end can be told of (it asked for a reply) is refused; any other raises `ProtocolError`,
after which the connection is of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtiova.errors import ProtocolError
from virtiova.features import Feature, Status, has
from virtiova.serve import events
from virtiova.serve.events import Event, Refused
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    ConfigSpace,
    Framer,
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    LogDescription,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

TOLERATED: Final = 1 << Feature.RING_EVENT_IDX | 1 << Feature.RING_INDIRECT_DESC | 1 << Feature.ACCESS_PLATFORM
"""Feature bits that are taken even from a front end that they were not offered to.

QEMU 7.2's vhost-user-rng does not look at the back end's features and sends these. The host has to do
what they say in any case; to ignore one would be to read the rings wrongly.
"""

MAX_QUEUES: Final = 256
MAX_RING: Final = 32768

_NEEDS: Final[dict[int, ProtocolFeature]] = {
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.SET_LOG_BASE: ProtocolFeature.LOG_SHMFD,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
}
"""Requests that exist only once a protocol feature was agreed upon."""


_DONE: Final = Message(Request.IOTLB_MSG).acknowledge()


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back end offers. Nothing else is ever agreed upon."""

    features: int
    """Virtio feature bits, with bit 30 for protocol features."""
    protocol: int
    queues: int = 1
    slots: int = 8
    """Regions of memory at a time, for CONFIGURE_MEM_SLOTS."""


class Session:
    """One connection of a front end: read `wanted` bytes at a time, hand them to `receive`, send the `replies`."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._framer = Framer()
        self._replies: list[Message] = []
        self._open: dict[int, Message] = {}
        self._next_token = 0
        self._orphans: list[int] = []
        self.features = 0
        """The virtio features that were accepted."""
        self.protocol = 0
        """The protocol features that were agreed upon."""
        self.status = 0
        """The device status: as the driver wrote it; a host may add to it."""
        self._owned = False
        self.last = 0
        """The request that was looked at last, for whoever has to say what went wrong."""
        self._handlers: dict[int, Callable[[Message], Event | Refused | None]] = {
            Request.GET_FEATURES: lambda m: self._number(m, self._offer.features),
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._owner,
            Request.RESET_OWNER: lambda m: events.RingsDisabled(self._token(m)),
            Request.RESET_DEVICE: lambda m: events.DeviceReset(self._token(m)),
            Request.SET_MEM_TABLE: self._memory_table,
            Request.ADD_MEM_REG: self._add_region,
            Request.REM_MEM_REG: self._remove_region,
            Request.GET_MAX_MEM_SLOTS: lambda m: self._number(m, self._offer.slots),
            Request.SET_LOG_BASE: self._log_base,
            Request.SET_LOG_FD: lambda m: events.LogNotice(self._token(m), _one_fd(m)),
            Request.SET_VRING_NUM: self._ring_size,
            Request.SET_VRING_ADDR: self._ring_address,
            Request.SET_VRING_BASE: self._ring_base,
            Request.GET_VRING_BASE: lambda m: events.RingStopped(self._token(m), self._state(m).index),
            Request.SET_VRING_KICK: lambda m: events.RingKick(self._token(m), *self._ring_fd(m)),
            Request.SET_VRING_CALL: lambda m: events.RingCall(self._token(m), *self._ring_fd(m)),
            Request.SET_VRING_ERR: lambda m: events.RingErr(self._token(m), *self._ring_fd(m)),
            Request.SET_VRING_ENABLE: self._ring_enable,
            Request.GET_PROTOCOL_FEATURES: lambda m: self._number(m, self._offer.protocol),
            Request.SET_PROTOCOL_FEATURES: self._set_protocol,
            Request.GET_QUEUE_NUM: lambda m: self._number(m, self._offer.queues),
            Request.SET_BACKEND_REQ_FD: lambda m: events.BackendChannel(self._token(m), _one_fd(m)),
            Request.IOTLB_MSG: self._iotlb,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight,
            Request.SET_INFLIGHT_FD: self._set_inflight,
            Request.GET_STATUS: lambda m: self._number(m, self.status),
            Request.SET_STATUS: self._set_status,
        }

    def _owner(self, message: Message) -> Event | None:
        if self._owned:
            return events.NewOwner(self._token(message))
        self._owned = True
        self._nothing(message)
        return None

    def agreed(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature was agreed upon."""
        return bool(self.protocol >> feature & 1)

    def reset(self) -> None:
        """The device is as before any driver. What concerns the connection itself stays as it was agreed upon."""
        self.status = 0
        self.features &= 1 << wire.F_PROTOCOL_FEATURES | 1 << wire.F_LOG_ALL

    # -- in

    @property
    def wanted(self) -> int:
        """Bytes to read next, at most."""
        return self._framer.wanted

    @property
    def idle(self) -> bool:
        """Whether there is no message that has begun and not ended."""
        return self._framer.idle

    def receive(self, data: bytes, fds: tuple[int, ...] = ()) -> list[Event | Refused]:
        """What the front end wants; ``fds`` came with the first byte of ``data``.

        After `ProtocolError` the connection is to be closed, and what `abandon` gives as well.
        """
        found: list[Event | Refused] = []
        todo = self._framer.feed(data, fds)
        while todo:
            try:
                event = self._take(todo[0])
            except ProtocolError:
                # None of the later messages is looked at, and of the earlier events nobody hears.
                for message in todo:
                    self._orphans += message.fds
                raise
            del todo[0]
            if event is not None:
                found.append(event)
        return found

    @property
    def takes_runs(self) -> bool:
        """Whether the next byte begins a message, and IOTLB messages may come: then `took` may stand for `receive`."""
        return self._framer.idle and has(self.features, Feature.ACCESS_PLATFORM)

    def took(self, replies: int) -> None:
        """IOTLB messages were done around `receive`, and so many of them want to be acknowledged."""
        self.last = Request.IOTLB_MSG
        self._replies += [_DONE] * replies

    def abandon(self) -> tuple[int, ...]:
        """Forget all that is unfinished; the descriptors to close."""
        orphans, self._orphans = tuple(self._orphans), []
        return orphans + self._framer.abandon()

    def _take(self, message: Message) -> Event | Refused | None:
        self.last = message.request
        name = wire.request_name(message.request)
        try:
            if message.reply:
                raise ProtocolError(f"{name}: a reply, where nothing was asked")
            handler = self._handlers.get(message.request)
            if handler is None:
                raise ProtocolError(f"{name}: a request that is not supported, and was not offered")
            needed = _NEEDS.get(message.request)
            if needed is not None and not self.agreed(needed):
                raise ProtocolError(f"{name}: {needed.name} was not agreed upon")
            wanted = _FDS.get(message.request, (0, 0))
            if not wanted[0] <= len(message.fds) <= wanted[1]:
                raise ProtocolError(
                    f"{name}: {len(message.fds)} file descriptors, wanted "
                    + (f"{wanted[0]}" if wanted[0] == wanted[1] else f"{wanted[0]} to {wanted[1]}")
                )
            return handler(message)
        except ProtocolError as problem:
            self._open = {token: asked for token, asked in self._open.items() if asked is not message}
            if not self._may_refuse(message):
                raise
            self._replies.append(message.acknowledge(False))
            return Refused(message.request, str(problem), message.fds)

    def _may_refuse(self, message: Message) -> bool:
        """Whether the front end waits for an answer that can be a failure: not where it waits for a value."""
        return self._acknowledged(message) and message.request not in _ANSWERED and not message.reply

    def _acknowledged(self, message: Message) -> bool:
        # QEMU and DPDK wait for the answer to an IOTLB message whenever they ask for one, agreed upon or not.
        return message.need_reply and (self.agreed(ProtocolFeature.REPLY_ACK) or message.request == Request.IOTLB_MSG)

    # -- out

    def replies(self) -> list[Message]:
        """What is to be sent, in order. The descriptors in it are the host's, who gave them."""
        out, self._replies = self._replies, []
        return out

    def acknowledge(self, token: int, problem: str = "") -> None:
        """What the event with ``token`` wants is done, or cannot be for a reason. Raises `ProtocolError` for a
        problem that the front end has not asked to be told of: it would go on as if there were none."""
        message = self._open.pop(token)
        if self._acknowledged(message):
            self._replies.append(message.acknowledge(not problem))
        elif problem:
            raise ProtocolError(f"{wire.request_name(message.request)}: {problem}")

    def answer(self, token: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Answer the event with ``token`` by a value."""
        self._replies.append(self._open.pop(token).answer(payload, fds))

    def _token(self, message: Message) -> int:
        self._next_token += 1
        self._open[self._next_token] = message
        return self._next_token

    # -- handlers: judge the form, keep what the session itself has to know

    def _number(self, message: Message, value: int) -> None:
        # Some front ends send the number that they ask for along.
        if len(message.payload) not in (0, 8):
            raise ProtocolError(f"{wire.request_name(message.request)} with {len(message.payload)} bytes, wanted none")
        self._replies.append(message.answer(wire.u64(value)))

    def _nothing(self, message: Message) -> None:
        self.acknowledge(self._token(message))

    def _set_features(self, message: Message) -> Event:
        features = wire.u64_of(message.payload)
        if unknown := features & ~self._offer.features & ~TOLERATED:
            raise ProtocolError(f"features 0x{unknown:x} were never offered")
        self.features = features
        return events.FeaturesSet(self._token(message), features)

    def _set_protocol(self, message: Message) -> Event:
        features = wire.u64_of(message.payload)
        if unknown := features & ~self._offer.protocol:
            raise ProtocolError(f"protocol features 0x{unknown:x} were never offered")
        self.protocol = features
        return events.ProtocolFeaturesSet(self._token(message), features)

    def _set_status(self, message: Message) -> Event:
        status = wire.u64_of(message.payload)
        if status > 0xFF:
            raise ProtocolError(f"device status 0x{status:x}, wanted a byte")
        # Only a reset ends that (virtio 1.4, 2.1.2).
        self.status = status | self.status & Status.DEVICE_NEEDS_RESET if status else 0
        return events.StatusSet(self._token(message), status)

    def _memory_table(self, message: Message) -> Event:
        regions = wire.decode_table(message.payload)
        if len(regions) != len(message.fds):
            raise ProtocolError(f"a memory table of {len(regions)} regions with {len(message.fds)} file descriptors")
        return events.MemoryTable(self._token(message), regions, message.fds)

    def _add_region(self, message: Message) -> Event:
        region = MemoryRegion.decode_single(message.payload)
        return events.RegionAdded(self._token(message), region, _one_fd(message))

    def _remove_region(self, message: Message) -> Event:
        return events.RegionRemoved(self._token(message), MemoryRegion.decode_single(message.payload), message.fds)

    def _iotlb(self, message: Message) -> Event:
        if not has(self.features, Feature.ACCESS_PLATFORM):
            raise ProtocolError("an IOTLB message, but bit 33 was not accepted")
        iotlb = IotlbMessage.decode(message.payload)
        if iotlb.kind is IotlbKind.UPDATE:
            return events.IotlbUpdated(self._token(message), iotlb)
        if iotlb.kind is IotlbKind.INVALIDATE:
            return events.IotlbInvalidated(self._token(message), iotlb)
        raise ProtocolError(f"an IOTLB message of type {iotlb.kind.name}, which is the back end's to send")

    def _index(self, index: int) -> int:
        if index >= self._offer.queues:
            raise ProtocolError(f"ring {index}, wanted less than {self._offer.queues}")
        return index

    def _state(self, message: Message) -> VringState:
        state = VringState.decode(message.payload)
        self._index(state.index)
        return state

    def _ring_size(self, message: Message) -> Event:
        state = self._state(message)
        self._ring_of(state.value)
        return events.RingSize(self._token(message), state.index, state.value)

    def _ring_base(self, message: Message) -> Event:
        state = self._state(message)
        if state.value > 0xFFFF and not self._packed:
            raise ProtocolError(f"base {state.value} of a split ring, wanted 16 bits")
        # In the upper half of a packed ring's, what is used. Some front ends leave it out, and nobody goes on with what
        # was taken and not given back but by what is noted as in flight.
        return events.RingBase(self._token(message), state.index, state.value & 0xFFFF)

    @property
    def _packed(self) -> bool:
        return has(self.features, Feature.RING_PACKED)

    def _is_ring(self, size: int) -> bool:
        return 1 <= size <= MAX_RING and (self._packed or not size & (size - 1))

    def _ring_of(self, size: int) -> None:
        """Raise `ProtocolError` for a size that no ring has."""
        if not self._is_ring(size):
            power = "1" if self._packed else "a power of two"
            raise ProtocolError(f"a ring of {size} entries, wanted {power} of at most {MAX_RING}")

    def _ring_address(self, message: Message) -> Event:
        address = VringAddr.decode(message.payload)
        return events.RingAddress(self._token(message), self._index(address.index), address)

    def _ring_enable(self, message: Message) -> Event:
        state = self._state(message)
        if state.value > 1:
            raise ProtocolError(f"{state.value} for enabled, wanted 0 or 1")
        return events.RingEnabled(self._token(message), state.index, bool(state.value))

    def _ring_fd(self, message: Message) -> tuple[int, int | None]:
        index, has_fd = wire.decode_vring_fd(message.payload)
        if has_fd != bool(message.fds):
            raise ProtocolError(f"{len(message.fds)} file descriptors, but bit 8 says {'one' if has_fd else 'none'}")
        return self._index(index), message.fds[0] if message.fds else None

    def _get_config(self, message: Message) -> Event | Refused:
        try:
            asked = ConfigSpace.decode(message.payload)
        except ProtocolError as problem:
            # Its failure has a form of its own: no payload.
            self._replies.append(message.answer(b""))
            return Refused(message.request, str(problem), message.fds)
        return events.ConfigRead(self._token(message), asked.offset, len(asked.data), asked.flags)

    def _set_config(self, message: Message) -> Event:
        written = ConfigSpace.decode(message.payload)
        return events.ConfigWritten(self._token(message), written.offset, written.data, written.flags)

    def _get_inflight(self, message: Message) -> Event:
        wanted = self._inflight(message)
        return events.InflightWanted(self._token(message), wanted)

    def _set_inflight(self, message: Message) -> Event:
        return events.InflightSet(self._token(message), self._inflight(message), _one_fd(message))

    def _inflight(self, message: Message) -> InflightDescription:
        wanted = InflightDescription.decode(message.payload)
        size = wanted.queue_size
        if not 1 <= wanted.queues <= self._offer.queues or not self._is_ring(size):
            raise ProtocolError(
                f"what is in flight in {wanted.queues} rings of {size} entries: there are no such rings"
            )
        return wanted

    def _log_base(self, message: Message) -> Event:
        return events.LogSet(self._token(message), LogDescription.decode(message.payload), _one_fd(message))


def _one_fd(message: Message) -> int:
    (fd,) = message.fds
    return fd


_FDS: Final[dict[int, tuple[int, int]]] = {
    Request.SET_MEM_TABLE: (0, wire.MAX_FDS),
    Request.ADD_MEM_REG: (1, 1),
    Request.REM_MEM_REG: (0, 1),
    Request.SET_LOG_BASE: (1, 1),
    Request.SET_LOG_FD: (1, 1),
    Request.SET_VRING_KICK: (0, 1),
    Request.SET_VRING_CALL: (0, 1),
    Request.SET_VRING_ERR: (0, 1),
    Request.SET_BACKEND_REQ_FD: (1, 1),
    Request.SET_INFLIGHT_FD: (1, 1),
}
"""Fewest and most descriptors with a request; the others have none."""

_ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.SET_LOG_BASE,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
    }
)
"""Requests that have an answer of their own, whether one was asked for or not."""
