# SPDX-License-Identifier: Apache-2.0
"""A device's registers, as far as vhost-user has them: the rest is the front end's own, as in any machine monitor."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from virtiova import _core
from virtiova.addr import UVA
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.errors import AccessError, MachineError, ProtocolError
from virtiova.features import DeviceId, Feature, Status, has
from virtiova.machine.model_transport import ModelMsi
from virtiova.machine.vhost_user.frontend import FrontEnd, drain
from virtiova.machine.vhost_user.memory import SharedMemory
from virtiova.ports import BusMaster, Msi
from virtiova.wire.vhost_user import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    MAX_CONFIG,
    ConfigSpace,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_table,
    encode_vring_fd,
    u64,
)

QUEUE_SIZE: Final = 1024
"""The largest ring that we hand out: vhost-user has no message that asks for the device's own limit."""
MAX_QUEUES: Final = 128
_PACKED_BASE: Final = 0x8000_8000
"""Index 0 and wrap counter 1, of what is available and, in the upper half, of what is used."""
_OWN_BITS: Final = 1 << F_LOG_ALL | 1 << F_PROTOCOL_FEATURES
"""Feature bits of the vhost-user connection, which are none of the device's."""
_QUEUES: Final = {DeviceId.NET: 2, DeviceId.CONSOLE: 2, DeviceId.FS: 2}
"""Queues where it is not one: with several pairs they come in pairs, too."""


@dataclass(frozen=True, slots=True)
class _Ring:
    """A ring as the driver handed it over: of a packed one ``avail`` is the driver's event suppression, ``used`` is the
    device's."""

    size: int
    desc: int
    avail: int
    used: int
    vector: int | None


