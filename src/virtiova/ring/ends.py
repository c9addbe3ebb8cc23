# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a virtqueue have in common, split or packed: all that drivers and hosts of devices see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from virtiova.addr import DmaAddr
from virtiova.dma.ops import DmaRegion
from virtiova.errors import ProtocolError
from virtiova.ring import chain as device_side
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_WRITE

MAX_CHAIN_BYTES: Final = 1 << 32
"""Bytes of buffers in one chain, by the driver's own bound (virtio 1.4, 2.7.5.2)."""
MAX_CHAIN: Final = 1024
"""Buffers in one chain, also where the ring has more entries: what one chain may cost. QEMU and the kernel's vhost
take no longer ones either."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes at ``addr`` of one request; ``write``: the device writes them."""

    addr: DmaAddr
    length: int
    write: bool


@dataclass(frozen=True, slots=True)
class Used:
    """A request that is done: ``head`` is what `DriverRing.add` gave, ``length`` bytes were written, as the device
    says."""

    head: int
    length: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of a ring that only the device writes once all that was added is published. ``until`` is what is there
    before it does, where publishing changes that."""

    offset: int
    length: int
    until: bytes | None = None


class RingLayout(Protocol):
    """Where the parts of a ring lie."""

    @property
    def size(self) -> int:
        """Entries."""

    @property
    def total(self) -> int:
        """Bytes."""


class DriverRing(Protocol):
    """One virtqueue, as its driver. `add` and `publish` are separate, so that many requests cost one store that the
    device sees, and so that canaries can be painted in between."""

    @property
    def layout(self) -> RingLayout: ...

    @property
    def parts(self) -> tuple[int, int, int]:
        """Device addresses of descriptor area, driver area and device area (virtio 1.4, 2.6)."""

    @property
    def room(self) -> int:
        """Descriptors that are free."""

    @property
    def newest(self) -> int:
        """The number of the request that was added last, and is not published yet."""

    def add(self, segments: Sequence[Segment]) -> int:
        """Put a request into the ring, not yet visible to the device; its number, until it is used."""

    def add_indirect(self, segments: Sequence[Segment], table: DmaRegion, offset: int = 0) -> int:
        """The same through an indirect table, written to ``table`` at ``offset``."""

    def publish(self) -> bool:
        """Make all added requests visible; True if the device wants to be notified of them."""

    def poll(self) -> Used | None:
        """The next request that was used, or None. Raises `ProtocolError` if the device made something up."""

    def used_moved(self) -> bool:
        """Has the device used more than what was polled? Trusts nothing else."""

    def answers(self) -> list[Answer]:
        """Where in the region the device says that it has done the next request."""

    def own_answers(self) -> list[Answer]:
        """Where it writes something, and the driver never does: to be watched while requests come and go."""


class DeviceRing(Protocol):
    """One virtqueue, as its device. What raises does so as `ring.split_device.SplitDevice` says."""

    @property
    def size(self) -> int:
        """Entries: the most chains that can be made available at a time."""

    @property
    def next_avail(self) -> int:
        """Where `pop` goes on, as a vhost front end has it: 16 bits."""

    @property
    def next_used(self) -> int:
        """Where `push` goes on, likewise."""

    def pop(self) -> Chain | None:
        """The next chain; None if the driver has made none available."""

    def put_back(self, count: int = 1) -> None:
        """Forget that the last ``count`` chains were taken: they are popped again. None of them was pushed."""

    def back_to(self, mark: int) -> None:
        """The same, to where `next_avail` stood at ``mark``."""

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back; its first ``written`` bytes of room were written."""

    def push_all(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """`push` for several, which the driver sees used all at once."""

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call."""

    def tell_again(self) -> None:
        """It is not known of what the driver was told: `needs_interrupt` may tell it once more."""

    def disable_notify(self) -> None:
        """Ask the driver not to kick. A hint only."""

    def enable_notify(self, *, waiting: bool = False) -> bool:
        """Ask for a kick with the next chain, then look once more; True: there is more, do not sleep. ``waiting``: the
        chains that are known to be there are not enough, so that only what comes after them counts."""


def check_request(segments: Sequence[Segment]) -> None:
    """Raise `ProtocolError` for a request that no driver may make (virtio 1.4, 2.7.4.2, 2.8.16)."""
    if not segments:
        raise ProtocolError("a request needs at least one descriptor")
    writes = [segment.write for segment in segments]
    if writes != sorted(writes):
        raise ProtocolError("device-readable descriptors must come before device-writable ones")


def room_of(segments: Sequence[Segment]) -> int:
    """Bytes of a request that the device may write."""
    return sum(segment.length for segment in segments if segment.write)


class Gathering:
    """The buffers of one chain, as its descriptors are walked: judged one by one, at most ``most``."""

    __slots__ = ("_most", "_total", "readable", "writable")

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = 0
        self.readable: list[device_side.Segment] = []
        self.writable: list[device_side.Segment] = []

    def add(self, where: int, address: int, length: int, flags: int) -> None:
        """The buffer of the descriptor at ``where``. Raises `ProtocolError` if the chain makes no sense with it."""
        if len(self.readable) + len(self.writable) == self._most:
            raise ProtocolError(f"descriptor at 0x{where:x}: a loop, or a chain of more than {self._most} buffers")
        self._total += length
        if self._total > MAX_CHAIN_BYTES:
            raise ProtocolError(f"descriptor at 0x{where:x}: 0x{self._total:x} bytes, wanted at most 2**32 in a chain")
        if flags & DESC_F_WRITE:
            self.writable.append((address, length))
        elif self.writable:
            raise ProtocolError(f"descriptor at 0x{where:x}: readable after writable, wanted writable ones last")
        else:
            self.readable.append((address, length))
