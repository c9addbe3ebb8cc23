# SPDX-License-Identifier: Apache-2.0
"""The registers of the model's device: the ``Transport`` port, and the device's own status rules.

There is no bus in between. What a driver writes has the effect that virtio 1.4, 2.1, 2.2 and 3.1.1
give it, to the letter; what a driver must not do has no effect, and is noted in `ModelTransport.words`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtiova.device.base import Device
from virtiova.device.host import serve_queue
from virtiova.dma.ram import ByteOrder
from virtiova.dma.space import AddressSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import Feature, Status, has, mask, names
from virtiova.ports import BusMaster, Msi
from virtiova.ring.ends import DeviceRing
from virtiova.ring.layout import PackedLayout, SplitLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.split_device import SplitDevice

QUEUE_SIZE: Final = 256
"""Entries of each queue at most."""

_WRITABLE: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
_MAX_WORDS: Final = 200


@dataclass(frozen=True, slots=True)
class Offer:
    """What a model offers, and what it makes of the answer."""

    access_platform: bool
    """Offers bit 33."""
    insists: bool
    """Refuses a driver that takes VERSION_1 but not an offered bit 33 (virtio 1.4, 6.2: it MAY)."""
    packed: bool = False
    """Offers packed rings, and promises to use buffers in order."""


@dataclass(frozen=True, slots=True)
class _Queue:
    layout: SplitLayout | PackedLayout
    parts: tuple[int, int, int]
    vector: int | None


class ModelMsi:
    """Message-signalled interrupts, written through the platform's own path whatever bit 33 is.

    ``name`` says whose they are: the device's (``msi-x``), or its machine's (``call``).
    """

    def __init__(self, platform: AddressSpace, name: str = "msi-x") -> None:
        self.name = name
        self._platform = platform
        self._armed: dict[int, tuple[int, int]] = {}

    def arm(self, vector: int, address: int, data: int) -> None:
        """Let ``vector`` write the 32-bit ``data`` to the platform's ``address``, a multiple of 4."""
        self._armed[vector] = (address, data & 0xFFFFFFFF)

    def disarm(self) -> None:
        """Disable all vectors."""
        self._armed.clear()

    def fire(self, vector: int | None) -> None:
        """Send the message of ``vector``, if armed. One that is stopped on the way is lost, as on a bus."""
        if vector is None or vector not in self._armed:
            return
        address, data = self._armed[vector]
        # A miss is the IOMMU's to record.
        with contextlib.suppress(AccessError):
            self._platform.store32(address, data)


