# SPDX-License-Identifier: Apache-2.0
"""A device that gives back what it is sent, and the same with one mistake each, and the check that is made for it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from virtiova.addr import Access
from virtiova.device.base import Device
from virtiova.errors import AccessError, ProtocolError
from virtiova.features import DeviceId, Feature
from virtiova.ring.chain import Chain
from virtiova.testing import Ask

MOST: Final = 1 << 16
ASKS: Final = (
    Ask("echo", b"abcdefgh" * 40, 400),
    Ask("less room", b"0123456789", 4, answer=b"0123"),
    Ask("more", b"xy", 9),
)


class Echo(Device):
    """What it is sent comes back, as far as there is room."""

    device_id = DeviceId.GPU
    features = 1 << 3

    def __init__(self) -> None:
        self.field = b"\1\2\3\4"

    def config(self) -> bytes:
        return b"echo" + self.field

    def configure(self, offset: int, data: bytes) -> None:
        whole = bytearray(self.config())
        whole[offset : offset + len(data)] = data
        self.field = bytes(whole[4:])

    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read(min(chain.readable, MOST))
        chain.write(data[: chain.writable])


class OffersTooMuch(Echo):
    features = 1 << Feature.ACCESS_PLATFORM


class Restless(Echo):
    reads = 0

    def config(self) -> bytes:
        self.reads += 1
        return self.reads.to_bytes(8, "little")


class OneField(Echo):
    def configure(self, offset: int, data: bytes) -> None:
        self.field = {4: data}[offset]


class Backwards(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read(min(chain.readable, MOST))
        chain.write(data[: chain.writable][::-1])


class Overstates(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read(min(chain.readable, MOST))
        chain.write(data[: max(chain.writable - 1, 0)])
        chain._written += chain.writable


class Clings(Echo):
    """Finishes a request after it gave it back."""

    last: Chain | None = None

    def handle(self, queue: int, chain: Chain) -> None:
        if self.last is not None and self.last.writable:
            try:
                self.last.write(b"!")
            except AccessError:
                self.last = None
        super().handle(queue, chain)
        self.last = chain


class Insists(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        if not self.has(Feature.ACCESS_PLATFORM):
            raise ProtocolError("not without bit 33")
        super().handle(queue, chain)


class SplitOnly(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        if self.has(Feature.RING_PACKED):
            raise ProtocolError("not in a packed ring")
        super().handle(queue, chain)


class TwoBuffers(Echo):
    """As drivers are that it was tried with."""

    def handle(self, queue: int, chain: Chain) -> None:
        if chain.length != 2:
            raise ProtocolError("wanted two buffers")
        super().handle(queue, chain)


class Peeks(Echo):
    """Looks at what is there before it writes over it."""

    def handle(self, queue: int, chain: Chain) -> None:
        for address, length, access in chain.buffers():
            if access is Access.WRITE and length < MOST:
                try:
                    chain._space.read(address, length)
                except AccessError:
                    break
        super().handle(queue, chain)


class StaysBusy(Echo):
    """What it cannot reach leaves it as it was in the middle."""

    busy = False

    def handle(self, queue: int, chain: Chain) -> None:
        if self.busy:
            return
        self.busy = True
        super().handle(queue, chain)
        self.busy = False

    def reset(self) -> None:
        self.busy = False


class Unpacks(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read(min(chain.readable, MOST))
        if data[0] > 255:
            raise AssertionError
        chain.write(data[: chain.writable])


class Divides(Echo):
    def handle(self, queue: int, chain: Chain) -> None:
        _share = chain.writable // (chain.readable + chain.writable)
        super().handle(queue, chain)


class Obliging(Echo):
    """Makes as much as there is room for."""

    def handle(self, queue: int, chain: Chain) -> None:
        data = chain.read(min(chain.readable, MOST))
        chain.write(data.ljust(chain.writable, b"\0")[: chain.writable])


class MixesUp(Echo):
    """The answers to several requests are those to the last of them."""

    def handle_batch(self, queue: int, chains: Sequence[Chain]) -> None:
        data = [chain.read(min(chain.readable, MOST)) for chain in chains]
        for chain in chains:
            chain.write(data[-1][: chain.writable])


class StopsThere(Echo):
    """One that is out of reach ends it for those behind."""

    def handle_batch(self, queue: int, chains: Sequence[Chain]) -> None:
        with contextlib.suppress(AccessError):
            for chain in chains:
                self.handle(queue, chain)


class Remembers(Echo):
    """A reset is not heard."""

    count = 0

    def handle(self, queue: int, chain: Chain) -> None:
        self.count += 1
        data = chain.read(min(chain.readable, MOST))
        chain.write((data + bytes([self.count]))[: chain.writable])


MUTANTS: Final[list[tuple[type[Device], str]]] = [
    (OffersTooMuch, "declares"),
    (Restless, "declares"),
    (OneField, "config-writes"),
    (Backwards, "answers"),
    (Overstates, "answers"),
    (Clings, "answers"),
    (Insists, "bit-off"),
    (SplitOnly, "packed"),
    (TwoBuffers, "cut"),
    (Peeks, "directions"),
    (StaysBusy, "taken-away"),
    (Unpacks, "any-request"),
    (Divides, "empty"),
    (Obliging, "claims"),
    (MixesUp, "together"),
    (StopsThere, "together"),
    (Remembers, "resets"),
]
"""The mistake, and the check that has to find it."""
