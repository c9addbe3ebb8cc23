# SPDX-License-Identifier: Apache-2.0
"""A front end for tests, without sockets: memory, rings and messages, straight into a session and its host."""

from __future__ import annotations

import os
import struct
from typing import Self

from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.device.base import Device
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.features import Feature, mask
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout
from virtiova.serve.crew import Crew
from virtiova.serve.host import Host
from virtiova.serve.offer import offer_of
from virtiova.serve.session import Session
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    BackendRequest,
    Framer,
    IotlbKind,
    IotlbMessage,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

PAGE = 4096
RAM = 1 << 21
GPA_BASE = 0x10_0000
UVA_BASE = 0x7F00_0000_0000
IOVA_BASE = 0xFFF0_0000
"""Three addresses of a byte, no two of them ever equal."""

RING = 0x1000
USED = 0x2000
SIZE = 8
PLAIN = mask([wire.F_PROTOCOL_FEATURES, Feature.VERSION_1])
WITH_BIT = PLAIN | 1 << Feature.ACCESS_PLATFORM


DATA = 0x10000
OTHER = 0x20000
HEADER = 0x30000
STATUS = 0x31000


def fives() -> Rng:
    """A source of bytes that are known: 0x55."""
    return Rng(lambda length: b"\x55" * length)


def disk(sectors: int = 64) -> Blk:
    """A disk of which no two sectors of 251 are alike."""
    return Blk(MemoryStore(bytearray(b"".join(bytes([n % 251 + 1]) * SECTOR for n in range(sectors)))))


