# SPDX-License-Identifier: Apache-2.0
"""Memory with canaries: every byte is known before and after, those around what may be touched as well."""

from __future__ import annotations

import random
from typing import Final

from virtiova.addr import GPA, PAGE_SIZE
from virtiova.dma.ram import MappedRam, RamBlock

BLOCK: Final = 6 * PAGE_SIZE
BASE: Final = GPA(0x10000)
"""Where RAM begins: not at the place that it has in the buffer."""
END: Final = GPA(BASE + 2 * BLOCK)
BLOCKS: Final = (
    RamBlock(BASE, BLOCK, BLOCK + 2 * PAGE_SIZE),
    RamBlock(GPA(BASE + BLOCK), BLOCK, PAGE_SIZE),
)
"""Adjacent for the guest, and the other way round in the buffer, with a page of canaries before, between and behind."""
_PATTERN: Final = random.Random(1).randbytes(2 * BLOCK + 3 * PAGE_SIZE)
"""No two places look alike."""


class Memory:
    """A guest's RAM: ``blocks`` of it in ``buffer``, in which no two places look alike.

    ``buffer`` is a ``bytearray`` (of which ``ctypes`` can take the address); ``ram`` is the same by guest-physical
    addresses. What lies between the blocks is nobody's.
    """

    def __init__(self, blocks: tuple[RamBlock, ...] = BLOCKS) -> None:
        size = max(block.offset + block.size for block in blocks) + PAGE_SIZE
        self.buffer = bytearray(_PATTERN if blocks is BLOCKS else random.Random(1).randbytes(size))
        self.blocks = blocks
        self.ram = MappedRam(self.buffer, self.blocks)

    def place(self, gpa: int) -> int:
        """Where in the buffer the byte at ``gpa`` is. Raises `LookupError` if it is not RAM."""
        for block in self.blocks:
            if block.gpa <= gpa < block.gpa + block.size:
                return block.offset + gpa - block.gpa
        raise LookupError(f"0x{gpa:x} is not RAM")
