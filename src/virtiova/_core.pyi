# SPDX-License-Identifier: Apache-2.0
"""The native half: memory accesses that Python cannot express. Offsets are in bytes.

Every sized access is exactly one machine access (``load_pair``: two of 64 bits) at a naturally
aligned offset. An offset out of range or misaligned raises ``IndexError``, any access after `Window.release`
``ValueError``, a value that does not fit ``OverflowError``; memory is untouched then.
"""

from typing import Self, final

@final
class Window:
    """A writable C-contiguous buffer, held until `release`.

    ``BufferError`` if it is read-only or has gaps, ``ValueError`` if it does not begin at a multiple of 8.
    The sized accesses are little-endian in memory, or big-endian with ``swap``, whatever the host is.
    """

    def __new__(cls, buffer: object) -> Self: ...
    def __len__(self) -> int: ...
    def release(self) -> None:
        """Let go of the buffer. May be called more than once."""

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes out, in no promised order and size."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in, in no promised order and size: never for what the other side polls."""

    def load16(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 16-bit value."""

    def load32(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 32-bit value."""

    def load_pair(self, offset: int) -> bytes:
        """16 bytes as they lie in memory, each aligned half loaded once, the first one first."""

    def store16(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 16-bit value."""

    def store32(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 32-bit value."""

def fence() -> None:
    """A sequentially consistent fence."""
