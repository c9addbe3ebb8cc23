# SPDX-License-Identifier: Apache-2.0
"""Mistakes with rings that a hostile guest writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import in_python, mutant, patch
from virtiova.addr import GPA, Access
from virtiova.dma.space import MediatedSpace, Miss, Span
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.ends import Gathering
from virtiova.ring.split_device import SplitDevice

_END = 1 << 64


def asserting(*words: str) -> None:
    """It takes what a guest must not do for what cannot be, and ends."""

    def pop(original: Any) -> Callable[[SplitDevice], Any]:
        def popped(self: SplitDevice) -> Any:
            try:
                return original(self)
            except ProtocolError as problem:
                if not isinstance(problem, AccessError) and any(word in str(problem) for word in words):
                    raise SystemExit(f"assertion failed: {problem}") from problem
                raise

        return popped

    in_python()
    patch(SplitDevice, "pop", pop)


@mutant("chain-loop")
def follows_for_ever() -> None:
    """It counts nothing while it follows a chain."""

    def add(original: Any) -> Any:
        def added(self: Gathering, *args: Any) -> None:
            if len(self.readable) + len(self.writable) < self._most:
                original(self, *args)

        return added

    in_python()
    patch(Gathering, "add", add)


@mutant("chain-next")
def asserts_next() -> None:
    """A next descriptor is one of the table's."""
    asserting(": next ")


@mutant("head-beyond")
def asserts_head() -> None:
    """A head is one of the table's."""
    asserting(": head ")


@mutant("available-jump")
def asserts_index() -> None:
    """There are not more requests than entries."""
    asserting("available index")


@mutant("indirect-nested")
def asserts_depth() -> None:
    """In a table there is no table."""
    asserting("inside an indirect")


@mutant("indirect-length")
def asserts_table() -> None:
    """A table is so many descriptors."""
    asserting("wanted a multiple of", "wanted less than")


class Wrapping(MediatedSpace):
    """Adds an offset to an address as the machine does."""

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        if address + length > _END:
            return [Span(GPA(0), length)]
        return super().translate(address, length, access)


@mutant("address-wraps")
def adds_without_a_carry() -> None:
    """What goes past the end of all addresses goes on at their beginning."""
    in_python(lambda host: Wrapping(host.ram, host.iotlb))


@mutant("extreme-lengths")
def asserts_sum() -> None:
    """The sum of all lengths fits."""
    asserting("in a chain")


@mutant("readable-after-writable")
def asserts_order() -> None:
    """Readable buffers come first."""
    asserting("readable after writable")


@mutant("header-unmapped")
def reads_zeros() -> None:
    """What cannot be read is zero, and a header of zeros is a read of the first sector."""

    def read(original: Any) -> Any:
        def done(self: Chain, n: int | None = None) -> bytes:
            try:
                return bytes(original(self, n))
            except AccessError:
                return bytes(n or 0)

        return done

    in_python()
    patch(Chain, "read", read)
