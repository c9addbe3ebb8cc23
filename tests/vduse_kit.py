# SPDX-License-Identifier: Apache-2.0
"""Linux's side of a VDUSE device for tests, and a driver behind it: the calls and messages of the character device are
answered from here, byte for byte, and everything about them can be made wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest

from virtiova.device.base import Device
from virtiova.device.blk import SECTOR, Blk
from virtiova.device.store import MemoryStore
from virtiova.features import Feature, Status, mask
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout
from virtiova.serve.counters import Counters
from virtiova.serve.crew import Crew, Spin
from virtiova.serve.vduse import node as node_module
from virtiova.serve.vduse import notes as notes_module
from virtiova.serve.vduse.loop import VduseConnection
from virtiova.serve.vduse.node import Node
from virtiova.serve.vduse.notes import Notes, identity
from virtiova.serve.vduse.server import RING_SIZE, config_of
from virtiova.serve.vduse.session import VduseSession
from virtiova.wire import vduse as wire
from virtiova.wire.vduse import Request, RequestKind

PAGE = 4096
RAM = 1 << 20
SHIFT = 0x5000
"""Where RAM begins in its file."""
IOVA = 0xFFF0_0000
"""And where it begins for the device, as long as a test does not map it otherwise."""
SIZE = 8
RING, USED, HEADER, STATUS, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x10000
"""Offsets in RAM; each ring's own are `STEP` higher than those of the one before."""
STEP = 0x8000
SECONDS = 10.0
READY = Status.ACKNOWLEDGE | Status.DRIVER
AGREED = READY | Status.FEATURES_OK
RUNNING = AGREED | Status.DRIVER_OK
TAKEN = mask([Feature.VERSION_1, Feature.ACCESS_PLATFORM])


@dataclass(slots=True)
class Vq:
    """A virtqueue as its driver set it, and as VQ_GET_INFO tells it."""

    size: int = SIZE
    desc: int = 0
    driver: int = 0
    device: int = 0
    avail: int = 0
    ready: bool = False
    kick: int = -1
    injected: int = 0


@dataclass(slots=True)
class Map:
    """A range of IOVAs, both ends included, and where it is in a file."""

    start: int
    last: int
    offset: int
    perm: int = 3
    fd: int = -1


@dataclass(slots=True)
class FakeKernel:
    """What the kernel has of one device."""

    queues: list[Vq]
    maps: list[Map] = field(default_factory=list)
    features: int = TAKEN
    status: int = 0
    errors: dict[int, int] = field(default_factory=dict)
    """An errno for each call that is to fail."""
    asked: int = 0
    """How often a region was asked for."""
    number: int = 100

    def ioctl(self, _fd: int, call: int, data: bytes | bytearray = b"") -> int:
        """What ``fcntl.ioctl`` does on the device file."""
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))
        assert len(data) == call >> 16 & 0x3FFF, "the kernel copies as much as the number of the call says"
        if call == wire.DEV_GET_FEATURES:
            struct.pack_into("=Q", data, 0, self.features)
            return 0
        if call == wire.IOTLB_GET_FD:
            return self._region(data)  # type: ignore[arg-type]
        index = struct.unpack_from("=I", data)[0]
        if index >= len(self.queues):
            raise OSError(errno.EINVAL, "no such queue")
        vq = self.queues[index]
        if call == wire.VQ_GET_INFO:
            whole = (index, vq.size, vq.desc, vq.driver, vq.device, vq.avail, 0, 0, 0, vq.ready)
            struct.pack_into("=IIQQQHHHHB7x", data, 0, *whole)
        elif call == wire.VQ_SETUP_KICKFD:
            if vq.kick >= 0:
                os.close(vq.kick)
            vq.kick = os.dup(struct.unpack_from("=Ii", data)[1])
        elif call == wire.VQ_INJECT_IRQ:
            if not self.status & Status.DRIVER_OK or not vq.ready:
                raise OSError(errno.EINVAL, "not running")
            vq.injected += 1
        else:
            assert call == wire.VQ_SETUP, hex(call)
        return 0

    def _region(self, data: bytearray) -> int:
        self.asked += 1
        _, start, last, _ = struct.unpack("=QQQB7x", data)
        found = [each for each in self.maps if each.start <= last and start <= each.last]
        if not found:
            raise OSError(errno.EINVAL, "no such region")
        first = min(found, key=lambda each: each.start)
        struct.pack_into("=QQQB7x", data, 0, first.offset, first.start, first.last, first.perm)
        return os.dup(first.fd)


