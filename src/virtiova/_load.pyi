# SPDX-License-Identifier: Apache-2.0
"""A load generator: the driver end of a ring for benchmarks, with requests that are prepared before.

It works on memory that it shares with a back end, polls or sleeps, and believes nothing: each used index, element and
status byte is checked as it comes, and now and then the data of a request against what an image is to hold.
"""

from collections.abc import Sequence
from typing import Final, final

from typing_extensions import Buffer

EMPTY: Final[int]
"""One descriptor that nobody has to look into."""
FRAME: Final[int]
"""One descriptor with bytes for the device."""
READ: Final[int]
"""Of a disk: header, page, status."""
WRITE: Final[int]

TIME: Final[int]
"""`Driver.run` ended because its time was over."""
DONE: Final[int]
"""All requests are done."""
LOOK: Final[int]
"""A watched descriptor has something to read, or its other end is gone."""
BAD: Final[int]
"""The other side wrote what cannot be: see `Driver.wrong`."""

MAX_SLOTS: Final[int]
"""Requests that a driver prepares at most."""
HEAD: Final[int]
"""Bytes for the header and the status of each of them."""

_Ring = tuple[int, int, int, int]

@final
class Driver:
    """The driver end of a ring in ``memory``. ``ring`` is its size and the offsets of its descriptors, available and
    used part; ``packed``: of its descriptors, the driver's and the device's event suppression. ``watch``: up to two
    descriptors to return for. Raises `IndexError` for what is not inside of the memory, `ValueError` for what makes no
    ring."""

    def __new__(
        cls,
        memory: Buffer,
        ring: _Ring,
        *,
        kick: int,
        call: int,
        watch: Sequence[int] = (),
        event_idx: bool = True,
        packed: bool = False,
    ) -> Driver: ...
    def prepare(
        self,
        kind: int,
        *,
        heads: int = 0,
        heads_address: int = 0,
        entries: Buffer | None = None,
        pages: int = 0,
        length: int = 1,
        zeros: bool = False,
        every: int = 255,
    ) -> None:
        """Write the descriptors of as many requests as the ring holds.

        ``heads`` and ``heads_address``: where headers and status bytes are, as offset and for the device. ``entries``:
        three 64-bit numbers each, the device's address of a buffer, the page of the memory behind it, counted from the
        offset ``pages``, and the page of the disk, which holds what `paint` writes, or ``zeros``; they are used in
        turn. A page of the memory has the same page of the disk in all of them. One read in ``every`` + 1 is looked
        at.
        """

    def run(self, depth: int, seconds: float, *, limit: int = 0, sleeping: bool = False) -> int:
        """Keep ``depth`` requests with the device, and return why that ended. Without the GIL.

        With a ``limit``, or a depth of 0, `DONE` once so many were submitted since `forget`, and all are back.
        """

    def forget(self) -> None:
        """Start to count anew. What is with the device stays there."""

    def release(self) -> None:
        """Let go of the memory: nothing can be run any more."""

    @property
    def flying(self) -> int:
        """Requests that are with the device."""

    @property
    def slots(self) -> int:
        """Requests that there is room for."""

    @property
    def wrong(self) -> str:
        """What the other side did that cannot be; empty if nothing."""

    def tally(self) -> dict[str, int]:
        """``submitted done checked kicks calls sleeps nanoseconds`` since `forget`."""

    def latency(self, part: float) -> float:
        """Nanoseconds within which this ``part`` of the requests was done, to about 3 %; 0 if none were."""

def echo(memory: Buffer, ring: _Ring, seconds: float, *, packed: bool = False) -> int:
    """Be the smallest device that there is, for so long: each request is given back as it is. How many were."""

def paint(memory: Buffer, at: int, page: int, count: int) -> None:
    """Write what pages ``page`` and following of an image hold, from the offset ``at``."""