class ModelTransport:
    """One device's registers, and the device behind them. Implements ``Transport`` and ``BusMaster``.

    ``space`` gives the device its address space, from the bits that the driver took; it is asked once, when
    FEATURES_OK is accepted. The device works in `work` only, so its DMA is never part of the kick itself.
    """

    legacy = False
    confirms = True
    byte_order: ByteOrder = "little"

    def __init__(
        self, device: Device, offer: Offer, space: Callable[[int], AddressSpace], platform: AddressSpace
    ) -> None:
        self._device = device
        self._insists = offer.insists
        self._choose_space = space
        bits = [Feature.VERSION_1, Feature.RING_INDIRECT_DESC, Feature.RING_EVENT_IDX]
        if offer.access_platform:
            bits.append(Feature.ACCESS_PLATFORM)
        if offer.packed:
            bits += [Feature.RING_PACKED, Feature.IN_ORDER]
        self._offered = device.features | mask(bits)
        self._master = True
        self._msi = ModelMsi(platform)
        self.device_id = int(device.device_id)
        self.msi: Msi | None = self._msi
        self.bus_master: BusMaster | None = self
        self.words: list[str] = []
        """What the device had to say, the first `_MAX_WORDS` sentences."""
        self._clear()

    def _clear(self) -> None:
        self._status = Status(0)
        self._written = 0
        self._space: AddressSpace | None = None
        self._queues: dict[int, _Queue] = {}
        self._rings: dict[int, DeviceRing] = {}
        self._kicked: set[int] = set()

    def _say(self, sentence: str) -> None:
        if len(self.words) < _MAX_WORDS:
            self.words.append(sentence)

    # -- features and status

    def reset(self) -> None:
        """Write status 0; the reset is done when this returns."""
        self.write_status(0)

    def read_features(self) -> int:
        """The bits that the device offers."""
        return self._offered

    def write_features(self, bits: int) -> None:
        """The bits that the driver takes. They are frozen once FEATURES_OK is set (virtio 1.4, 3.1.1)."""
        if Status.FEATURES_OK in self._status:
            self._say("features written after FEATURES_OK: ignored")
        else:
            self._written = bits

    def read_status(self) -> int:
        """The status register; check FEATURES_OK here after it was written."""
        return int(self._status)

    def write_status(self, status: int) -> None:
        """0 resets. Bits once set stay; FEATURES_OK is kept only for a set that the device can work with.

        DRIVER_OK without FEATURES_OK has no effect, so one that carries on after a refusal is not served.
        """
        if status == 0:
            self._device.reset()
            self._device.accepted = 0
            self._clear()
            return
        if self._status & _WRITABLE & ~status:
            self._say("a status bit was cleared without a reset: kept")
        fresh = Status(status) & _WRITABLE & ~self._status
        if Status.FEATURES_OK in fresh and not self._accept():
            fresh &= ~Status.FEATURES_OK
        self._status |= fresh & ~Status.DRIVER_OK
        if Status.DRIVER_OK in fresh:
            self._start()

    def _accept(self) -> bool:
        unknown = self._written & ~self._offered
        if unknown:
            self._say(f"FEATURES_OK refused: never offered: {', '.join(names(unknown))}")
            return False
        missing = has(self._offered & ~self._written, Feature.ACCESS_PLATFORM)
        if self._insists and missing and has(self._written, Feature.VERSION_1):
            self._say("FEATURES_OK refused: ACCESS_PLATFORM is offered and was not taken")
            return False
        self._device.accepted = self._written
        self._space = self._choose_space(self._written)
        return True

    def _start(self) -> None:
        if Status.FEATURES_OK not in self._status:
            self._say("DRIVER_OK without FEATURES_OK: ignored")
            return
        self._status |= Status.DRIVER_OK
        # Buffers may have been made available before; a driver need not kick again for them.
        if self._master:
            self._kicked.update(self._queues)

    @property
    def _live(self) -> bool:
        stopped = Status.DEVICE_NEEDS_RESET | Status.FAILED
        return Status.DRIVER_OK in self._status and not self._status & stopped

    # -- queues and configuration

    def queue_size(self, index: int) -> int:
        """The largest size of queue ``index``; 0 if it does not exist."""
        return QUEUE_SIZE if 0 <= index < self._device.queues else 0

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """Hand over the addresses of a ring of ``size`` entries, to be looked at from DRIVER_OK on.

        Raises `ProtocolError` for a queue or size that does not exist, and for DRIVER_OK come first.
        """
        if not 1 <= size <= self.queue_size(index):
            raise ProtocolError(f"queue {index} of size {size}, wanted at most {self.queue_size(index)}")
        if Status.DRIVER_OK in self._status:
            raise ProtocolError(f"queue {index} enabled after DRIVER_OK, wanted before")
        layout = PackedLayout(size) if self._device.has(Feature.RING_PACKED) else SplitLayout(size)
        self._queues[index] = _Queue(layout, (desc, avail, used), vector)

    def notify(self, index: int) -> None:
        """Mark queue ``index`` to be looked at. Lost if the device is not live, or may not do DMA."""
        if not self._live or index not in self._queues:
            self._say(f"kick of queue {index}, which is not live: ignored")
        elif self._master:
            self._kicked.add(index)

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the device-specific configuration. Raises `AccessError` past its end."""
        config = self._device.config()
        if offset < 0 or length < 0 or offset + length > len(config):
            raise AccessError(offset, length, f"outside of a device configuration of {len(config)} bytes")
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """What a driver writes into the configuration; which of it has an effect is the device's matter."""
        self.read_config(offset, len(data))
        self._device.configure(offset, data)

    def set_bus_master(self, on: bool) -> None:
        """Give or take the permission to do DMA. What was kicked before it was taken needs a new kick."""
        self._master = on
        if not on:
            self._kicked.clear()

    # -- the device's own time

    def work(self) -> bool:
        """Let the device do all that it has to do; whether it did anything."""
        worked = False
        for index in sorted(self._kicked):
            if self._live and self._device.pending(index):
                worked |= self._serve(index)
        return worked

    def _serve(self, index: int) -> bool:
        """Serve one queue. If the ring cannot be reached or has no meaning, the device needs a reset."""
        try:
            ring = self._rings.get(index) or self._ring(index)
            served = serve_queue(self._device, index, ring)
            if served.drained:
                self._kicked.discard(index)
            if served.chains and ring.needs_interrupt():
                self._msi.fire(self._queues[index].vector)
        except ProtocolError as problem:
            self._say(f"queue {index}: {problem}; device needs a reset")
            self._status |= Status.DEVICE_NEEDS_RESET
            self._kicked.clear()
            return True
        return served.chains > 0

    def _ring(self, index: int) -> DeviceRing:
        queue = self._queues[index]
        if self._space is None:
            raise ProtocolError("no features were negotiated")
        layout, space = queue.layout, self._space
        event_idx = self._device.has(Feature.RING_EVENT_IDX)
        indirect = self._device.has(Feature.RING_INDIRECT_DESC)
        ring: DeviceRing
        if isinstance(layout, PackedLayout):
            ring = PackedDevice(space, *queue.parts, layout, event_idx=event_idx, indirect=indirect)
        else:
            ring = SplitDevice(space, *queue.parts, layout, self.byte_order, event_idx=event_idx, indirect=indirect)
        self._rings[index] = ring
        return ring