class VhostUserTransport:
    """The `ports.Transport` of a vhost-user back end of the type ``device_id``, whose features are ``offered``."""

    legacy = False
    byte_order: ByteOrder = "little"
    bus_master: BusMaster | None = None

    def __init__(
        self, front: FrontEnd, memory: SharedMemory, device_id: DeviceId, offered: int, platform: AddressSpace
    ) -> None:
        self._front = front
        self._memory = memory
        self.device_id: int = device_id
        # A call becomes a message that this machine writes, through the same tables, as any machine monitor does.
        # That makes it the control: it shows what stands in front.
        self._messages = ModelMsi(platform, "call")
        self.msi: Msi | None = self._messages
        self._offered = offered
        self._status = 0
        self._written = 0
        self._refused = ""
        self._gone = False
        """The connection was given up over the features: a refusal, in the only way that some have."""
        self.insists = False
        """Bit 33 is asked for also where the back end could not ask for a translation: what then happens is a question
        of its own."""
        self._rings: dict[int, _Ring] = {}
        self._live: dict[int, _Live] = {}
        self.one_by_one = False
        """Regions of memory are added one by one, instead of in one table (CONFIGURE_MEM_SLOTS)."""
        self._kept: list[int] = []
        """Kick descriptors that outlive their rings."""
        self.calls: collections.Counter[int] = collections.Counter()
        """By queue, how often the back end called: at most as often as it did."""
        self._queues = _QUEUES.get(device_id, 1)
        if front.speaks(ProtocolFeature.MQ):
            # For a network device the number is that of its pairs.
            number = front.ask(Request.GET_QUEUE_NUM)
            if not 1 <= number <= MAX_QUEUES:
                raise ProtocolError(f"the back end says that it has {number} queues; 1 to {MAX_QUEUES} make sense")
            self._queues *= number if device_id == DeviceId.NET else 1
            self._queues = max(self._queues, number)

    # -- features and status

    @property
    def confirms(self) -> bool:
        """Whether FEATURES_OK has an answer: the back end's (STATUS, or a refused SET_FEATURES), or our refusal."""
        return bool(self._refused) or self._has_status

    @property
    def refusal(self) -> str:
        """Why the last features were refused; empty if they were not."""
        return self._refused

    @property
    def _has_status(self) -> bool:
        return self._front.speaks(ProtocolFeature.STATUS) and not self._gone

    def reset(self) -> None:
        """Stop all rings, and reset the device as far as the back end has a message for that."""
        self.stop()
        self._messages.disarm()
        if self._front.speaks(ProtocolFeature.RESET_DEVICE):
            self._front.must(Request.RESET_DEVICE)
        self._rings.clear()
        self._written, self._refused = 0, ""
        self._set_status(0)

    def read_features(self) -> int:
        """What the back end offers, without the bits that are the connection's."""
        return self._offered & ~_OWN_BITS

    def write_features(self, bits: int) -> None:
        """Pass the driver's word on as it is, also a bit that was never offered: that answer is the back end's.

        Only what was offered counts as negotiated here, and bit 33 only if the back end can ask.
        """
        self._written = bits
        negotiated = bits & self._offered
        wants = has(negotiated, Feature.ACCESS_PLATFORM)
        asks = self._front.speaks(ProtocolFeature.BACKEND_REQ) and self._front.speaks(ProtocolFeature.REPLY_ACK)
        self._refused = ""
        if wants and not asks and not self.insists:
            self._refuse("bit 33 without BACKEND_REQ and REPLY_ACK: this back end could not ask for a translation")
            return
        word = bits | self._offered & 1 << F_PROTOCOL_FEATURES
        try:
            taken = self._front.set_features(word, translating=wants)
            # Some acknowledge first, and then give up the connection over what they acknowledged.
            self._front.barrier()
        except MachineError as error:
            self._gone = True
            self._refuse(f"SET_FEATURES 0x{word:x}: {error}")
            return
        if not taken:
            self._refuse(f"the back end refused SET_FEATURES 0x{word:x}")

    def _refuse(self, why: str) -> None:
        self._refused = why
        self._front.say(why)

    def read_status(self) -> int:
        """The back end's status where it has one (STATUS), else what the driver wrote."""
        status = self._status
        if self._has_status:
            status = self._front.ask(Request.GET_STATUS) & 0xFF
        return status & ~Status.FEATURES_OK if self._refused else status

    def write_status(self, status: int) -> None:
        """Pass it on where it can be; DRIVER_OK starts the rings, unless somebody has started some by himself."""
        starting = status & Status.DRIVER_OK and not self._status & Status.DRIVER_OK
        if starting and not self._live:
            self._start()
        self._set_status(status)
        if starting:
            self._front.barrier()

    def _set_status(self, status: int) -> None:
        self._status = status
        if self._has_status and not self._front.command(Request.SET_STATUS, u64(status)):
            self._front.say(f"SET_STATUS 0x{status:x} was answered with a failure")

    # -- queues

    def queue_size(self, index: int) -> int:
        """`QUEUE_SIZE` for a queue that exists."""
        return QUEUE_SIZE if 0 <= index < self._queues else 0

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """Take the ring's addresses; the back end gets them at DRIVER_OK."""
        if not 1 <= size <= self.queue_size(index):
            raise ProtocolError(f"queue {index} of size {size}, wanted at most {self.queue_size(index)}")
        if self._live:
            raise ProtocolError(f"queue {index} enabled after DRIVER_OK, wanted before")
        self._rings[index] = _Ring(size, desc, avail, used, vector)

    def _start(self) -> None:
        self.share_memory()
        for index in sorted(self._rings):
            self.start_queue(index, enable=False)
        for index in self._live:
            self.enable(index)

    def share_memory(self) -> None:
        """Tell the back end where all memory is."""
        regions = self._memory.regions
        if self.one_by_one:
            for region in regions:
                self.add_region(region)
            return
        self._front.must(Request.SET_MEM_TABLE, encode_table(regions), [self._memory.fd] * len(regions))

    def add_region(self, region: MemoryRegion) -> None:
        """Tell the back end of one region more (CONFIGURE_MEM_SLOTS)."""
        self._front.must(Request.ADD_MEM_REG, region.encode_single(), [self._memory.fd])

    def start_queue(self, index: int, base: int | None = None, *, enable: bool = True, size: int | None = None) -> None:
        """Hand one ring to the back end, from ``base`` on: an index, or of a packed ring that and the wrap counter, of
        what is available and, in the upper half, of what is used. None: from the beginning. ``size`` is what the back
        end is told, if not what it is."""
        ring = self._rings[index]
        if base is None:
            # A packed ring begins with both wrap counters set.
            base = _PACKED_BASE if has(self._front.accepted, Feature.RING_PACKED) else 0
        self._live[index] = _Live(
            self._front, ring.size if size is None else size, self.address(index), base, self._caller(index, ring)
        )
        if enable:
            self.enable(index)

    def enable(self, index: int, *, on: bool = True) -> None:
        """Let the back end work on a ring, or not, where protocol features are in use: else it always may."""
        if self._front.speaks_at_all:
            self._front.must(Request.SET_VRING_ENABLE, VringState(index, int(on)).encode())

    def stop_queue(self, index: int, seconds: float | None = None) -> int:
        """Take a ring back, within ``seconds`` if they are given; the index (of a packed ring: all four values) at
        which the back end would have gone on."""
        live = self._live.pop(index)
        try:
            posted = self._front.post(Request.GET_VRING_BASE, VringState(index, 0).encode(), need_reply=False)
            reply = self._front.wait(posted, seconds)
            return VringState.decode(reply).value
        finally:
            live.close()

    def replace_call(self, index: int) -> Callable[[], tuple[bool, bool]]:
        """Give a running ring another call descriptor; what tells whether the one before and the new one were used
        since."""
        return self._live[index].replace_call()

    def kick_of(self, index: int) -> Callable[[], None]:
        """What kicks a ring that runs, also once it was taken back, until the connection is closed."""
        kick = os.dup(self._live[index].kick_fd)
        self._kept.append(kick)
        return lambda: _tell(kick)

    def log_queue(self, index: int, used: int) -> None:
        """Tell of a running ring that it is to be logged, and that its used ring is at ``used`` for the log."""
        self._front.must(Request.SET_VRING_ADDR, replace(self.address(index), flags=1, log=used).encode())

    def adopt(self, front: FrontEnd) -> None:
        """Go on by another connection. The rings are where they were, and none of them runs."""
        self.close()
        self._front = front

    @property
    def queues(self) -> int:
        """How many there are."""
        return self._queues

    def address(self, index: int) -> VringAddr:
        """Where a ring is, as the back end is told: IOVAs if bit 33 is negotiated, else our own addresses."""
        ring = self._rings[index]
        where: Callable[[int], int] = self._memory.uva if not self._front.translating else UVA
        return VringAddr(index, 0, where(ring.desc), where(ring.used), where(ring.avail), 0)

    def _caller(self, index: int, ring: _Ring) -> Callable[[], None]:
        def called() -> None:
            self.calls[index] += 1
            self._messages.fire(ring.vector)

        return called

    def stop(self) -> None:
        """Take all rings back that run."""
        for index in list(self._live):
            self.enable(index, on=False)
            self.stop_queue(index)

    def notify(self, index: int) -> None:
        """Kick."""
        live = self._live.get(index)
        if live is None:
            self._front.say(f"kick of queue {index}, which does not run: nobody to tell")
        else:
            live.kick()

    # -- configuration

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration, always asked for from its start: back ends are known to ignore the offset."""
        end = offset + length
        if offset < 0 or length < 0 or end > MAX_CONFIG:
            raise AccessError(offset, length, f"a configuration has {MAX_CONFIG} bytes at most")
        if not self._front.speaks(ProtocolFeature.CONFIG):
            raise MachineError("the back end has no configuration to read (protocol feature CONFIG)")
        reply = self._front.exchange(Request.GET_CONFIG, ConfigSpace(0, 0, bytes(end)).encode())
        data = ConfigSpace.decode(reply).data if reply else b""
        if len(data) != end:
            raise ProtocolError(f"asked for {end} bytes of configuration, got {len(data)}")
        return data[offset:]

    def write_config(self, offset: int, data: bytes) -> None:
        """Bytes of the configuration (SET_CONFIG)."""
        if not self._front.speaks(ProtocolFeature.CONFIG):
            raise MachineError("the back end has no configuration to write (protocol feature CONFIG)")
        if not self._front.command(Request.SET_CONFIG, ConfigSpace(offset, 0, data).encode()):
            self._front.say(f"SET_CONFIG 0x{offset:x}+0x{len(data):x} was answered with a failure")

    def close(self) -> None:
        """Let go of the rings' descriptors, without a word to anybody."""
        for live in self._live.values():
            live.close()
        self._live.clear()
        while self._kept:
            os.close(self._kept.pop())


