# SPDX-License-Identifier: Apache-2.0
"""The device classes, each request by hand over a flat space: no machine, no ring but where it matters."""

from __future__ import annotations

import os
import struct

import pytest

from ring_kit import make_ram
from virtiova.addr import GPA
from virtiova.device.base import Device
from virtiova.device.blk import SECTOR, Blk, Request, Status
from virtiova.device.host import Served, serve_queue
from virtiova.device.net import MAX_FRAME, RX, TX, Net
from virtiova.device.rng import MAX_BYTES, Rng
from virtiova.device.store import MemoryStore
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import FlatSpace
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain, Segment
from virtiova.ring.split_device import SplitDevice
from virtiova.testing.raw_rings import RawRing

HEADER = 0x100
STATUS = 0x180
DATA = 0x1000
NOWHERE = 0x10_0000
UNTOUCHED = 0xEE


@pytest.fixture
def ram() -> MappedRam:
    return make_ram(0x8000)


# -- block


class Disk:
    """A block device over four sectors, each filled with its number, and one request at a time."""

    def __init__(self, ram: MappedRam) -> None:
        self.image = bytearray(b"".join(bytes([n]) * SECTOR for n in range(4)))
        self.device = Blk(MemoryStore(self.image), serial=b"a serial number that is too long")
        self.ram = ram

    def ask(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: list[Segment] | None = None,
        into: list[Segment] | None = None,
    ) -> tuple[int, int]:
        """The status, and how many bytes were promised."""
        self.ram.write(GPA(HEADER), struct.pack("<IIQ", kind, 0, sector))
        self.ram.write(GPA(STATUS), bytes([UNTOUCHED]))
        space = FlatSpace(self.ram)
        chain = Chain(space, 0, [(HEADER, 16), *(out or [])], [*(into or []), (STATUS, 1)])
        self.device.handle(0, chain)
        return self.ram.read(GPA(STATUS), 1)[0], chain.written


@pytest.fixture
def disk(ram: MappedRam) -> Disk:
    return Disk(ram)


def test_blk_reads(disk: Disk) -> None:
    assert disk.ask(Request.IN, 2, into=[(DATA, 100), (DATA + 0x800, 924)]) == (Status.OK, 1025)
    assert disk.ram.read(GPA(DATA), 101) == b"\2" * 100 + b"\0"
    assert disk.ram.read(GPA(DATA + 0x800), 925) == b"\2" * 412 + b"\3" * 512 + b"\0"


def test_blk_writes_and_flushes(disk: Disk) -> None:
    disk.ram.write(GPA(DATA), b"new " * 128)
    assert disk.ask(Request.OUT, 1, out=[(DATA, SECTOR)]) == (Status.OK, 1)
    assert disk.image == bytes(SECTOR) + b"new " * 128 + b"\2" * SECTOR + b"\3" * SECTOR
    assert disk.ask(Request.FLUSH) == (Status.OK, 1)


def test_blk_says_who_it_is(disk: Disk) -> None:
    assert disk.ask(Request.GET_ID, into=[(DATA, 20)]) == (Status.OK, 21)
    assert disk.ram.read(GPA(DATA), 21) == b"a serial number that\0"
    short = Blk(MemoryStore(bytearray()), serial=b"x")
    chain = Chain(FlatSpace(disk.ram), 0, [(HEADER, 16)], [(DATA, 20), (STATUS, 1)])
    short.handle(0, chain)
    assert disk.ram.read(GPA(DATA), 20) == b"x".ljust(20, b"\0")


def test_blk_config_counts_whole_sectors() -> None:
    config = Blk(MemoryStore(bytearray(3 * SECTOR + 511))).config()
    assert int.from_bytes(config[:8], "little") == 3
    assert int.from_bytes(config[20:24], "little") == SECTOR


