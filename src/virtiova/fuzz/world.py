# SPDX-License-Identifier: Apache-2.0
"""One connection under a fuzzer: a machine with a driver, whose every part a step can get at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, UVA, Access
from virtiova.driver.base import Queue, Request
from virtiova.driver.open import driver_class
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, Feature, has
from virtiova.fuzz.ledger import Ledger
from virtiova.machine.backend import BackEnd
from virtiova.machine.qemu.process import memory_file
from virtiova.machine.vhost_user.asked import Asked
from virtiova.machine.vhost_user.connection import Running
from virtiova.machine.vhost_user.frontend import WANTED
from virtiova.machine.vhost_user.iotlb import EVERYTHING
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.machine.vhost_user.memory import FILE_SIZE
from virtiova.probe.canary import TwinRegion
from virtiova.probe.rig import FeaturesRefusedError, Rig, twin
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage, MemoryRegion, ProtocolFeature, decode_table
from virtiova.wire.vhost_user import Request as Asking

DATA_PAGES: Final = 4
_LEFT: Final = (Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC, Feature.IN_ORDER)
_ECHOED: Final = 24
_SCRATCH: Final = 1 << 16
_ANSWERED: Final = frozenset(
    {
        Asking.GET_FEATURES,
        Asking.GET_VRING_BASE,
        Asking.GET_PROTOCOL_FEATURES,
        Asking.GET_QUEUE_NUM,
        Asking.GET_CONFIG,
        Asking.GET_INFLIGHT_FD,
        Asking.SET_LOG_BASE,
        Asking.GET_MAX_MEM_SLOTS,
        Asking.GET_STATUS,
    }
)
"""Requests with an answer of their own."""


class Unfit(Exception):
    """The set-up that a sequence begins with is nothing that this back end has."""


class World:
    """``bit33``, ``packed``, ``size`` and the bits of ``left`` (EVENT_IDX, INDIRECT_DESC, IN_ORDER are not taken) are
    how the device is brought up. Use as a context manager. Raises `Unfit` if the back end cannot be brought up so,
    `MachineError` and `ProtocolError` as the machine does."""

    def __init__(
        self, backend: BackEnd, running: Running, *, bit33: bool, packed: bool, size: int, left: int, slots: bool
    ) -> None:
        self.ledger = Ledger()
        self._cleanup = contextlib.ExitStack()
        self.outstanding: dict[int, int] = {}
        """Requests by queue that are valid, published and not used."""
        self.made = 0
        self.valid = True
        """Nothing was done that a good front end and driver would not do."""
        self.problem = ""
        """What was used that never should have been."""
        self.held: list[Asked] = []
        self._requests: list[Request] = []
        self._eventfds: list[int] = []
        try:
            self._bring_up(backend, running, bit33=bit33, packed=packed, size=size, left=left, slots=slots)
        except FeaturesRefusedError:
            self.close()
            raise Unfit("the features are refused") from None
        except BaseException:
            self.close()
            raise

    def _bring_up(
        self, backend: BackEnd, running: Running, *, bit33: bool, packed: bool, size: int, left: int, slots: bool
    ) -> None:
        wanted = (*WANTED, ProtocolFeature.CONFIGURE_MEM_SLOTS) if slots else WANTED
        ledger = self.ledger
        machine = VhostUserMachine(backend, packed=packed, running=running, wanted=wanted, memory=lambda: ledger.memory)
        self.machine = machine
        self._cleanup.callback(machine.close)
        self.front, self.memory, self.registers = machine.front, machine.memory, machine.registers
        self.front.on_told = ledger.told
        self.rig = rig = Rig(machine)
        self.bit33 = bit33 and has(machine.offered, VIRTIO_F_ACCESS_PLATFORM)
        self.registers.one_by_one = self.front.speaks(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if self.bit33:
            rig.enable_iommu()
        leave = [feature for index, feature in enumerate(_LEFT) if left >> index & 1]
        negotiated = rig.negotiate(take=self.bit33, leave=leave)
        if negotiated.refused:
            raise Unfit("the features are refused")
        if not (self.bit33 and self.front.translating):
            self.free()
        self.driver = rig.start(size=size)
        cls = driver_class(rig.transport.device_id)
        self.writes = cls.writes and not (self._moves_frames and machine.peer.reach == "none")
        self.reads = cls.reads and machine.peer.reach == "own"
        self.data: TwinRegion = rig.ops.alloc(DATA_PAGES * PAGE_SIZE)
        self.table: TwinRegion = rig.ops.alloc(2 * PAGE_SIZE)
        self.indirect = negotiated.in_rings(Feature.RING_INDIRECT_DESC)
        self.most = _ECHOED if self._moves_frames and machine.peer.reach == "echo" else 1 << 30

    @property
    def _moves_frames(self) -> bool:
        return self.machine.kind in ("net", "console")

    @property
    def queues(self) -> list[Queue]:
        """Those of the driver."""
        return self.driver.queues()

    def free(self) -> None:
        """From now on descriptors may name any memory of the regions."""
        self.ledger.granted(self.memory.regions)

    def spoil(self) -> None:
        """What comes now is nothing that a good front end or driver does: nothing is promised any more."""
        self.valid = False

    # -- pages ---------------------------------------------------------------------------------------------------

    def pages(self) -> list[int]:
        """The device addresses of all pages that the driver shares, in an order that is always the same."""
        return [region.addr + at for region in self.rig.ops.regions for at in range(0, region.size, PAGE_SIZE)]

    def page(self, number: int) -> int:
        """One of them."""
        pages = self.pages()
        return pages[number % len(pages)]

    def ring_region(self, number: int) -> TwinRegion:
        """The memory of one of the rings."""
        return twin(self.queues[number % len(self.queues)].region)

    # -- IOTLB ---------------------------------------------------------------------------------------------------

    def invalidate(self, iova: int, size: int) -> None:
        """INVALIDATE, acknowledged: from then on what it takes back may not be written."""
        if not self.front.translating:
            return
        taken = self.ledger.takes_back(iova, size)
        pending = self.front.post_invalidate(iova, size)
        if pending is None:
            self.front.barrier()
        else:
            self.front.wait(pending)
        if pending is None or pending.ok:
            self.ledger.took_back(taken)

    def flush(self) -> None:
        """All addresses."""
        for base, size in EVERYTHING:
            self.invalidate(base, size)

    def update(self, page: int, allowed: Access = Access.RW) -> None:
        """UPDATE of one page, as the tables have it, asked for or not."""
        found = self.machine.iotlb.resolve(page, Access.READ)
        if found is None or not self.front.translating:
            return
        pending = self.front.post_update(page, PAGE_SIZE, self.memory.uva(found[1]), allowed)
        if pending is not None:
            self.front.wait(pending)

    def iotlb(self, iova: int, size: int, uaddr: int, perm: int, kind: int) -> None:
        """Any IOTLB message that can be written down."""
        message = IotlbMessage(IOVA(iova), size, UVA(uaddr), Access(perm & 3), IotlbKind(1 + kind % 4))
        self.front.post_iotlb(message)

    def hold(self) -> None:
        """Misses wait from now on."""
        self.front.on_miss = self.held.append

    def release(self) -> None:
        """They are answered, those that wait as well."""
        self.front.on_miss = Asked.answer
        held, self.held = self.held, []
        for asked in held:
            asked.answer()

    # -- requests ------------------------------------------------------------------------------------------------

    def make(self, make: Callable[[], Request], count: int) -> None:
        """Publish ``count`` requests together, as far as there is room; what was used before is taken off the ring."""
        self.poll()
        requests = []
        for _ in range(count):
            if self.made >= self.most:
                break
            try:
                requests.append(make())
            except (ProtocolError, AccessError):
                # No room: in the ring, or for frames.
                break
            self.made += 1
            self._requests.append(requests[-1])
            index = requests[-1].queue.index
            self.outstanding[index] = self.outstanding.get(index, 0) + 1
        for request in requests:
            request.go()

    def poll(self) -> None:
        """Take off what was used."""
        for queue in self.queues:
            try:
                while queue.ring.poll() is not None:
                    if queue.index in self.outstanding:
                        self.outstanding[queue.index] -= 1
            except ProtocolError as error:
                self.problem = self.problem or f"ring {queue.index}: {error}"

    @property
    def left(self) -> int:
        """How many valid requests are not used."""
        return sum(max(0, count) for count in self.outstanding.values())

    def settle(self, seconds: float) -> None:
        """Answer what waits, kick, and wait for all requests."""
        self.release()
        for queue in self.queues:
            queue.kick()

        def over() -> bool:
            self.poll()
            # A frame that found no buffer was lost, as a network may: it is sent again.
            for request in self._requests[-self.left :] if self.left else ():
                request.done()
            return not self.left or bool(self.problem)

        self.machine.wait(over, seconds)

    # -- descriptors ---------------------------------------------------------------------------------------------

    def eventfd(self) -> int:
        """A fresh one, which lives as long as this does."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._eventfds.append(fd)
        return fd

    def scratch(self) -> int:
        """A file of zeros that is nobody's memory."""
        fd = memory_file("virtiova-scratch", _SCRATCH)
        self._eventfds.append(fd)
        return fd

    def message(self, request: int, payload: bytes, fds: list[int], *, need_reply: bool) -> None:
        """Any message on the main channel; what it grants is granted, so that nothing is taken for a stray write."""
        self._grant(request, payload)
        if need_reply or request in _ANSWERED:
            self.front.post(request, payload, fds, need_reply=need_reply)
        else:
            self.front.tell(request, payload, fds)

    def _grant(self, request: int, payload: bytes) -> None:
        with contextlib.suppress(ProtocolError, ValueError):
            if request == Asking.SET_MEM_TABLE:
                self.ledger.granted(_within(decode_table(payload)))
            elif request == Asking.ADD_MEM_REG:
                self.ledger.granted(_within([MemoryRegion.decode_single(payload)]))
            elif request == Asking.IOTLB_MSG:
                self.ledger.told(IotlbMessage.decode(payload))
            elif request in (Asking.SET_FEATURES, Asking.RESET_DEVICE, Asking.SET_OWNER, Asking.RESET_OWNER):
                self.free()

    def close(self) -> None:
        """Hang up. May be called more than once."""
        self._cleanup.close()
        while self._eventfds:
            os.close(self._eventfds.pop())

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _within(regions: Iterable[MemoryRegion]) -> list[MemoryRegion]:
    """Regions as far as they are of the file at all."""
    cut = [replace(region, size=min(region.size, FILE_SIZE - region.offset)) for region in regions]
    return [region for region in cut if region.size > 0]
