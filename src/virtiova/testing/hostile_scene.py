# SPDX-License-Identifier: Apache-2.0
"""A ring that is laid by hand, and what a device end that looks at it may do: refuse, and touch nothing outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.errors import ProtocolError
from virtiova.testing.checks import Wrong
from virtiova.testing.raw_rings import RawPackedRing, RawRing
from virtiova.testing.ring_ends import Begin, Place, place
from virtiova.testing.ring_world import TooMuch, Watched, World

SIZE: Final = 4
MOST: Final = 5000
"""Accesses after which a device end is thought to be in a loop."""


class Scene:
    """A ring of `SIZE` laid by hand, and beside it an indirect table and data, of a page each."""

    def __init__(self, begin: Begin) -> None:
        self.world = World(way=begin.way, pages=24)
        self.place: Place = place(begin, self.world, MOST)
        self.table = self.world.alloc(PAGE_SIZE)
        self.data = self.world.alloc(PAGE_SIZE)
        self.steps = [str(begin)]
        self.packed = begin.packed

    def split(self) -> RawRing:
        """The ring by hand, where guest-physical addresses are the device's."""
        return RawRing(self.world.mapped, self.place.parts[0], SIZE)

    def ring(self) -> RawPackedRing:
        """The packed one."""
        return RawPackedRing(self.world.mapped, self.place.parts[0], SIZE)

    def wrong(self, what: str) -> Wrong:
        """With the steps so far."""
        return Wrong(self.steps, what)

    def guarded(self, call: Callable[[], object]) -> object:
        """What a call gives. What may be raised goes through; anything else is wrong."""
        try:
            return call()
        except (ProtocolError, Wrong):
            raise
        except TooMuch as endless:
            raise self.wrong(f"does not come to an end: {endless}") from endless
        except Exception as error:
            raise self.wrong(f"raised {type(error).__name__}: {error}; wanted a ProtocolError") from error

    def in_bounds(self) -> None:
        """Nothing was changed that is nobody's, and nothing looked at but ring, table and data."""
        stray = self.world.stray()
        if stray is not None:
            raise self.wrong(f"RAM at 0x{stray:x} was changed, which belongs to nobody here")
        space = self.place.space
        assert isinstance(space, Watched)
        regions = (self.place.region, self.table, self.data)
        for op in space.ops:
            if op.length and not any(
                one.addr <= op.address and op.address + op.length <= one.addr + one.size for one in regions
            ):
                raise self.wrong(f"a {op.what} of {op.length} bytes at 0x{op.address:x}, which is nobody's")
