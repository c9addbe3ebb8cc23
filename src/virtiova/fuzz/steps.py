# SPDX-License-Identifier: Apache-2.0
"""The steps that a good front end and driver may make, in any order: after them every request is to be used."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from virtiova.addr import PAGE_SIZE, UVA
from virtiova.fuzz.world import DATA_PAGES, World
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.probe.rig import LENGTH
from virtiova.wire.vhost_user import Request

Numbers = tuple[str | int, ...]
F = TypeVar("F", bound=Callable[..., None])
_PIECES: Final = 8
_FURTHEST: Final = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of step: how often it comes, what its numbers are drawn from, and what it does."""

    weight: int
    draw: Callable[[random.Random], Numbers]
    do: Callable[..., None]
    good: bool
    """Whether a good front end and driver may do that at any time."""


STEPS: Final[dict[str, Kind]] = {}
"""By name."""


def step(
    name: str, weight: int, draw: Callable[[random.Random], Numbers] = lambda _: (), *, good: bool = True
) -> Callable[[F], F]:
    """Register a function of the world and the step's numbers."""

    def register(do: F) -> F:
        STEPS[name] = Kind(weight, draw, do, good)
        return do

    return register


def _place(rng: random.Random) -> int:
    """An offset in the data pages: often one before a border."""
    return rng.choice([0, 0, PAGE_SIZE - 256, 2 * PAGE_SIZE - 64, rng.randrange(0, (DATA_PAGES - 1) * PAGE_SIZE, 8)])


def _count(rng: random.Random) -> int:
    return rng.choice([1, 1, 1, 2, 3, 5])


def _any_page(rng: random.Random) -> Numbers:
    return (rng.randrange(_FURTHEST),)


def _at(world: World, place: int) -> int:
    return world.data.addr + place % ((DATA_PAGES - 1) * PAGE_SIZE)


@step("write", 12, lambda rng: (_count(rng), _place(rng)))
def write(world: World, count: int, place: int) -> None:
    """Requests that let the device write, published together."""
    if world.writes:
        world.make(lambda: world.driver.make_device_write([(_at(world, place), LENGTH)]), count)


@step("read", 4, lambda rng: (_count(rng), _place(rng)))
def read(world: World, count: int, place: int) -> None:
    """Requests that let the device read."""
    if world.reads:
        world.make(lambda: world.driver.make_device_read([(_at(world, place), LENGTH)]), count)


@step("pieces", 4, lambda rng: (rng.randrange(2, _PIECES + 1), _place(rng)))
def pieces(world: World, count: int, place: int) -> None:
    """One request of several buffers, far from each other."""
    if not world.writes:
        return
    count = max(1, min(count, _PIECES))
    each = LENGTH // _PIECES
    spread = [(_at(world, place + index * 1384), each) for index in range(count - 1)]
    buffers = [*spread, (_at(world, place), LENGTH - each * (count - 1))]
    world.make(lambda: world.driver.make_device_write(buffers), 1)


@step("indirect", 4, lambda rng: (_place(rng),))
def indirect(world: World, place: int) -> None:
    """One request through an indirect table; the table is free when all before is used."""
    if world.writes and world.indirect:
        world.poll()
        if not world.left:
            world.make(lambda: world.driver.make_device_write([(_at(world, place), LENGTH)], world.table), 1)


@step("kick", 2, lambda rng: (rng.randrange(4),))
def kick(world: World, queue: int) -> None:
    """A kick that nobody asked for."""
    world.queues[queue % len(world.queues)].kick()


@step("pause", 5, lambda rng: (rng.randrange(1, 4),))
def pause(world: World, milliseconds: int) -> None:
    """Let the back end work."""
    world.machine.wait(lambda: False, min(milliseconds, 50) / 1000)


@step("invalidate", 8, _any_page)
def invalidate(world: World, page: int) -> None:
    """Take back what was told of a page; it stays mapped, so that it may be asked for again."""
    world.invalidate(world.page(page), PAGE_SIZE)


@step("invalidate-some", 2, lambda rng: (rng.randrange(_FURTHEST), rng.randrange(PAGE_SIZE), rng.randrange(1, 1 << 16)))
def invalidate_some(world: World, page: int, offset: int, size: int) -> None:
    """The same for a range that begins and ends anywhere."""
    world.invalidate(world.page(page) + offset, max(1, size))


@step("flush", 2)
def flush(world: World) -> None:
    """Take all back."""
    world.flush()


@step("update", 4, _any_page)
def update(world: World, page: int) -> None:
    """Tell of a page, asked for or not, as it is."""
    world.update(world.page(page))


@step("hold", 4)
def hold(world: World) -> None:
    """Leave misses without an answer for now."""
    world.hold()


@step("answer", 5, lambda rng: (rng.randrange(8),))
def answer(world: World, number: int) -> None:
    """Answer one of those that wait, in any order."""
    if world.held:
        world.held.pop(number % len(world.held)).answer()


@step("release", 4)
def release(world: World) -> None:
    """Answer all of them."""
    world.release()


@step("table", 2)
def table(world: World) -> None:
    """The same memory table once more."""
    world.release()
    if not world.registers.one_by_one:
        world.registers.share_memory()


@step("moved-table", 1, lambda rng: (rng.randrange(1, 8),))
def moved_table(world: World, number: int) -> None:
    """The same memory at other user addresses; everything that was told is taken back."""
    world.release()
    if world.registers.one_by_one or not world.front.translating:
        return
    world.memory.regions = tuple(replace(each, uva=UVA(each.uva + (number % 64 << 40))) for each in REGIONS)
    world.registers.share_memory()
    world.flush()


@step("restart", 2, lambda rng: (rng.randrange(4),))
def restart(world: World, number: int) -> None:
    """Stop a ring, and start it where it stopped."""
    world.release()
    queue = world.queues[number % len(world.queues)]
    world.registers.start_queue(queue.index, world.registers.stop_queue(queue.index))
    queue.kick()


@step("pause-ring", 2, lambda rng: (rng.randrange(4),))
def pause_ring(world: World, number: int) -> None:
    """Disable a ring, and enable it again."""
    world.release()
    queue = world.queues[number % len(world.queues)]
    world.registers.enable(queue.index, on=False)
    world.registers.enable(queue.index)
    queue.kick()


@step("ask", 2, lambda rng: (rng.randrange(2),))
def ask(world: World, what: int) -> None:
    """Ask what may be asked at any time."""
    world.front.ask((Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES)[what % 2])