@pytest.mark.parametrize("kind", [2, 3, 5, 9, 10, 12, 14, 15, 26, 0xFFFFFFFF])
def test_blk_unknown_request_is_unsupported(disk: Disk, kind: int) -> None:
    assert disk.ask(kind, into=[(DATA, SECTOR)]) == (Status.UNSUPP, 0)
    assert disk.ram.read(GPA(DATA), SECTOR) == bytes(SECTOR)


@pytest.mark.parametrize(
    ("sector", "length"),
    [(4, 512), (3, 1024), (0, 513), (0, 1), (1 << 55, 512), ((1 << 64) - 1, 512), ((1 << 64) - 1, 1024)],
)
def test_blk_bounds(disk: Disk, sector: int, length: int) -> None:
    before = bytes(disk.image)
    assert disk.ask(Request.IN, sector, into=[(DATA, length)]) == (Status.IOERR, 0)
    assert disk.ask(Request.OUT, sector, out=[(DATA, length)]) == (Status.IOERR, 1)
    assert disk.image == before
    assert disk.ram.read(GPA(DATA), length) == bytes(length)


def test_blk_last_sector_is_inside(disk: Disk) -> None:
    assert disk.ask(Request.IN, 3, into=[(DATA, 512)]) == (Status.OK, 513)


def test_blk_data_that_cannot_be_reached_is_an_error_with_a_status(disk: Disk) -> None:
    before = bytes(disk.image)
    assert disk.ask(Request.IN, 0, into=[(DATA, 512), (NOWHERE, 512)]) == (Status.IOERR, 512)
    assert disk.ask(Request.OUT, 0, out=[(NOWHERE, 512)]) == (Status.IOERR, 1)
    assert disk.ask(Request.GET_ID, into=[(NOWHERE, 20)]) == (Status.IOERR, 0)
    assert disk.image == before


class BadStore(MemoryStore):
    def read(self, offset: int, length: int) -> bytes:
        raise OSError("medium error")

    def flush(self) -> None:
        raise OSError("medium error")


def test_blk_store_errors_become_a_status(ram: MappedRam) -> None:
    disk = Disk(ram)
    disk.device = Blk(BadStore(bytearray(4 * SECTOR)))
    assert disk.ask(Request.IN, 0, into=[(DATA, 512)]) == (Status.IOERR, 0)
    assert disk.ask(Request.FLUSH) == (Status.IOERR, 1)


@pytest.mark.parametrize(
    ("readable", "writable"), [([(HEADER, 15)], [(STATUS, 1)]), ([(HEADER, 16)], []), ([], [(STATUS, 1)])]
)
def test_blk_request_without_header_or_status(ram: MappedRam, readable: list[Segment], writable: list[Segment]) -> None:
    with pytest.raises(ProtocolError, match="wanted a header of 16 and a status of 1"):
        Blk(MemoryStore(bytearray(512))).handle(0, Chain(FlatSpace(ram), 0, readable, writable))
    assert ram.read(GPA(STATUS), 1) == b"\0"


def test_blk_status_that_cannot_be_written(ram: MappedRam) -> None:
    chain = Chain(FlatSpace(ram), 0, [(HEADER, 16)], [(NOWHERE, 1)])
    with pytest.raises(AccessError):
        Blk(MemoryStore(bytearray(512))).handle(0, chain)


def test_blk_moves_more_than_one_step(ram: MappedRam) -> None:
    big = make_ram(0x80000)
    image = bytearray(os.urandom(0x30000))
    chain = Chain(FlatSpace(big), 0, [(HEADER, 16)], [(DATA, 0x30000), (STATUS, 1)])
    Blk(MemoryStore(image)).handle(0, chain)
    assert big.read(GPA(DATA), 0x30000) == image
    big.write(GPA(HEADER), struct.pack("<IIQ", Request.OUT, 0, 0))
    target = bytearray(0x30000)
    Blk(MemoryStore(target)).handle(0, Chain(FlatSpace(big), 0, [(HEADER, 16), (DATA, 0x30000)], [(STATUS, 1)]))
    assert target == image


# -- entropy


