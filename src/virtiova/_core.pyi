# SPDX-License-Identifier: Apache-2.0
"""The native half: memory accesses that Python cannot express. Offsets are in bytes.

Every sized access is exactly one machine access (``load_pair``: two of 64 bits) at a naturally
aligned offset. Out of range or misaligned offsets, and any access after `Window.release`, raise ``IndexError``
resp. ``ValueError``; a value that does not fit raises ``OverflowError``.
"""

class Window:
    """A writable C-contiguous buffer, held until `release`."""

    def __init__(self, buffer: object) -> None: ...
    def __len__(self) -> int: ...
    def release(self) -> None:
        """Let go of the buffer. May be called more than once."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def load16(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 16-bit little-endian value (``swap``: big-endian)."""

    def load32(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 32-bit value."""

    def load_pair(self, offset: int) -> bytes:
        """16 bytes, each half loaded once, the first one with acquire order."""

    def store16(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 16-bit value."""

    def store32(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 32-bit value."""

def fence() -> None:
    """A sequentially consistent fence."""
