# SPDX-License-Identifier: Apache-2.0
"""The disk of ours that machines put behind a device: every sector says its own number."""

from __future__ import annotations

from typing import Final

SECTOR: Final = 512
IMAGE_SECTORS: Final = 2048


def sector_text(number: int) -> bytes:
    """What sector ``number`` holds: 512 bytes that name it, as ``b"sector 00000001 "``, 32 times."""
    return (b"sector %08d " % number * 32)[:SECTOR]


def disk_image(sectors: int) -> bytes:
    """A disk of so many sectors."""
    return b"".join(map(sector_text, range(sectors)))