def test_rng_fills_the_buffer_and_no_more(ram: MappedRam) -> None:
    chain = Chain(FlatSpace(ram), 0, [], [(DATA, 3), (DATA + 8, 4)])
    Rng(lambda n: bytes(range(1, n + 1))).handle(0, chain)
    assert ram.read(GPA(DATA), 13) == b"\1\2\3\0\0\0\0\0\4\5\6\7\0"
    assert chain.written == 7


def test_rng_is_random(ram: MappedRam) -> None:
    for at in (DATA, DATA + 64):
        Rng().handle(0, Chain(FlatSpace(ram), 0, [], [(at, 64)]))
    assert len({ram.read(GPA(at), 64) for at in (DATA, DATA + 64, DATA + 128)}) == 3


def test_rng_does_not_make_four_gigabytes() -> None:
    asked = []

    def source(n: int) -> bytes:
        asked.append(n)
        return bytes(n)

    chain = Chain(FlatSpace(make_ram(0x20000)), 0, [], [(0, 0xFFFFFFFF)])
    Rng(source).handle(0, chain)
    assert asked == [MAX_BYTES]
    assert chain.written == MAX_BYTES


# -- network


class Frames:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)


def net(bits: int = 1 << Feature.VERSION_1, backlog: int = 2) -> tuple[Net, Frames]:
    wire = Frames()
    device = Net(wire, b"\2\0\0\0\0\7", backlog=backlog)
    device.accepted = bits
    return device, wire


@pytest.mark.parametrize(("bits", "header"), [(1 << Feature.VERSION_1, 12), (0, 10)])
def test_net_sends_without_the_header(ram: MappedRam, bits: int, header: int) -> None:
    device, wire = net(bits)
    ram.write(GPA(DATA), b"h" * header + b"frame")
    device.handle(TX, Chain(FlatSpace(ram), 0, [(DATA, 4), (DATA + 4, header + 1)], []))
    assert wire.sent == [b"frame"]


@pytest.mark.parametrize(("bits", "header"), [(1 << Feature.VERSION_1, bytes(10) + b"\1\0"), (0, bytes(10))])
def test_net_receives_with_the_header(ram: MappedRam, bits: int, header: bytes) -> None:
    device, _ = net(bits)
    ram.write(GPA(DATA), b"\xff" * 64)
    device.deliver(b"frame")
    chain = Chain(FlatSpace(ram), 0, [], [(DATA, 64)])
    device.handle(RX, chain)
    assert ram.read(GPA(DATA), len(header) + 6) == header + b"frame\xff"
    assert chain.written == len(header) + 5


def test_net_frames_wait_in_order_up_to_the_backlog(ram: MappedRam) -> None:
    device, _ = net()
    assert not device.pending(RX)
    assert device.pending(TX)
    for frame in (b"1", b"2", b"3"):
        device.deliver(frame)
    assert device.dropped == 1
    for wanted in (b"1", b"2"):
        assert device.pending(RX)
        device.handle(RX, Chain(FlatSpace(ram), 0, [], [(DATA, 64)]))
        assert ram.read(GPA(DATA + 12), 1) == wanted
    assert not device.pending(RX)
    device.deliver(b"4")
    device.reset()
    assert not device.pending(RX)


def test_net_drops_and_counts(ram: MappedRam) -> None:
    device, wire = net(backlog=9)
    device.deliver(b"x" * (MAX_FRAME + 1))
    assert device.dropped == 1
    device.deliver(b"does not fit")
    chain = Chain(FlatSpace(ram), 0, [], [(DATA, 23)])
    device.handle(RX, chain)
    assert (device.dropped, chain.written, ram.read(GPA(DATA), 23)) == (2, 0, bytes(23))
    device.deliver(b"misses")
    with pytest.raises(AccessError):
        device.handle(RX, Chain(FlatSpace(ram), 0, [], [(NOWHERE, 64)]))
    assert device.dropped == 3
    with pytest.raises(AccessError):
        device.handle(TX, Chain(FlatSpace(ram), 0, [(DATA, 12), (NOWHERE, 4)], []))
    assert device.dropped == 4
    device.handle(TX, Chain(FlatSpace(ram), 0, [(DATA, 12), (0, 0xFFFFFFFF)], []))
    assert device.dropped == 5
    assert wire.sent == []


