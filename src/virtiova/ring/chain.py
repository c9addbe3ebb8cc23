# SPDX-License-Identifier: Apache-2.0
"""A request as a device sees it: bytes to read, room to write, and nothing else.

No address is visible here, and no RAM: every byte goes through the address space that the device
was given. That is what makes it impossible for a device class to go around it by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virtiova.addr import Access
from virtiova.dma.space import MAX_ACCESS, AddressSpace
from virtiova.errors import AccessError, ProtocolError

Segment = tuple[int, int]
"""Address and length in bytes of one buffer, as the device's address space understands it."""


class _Cursor:
    """A position in a list of buffers that only moves forward."""

    __slots__ = ("_index", "_offset", "left", "segments")

    def __init__(self, segments: Sequence[Segment], total: int) -> None:
        self.segments = segments
        self._index = 0
        self._offset = 0
        self.left = total

    def take(self, count: int) -> Iterator[Segment]:
        """The next ``count`` bytes (at most `left`), piece by piece. Moves as the pieces are drawn."""
        while count > 0:
            address, length = self.segments[self._index]
            step = min(count, length - self._offset)
            piece = (address + self._offset, step)
            count -= step
            self.left -= step
            self._offset += step
            if self._offset == length:
                self._index += 1
                self._offset = 0
            if step:
                yield piece

    def skip(self, count: int) -> None:
        """Move past ``count`` bytes."""
        for _ in self.take(count):
            pass


class Chain:
    """One descriptor chain, popped from a ring. Buffers are read and written in order, by a cursor.

    ``head`` is the ring's own name for it, and ``slots`` the descriptors that it has in the ring itself, for the
    ring to push it back.
    """

    __slots__ = ("_gap", "_in", "_out", "_space", "_written", "head", "moved", "slots")

    def __init__(
        self,
        space: AddressSpace,
        head: int,
        readable: Sequence[Segment],
        writable: Sequence[Segment],
        slots: int = 1,
    ) -> None:
        self._space = space
        self._out = _Cursor(readable, sum(length for _, length in readable))
        self._in = _Cursor(writable, sum(length for _, length in writable))
        self._written = 0
        self._gap = False
        self.head = head
        self.slots = slots
        self.moved = 0
        """Bytes read and written so far."""

    def buffers(self) -> Iterator[tuple[int, int, Access]]:
        """Address, length and direction of each buffer: for the host, which looks whether they can be reached."""
        for address, length in self._out.segments:
            yield address, length, Access.READ
        for address, length in self._in.segments:
            yield address, length, Access.WRITE

    @property
    def length(self) -> int:
        """How many buffers it has, empty ones as well: what it costs to look at it."""
        return len(self._out.segments) + len(self._in.segments)

    @property
    def readable(self) -> int:
        """Bytes from the driver that were not read yet."""
        return self._out.left

    @property
    def writable(self) -> int:
        """Bytes of room for the driver that were not written yet."""
        return self._in.left

    @property
    def written(self) -> int:
        """Bytes written without a gap from the start: what a used element may say (virtio 1.4, 2.7.8.2)."""
        return self._written

    def read(self, n: int | None = None) -> bytes:
        """The next ``n`` bytes from the driver, all that is left if None; fewer if there are not so many.

        Raises `AccessError` if the address space does not let them through, or if they are more than
        ``MAX_ACCESS`` (ask for less). Bytes asked for are behind the cursor even if they missed.
        """
        count = self._out.left if n is None else min(n, self._out.left)
        pieces = self._out.take(count)
        parts = []
        try:
            if count > MAX_ACCESS:
                raise AccessError(next(pieces)[0], count, f"one read moves at most 0x{MAX_ACCESS:x} bytes")
            for address, length in pieces:
                parts.append(self._space.read(address, length))
                self.moved += length
        except AccessError:
            for _ in pieces:
                pass
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: bytes) -> None:
        """Write ``data`` to the driver's next bytes.

        Raises `ProtocolError` if there is less room than that, with nothing written, and `AccessError` if
        the address space does not let it through: then earlier buffers of the chain are written, the one
        that missed is not, and the cursor stands behind all of ``data``.
        """
        count = len(data)
        if count > self._in.left:
            raise ProtocolError(f"the driver has room for 0x{self._in.left:x} bytes, wanted 0x{count:x}")
        pieces = self._in.take(count)
        done = 0
        try:
            for address, length in pieces:
                self._space.write(address, data if length == count else data[done : done + length])
                done += length
        except AccessError:
            self._advance(done)
            self._gap = True
            for _ in pieces:
                pass
            raise
        self._advance(done)

    def skip(self, n: int) -> None:
        """Leave the next ``n`` bytes of room as they are, as before a status that comes last."""
        if not 0 <= n <= self._in.left:
            raise ProtocolError(f"the driver has room for 0x{self._in.left:x} bytes, wanted to skip 0x{n:x}")
        if n:
            self._gap = True
            self._in.skip(n)

    def _advance(self, count: int) -> None:
        self.moved += count
        if not self._gap:
            self._written += count
