# SPDX-License-Identifier: Apache-2.0
"""Views of one machine become one: the host side knows what is offered, the guest side what was accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View, ViewKind

_ORDER: Final = (ViewKind.JOINED, ViewKind.HOST, ViewKind.GUEST, ViewKind.CONFIGURATION, ViewKind.LOG)
"""Whose facts count first among those that are equally sure: of two that say what is offered, the one who offers."""


_NOBODY: Final = frozenset(
    {
        "00000000-0000-0000-0000-000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "03000200-0400-0500-0006-000700080009",
    }
)
"""UUIDs of machines that were given none: none at all, and what a maker of firmware left in its example."""


def join(views: Sequence[View]) -> list[View]:
    """The same views, those of one machine joined, each where the first of its views was.

    Of one machine are views with one UUID; else from different sides, with one name; else two from different sides
    that were given together, all whose places agree. Never those whose UUIDs differ, or that have no place in common.
    A log is that of the only machine there is.
    """
    groups = [_Group([view]) for view in views if view.kind is not ViewKind.LOG]
    groups = _identified(groups)
    groups = _named(groups)
    groups = _two_sides(groups)
    logs = [view for view in views if view.kind is ViewKind.LOG]
    if logs and len(groups) == 1 and not groups[0].empty:
        groups[0].views += logs
    elif logs:
        # Several logs without a machine are of one: nobody gives the logs of two machines that are not there.
        alone = [_Group(logs)] if not groups else [_Group([each]) for each in logs]
        groups += alone
    order = {id(view): place for place, view in enumerate(views)}
    groups.sort(key=lambda group: min(order[id(view)] for view in group.views))
    return [_joined(group.views) for group in groups]


class _Group:
    """Views that are of one machine."""

    def __init__(self, views: list[View]) -> None:
        self.views = views

    @property
    def empty(self) -> bool:
        """Nothing could be read of any of them."""
        return all(view.empty for view in self.views)

    def uuids(self) -> set[str]:
        """What they say who the machine is. Two of one view are of two readings, of which the surest counts."""
        found = (view.machine.get(k.UUID) for view in self.views)
        return {each.lower() for each in found if each and each.lower() not in _NOBODY}

    def names(self) -> set[str]:
        """What the machine is called: a host name and QEMU's ``-name`` need not be one."""
        return {name for view in self.views for name in (view.machine.get(k.NAME), view.name) if name}

    def told_names(self) -> set[str]:
        """The same, as far as somebody said so: not what a view is called for want of a name."""
        return {name for view in self.views if (name := view.machine.get(k.NAME))}

    def sides(self) -> set[ViewKind]:
        """From where it was looked at."""
        return {view.kind for view in self.views}

    def places(self) -> dict[str, set[str]]:
        """Types by place, of all devices that have one."""
        found: dict[str, set[str]] = {}
        for view in self.views:
            for device in view.devices:
                place = place_of(device)
                if place:
                    found.setdefault(place, set()).add(device.facts.get(k.TYPE) or "")
        return found


def _identified(groups: Iterable[_Group]) -> list[_Group]:
    """Those with one UUID become one, unless they know places and have none in common. Each is looked at once."""
    first: dict[str, _Group] = {}
    kept: list[_Group] = []
    for group in groups:
        found = group.uuids()
        uuid = next(iter(found)) if len(found) == 1 else ""
        mate = first.setdefault(uuid, group) if uuid else group
        if mate is not group and _common(mate, group):
            mate.views += group.views
        else:
            kept.append(group)
    return kept


def _named(groups: Sequence[_Group]) -> list[_Group]:
    """Those of one name become one, unless their UUIDs differ or they have no place in common."""
    by_name: dict[str, list[_Group]] = {}
    kept: list[_Group] = []
    for group in groups:
        if group.empty:
            kept.append(group)
            continue
        mates = [mate for name in group.names() for mate in by_name.get(name, ())]
        fitting = next((mate for mate in mates if _may_be_one(mate, group)), None)
        if fitting is not None:
            fitting.views += group.views
        else:
            kept.append(group)
        for name in group.names():
            held = by_name.setdefault(name, [])
            # A thousand machines called localhost are not compared with each other.
            if len(held) < _MATES and all(each is not (fitting or group) for each in held):
                held.append(fitting or group)
    return kept


_MATES: Final = 8


def _two_sides(groups: list[_Group]) -> list[_Group]:
    """Two that were given together, from different sides, if their places and types agree."""
    whole = [group for group in groups if not group.empty]
    if len(whole) != 2:
        return groups
    one, other = whole
    # A guest has a name of its own; outside of it there is one name for a machine.
    outside = all(ViewKind.GUEST not in group.sides() for group in whole)
    named = outside and one.told_names() and other.told_names()
    if one.sides() & other.sides() or named or _differ(one, other) or not _agree(one, other):
        return groups
    one.views += other.views
    return [group for group in groups if group is not other]


def _differ(one: _Group, other: _Group) -> bool:
    """They say who they are, and it is not the same; or one of them runs on the other."""
    mine, theirs = one.uuids(), other.uuids()
    return bool(mine and theirs and not mine & theirs) or _runs_on(one, other) or _runs_on(other, one)


