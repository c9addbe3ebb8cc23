# SPDX-License-Identifier: Apache-2.0
"""One connection of a benchmark: the handshake and the IOTLB in Python, the requests from the native load generator.

The generator comes back whenever a channel of the connection has something: a MISS is answered and a back end that is
gone is noticed by the same thread that drives the ring.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Final

from virtiova import _load
from virtiova.bench.memory import CONTROL, HEADS, PAGE, Memory, entries, updates
from virtiova.bench.waits import Waits
from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.features import Feature, has, mask
from virtiova.machine.vhost_user.channel import Gone
from virtiova.machine.vhost_user.frontend import FrontEnd
from virtiova.wire.vhost_user import (
    F_PROTOCOL_FEATURES,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_table,
    encode_vring_fd,
)

WANTED: Final = (ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ, ProtocolFeature.CONFIG)
FRAME: Final = 64
"""Bytes of a frame; before them is the header of virtio-net."""
_NET_HEADER: Final = 12
_FRAME_START: Final = bytes(_NET_HEADER) + bytes.fromhex("525400000002 525400000001 88b5")
"""A header without offloads; to and from addresses that nobody has; the type for experiments (IEEE 802)."""
_MAX_MISSES: Final = 1 << 30
_STALLED: Final = 5.0
"""Seconds without any answer after which a back end is given up."""
_SLICE: Final = 0.01
_SETTLE: Final = 0.005
_PACKED_BASE: Final = 0x8000_8000
"""Where a packed ring begins: index 0 and wrap counter 1, available and used."""
_FEW: Final = 20
"""Requests in a slice, below which how many there are says little."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen of one setting: requests a second and latencies in microseconds, of the median slice of time in
    which nobody else had one of the processors; ``disturbed`` is the share of slices in which somebody had."""

    rate: float
    p50: float
    p99: float
    checked: int
    disturbed: float


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some milliseconds of a sample."""

    quiet: bool
    done: int
    nanoseconds: int
    p50: float
    p99: float