def test_net_transmission_without_a_header(ram: MappedRam) -> None:
    device, _ = net()
    with pytest.raises(ProtocolError, match="wanted a header of 12"):
        device.handle(TX, Chain(FlatSpace(ram), 0, [(DATA, 11)], []))


def test_net_config_and_address() -> None:
    device, _ = net()
    assert device.config() == b"\2\0\0\0\0\7\1\0"
    with pytest.raises(ProtocolError, match="wanted 6"):
        Net(Frames(), b"\0" * 5)


# -- any device, hosted


class Echo(Device):
    """What a user writes."""

    device_id, queues = DeviceId.ENTROPY, 1
    wants = True

    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read()
        if data == b"bad":
            raise ProtocolError("a request without meaning")
        chain.write(data)

    def pending(self, queue: int) -> bool:
        return self.wants


def hosted(ram: MappedRam) -> tuple[RawRing, SplitDevice]:
    raw = RawRing(ram, 0)
    space = FlatSpace(ram)
    end = SplitDevice(space, raw.desc, raw.avail, raw.used, raw.layout, event_idx=False, indirect=False)
    return raw, end


def test_serve_queue_until_drained(ram: MappedRam) -> None:
    raw, end = hosted(ram)
    ram.write(GPA(DATA), b"abc")
    raw.put_chain(0, (DATA, 3, False), (DATA + 16, 3, True))
    raw.offer(0, 0)
    assert serve_queue(Echo(), 0, end) == Served(2, drained=True)
    assert [raw.used_element(n) for n in (0, 1)] == [(0, 3), (0, 3)]
    assert raw.get16(raw.used) == 0, "the driver was asked to kick again"
    assert serve_queue(Echo(), 0, end) == Served(0, drained=True)


def test_serve_queue_goes_on_after_a_data_fault(ram: MappedRam) -> None:
    raw, end = hosted(ram)
    raw.put_chain(0, (NOWHERE, 3, False), (DATA + 16, 3, True))
    raw.put_chain(2, (DATA, 3, False), (DATA + 16, 3, True))
    raw.offer(0, 2)
    assert serve_queue(Echo(), 0, end).chains == 2
    assert [raw.used_element(n) for n in (0, 1)] == [(0, 0), (2, 3)]


def test_serve_queue_stops_at_a_request_without_meaning(ram: MappedRam) -> None:
    raw, end = hosted(ram)
    ram.write(GPA(DATA), b"bad")
    raw.put_chain(0, (DATA, 3, False), (DATA + 16, 3, True))
    raw.offer(0)
    with pytest.raises(ProtocolError, match="without meaning"):
        serve_queue(Echo(), 0, end)
    assert raw.used_index == 0


def test_serve_queue_leaves_buffers_that_the_device_has_no_use_for(ram: MappedRam) -> None:
    raw, end = hosted(ram)
    raw.put_chain(0, (DATA, 3, False), (DATA + 16, 3, True))
    raw.offer(0)
    echo = Echo()
    echo.wants = False
    assert serve_queue(echo, 0, end) == Served(0, drained=False)
    assert raw.used_index == 0
    echo.wants = True
    assert serve_queue(echo, 0, end) == Served(1, drained=True)


def test_base_class_defaults() -> None:
    class Bare(Device):
        device_id = DeviceId.ENTROPY

    device = Bare()
    device.reset()
    assert (device.queues, device.features, device.config(), device.pending(0)) == (1, 0, b"", True)
    device.accepted = 1 << 33
    assert device.has(Feature.ACCESS_PLATFORM)
    assert not device.has(32)
    with pytest.raises(NotImplementedError):
        device.handle(0, Chain(FlatSpace(make_ram(1)), 0, [], []))