class NoBus:
    """Instead of who takes devices off the bus."""

    answer: str | None = ""

    def __init__(self) -> None:
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def begin(self) -> None:
        """There is no bus."""

    def heard(self) -> None:
        """Nobody says anything."""

    def close(self) -> None:
        os.close(self._fd)


class Fake:
    """One served device between a fake kernel and a driver of raw bytes."""

    def __init__(self, device: Device, folder: Path, patch: pytest.MonkeyPatch, *, workers: bool = False) -> None:
        self.kernel = FakeKernel([Vq() for _ in range(device.queues)])
        patch.setattr(node_module, "fcntl", SimpleNamespace(ioctl=self.kernel.ioctl))
        patch.setattr(notes_module, "folder", lambda: str(folder / "notes"))
        self.file = os.memfd_create("ram")
        os.ftruncate(self.file, SHIFT + RAM)
        self.said: list[str] = []
        self.counters = Counters()
        config = config_of(device, "d0")
        (folder / "d0").touch()
        self.node = Node("d0", device.queues, str(folder))
        # Whole messages, as the character device has them.
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(SECONDS)
        os.dup2(theirs.fileno(), self.node.fd)
        theirs.close()
        os.set_blocking(self.node.fd, False)
        self.node.set_up(RING_SIZE)
        self.notes = Notes("d0", device.queues, RING_SIZE, identity(config, RING_SIZE, ""), fresh=True)
        self.session = VduseSession(config.features, config.queues, self.node, self.notes)
        self._bus = NoBus()
        self._crew = Crew.of(device, Spin(0.0), self.said.append) if workers else None
        self.connection = VduseConnection(
            device,
            self.node,
            self.session,
            self.notes,
            self._bus,  # type: ignore[arg-type]
            say=self.said.append,
            counters=self.counters,
            crew=self._crew,
        )
        self.ended: BaseException | None = None
        self._avail = [0] * device.queues
        self._stop = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.connection.run(lambda: self._stop, self._wake)
        except BaseException as problem:
            self.ended = problem

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "it does not end"
        self.connection.close()
        if self._crew is not None:
            self._crew.close()
        self.node.close()
        self.notes.close(remove=True)
        self._bus.close()
        self._sock.close()
        for fd in (self.file, self._wake, *(each.kick for each in self.kernel.queues if each.kick >= 0)):
            os.close(fd)

    # -- messages

    def raw(self, data: bytes) -> None:
        """A message, whatever it may be."""
        self._sock.send(data)

    def answer(self) -> tuple[int, bool, bytes]:
        """Number, success and the rest of the next answer."""
        data = self._sock.recv(4096)
        assert len(data) == wire.MESSAGE_SIZE, data
        number, result = struct.unpack_from("=II", data)
        return number, result == 0, data[24:]

    def silent(self) -> bool:
        """Whether there is no answer that nobody asked for."""
        return not select.select([self._sock], [], [], 0.0)[0]

    def ask(self, kind: RequestKind, **what: int) -> tuple[bool, bytes]:
        """A message and its answer; there is no other one."""
        self.kernel.number += 1
        self.raw(Request(kind, self.kernel.number, **what).encode())
        number, ok, rest = self.answer()
        assert number == self.kernel.number
        assert self.silent()
        return ok, rest

    def status(self, status: int) -> bool:
        """The driver writes the device status; the kernel keeps it if the device agrees."""
        ok, _ = self.ask(RequestKind.SET_STATUS, status=status)
        if ok or status == 0:
            self.kernel.status = status
        return ok

    def changed(self, start: int, last: int) -> bool:
        """Memory has changed."""
        return self.ask(RequestKind.UPDATE_IOTLB, start=start, last=last)[0]

    def stands(self, index: int = 0) -> int:
        """Where a ring stands."""
        ok, rest = self.ask(RequestKind.GET_VQ_STATE, index=index)
        assert ok
        got, avail = struct.unpack_from("=IH", rest)
        assert got == index
        return int(avail)

    # -- memory, and a driver

    def map(self, offset: int = 0, size: int = RAM, iova: int | None = None, perm: int = 3) -> Map:
        """``size`` bytes of RAM at ``offset`` for the device, at `IOVA` and the offset unless said otherwise."""
        start = IOVA + offset if iova is None else iova
        made = Map(start, start + size - 1, SHIFT + offset, perm, self.file)
        self.kernel.maps.append(made)
        return made

    def put(self, offset: int, data: bytes) -> None:
        os.pwrite(self.file, data, SHIFT + offset)

    def get(self, offset: int, length: int) -> bytes:
        return os.pread(self.file, length, SHIFT + offset)

    def ring(self, index: int = 0, *, ready: bool = True) -> Vq:
        """Set a ring up, at `RING` and `USED`."""
        at, vq = IOVA + index * STEP, self.kernel.queues[index]
        vq.desc, vq.driver, vq.device = at + RING, at + RING + SplitLayout(SIZE).avail, at + USED
        vq.ready = ready
        return vq

    def forget(self) -> None:
        """After a reset: another driver, whose rings are empty."""
        kernel = self.kernel
        kernel.maps.clear()
        kernel.features = TAKEN
        for index, vq in enumerate(kernel.queues):
            vq.size, vq.avail, self._avail[index] = SIZE, 0, 0
            self.put(RING + index * STEP, bytes(USED - RING + 64))

    def start(self) -> None:
        """All of it, as a driver does that means well."""
        self.map()
        for index in range(len(self.kernel.queues)):
            self.ring(index)
        for status in (0, Status.ACKNOWLEDGE, READY, AGREED, RUNNING):
            assert self.status(status), self.said

    def offer(self, *buffers: tuple[int, int, bool], index: int = 0, kick: bool = True) -> None:
        """Make a chain of (address, length, writable) available, from the first descriptor on."""
        at = RING + index * STEP
        for n, (address, length, writable) in enumerate(buffers):
            more = n + 1 < len(buffers)
            flags = (DESC_F_WRITE if writable else 0) | (DESC_F_NEXT if more else 0)
            self.put(at + 16 * n, Desc(address, length, flags, n + 1 if more else 0).pack())
        slot = self._avail[index]
        avail = at + SplitLayout(SIZE).avail
        self.put(avail + 4 + 2 * (slot % SIZE), struct.pack("<H", 0))
        self._avail[index] = (slot + 1) & 0xFFFF
        self.put(avail + 2, struct.pack("<H", self._avail[index]))
        if kick:
            self.kick(index)

    def kick(self, index: int = 0) -> None:
        """As the kernel does it when its driver kicks."""
        os.eventfd_write(self.kernel.queues[index].kick, 1)

    def used(self, index: int = 0) -> int:
        """The used index."""
        return int.from_bytes(self.get(USED + index * STEP + 2, 2), "little")

    def ask_sector(self, sector: int = 3, index: int = 0, *, clear: bool = True) -> None:
        """A request to read a sector into `DATA`, ``clear``: where there is nothing yet."""
        at = index * STEP
        self.put(HEADER + at, struct.pack("<IIQ", 0, 0, sector))
        self.put(STATUS + at, b"\xee")
        if clear:
            self.put(DATA + at, bytes(SECTOR))
        base = IOVA + at
        buffers = (base + HEADER, 16, False), (base + DATA, SECTOR, True), (base + STATUS, 1, True)
        self.offer(*buffers, index=index)

    def done(self, index: int = 0, seconds: float = SECONDS) -> bool:
        """Whether all that was made available is used in time."""
        end = time.monotonic() + seconds
        while self.used(index) != self._avail[index]:
            if time.monotonic() > end or self.ended is not None:
                return False
            time.sleep(0.001)
        return True

    def reads(self, index: int = 0, sector: int = 3) -> bool:
        """Whether a sector is read as it is on `serve_kit.disk`."""
        self.ask_sector(sector, index)
        at = index * STEP
        return (
            self.done(index)
            and self.get(STATUS + at, 1) == b"\0"
            and self.get(DATA + at, SECTOR) == bytes([sector % 251 + 1]) * SECTOR
        )

    def told(self, text: str, seconds: float = SECONDS) -> bool:
        """Whether the log says that in time."""
        end = time.monotonic() + seconds
        while not any(text in line for line in self.said):
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """No descriptor is left behind."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def two_rings() -> Blk:
    return Blk(MemoryStore(bytearray(b"".join(bytes([n % 251 + 1]) * 512 for n in range(64)))), queues=2)


def serves(fake: Fake) -> bool:
    """Whether a driver that resets the device and means well is served."""
    assert fake.status(0)
    fake.forget()
    fake.start()
    return fake.reads(0) and fake.reads(1, sector=5)
