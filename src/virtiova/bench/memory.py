# SPDX-License-Identifier: Apache-2.0
"""The memory of a benchmark, and how it is mapped: nothing, one mapping, or many small ones.

One file: rings, headers and status bytes first, then the pages that requests are about. As everywhere here, a byte has
three addresses or four, no two of which are equal: guest-physical, IOVA, the front end's, and its place in the file.
"""

from __future__ import annotations

import array
import functools
import mmap
import os
import random
import struct
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.errors import AccessError
from virtiova.machine.qemu.process import sealed_file
from virtiova.wire.vhost_user import IotlbKind, MemoryRegion, Request

PAGE: Final = 4096
CONTROL: Final = 1 << 20
"""Bytes of the file that are for rings and headers."""
RINGS: Final = (0, 0x20000)
"""Where the two rings are."""
HEADS: Final = 0x40000

_CONTROL_GPA: Final = GPA(0x1_4000_0000)
_CONTROL_IOVA: Final = IOVA(0x3_8000_0000)
_CONTROL_UVA: Final = UVA(0x7E5A_0000_0000)
_PAGES_GPA: Final = GPA(0x2_0000_0000)
_PAGES_IOVA: Final = IOVA(0x8_0000_0000)
_PAGES_UVA: Final = UVA(0x7E61_0000_0000)
_STRIDE: Final = 2 * PAGE
_UPDATE: Final = struct.Struct("<IIIQQQBB6x")
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """How the pages are mapped: ``mappings`` is 0 without bit 33; 1 for all of them in one; else that many of 4 KiB,
    8 KiB from each other, to host pages in no order. ``pages`` is the number of host pages, and several mappings share
    one where there are fewer of them."""

    mappings: int
    pages: int

    @property
    def bit(self) -> bool:
        """Whether bit 33 is negotiated."""
        return self.mappings > 0

    @property
    def used(self) -> int:
        """Host pages that requests are about."""
        return self.pages if self.mappings < 2 else min(self.mappings, self.pages)


@functools.lru_cache(maxsize=8)
def host_pages(shape: Shape) -> tuple[int, ...]:
    """The host page of each mapping (of one: of each page), at random, yet the same in every run."""
    count = shape.pages if shape.mappings < 2 else shape.mappings
    order = list(range(shape.used))
    if shape.mappings >= 2:
        random.Random(shape.mappings).shuffle(order)
    return tuple(order[number % len(order)] for number in range(count))


@functools.lru_cache(maxsize=8)
def entries(shape: Shape, image: int, *, spread: bool) -> bytes:
    """What `_load.Driver.prepare` takes, in an order of its own: address, host page, and page of a disk of ``image``
    pages. With ``spread`` buffers start at different places of their pages, as frames do: else all of them would be
    after the same few lines of a cache."""
    base, step = (_PAGES_GPA, PAGE) if not shape.bit else (_PAGES_IOVA, PAGE if shape.mappings == 1 else _STRIDE)
    numbered = list(enumerate(host_pages(shape)))
    random.Random(len(numbered)).shuffle(numbered)
    made = array.array("Q")
    for number, page in numbered:
        made.extend((base + number * step + (page * 7 % 31 * 128 if spread else 0), page, page % image))
    return made.tobytes()


def misses(shape: Shape, told: int) -> bytes:
    """As `entries`, of the mappings behind the first ``told``."""
    made = array.array("Q")
    for number, page in list(enumerate(host_pages(shape)))[told:]:
        made.extend((_PAGES_IOVA + number * _STRIDE, page, page))
    return made.tobytes()


@functools.lru_cache(maxsize=4)
def updates(shape: Shape, told: int | None = None) -> bytes:
    """The UPDATE messages for all of it, as bytes; or for the first ``told`` mappings of 4 KiB."""
    if not shape.bit:
        return b""
    made = bytearray(_message(IotlbKind.UPDATE, _CONTROL_IOVA, CONTROL, _CONTROL_UVA))
    if shape.mappings == 1:
        made += _message(IotlbKind.UPDATE, _PAGES_IOVA, shape.pages * PAGE, _PAGES_UVA)
    else:
        for number, page in enumerate(host_pages(shape)[:told]):
            made += _message(IotlbKind.UPDATE, _PAGES_IOVA + number * _STRIDE, PAGE, _PAGES_UVA + page * PAGE)
    return bytes(made)


def pairs(first: int, count: int) -> bytes:
    """UPDATE and INVALIDATE of ``count`` pages that no request is about, each pair by itself, as bytes."""
    made = bytearray()
    for number in range(first, first + count):
        # Between two mappings that may be there.
        iova = _PAGES_IOVA + number * _STRIDE + PAGE
        made += _message(IotlbKind.UPDATE, iova, PAGE, _PAGES_UVA)
        made += _message(IotlbKind.INVALIDATE, iova, PAGE, 0)
    return bytes(made)


def _message(kind: IotlbKind, iova: int, size: int, uva: int) -> bytes:
    perm = Access.RW.value if kind is IotlbKind.UPDATE else 0
    return _UPDATE.pack(Request.IOTLB_MSG, _VERSION, 32, iova, size, uva, perm, kind)


class Memory:
    """The file, mapped; sealed, so that nobody can cut it short. ``shape`` says what a MISS is answered with."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.size = CONTROL + shape.pages * PAGE
        self.fd = sealed_file("virtiova-bench", self.size)
        try:
            self.map = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self.regions = (
            MemoryRegion(_CONTROL_GPA, CONTROL, _CONTROL_UVA, 0),
            MemoryRegion(_PAGES_GPA, shape.pages * PAGE, _PAGES_UVA, CONTROL),
        )

    def resolve(self, iova: int, access: Access) -> tuple[IOVA, GPA, Access] | None:
        """The page that a MISS is about (`FrontEnd`)."""
        page = iova & -PAGE
        if _CONTROL_IOVA <= page < _CONTROL_IOVA + CONTROL:
            return IOVA(page), GPA(_CONTROL_GPA + page - _CONTROL_IOVA), Access.RW
        offset = page - _PAGES_IOVA
        if self.shape.mappings == 1:
            number = offset // PAGE
            return (IOVA(page), GPA(_PAGES_GPA + offset), Access.RW) if 0 <= number < self.shape.pages else None
        number, gap = divmod(offset, _STRIDE)
        if gap or not 0 <= number < self.shape.mappings:
            return None
        return IOVA(page), GPA(_PAGES_GPA + host_pages(self.shape)[number] * PAGE), Access.RW

    def uva(self, gpa: int) -> UVA:
        """Our own address of a byte of guest memory."""
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return UVA(region.uva + gpa - region.gpa)
        raise AccessError(gpa, 1, "no RAM there")

    def ring(self, number: int, size: int) -> tuple[int, int, int, int]:
        """Ring ``number`` as `_load.Driver` takes it: size, and where its three parts are."""
        start = RINGS[number]
        return size, start, start + 0x8000, start + 0x10000

    def ring_address(self, offset: int) -> int:
        """What the back end is told for a part of a ring: an IOVA with bit 33, else our own address."""
        return (_CONTROL_IOVA if self.shape.bit else _CONTROL_UVA) + offset

    def address(self, offset: int) -> int:
        """What goes into a ring for a byte of the first part of the file."""
        return (_CONTROL_IOVA if self.shape.bit else _CONTROL_GPA) + offset

    def clear(self) -> None:
        """Rings as they were before the first connection."""
        self.map[:CONTROL] = bytes(CONTROL)

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.map.close()
            os.close(fd)