def _runs_on(one: _Group, other: _Group) -> bool:
    """It was found on the other's system, whose devices may well be at the same places."""
    below = {view.machine.get(k.RUNS_ON) for view in one.views} - {None}
    return any(view.kind is ViewKind.GUEST and view.source in below for view in other.views)


def _may_be_one(one: _Group, other: _Group) -> bool:
    """Of one name: are they one machine? Two guests called alike are two, as are two processes of one name; a machine
    may be written down twice."""
    if _differ(one, other):
        return False
    twice = one.sides() & other.sides()
    if not twice:
        return _common(one, other)
    return twice == {ViewKind.CONFIGURATION} and _agree(one, other)


def _common(one: _Group, other: _Group) -> bool:
    """A place in common; or one of them knows no places, and nothing speaks against it."""
    mine, theirs = one.places(), other.places()
    return not mine or not theirs or bool(mine.keys() & theirs.keys())


def _agree(one: _Group, other: _Group) -> bool:
    """The places of one are all there in the other, and what is at each is of one type."""
    mine, theirs = one.places(), other.places()
    both = mine.keys() & theirs.keys()
    if not both or both not in (mine.keys(), theirs.keys()):
        return False
    return all(mine[place] & theirs[place] or "" in mine[place] | theirs[place] for place in both)


def place_of(device: Device) -> str:
    """The place of a device in the form that both sides of a virtual machine have; empty if it is not known.

    A guest sees channel subsystem fe, which QEMU's devices are in, as number 0.
    """
    place = device.facts.get(k.PLACE) or ""
    if place.startswith("ccw:0."):
        return f"ccw:fe.{place.removeprefix('ccw:0.')}"
    return place.replace("pci:0000:", "pci:", 1)


def _joined(views: list[View]) -> View:
    """One view of several. What is running counts before what is written; nothing is lost."""
    if len(views) == 1:
        return views[0]
    views = sorted(views, key=lambda view: _ORDER.index(view.kind))
    kinds = {view.kind for view in views if not view.empty}
    names = [view.name for kind in _NAMES for view in views if view.kind is kind and view.name]
    kind = kinds.pop() if kinds == {ViewKind.LOG} else ViewKind.JOINED
    found = View(kind, names[0] if names else "", "\n".join(dict.fromkeys(view.source for view in views)))
    for view in views:
        found.machine.take(view.machine)
        found.log += view.log
        found.problems += [each for each in view.problems if each not in found.problems]
    found.devices = _devices(views)
    found.empty = all(view.empty for view in views)
    return found


_NAMES: Final = (ViewKind.JOINED, ViewKind.GUEST, ViewKind.HOST, ViewKind.CONFIGURATION, ViewKind.LOG)
"""Whose name a joined machine or device has: the one that is seen inside."""


def _devices(views: Sequence[View]) -> list[Device]:
    """The devices of all views, those at one place joined; where one's place is not known, by name and type."""
    groups: list[list[tuple[ViewKind, Device]]] = []
    held: dict[tuple[str, ...], int] = {}
    places: dict[int, str] = {}
    for view in views:
        once = _once(view)
        taken: set[int] = set()
        for device in view.devices:
            place, keys = place_of(device), _keys(device, once)
            fits = (held[key] for key in keys if key in held and held[key] not in taken)
            at = next((each for each in fits if not place or places.get(each, place) == place), None)
            if at is None:
                at = len(groups)
                groups.append([])
            taken.add(at)
            groups[at].append((view.kind, device))
            if place:
                places.setdefault(at, place)
            for key in keys:
                held.setdefault(key, at)
    return [_device(group) for group in groups]


def _once(view: View) -> set[str]:
    """Places that only one device of the view has: with several PCI domains, others are not told apart."""
    count: dict[str, int] = {}
    for device in view.devices:
        place = place_of(device)
        count[place] = count.get(place, 0) + 1
    return {place for place, times in count.items() if place and times == 1}


def _keys(device: Device, once: set[str]) -> list[tuple[str, ...]]:
    """What a device may be known by, surest first. Names are options' ids on one side, the kernel's on the other."""
    place = place_of(device)
    keys: list[tuple[str, ...]] = [("place", place)] if place in once else []
    if device.name:
        keys.append(("name", device.name, device.facts.get(k.TYPE) or ""))
    return keys


def _device(group: list[tuple[ViewKind, Device]]) -> Device:
    if len(group) == 1:
        return group[0][1]
    by_name = sorted(group, key=lambda each: _NAMES.index(each[0]))
    found = Device(by_name[0][1].name)
    for _, device in sorted(group, key=lambda each: _ORDER.index(each[0])):
        found.facts.take(device.facts)
    others = tuple(dict.fromkeys(device.name for _, device in by_name if device.name not in ("", found.name)))
    fact = next(iter(found.facts), None)
    if others and fact is not None:
        found.facts.put(k.ALSO_CALLED, others, fact.place, Certainty.INFERRED)
    return found