class FrontEnd:
    """The other side of one connection; offsets are into its RAM."""

    def __init__(self, device: Device, behaviour: str = "honest", crew: Crew | None = None) -> None:
        self.session = Session(offer_of(device))
        self.said: list[str] = []
        self.now = 0.0
        self.host = Host(
            device, self.session, clock=lambda: self.now, say=self.said.append, behaviour=behaviour, crew=crew
        )
        self.file = os.memfd_create("ram")
        os.ftruncate(self.file, RAM)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.bit = False
        self._fds = [self.file, self.call]
        self._avail: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()
        for fd in self._fds:
            os.close(fd)

    # -- messages

    def send(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, ack: bool = False
    ) -> list[Message]:
        """One message, with duplicates of ``fds``; what came back."""
        message = Message(request, payload, need_reply=ack)
        handed = tuple(os.dup(fd) for fd in fds)
        for event in self.session.receive(message.encode(), handed):
            self.host.handle(event)
        return self.session.replies()

    def ok(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """One message that is acknowledged with success."""
        assert self.send(request, payload, fds, ack=True) == [Message(request, wire.u64(0), reply=True)]

    def refused(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> str:
        """One message that is acknowledged with a failure; the line in the log."""
        assert self.send(request, payload, fds, ack=True) == [Message(request, wire.u64(1), reply=True)]
        return self.said[-1]

    # -- setting up

    def negotiate(self, features: int, protocol: int | None = None) -> None:
        """Features, the back-end channel, the memory table of one region."""
        self.bit = bool(features >> Feature.ACCESS_PLATFORM & 1)
        (offered,) = self.send(Request.GET_PROTOCOL_FEATURES)
        agreed = wire.u64_of(offered.payload) if protocol is None else protocol
        self.send(Request.SET_PROTOCOL_FEATURES, wire.u64(agreed))
        self.send(Request.SET_OWNER)
        if agreed >> ProtocolFeature.BACKEND_REQ & 1:
            self.send(Request.SET_BACKEND_REQ_FD, b"", (self.call,))
        self.send(Request.SET_FEATURES, wire.u64(features))
        self.table()

    def region(self, offset: int = 0, size: int = RAM, shift: int = 0) -> MemoryRegion:
        """A region of the file; ``shift`` moves its GPA and UVA."""
        start = offset + shift
        return MemoryRegion(GPA(GPA_BASE + start), size, UVA(UVA_BASE + start), offset)

    def table(self, *regions: MemoryRegion) -> None:
        """A memory table, all of RAM in one region unless some are given."""
        table = regions or (self.region(),)
        self.send(Request.SET_MEM_TABLE, wire.encode_table(table), (self.file,) * len(table))

    def start(self, index: int = 0, base: int = 0) -> None:
        """A ring of `SIZE` entries at `RING` and `USED`, each further one 0x4000 higher, started and enabled."""
        at = index * 0x4000
        layout = SplitLayout(SIZE)
        self._avail[index] = base
        self.send(Request.SET_VRING_NUM, VringState(index, SIZE).encode())
        self.send(Request.SET_VRING_BASE, VringState(index, base).encode())
        place = self.dma if self.bit else self.uva
        address = VringAddr(index, 0, place(RING + at), place(USED + at), place(RING + at + layout.avail), 0)
        self.send(Request.SET_VRING_ADDR, address.encode())
        self.send(Request.SET_VRING_CALL, wire.encode_vring_fd(index, True), (self.call,))
        self.send(Request.SET_VRING_KICK, wire.encode_vring_fd(index, True), (self.call,))
        self.send(Request.SET_VRING_ENABLE, VringState(index, 1).encode())

    # -- memory

    @staticmethod
    def uva(offset: int) -> int:
        return UVA_BASE + offset

    def dma(self, offset: int) -> int:
        """What a driver writes into a ring for that byte."""
        return (IOVA_BASE if self.bit else GPA_BASE) + offset

    def put(self, offset: int, data: bytes) -> None:
        os.pwrite(self.file, data, offset)

    def get(self, offset: int, length: int) -> bytes:
        return os.pread(self.file, length, offset)

    def map(self, offset: int, target: int | None = None, access: Access = Access.RW) -> list[Message]:
        """An UPDATE for the page at IOVA ``offset``, which lies at ``target`` of RAM (as the IOVA says if None)."""
        uva = UVA(UVA_BASE + (offset if target is None else target))
        update = IotlbMessage(IOVA(IOVA_BASE + offset), PAGE, uva, access, IotlbKind.UPDATE)
        return self.send(Request.IOTLB_MSG, update.encode(), ack=True)

    def invalidate(self, start: int, size: int) -> list[Message]:
        """An INVALIDATE, by IOVA."""
        gone = IotlbMessage(IOVA(start), size, UVA(0), Access.NONE, IotlbKind.INVALIDATE)
        return self.send(Request.IOTLB_MSG, gone.encode(), ack=True)

    # -- the driver, and the answers to misses

    def offer(self, *buffers: tuple[int, int, bool], index: int = 0, head: int = 0, kick: bool = True) -> None:
        """Make a chain of (address in the ring, length, writable) available; descriptors from ``head`` on."""
        at = RING + index * 0x4000
        for n, (address, length, writable) in enumerate(buffers):
            more = n + 1 < len(buffers)
            flags = (DESC_F_WRITE if writable else 0) | (DESC_F_NEXT if more else 0)
            self.put(at + 16 * (head + n), Desc(address, length, flags, head + n + 1 if more else 0).pack())
        avail = at + SplitLayout(SIZE).avail
        slot = self._avail[index]
        self.put(avail + 4 + 2 * (slot % SIZE), struct.pack("<H", head))
        self._avail[index] = (slot + 1) & 0xFFFF
        self.put(avail + 2, struct.pack("<H", self._avail[index]))
        if kick:
            self.host.rounds.kicked(index)

    def used(self, index: int = 0) -> int:
        """The used index."""
        (value,) = struct.unpack("<H", self.get(USED + index * 0x4000 + 2, 2))
        return int(value)

    def used_element(self, number: int, index: int = 0) -> tuple[int, int]:
        """Head and length of a used element."""
        head, length = struct.unpack("<II", self.get(USED + index * 0x4000 + 4 + 8 * (number % SIZE), 8))
        return head, length

    def work(self) -> list[IotlbMessage]:
        """Let the host work until it has nothing to do; the misses that it sent."""
        for _ in range(1000):
            if not self.host.rounds.work():
                break
        framer = Framer()
        found = [message for data in self.host.outbox for message in framer.feed(data)]
        self.host.outbox.clear()
        assert all(message.request == BackendRequest.IOTLB_MSG for message in found)
        said = [IotlbMessage.decode(message.payload) for message in found]
        # What is not a question is a notice, which nobody has to answer (test_serve_access_fail.py).
        pairs = zip(found, said, strict=True)
        assert not any(message.need_reply for message, each in pairs if each.kind is not IotlbKind.MISS)
        return [each for each in said if each.kind is IotlbKind.MISS]

    def answer(self, ok: bool) -> None:
        """The answer to the oldest MISS."""
        self.host.answered(Message(BackendRequest.IOTLB_MSG, wire.u64(0 if ok else 1), reply=True).encode())

    def serve(self, mapped: dict[int, int] | None = None) -> int:
        """Answer misses, by ``mapped`` (page offset in IOVAs to that in RAM; as they are if None), until there are no
        more; how many pages were asked for."""
        count = 0
        while misses := self.work():
            for miss in misses:
                count += 1
                offset = (miss.iova & ~0xFFF) - IOVA_BASE
                if mapped is None or offset in mapped:
                    assert self.map(offset, None if mapped is None else mapped[offset])[0].payload == wire.u64(0)
                    self.answer(True)
                else:
                    self.answer(False)
        return count


RINGS = {RING: RING, USED: USED}


def request(end: FrontEnd, kind: int = 0, sector: int = 3, index: int = 0) -> None:
    """A block request: header, one sector, status."""
    end.put(HEADER, struct.pack("<IIQ", kind, 0, sector))
    end.put(STATUS, b"\xee")
    buffers = (end.dma(HEADER), 16, False), (end.dma(DATA), SECTOR, kind == 0), (end.dma(STATUS), 1, True)
    end.offer(*buffers, index=index)
