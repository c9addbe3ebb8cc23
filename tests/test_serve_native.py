# SPDX-License-Identifier: Apache-2.0
"""What is served goes through the native table: what was taken back is out of it, and a dirty log sees every write."""

from __future__ import annotations

import os
import random

import pytest

from serve_kit import GPA_BASE, IOVA_BASE, PAGE, PLAIN, RAM, RINGS, USED, UVA_BASE, WITH_BIT, FrontEnd
from virtiova.addr import IOVA, UVA, Access
from virtiova.device.rng import Rng
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage, LogDescription, Request

A = 0x10000
C = 0x20000
LARGE = 1 << 30
"""An IOVA at a multiple of 2 MiB: all of RAM there is one leaf."""
LENGTH = 64


class Counting:
    """A device that writes what can be told apart: its requests, counted from 1."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, length: int) -> bytes:
        self.count += 1
        return bytes([self.count % 255 + 1]) * length


def known(end: FrontEnd, iova: int, access: Access = Access.WRITE) -> bool:
    """Whether the native table knows the place."""
    return end.host.iotlb.radix.covers(iova, LENGTH, access.value)


def write(end: FrontEnd, iova: int, number: int) -> None:
    """Request ``number``, counted from 0: the device writes at ``iova``. Nothing else is mapped than the ring."""
    end.offer((iova, LENGTH, True), head=number % 8)
    end.serve(RINGS)
    assert end.used() == (number + 1) & 0xFFFF


def large(end: FrontEnd, kind: IotlbKind, uva: int = UVA_BASE) -> None:
    gone = kind is IotlbKind.INVALIDATE
    message = IotlbMessage(IOVA(LARGE), RAM, UVA(0 if gone else uva), Access.NONE if gone else Access.RW, kind)
    end.ok(Request.IOTLB_MSG, message.encode())


def test_what_was_taken_back_is_not_in_the_native_table() -> None:
    """X leads to A and is used; it is taken back; it leads to C: bytes land in C, and A is as it was."""
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(A, A)
        write(end, end.dma(A), 0)
        assert end.get(A, LENGTH) == b"\x02" * LENGTH
        assert known(end, end.dma(A)), "the table was not used: this test would say nothing of it"
        assert end.invalidate(end.dma(A), PAGE)[0].payload == wire.u64(0)
        assert not known(end, end.dma(A))
        end.put(A, b"canary A" * (PAGE // 8))
        # Not mapped: an error, and nowhere a byte.
        write(end, end.dma(A), 1)
        assert end.used_element(1)[1] == 0
        assert end.get(C, LENGTH) == bytes(LENGTH)
        end.map(A, C)
        write(end, end.dma(A), 2)
        assert known(end, end.dma(A))
        assert end.get(C, LENGTH) == bytes([end.get(C, 1)[0] or 1]) * LENGTH != bytes(LENGTH)
        assert end.get(A, PAGE) == b"canary A" * (PAGE // 8)


def test_an_answer_that_replaces_another_needs_no_invalidation() -> None:
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(A, A)
        write(end, end.dma(A), 0)
        end.put(A, bytes(LENGTH))
        end.map(A, C)
        write(end, end.dma(A), 1)
        assert (end.get(A, LENGTH), end.get(C, LENGTH)) == (bytes(LENGTH), b"\x03" * LENGTH)
        # One that allows reading only takes the permission away.
        end.map(A, C, Access.READ)
        write(end, end.dma(A), 2)
        assert end.get(C, LENGTH) == b"\x03" * LENGTH


@pytest.mark.parametrize("how", ["whole", "page", "all"])
def test_one_leaf_of_2_mib_is_taken_back(how: str) -> None:
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(WITH_BIT)
        end.start()
        large(end, IotlbKind.UPDATE)
        write(end, LARGE + A, 0)
        assert end.get(A, LENGTH) == b"\x02" * LENGTH
        assert known(end, LARGE + C), "the one access has made a leaf of all of it"
        if how == "whole":
            large(end, IotlbKind.INVALIDATE)
        elif how == "page":
            end.invalidate(LARGE + A, PAGE)
        else:
            end.invalidate(0, (1 << 64) - 1)
        end.put(A, bytes(LENGTH))
        write(end, LARGE + A, 1)
        assert end.get(A, LENGTH) == bytes(LENGTH)
        write(end, LARGE + A + PAGE, 2)
        beside = end.get(A + PAGE, LENGTH)
        assert (beside != bytes(LENGTH)) == (how == "page"), "what was not taken back stays"


def test_memory_that_is_taken_away_is_out_of_the_native_table() -> None:
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(A, A)
        write(end, end.dma(A), 0)
        end.table()
        assert end.host.iotlb.radix.tables == 0
        end.put(A, bytes(LENGTH))
        write(end, end.dma(A), 1)
        assert end.get(A, LENGTH) == bytes(LENGTH)


def test_many_mappings_come_and_go_and_every_byte_is_where_it_belongs() -> None:
    """A thousand requests, updates and invalidations by chance, beside a dictionary that says where bytes belong."""
    rng = random.Random(33)
    device = Counting()
    pages = [A + PAGE * n for n in range(8)]
    homes = [0x40000 + PAGE * n for n in range(16)]
    leads: dict[int, int] = {}
    content = dict.fromkeys(homes, bytes(LENGTH))
    number = through = 0
    with FrontEnd(Rng(device)) as end:
        end.negotiate(WITH_BIT)
        end.start()
        for _ in range(1000):
            page = rng.choice(pages)
            match rng.randrange(6):
                case 0:
                    leads[page] = rng.choice(homes)
                    assert end.map(page, leads[page])[0].payload == wire.u64(0)
                case 1:
                    length = rng.randrange(1, 4) * PAGE
                    assert end.invalidate(end.dma(page), length)[0].payload == wire.u64(0)
                    for gone in range(page, page + length, PAGE):
                        leads.pop(gone, None)
                case _:
                    through += known(end, end.dma(page))
                    write(end, end.dma(page), number)
                    number += 1
                    if page in leads:
                        content[leads[page]] = bytes([device.count % 255 + 1]) * LENGTH
            assert {home: end.get(home, LENGTH) for home in homes} == content
    assert through > 100, "requests that found their page in the native table"


def test_a_dirty_log_takes_the_ring_off_the_native_table_and_gives_it_back() -> None:
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(WITH_BIT)
        end.start()
        end.map(A, A)
        write(end, end.dma(A), 0)
        assert known(end, end.dma(A))
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)

        def marked() -> set[int]:
            bits = int.from_bytes(os.pread(log, PAGE, 0), "little")
            os.pwrite(log, bytes(PAGE), 0)
            return {page for page in range(PAGE * 8) if bits >> page & 1}

        logging = wire.u64(WITH_BIT | 1 << wire.F_LOG_ALL)
        written = {(GPA_BASE + offset) // PAGE for offset in (A, USED)}
        # The feature first and the log later, as QEMU does when a migration starts.
        end.send(Request.SET_FEATURES, logging)
        end.send(Request.SET_LOG_BASE, LogDescription(PAGE, 0).encode(), (log,))
        write(end, end.dma(A), 1)
        assert written <= marked(), "the table still knows the page, and was gone around"
        end.send(Request.SET_FEATURES, wire.u64(WITH_BIT))
        write(end, end.dma(A), 2)
        assert marked() == set()
        end.send(Request.SET_FEATURES, logging)
        write(end, end.dma(A), 3)
        assert written <= marked()
        assert end.get(A, LENGTH) == b"\x05" * LENGTH
        os.close(log)


def test_without_the_bit_the_native_table_is_that_of_the_regions() -> None:
    with FrontEnd(Rng(Counting())) as end:
        end.negotiate(PLAIN)
        end.start()
        assert end.host.platform().radix is end.host.ram.radix
        end.host.ram.write = lambda *_: pytest.fail("not by the table")  # type: ignore[method-assign]
        write(end, end.dma(A), 0)
        assert end.get(A, LENGTH) == b"\x02" * LENGTH
        end.host.ram.radix.clear()
        del end.host.ram.write
        write(end, end.dma(C), 1)
        assert end.get(C, LENGTH) == b"\x03" * LENGTH
        log = os.memfd_create("log")
        os.ftruncate(log, PAGE)
        end.send(Request.SET_LOG_BASE, LogDescription(PAGE, 0).encode(), (log,))
        end.send(Request.SET_FEATURES, wire.u64(PLAIN | 1 << wire.F_LOG_ALL))
        assert end.host.platform().radix is None
        write(end, end.dma(A), 2)
        bits = int.from_bytes(os.pread(log, PAGE, 0), "little")
        assert all(bits >> (GPA_BASE + offset) // PAGE & 1 for offset in (A, USED))
        os.close(log)


def test_what_is_wrong_on_purpose_stays_wrong() -> None:
    """Neither takes the native table, which would be honest."""
    for behaviour in ("leaky", "stale"):
        with FrontEnd(Rng(Counting()), behaviour) as end:
            end.negotiate(WITH_BIT)
            end.start()
            end.map(A, A)
            end.offer((end.dma(A), LENGTH, True))
            end.serve(RINGS)
            assert end.host.platform().radix is None
            assert end.dma(A) == IOVA_BASE + A
