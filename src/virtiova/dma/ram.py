# SPDX-License-Identifier: Apache-2.0
"""RAM: where bytes live, by guest-physical address, mapped into this process or reached by verbs.

Indices, flags and descriptors that another party can change are touched only through the sized
loads and stores, each of which is exactly one access with the memory order that its name says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from virtiova import _core
from virtiova.addr import GPA, PAGE_SIZE
from virtiova.errors import AccessError, MachineError

ByteOrder = Literal["little", "big"]


class Ram(Protocol):
    """A machine's memory, by guest-physical address. Every access outside of it raises `AccessError`."""

    def read(self, gpa: GPA, length: int) -> bytes:
        """Copy ``length`` bytes out, no order promised."""

    def write(self, gpa: GPA, data: bytes) -> None:
        """Copy bytes in, no order promised."""

    def load16(self, gpa: GPA, order: ByteOrder = "little") -> int:
        """One 16-bit load, acquire: what the other side wrote before it stored this is visible after."""

    def load32(self, gpa: GPA, order: ByteOrder = "little") -> int:
        """One 32-bit load, acquire."""

    def load_pair(self, gpa: GPA) -> bytes:
        """16 bytes at a 16-byte boundary (a descriptor), each half loaded exactly once."""

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 16-bit store, release: what was written before is visible to whoever loads it."""

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        """One 32-bit store, release."""

    def fence(self) -> None:
        """A full fence: no later load is satisfied before an earlier store is visible."""


@dataclass(frozen=True, slots=True)
class RamBlock:
    """``size`` bytes of RAM at guest-physical ``gpa``, found at ``offset`` of the backing buffer."""

    gpa: GPA
    size: int
    offset: int


class MappedRam:
    """RAM that is mapped into this process: a writable buffer and the blocks that it is cut into."""

    def __init__(self, buffer: object, blocks: Sequence[RamBlock]) -> None:
        self._window = _core.Window(buffer)
        self._blocks = tuple(blocks)
        for block in self._blocks:
            if block.offset < 0 or block.offset + block.size > len(self._window):
                raise AccessError(block.gpa, block.size, "RAM block lies outside of its backing buffer")

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        """The blocks that this RAM is made of."""
        return self._blocks

    def close(self) -> None:
        """Let go of the buffer, so that whoever mapped it can unmap it."""
        self._window.release()

    def _offset(self, gpa: int, length: int) -> int:
        for block in self._blocks:
            if block.gpa <= gpa and gpa + length <= block.gpa + block.size:
                return block.offset + (gpa - block.gpa)
        raise AccessError(gpa, length, "no RAM there")

    def read(self, gpa: GPA, length: int) -> bytes:
        return self._window.read(self._offset(gpa, length), length)

    def write(self, gpa: GPA, data: bytes) -> None:
        self._window.write(self._offset(gpa, len(data)), data)

    def load16(self, gpa: GPA, order: ByteOrder = "little") -> int:
        return self._window.load16(self._aligned(gpa, 2), order == "big")

    def load32(self, gpa: GPA, order: ByteOrder = "little") -> int:
        return self._window.load32(self._aligned(gpa, 4), order == "big")

    def load_pair(self, gpa: GPA) -> bytes:
        return self._window.load_pair(self._aligned(gpa, 16))

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        self._window.store16(self._aligned(gpa, 2), value, order == "big")

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        self._window.store32(self._aligned(gpa, 4), value, order == "big")

    def fence(self) -> None:
        _core.fence()

    def _aligned(self, gpa: int, size: int) -> int:
        if gpa % size:
            raise AccessError(gpa, size, f"not aligned to {size} bytes")
        return self._offset(gpa, size)


class VerbRam:
    """RAM that is reached only by a machine's verbs (``read`` and ``write``), never mapped here.

    A verb is a round trip over a socket, handled by the machine in order, so the sized accesses need
    no fence of their own. ``read`` takes an address and a length, ``write`` an address and bytes.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        write: Callable[[int, bytes], None],
        blocks: Sequence[RamBlock],
    ) -> None:
        self._read = read
        self._write = write
        self._blocks = tuple(blocks)

    def _check(self, gpa: int, length: int, align: int = 1) -> None:
        if gpa % align:
            raise AccessError(gpa, length, f"not aligned to {align} bytes")
        if not any(b.gpa <= gpa and gpa + length <= b.gpa + b.size for b in self._blocks):
            raise AccessError(gpa, length, "no RAM there")

    def read(self, gpa: GPA, length: int) -> bytes:
        self._check(gpa, length)
        data = self._read(gpa, length) if length else b""
        if len(data) != length:
            raise MachineError(f"asked for {length} bytes at 0x{gpa:x}, got {len(data)}")
        return data

    def write(self, gpa: GPA, data: bytes) -> None:
        self._check(gpa, len(data))
        if data:
            self._write(gpa, data)

    def load16(self, gpa: GPA, order: ByteOrder = "little") -> int:
        self._check(gpa, 2, 2)
        return int.from_bytes(self.read(gpa, 2), order)

    def load32(self, gpa: GPA, order: ByteOrder = "little") -> int:
        self._check(gpa, 4, 4)
        return int.from_bytes(self.read(gpa, 4), order)

    def load_pair(self, gpa: GPA) -> bytes:
        self._check(gpa, 16, 16)
        return self.read(gpa, 16)

    def store16(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        self._check(gpa, 2, 2)
        self._write(gpa, value.to_bytes(2, order))

    def store32(self, gpa: GPA, value: int, order: ByteOrder = "little") -> None:
        self._check(gpa, 4, 4)
        self._write(gpa, value.to_bytes(4, order))

    def fence(self) -> None:
        """Nothing to do: verbs are answered in order."""


class PageAllocator:
    """Hands out zeroed 4 KiB pages of a RAM, from ``start`` up to ``end``, never adjacent to the last one.

    The gap of one page between any two pages is deliberate: a byte past the end of a page then lands
    in memory that nobody owns, where it is seen, and two pages are never contiguous by luck.
    """

    def __init__(self, ram: Ram, start: GPA, end: GPA) -> None:
        self._ram = ram
        self._next = start
        self._end = end
        self._free: dict[int, list[GPA]] = {}

    def page(self) -> GPA:
        """A zeroed page."""
        return self.run(1)

    def run(self, count: int, align: int = PAGE_SIZE) -> GPA:
        """``count`` zeroed pages in a row, the first aligned to ``align`` bytes (a power of two)."""
        free = self._free.get(count, [])
        for gpa in free:
            if not gpa % align:
                free.remove(gpa)
                self._ram.write(gpa, bytes(count * PAGE_SIZE))
                return gpa
        gpa = GPA((self._next + align - 1) & ~(align - 1))
        end = gpa + count * PAGE_SIZE
        if end > self._end:
            raise AccessError(gpa, count * PAGE_SIZE, "the machine has no RAM left for the probe")
        self._next = GPA(end + PAGE_SIZE)
        self._ram.write(gpa, bytes(count * PAGE_SIZE))
        return gpa

    def release(self, gpa: GPA, count: int = 1) -> None:
        """Take ``count`` pages from ``gpa`` on back, as they were handed out by one call."""
        self._free.setdefault(count, []).append(gpa)

    def carve(self, count: int, align: int = PAGE_SIZE) -> PageAllocator:
        """An allocator of its own over the next ``count`` pages, the first aligned to ``align`` bytes."""
        start = GPA((self._next + align - 1) & ~(align - 1))
        end = GPA(start + count * PAGE_SIZE)
        if end > self._end:
            raise AccessError(start, count * PAGE_SIZE, "the machine has no RAM left for the probe")
        self._next = end
        return PageAllocator(self._ram, start, end)
