# SPDX-License-Identifier: Apache-2.0
"""Block requests beyond reading and writing: discard, zeroes, read-only, caches, limits; over memory and over files."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from leaks import descriptors
from ring_kit import make_ram
from virtiova.addr import GPA
from virtiova.device.blk import (
    DISCARD_SECTORS,
    MAX_DATA,
    RANGES,
    SECTOR,
    WRITEBACK_AT,
    ZEROES_SECTORS,
    Bit,
    Blk,
    Request,
    Status,
)
from virtiova.device.store import FileStore, MemoryStore, Store
from virtiova.dma.space import FlatSpace
from virtiova.errors import NotPossibleError, UsageError
from virtiova.ring.chain import Chain

SECTORS = 64
HEADER, STATUS, DATA = 0x100, 0x180, 0x1000
UNMAP, UNKNOWN = 1, 2
ALL = (1 << 64) - 1


def image() -> bytes:
    return b"".join(bytes([n + 1]) * SECTOR for n in range(SECTORS))


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore(bytearray(image()))
        return
    path = tmp_path / "disk"
    path.write_bytes(image())
    with FileStore(path) as file:
        yield file


def ask(device: Blk, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """Status, and what came back."""
    ram = make_ram(0x10000)
    ram.write(GPA(HEADER), struct.pack("<IIQ", kind, 0, sector))
    ram.write(GPA(DATA), data)
    out = [(HEADER, 16), *([(DATA, len(data))] if data else [])]
    into = [*([(DATA, room)] if room else []), (STATUS, 1)]
    device.handle(0, Chain(FlatSpace(ram), 0, out, into))
    return ram.read(GPA(STATUS), 1)[0], ram.read(GPA(DATA), room)


def ranges(*parts: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *part) for part in parts)


def contents(device: Blk, sector: int, count: int) -> bytes:
    status, data = ask(device, Request.IN, sector, room=count * SECTOR)
    assert status == Status.OK
    return data


def test_reads_and_writes_of_either_store(store: Store) -> None:
    device = Blk(store)
    assert contents(device, 5, 3) == image()[5 * SECTOR : 8 * SECTOR]
    assert ask(device, Request.OUT, 63, b"last" * 128)[0] == Status.OK
    assert contents(device, 62, 2) == b"\x3f" * SECTOR + b"last" * 128
    assert ask(device, Request.OUT, 63, b"past" * 256)[0] == Status.IOERR
    assert ask(device, Request.FLUSH)[0] == Status.OK


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_zeroes_read_as_zeroes_and_nothing_else_does(store: Store, flags: int) -> None:
    device = Blk(store)
    assert ask(device, Request.WRITE_ZEROES, data=ranges((3, 2, flags), (60, 4, flags), (9, 0, 0)))[0] == Status.OK
    wanted = bytearray(image())
    wanted[3 * SECTOR : 5 * SECTOR] = bytes(2 * SECTOR)
    wanted[60 * SECTOR :] = bytes(4 * SECTOR)
    assert contents(device, 0, SECTORS) == wanted


def test_discard_leaves_the_rest_alone(store: Store) -> None:
    device = Blk(store)
    assert ask(device, Request.DISCARD, data=ranges((8, 8, 0)))[0] == Status.OK
    now = contents(device, 0, SECTORS)
    assert now[: 8 * SECTOR] == image()[: 8 * SECTOR]
    assert now[16 * SECTOR :] == image()[16 * SECTOR :]


def test_a_discarded_file_takes_less_room(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(1 << 20))
    before = path.stat().st_blocks
    with FileStore(path) as store:
        assert ask(Blk(store), Request.DISCARD, data=ranges((0, 1024, 0)))[0] == Status.OK
    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks < before


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (Request.DISCARD, ranges((0, 1, UNMAP)), Status.UNSUPP),
        (Request.DISCARD, ranges((0, 1, 0), (0, 1, UNKNOWN)), Status.UNSUPP),
        (Request.WRITE_ZEROES, ranges((0, 1, UNKNOWN)), Status.UNSUPP),
        (Request.WRITE_ZEROES, ranges((0, 1, UNMAP | 1 << 31)), Status.UNSUPP),
        (Request.WRITE_ZEROES, ranges((0, 1, 0))[:-1], Status.IOERR),
        (Request.WRITE_ZEROES, b"", Status.IOERR),
        (Request.WRITE_ZEROES, ranges(*[(0, 1, 0)] * (RANGES + 1)), Status.IOERR),
        (Request.WRITE_ZEROES, ranges((0, 1, 0), (SECTORS, 1, 0)), Status.IOERR),
        (Request.WRITE_ZEROES, ranges((0, 1, 0), (ALL, 1, 0)), Status.IOERR),
        (Request.DISCARD, ranges((0, 1, 0), (1, SECTORS, 0)), Status.IOERR),
        (Request.DISCARD, ranges((0, 0xFFFFFFFF, 0)), Status.IOERR),
    ],
)
def test_ranges_without_meaning_change_nothing(store: Store, kind: Request, data: bytes, status: Status) -> None:
    device = Blk(store)
    assert ask(device, kind, data=data)[0] == status
    assert contents(device, 0, SECTORS) == image()


def test_ranges_have_a_largest_size() -> None:
    class Huge(MemoryStore):
        size = 1 << 50

    device = Blk(Huge(bytearray(SECTOR)))
    assert ask(device, Request.DISCARD, data=ranges((0, DISCARD_SECTORS, 0)))[0] == Status.OK
    assert ask(device, Request.DISCARD, data=ranges((0, DISCARD_SECTORS + 1, 0)))[0] == Status.IOERR
    assert ask(device, Request.WRITE_ZEROES, data=ranges((0, ZEROES_SECTORS + 1, 0)))[0] == Status.IOERR


def test_a_request_has_a_largest_size() -> None:
    class Huge(MemoryStore):
        size = 1 << 50

        def read(self, offset: int, length: int) -> bytes:
            raise AssertionError("was asked for data")

    ram = make_ram(0x1000)
    ram.write(GPA(HEADER), struct.pack("<IIQ", Request.IN, 0, 0))
    chain = Chain(FlatSpace(ram), 0, [(HEADER, 16)], [(DATA, MAX_DATA + SECTOR), (STATUS, 1)])
    Blk(Huge(bytearray())).handle(0, chain)
    assert ram.read(GPA(STATUS), 1)[0] == Status.IOERR


# -- read-only


def test_read_only(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    path.chmod(0o444)
    with FileStore(path, read_only=True) as file:
        for store in (file, MemoryStore(bytearray(image()), read_only=True)):
            device = Blk(store)
            assert device.features >> Bit.RO & 1
            assert not device.features >> Bit.DISCARD & 1
            assert ask(device, Request.OUT, 0, b"x" * SECTOR)[0] == Status.IOERR
            assert ask(device, Request.DISCARD, data=ranges((0, 1, 0)))[0] == Status.IOERR
            assert ask(device, Request.WRITE_ZEROES, data=ranges((0, 1, 0)))[0] == Status.IOERR
            assert ask(device, Request.FLUSH)[0] == Status.OK
            assert contents(device, 0, SECTORS) == image()


# -- caches (virtio 1.4, 5.2.6.2)


class Counting(MemoryStore):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


@pytest.mark.parametrize(
    ("accepted", "writeback", "flushes"),
    [
        ((), 1, 1),  # one that cannot flush takes a completed write for a stable one
        ((Bit.FLUSH,), 1, 0),
        ((Bit.FLUSH,), 0, 0),  # writing the field without the feature is nothing
        ((Bit.FLUSH, Bit.CONFIG_WCE), 1, 0),
        ((Bit.FLUSH, Bit.CONFIG_WCE), 0, 1),
        ((Bit.CONFIG_WCE,), 1, 1),
    ],
)
def test_a_write_is_stable_when_it_has_to_be(accepted: tuple[Bit, ...], writeback: int, flushes: int) -> None:
    store = Counting(bytearray(image()))
    device = Blk(store)
    device.accepted = sum(1 << bit for bit in accepted)
    device.configure(WRITEBACK_AT, bytes([writeback]))
    assert ask(device, Request.OUT, 1, b"x" * SECTOR)[0] == Status.OK
    assert store.flushes == flushes


def test_writeback_reads_as_what_it_is() -> None:
    device = Blk(MemoryStore(bytearray(image())))
    assert device.config()[WRITEBACK_AT] == 1
    device.accepted = 1 << Bit.CONFIG_WCE
    assert device.config()[WRITEBACK_AT] == 0, "CONFIG_WCE without FLUSH (5.2.5.2)"
    device.accepted |= 1 << Bit.FLUSH
    assert device.config()[WRITEBACK_AT] == 1
    device.configure(WRITEBACK_AT - 1, b"\xff\0")
    assert device.config()[WRITEBACK_AT] == 0
    device.configure(0, bytes(8))
    device.reset()
    assert device.config()[WRITEBACK_AT] == 1


# -- configuration


def test_config_field_by_field() -> None:
    """Offsets as in ``include/uapi/linux/virtio_blk.h``, by hand: not by the structure that packs them."""
    config = Blk(MemoryStore(bytearray(1 << 20)), queues=3).config()

    def field(offset: int, size: int) -> int:
        return int.from_bytes(config[offset : offset + size], "little")

    assert len(config) == 60
    seen = {
        "capacity": field(0, 8),
        "size_max": field(8, 4),
        "seg_max": field(12, 4),
        "cylinders": field(16, 2),
        "heads": config[18],
        "sectors": config[19],
        "blk_size": field(20, 4),
        "physical_block_exp": config[24],
        "alignment_offset": config[25],
        "min_io_size": field(26, 2),
        "opt_io_size": field(28, 4),
        "writeback": config[32],
        "unused0": config[33],
        "num_queues": field(34, 2),
        "max_discard_sectors": field(36, 4),
        "max_discard_seg": field(40, 4),
        "discard_sector_alignment": field(44, 4),
        "max_write_zeroes_sectors": field(48, 4),
        "max_write_zeroes_seg": field(52, 4),
        "write_zeroes_may_unmap": config[56],
        "unused1": field(57, 3),
    }
    assert seen == {
        "capacity": 2048,
        "size_max": 131072,
        "seg_max": 126,
        "cylinders": 2,
        "heads": 16,
        "sectors": 63,
        "blk_size": 512,
        "physical_block_exp": 3,
        "alignment_offset": 0,
        "min_io_size": 8,
        "opt_io_size": 0,
        "writeback": 1,
        "unused0": 0,
        "num_queues": 3,
        "max_discard_sectors": 1 << 21,
        "max_discard_seg": 16,
        "discard_sector_alignment": 8,
        "max_write_zeroes_sectors": 1 << 15,
        "max_write_zeroes_seg": 16,
        "write_zeroes_may_unmap": 1,
        "unused1": 0,
    }


@pytest.mark.parametrize("queues", [1, 2, 256])
def test_several_queues_are_a_feature(queues: int) -> None:
    device = Blk(MemoryStore(bytearray(SECTOR)), queues=queues)
    assert (device.queues, device.features >> Bit.MQ & 1) == (queues, queues > 1)
    assert int.from_bytes(device.config()[34:36], "little") == queues


@pytest.mark.parametrize("queues", [0, -1, 257])
def test_no_such_number_of_queues(queues: int) -> None:
    with pytest.raises(UsageError, match="wanted 1 to 256"):
        Blk(MemoryStore(bytearray()), queues=queues)


# -- files


def test_a_file_that_becomes_shorter_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with FileStore(path) as store:
        device = Blk(store)
        os.truncate(path, 10 * SECTOR + 7)
        assert ask(device, Request.IN, 9, room=SECTOR)[0] == Status.OK
        assert ask(device, Request.IN, 10, room=SECTOR)[0] == Status.IOERR
        assert ask(device, Request.IN, 40, room=SECTOR)[0] == Status.IOERR


def test_a_file_that_grows_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with FileStore(path) as store:
        os.truncate(path, 1 << 20)
        assert ask(Blk(store), Request.OUT, SECTORS, b"x" * SECTOR)[0] == Status.IOERR


@pytest.mark.parametrize("name", ["nothing", "folder", "pipe"])
@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_file(tmp_path: Path, name: str, read_only: bool) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = descriptors()
    with pytest.raises(UsageError, match=name):
        FileStore(tmp_path / name, read_only=read_only)
    assert descriptors() == before


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(image())
    with FileStore(path), pytest.raises(NotPossibleError, match="somebody else"):
        FileStore(path, read_only=True)
    with FileStore(path, read_only=True), FileStore(path, read_only=True) as second:
        assert second.read(0, 1) == b"\1"
        with pytest.raises(NotPossibleError):
            FileStore(path)
    with FileStore(path) as again:
        assert again.size == SECTORS * SECTOR
