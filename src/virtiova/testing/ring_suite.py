# SPDX-License-Identifier: Apache-2.0
"""The checks of an end of a ring, for either role, split and packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from virtiova.errors import UsageError
from virtiova.testing import hostile_rings as hostile
from virtiova.testing import planted_rings
from virtiova.testing.checks import EXAMPLES, Check, Effort, Report, choose, run, search_histories
from virtiova.testing.ring_ends import Begin, MakeDevice, MakeDriver, RingHistory, simpler
from virtiova.testing.ring_play import RingPlay, play
from virtiova.testing.ring_strategies import (
    FLOW,
    KINDS,
    Decode,
    Kind,
    act,
    any_add,
    direct,
    histories,
    indirect,
    push,
    rings,
    single,
    small,
    some,
)

Role = Literal["driver", "device"]
Option = Literal["indirect", "event-idx"]
OPTIONS: Final[tuple[Option, ...]] = ("indirect", "event-idx")
"""Of the ends that we have: bits 28 and 29."""
_LAPS: Final = {"split": 1 << 16, "packed": 3000}
"""Requests after which a free-running index has gone round, or a small ring many times."""


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    title: str
    citation: str
    steps: Sequence[Decode]
    ring: Callable[[Sequence[Kind]], SearchStrategy[Begin]] = rings
    kinds: Sequence[Kind] = KINDS
    roles: Sequence[Role] = ("driver", "device")


def _long_ring(kind: Kind) -> SearchStrategy[Begin]:
    """One of several pages; a packed one is where the second page begins."""
    sizes, starts = ((256,), (0,)) if kind == "split" else ((300,), (254,))
    return rings([kind], sizes=sizes, starts=starts, ways=st.just("platform"))


_SLEEP: Final = (act("sleep"), act("sleep"), act("stay_awake"))
_NOTIFY: Final = (single, single, direct, *FLOW, *_SLEEP)
_STOPS: Final = (single, single, direct, *FLOW, act("interrupt"), act("interrupt"))

_ROWS: Final = (
    _Row("moves", "requests and answers arrive as they were sent", "virtio 1.4, 2.6", (direct, *FLOW)),
    _Row(
        "hidden",
        "nothing is seen before it was published",
        "virtio 1.4, 2.7.13",
        (small, some("pop"), some("pop"), act("publish")),
    ),
    _Row("indirect", "indirect tables are as good as the ring", "virtio 1.4, 2.7.5.3", (indirect, any_add, *FLOW)),
    _Row(
        "any-order",
        "requests may be given back in any order",
        "virtio 1.4, 2.7.8",
        (small, small, any_add, *FLOW, push),
    ),
    _Row(
        "in-order",
        "one used element may stand for all before it",
        "virtio 1.4, 2.7.9",
        (small, any_add, *FLOW, some("push_together"), some("push_together")),
        lambda kinds: rings(kinds, in_order=True),
        roles=("driver",),
    ),
    _Row(
        "full",
        "a ring can be filled to the last descriptor, and no further",
        "virtio 1.4, 2.7.5",
        (small, any_add, act("fill"), act("overfill"), *FLOW),
    ),
    _Row(
        "around",
        "rings and indices go round",
        "virtio 1.4, 2.7.6",
        (small, small, any_add, *FLOW, *_SLEEP),
        lambda kinds: st.one_of(
            [rings([kind], starts=(65535, 65533, 65520) if kind == "split" else (1, 5, 13, 31)) for kind in kinds]
        ),
    ),
    _Row(
        "scattered",
        "the ring may lie on pages that are not adjacent",
        "virtio 1.4, 2.6",
        (small, any_add, *FLOW),
        lambda kinds: st.one_of([_long_ring(kind) for kind in kinds]),
    ),
    _Row(
        "big-endian",
        "a legacy ring has the guest's byte order and alignment",
        "virtio 1.4, 2.7.3",
        (any_add, *FLOW),
        lambda kinds: rings(kinds, big=True),
        kinds=("split",),
    ),
    _Row(
        "kicks",
        "who sleeps is notified, who does not want to be is not",
        "virtio 1.4, 2.7.10",
        _NOTIFY,
        lambda kinds: rings(kinds, event_idx=False),
    ),
    _Row(
        "kicks-event-idx",
        "the same by bit 29",
        "virtio 1.4, 2.7.10",
        _NOTIFY,
        lambda kinds: rings(kinds, event_idx=True),
    ),
    _Row(
        "interrupts",
        "the driver hears of what was used",
        "virtio 1.4, 2.7.7",
        _STOPS,
        lambda kinds: rings(kinds, event_idx=False),
        roles=("device",),
    ),
    _Row(
        "interrupts-event-idx",
        "the same by bit 29, and of no more than it asked for",
        "virtio 1.4, 2.7.7",
        _STOPS,
        lambda kinds: rings(kinds, event_idx=True),
        roles=("device",),
    ),
    _Row(
        "put-back",
        "chains that were put back are taken again",
        "virtiova, DeviceRing",
        (any_add, *FLOW, some("put_back")),
        roles=("device",),
    ),
)

_LIES: Final = {
    "unknown": "a request that nobody sent cannot be used",
    "hidden": "a request that is not published cannot be used",
    "twice": "a request cannot be used twice",
    "jump": "no more can be used than is under way",
}


def ring_checks(
    *,
    driver: MakeDriver | None = None,
    device: MakeDevice | None = None,
    kinds: Sequence[Kind] = KINDS,
    lacks: Collection[Option] = (),
    examples: int = EXAMPLES,
    seed: int = 0,
) -> list[Check]:
    """The checks of `check_ring`, one by one: for ``pytest.mark.parametrize("check", ..., ids=str)``.

    Their names begin with the kind of the ring: ``split-loop``, ``packed-moves``.
    """
    if driver is None and device is None:
        raise UsageError("neither a driver end nor a device end to check: check_ring(driver=...) or (device=...)")
    if not kinds or not set(kinds) <= set(KINDS):
        raise UsageError(f"rings of kind {', '.join(kinds) or 'none'}, wanted some of: {', '.join(KINDS)}")
    if not set(lacks) <= set(OPTIONS):
        raise UsageError(f"a ring that lacks {', '.join(lacks)}, wanted some of: {', '.join(OPTIONS)}")
    effort = Effort(examples, seed)
    roles = {name for name, end in (("driver", driver), ("device", device)) if end is not None}
    checks = []
    for kind in kinds:
        packed = kind == "packed"
        for row in _ROWS:
            if kind in row.kinds and roles & set(row.roles) and not any(each in row.name for each in lacks):
                body = _searching(row, kind, driver, device, lacks, effort)
                checks.append(Check(f"{kind}-{row.name}", row.title, row.citation, body))
        long = _lasting(packed, driver, device, lacks)
        checks.append(
            Check(f"{kind}-lasts", "after very many requests nobody misses a word", "virtio 1.4, 2.7.6", long)
        )
        if device is not None:
            checks += _hostile_drivers(kind, device, lacks, effort)
        if driver is not None:
            checks += _hostile_devices(kind, driver)
    return checks


def _searching(
    row: _Row,
    kind: Kind,
    driver: MakeDriver | None,
    device: MakeDevice | None,
    lacks: Collection[Option],
    effort: Effort,
) -> Callable[[], None]:
    def once(history: RingHistory) -> None:
        play(history, driver, device)

    ring = row.ring([kind]).map(lambda begin: _without(begin, lacks))
    return lambda: search_histories(histories(ring, *row.steps), once, effort, simpler)


def _without(begin: Begin, lacks: Collection[Option]) -> Begin:
    """The same ring, where those bits were not taken."""
    return replace(begin, indirect="indirect" not in lacks, event_idx=begin.event_idx and "event-idx" not in lacks)


def _lasting(
    packed: bool, driver: MakeDriver | None, device: MakeDevice | None, lacks: Collection[Option]
) -> Callable[[], None]:
    """In bursts, by two ends that sleep whenever they may."""

    def body() -> None:
        for size, event_idx in ((64, True), (8, False)) if not packed else ((7, True), (8, False)):
            ring = RingPlay(_without(Begin(packed=packed, size=size, event_idx=event_idx), lacks), driver, device)
            full = all(hasattr(ring.device, name) for name in ("enable_notify", "disable_notify", "needs_interrupt"))
            wanted = (_LAPS["packed"] if packed else _LAPS["split"] + 300) if event_idx else 500
            ring.steps.append(f"# up to {wanted} requests, in bursts, by two ends that sleep whenever they may")
            _burst(ring, wanted, notify=full)
            ring.drain()

    return body


def _burst(ring: RingPlay, wanted: int, *, notify: bool) -> None:
    size = ring.layout.size
    asleep = ring.sleep() if notify else False
    number = 0
    while ring.n_polled < wanted:
        number += 1
        for _ in range(1 + number * 7 % size):
            ring.add((), (1,))
        kicked = ring.publish()
        ring.want(kicked or not asleep, "the device sleeps, and was not notified")
        if notify:
            ring.stay_awake()
        for _ in range(1 + number * 5 % size):
            ring.pop()
        told = False
        while ring.push(number * 3, 1):
            told = (ring.interrupt() if notify else True) or told
        ring.want(told or not ring.used or not ring.known_driver, "the driver sleeps, and was not interrupted")
        asleep = ring.sleep() if notify else False
        while ring.poll():
            pass


def _hostile_drivers(kind: Kind, device: MakeDevice, lacks: Collection[Option], effort: Effort) -> list[Check]:
    packed = kind == "packed"
    tables = "indirect" not in lacks
    checks = [
        Check(
            f"{kind}-{planted.name}",
            planted.title,
            planted.citation,
            partial(planted_rings.refuses, planted, device, packed=packed),
        )
        for planted in planted_rings.PLANTED
        if (planted.packed if packed else planted.split) is not None and (tables or not planted.about_tables)
    ]
    if packed:
        title = "what was not given back cannot be made available"
        checks.append(
            Check("packed-again", title, "virtio 1.4, 2.8.1", lambda: hostile.given_back_first(device, packed=True))
        )
    once = "what can change is read once"
    reads_once = partial(hostile.reads_once, device, packed=packed, tables=tables)
    checks.append(Check(f"{kind}-reads-once", once, "virtiova, DeviceRing", reads_once))
    anything = "whatever lies in the ring, nothing outside is touched"
    survives = partial(hostile.survives, device, effort, packed=packed, tables=tables)
    checks.append(Check(f"{kind}-junk", anything, "virtiova, DeviceRing", survives))
    return checks


def _hostile_devices(kind: Kind, driver: MakeDriver) -> list[Check]:
    packed = kind == "packed"
    return [
        Check(
            f"{kind}-used-{what}",
            title,
            "virtio 1.4, 2.7.8",
            partial(hostile.made_up, what, driver, packed=packed),
        )
        for what, title in _LIES.items()
        if not (packed and what == "jump")
    ]


def check_ring(
    *,
    driver: MakeDriver | None = None,
    device: MakeDevice | None = None,
    kinds: Sequence[Kind] = KINDS,
    lacks: Collection[Option] = (),
    only: Iterable[str] | None = None,
    expected: Mapping[str, str] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> Report:
    """Check an end of a ring against a model of every request, with our other end opposite; hostile ones as well.

    ``driver`` makes a `DriverEnd`, ``device`` a `DeviceEnd`, of a `Place`; with both they meet each other. ``kinds``:
    ``split`` and ``packed``, or one of them. ``lacks``: ``indirect`` (bit 28) and ``event-idx`` (bit 29), if the end
    does not know them. The other arguments are those of `check_address_space`.

    Returns what was checked. Raises `CheckFailed` with the shortest history for each check that fails, `UsageError` for
    a name that there is not. An end that cannot go on where another one stopped (`Begin.start`) raises `NotApplicable`
    as it is made. A device end that comes to no end without looking at memory is not stopped.
    """
    checks = ring_checks(driver=driver, device=device, kinds=kinds, lacks=lacks, examples=examples, seed=seed)
    return run("check_ring", choose(checks, only), expected or {})