class Session:
    """A fresh connection to a back end of a disk or (``net``) a network device, with its requests prepared.

    ``pid`` is the back end's process, 0 if it is not known. Before the first request it is told of all mappings, or of
    ``told``. For ``shares`` see `Waits`. `NotPossibleError` if it does not offer bit 33 or ``packed`` rings and is
    to, `MachineError` or `ProtocolError` for a back end that does not do its part.
    """

    def __init__(
        self,
        sock: socket.socket,
        memory: Memory,
        gone: Gone = MachineError,
        *,
        net: bool,
        pid: int,
        told: int | None = None,
        shares: bool = False,
        packed: bool = False,
    ) -> None:
        self.memory = memory
        self._packed = packed
        self._told = told
        self.waits = Waits(pid, shares=shares)
        self._net = net
        self._gone = gone
        self._fds: list[int] = []
        self._driver: _load.Driver | None = None
        memory.clear()
        self.front = FrontEnd(sock, memory.resolve, _ignore, memory.uva, gone, _MAX_MISSES)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        front, memory, bit = self.front, self.memory, self.memory.shape.bit
        offered = front.open(WANTED)
        if bit and not has(offered, Feature.ACCESS_PLATFORM):
            raise NotPossibleError("it does not offer bit 33")
        if self._packed and not has(offered, Feature.RING_PACKED):
            raise NotPossibleError("it does not offer packed rings")
        wanted = mask([Feature.VERSION_1, Feature.RING_EVENT_IDX, F_PROTOCOL_FEATURES])
        self.features = offered & wanted | mask([Feature.ACCESS_PLATFORM] * bit + [Feature.RING_PACKED] * self._packed)
        if not front.set_features(self.features, translating=bit):
            raise MachineError(f"the back end refused SET_FEATURES 0x{self.features:x}")
        front.must(Request.SET_MEM_TABLE, encode_table(memory.regions), [memory.fd] * len(memory.regions))
        self._size = 256 if self._net else 512
        rings = (0, 1) if self._net else (0,)
        fds = [self._ring(index) for index in rings]
        front.stream(updates(memory.shape, self._told))
        if has(self.features, F_PROTOCOL_FEATURES):
            for index in rings:
                front.must(Request.SET_VRING_ENABLE, VringState(index, 1).encode())
        front.barrier()
        kick, call = fds[-1]
        self._driver = _load.Driver(
            memory.map,
            memory.ring(rings[-1], self._size),
            kick=kick,
            call=call,
            watch=front.filenos,
            event_idx=has(self.features, Feature.RING_EVENT_IDX),
            packed=self._packed,
        )

    @property
    def driver(self) -> _load.Driver:
        """The driver end of the ring that requests are in."""
        if self._driver is None:
            raise ValueError("the session is not open")
        return self._driver

    def _ring(self, index: int) -> tuple[int, int]:
        front, (size, *parts) = self.front, self.memory.ring(index, self._size)
        kick, call = self._eventfd(), self._eventfd()
        desc, avail, used = (self.memory.ring_address(part) for part in parts)
        front.must(Request.SET_VRING_NUM, VringState(index, size).encode())
        front.must(Request.SET_VRING_BASE, VringState(index, _PACKED_BASE if self._packed else 0).encode())
        front.must(Request.SET_VRING_ADDR, VringAddr(index, 0, desc, used, avail, 0).encode())
        front.must(Request.SET_VRING_CALL, encode_vring_fd(index, True), [call])
        front.must(Request.SET_VRING_KICK, encode_vring_fd(index, True), [kick])
        return kick, call

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd

    # -- requests

    def frames(self) -> None:
        """Prepare frames of 64 bytes for the device."""
        self._frames(entries(self.memory.shape, 1, spread=True))

    def each(self, made: bytes) -> float:
        """Microseconds of the median frame, each sent once from the place that is its own, one at a time."""
        self._frames(made)
        count = len(made) // 24
        self.driver.forget()
        self._go(1, _STALLED + count / 20, limit=count)
        if self.driver.tally()["done"] < count:
            raise self._gone(f"{count - self.driver.tally()['done']} of {count} frames were not taken")
        return self.driver.latency(0.5) / 1e3

    def _frames(self, made: bytes) -> None:
        numbers = memoryview(made).cast("Q")
        # The address within its page is the same for the device and in the file.
        for at in range(0, len(numbers), 3):
            start = CONTROL + numbers[at + 1] * PAGE + numbers[at] % PAGE
            self.memory.map[start : start + len(_FRAME_START)] = _FRAME_START
        self.driver.prepare(_load.FRAME, entries=made, pages=CONTROL, length=_NET_HEADER + FRAME)

    def reads(self, image: int, *, zeros: bool = False) -> None:
        """Prepare reads of 4 KiB from a disk of ``image`` pages that holds what `_load.paint` writes, or zeros."""
        self._disk(_load.READ, image, zeros=zeros)

    def fill(self, image: int) -> None:
        """Have the device write what the disk is to hold."""
        count = image // self.memory.shape.used + 1
        for turn in range(count):
            first = turn * self.memory.shape.used
            there = min(self.memory.shape.used, image - first)
            if there > 0:
                self._write(first, there)

    def _write(self, first: int, count: int) -> None:
        _load.paint(self.memory.map, CONTROL, first, count)
        numbers = memoryview(entries(self.memory.shape, 1, spread=False)).cast("Q")
        made = bytearray()
        for at in range(0, len(numbers), 3):
            if numbers[at + 1] < count:
                made += numbers[at : at + 2].tobytes() + (first + numbers[at + 1]).to_bytes(8, "little")
        self._disk(_load.WRITE, 0, bytes(made))
        self.driver.forget()
        self._go(32, 60.0, limit=len(made) // 24)
        if self.driver.tally()["done"] < len(made) // 24:
            raise MachineError("the back end does not take what is to be on its disk")

    def _disk(self, kind: int, image: int, made: bytes = b"", *, zeros: bool = False) -> None:
        self.driver.prepare(
            kind,
            heads=HEADS,
            heads_address=self.memory.address(HEADS),
            entries=made or entries(self.memory.shape, image, spread=False),
            pages=CONTROL,
            length=PAGE,
            zeros=zeros,
        )

    # -- measuring

    def sample(self, depth: int, seconds: float, *, sleeping: bool = False) -> Sample:
        """Keep ``depth`` requests with the device for so long, in slices of 10 ms, and look at the quiet ones.

        It goes on for up to twice that time until half of the slices were quiet.
        """
        driver = self.driver
        self._go(depth, max(_SETTLE, min(0.05, seconds / 4)), sleeping=sleeping)
        wanted = max(2, round(seconds / _SLICE))
        found: list[_Slice] = []
        checked = 0
        self.waits.look()
        while len(found) < wanted or (len(found) < 2 * wanted and sum(one.quiet for one in found) < wanted / 2):
            driver.forget()
            begin = time.monotonic_ns()
            self._go(depth, _SLICE, sleeping=sleeping)
            end = time.monotonic_ns()
            tally = driver.tally()
            checked += tally["checked"]
            quiet = self.waits.quiet(end - begin)
            latency = driver.latency(0.5) / 1e3, driver.latency(0.99) / 1e3
            found.append(_Slice(quiet, tally["done"], end - begin, *latency))
        self.drain()
        return _judged(found, checked)

    def drain(self) -> None:
        """Take back what is with the device."""
        self._go(0, _STALLED)
        if self.driver.flying:
            raise self._gone(f"{self.driver.flying} requests were not answered within {_STALLED:g} s")

    def _go(self, depth: int, seconds: float, *, limit: int = 0, sleeping: bool = False) -> None:
        """Run, and serve the channels meanwhile. Longer than asked for only where nothing comes back at all."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            # Short enough for Ctrl-C.
            why = self.driver.run(depth, min(left, 0.05), limit=limit, sleeping=sleeping)
            if why == _load.DONE:
                return
            if why == _load.BAD:
                raise ProtocolError(f"the back end brought {self.driver.wrong}")
            self.front.pump(0)

    def close(self) -> None:
        """Close the connection and the rings' descriptors."""
        self.front.close()
        if self._driver is not None:
            self._driver.release()
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())


def _judged(found: list[_Slice], checked: int) -> Sample:
    """The median of the quiet slices; of all if there are too few. Where little is done in one, all together."""
    quiet = [one for one in found if one.quiet]
    disturbed = 1 - len(quiet) / len(found)
    chosen = quiet if len(quiet) >= 2 else found
    middle = sorted(chosen, key=lambda one: one.done / one.nanoseconds)[len(chosen) // 2]
    rate, p50, p99 = middle.done / middle.nanoseconds * 1e9, middle.p50, middle.p99
    if middle.done < _FEW:
        rate = sum(one.done for one in chosen) / sum(one.nanoseconds for one in chosen) * 1e9
        some = [one for one in chosen if one.done] or [middle]
        p50, p99 = statistics.median(one.p50 for one in some), max(one.p99 for one in some)
    return Sample(rate, p50, p99, checked, disturbed)


def _ignore(_iova: int, _access: object) -> None:
    """An access that was not allowed shows as a request without an answer."""