class _Live:
    """A ring that the back end serves: its three eventfds."""

    def __init__(self, front: FrontEnd, size: int, addresses: VringAddr, base: int, called: Callable[[], None]) -> None:
        self._front = front
        index = self._index = addresses.index
        self._fds: list[int] = []
        self._called = called
        self._calls = 0
        try:
            self._kick, self._call, self._error = (self._eventfd() for _ in range(3))
            front.must(Request.SET_VRING_NUM, VringState(index, size).encode())
            front.must(Request.SET_VRING_BASE, VringState(index, base).encode())
            front.must(Request.SET_VRING_ADDR, addresses.encode())
            payload = encode_vring_fd(index, True)
            front.must(Request.SET_VRING_ERR, payload, [self._error])
            front.must(Request.SET_VRING_CALL, payload, [self._call])
            front.watch(self._call, self._take_call)
            front.watch(self._error, self._take_error)
            front.must(Request.SET_VRING_KICK, payload, [self._kick])
        except BaseException:
            self.close()
            raise

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd

    @property
    def kick_fd(self) -> int:
        """The kick descriptor."""
        return self._kick

    def _take_call(self) -> None:
        if drain(self._call):
            self._calls += 1
            self._called()

    def replace_call(self) -> Callable[[], tuple[bool, bool]]:
        """Another call descriptor; whether the one before and the new one were used since."""
        old, front = self._call, self._front
        front.unwatch(old)
        self._call = self._eventfd()
        front.must(Request.SET_VRING_CALL, encode_vring_fd(self._index, True), [self._call])
        drain(old)
        self._calls = 0
        front.watch(self._call, self._take_call)
        return lambda: (drain(old), self._calls > 0)

    def _take_error(self) -> None:
        if drain(self._error):
            self._front.say(f"the back end reported an error of ring {self._index}")

    def kick(self) -> None:
        """Tell the back end that the available ring has moved."""
        _tell(self._kick)

    def close(self) -> None:
        """Close the eventfds."""
        while self._fds:
            fd = self._fds.pop()
            self._front.unwatch(fd)
            os.close(fd)


def _tell(kick: int) -> None:
    """Kick. Full is told, too: who holds the other end may have counted it up, or make us wait, which has an end."""
    _core.tell(kick)
