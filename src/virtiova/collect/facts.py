# SPDX-License-Identifier: Apache-2.0
"""Facts by key, each with its place and certainty, and the views that hold them."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar, cast

from virtiova.result.scan import Place, Seen

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_KEYS: Final[dict[str, Key[Any]]] = {}


class Certainty(enum.IntEnum):
    """How sure a fact is, surest first."""

    SEEN = 0
    """Read from the running thing itself."""
    SAID = 1
    """Written down: an option, an element of a file."""
    DEFAULT = 2
    """What the product does where nothing is written."""
    INFERRED = 3
    """Follows from other facts."""


class Key(Generic[T_co]):
    """The name of a fact and what it means. Names are unique; `key()` finds them."""

    __slots__ = ("about", "name")

    def __init__(self, name: str, about: str) -> None:
        assert name not in _KEYS
        self.name = name
        self.about = about
        _KEYS[name] = self

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


def keys() -> dict[str, Key[Any]]:
    """All keys by name."""
    return dict(_KEYS)


@dataclass(frozen=True, slots=True)
class Fact(Generic[T_co]):
    """A value, where it was read, and how sure it is."""

    key: str
    value: T_co
    place: Place
    certainty: Certainty = Certainty.SEEN

    def seen(self, text: str = "") -> Seen:
        """As something that was seen; ``text`` instead of ``key: value``."""
        return Seen(text or f"{self.key}: {shown(self.value)}", self.place)


def shown(value: object) -> str:
    """A fact's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"0x{each:x}" if isinstance(each, int) else str(each) for each in value)
    return str(value)


class Facts:
    """Facts by key. Several may be held of one key, from several places: the surest counts, the first of equals."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: dict[str, list[Fact[Any]]] = {}

    def put(self, key: Key[T], value: T, place: Place, certainty: Certainty = Certainty.SEEN) -> None:
        """One more fact."""
        self._all.setdefault(key.name, []).append(Fact(key.name, value, place, certainty))

    def get(self, key: Key[T]) -> T | None:
        """The surest value; None: nothing is known."""
        found = self.fact(key)
        return None if found is None else found.value

    def fact(self, key: Key[T]) -> Fact[T] | None:
        """The surest fact of that key."""
        held = self._all.get(key.name)
        return cast("Fact[T]", min(held, key=lambda fact: fact.certainty)) if held else None

    def all(self, key: Key[T]) -> list[Fact[T]]:
        """All facts of that key, in the order in which they came."""
        return list(self._all.get(key.name, ()))

    def take(self, other: Facts) -> None:
        """Take in all that another one holds, after our own."""
        for name, held in other._all.items():
            self._all.setdefault(name, []).extend(held)

    def __iter__(self) -> Iterator[Fact[Any]]:
        for held in self._all.values():
            yield from held

    def __contains__(self, key: Key[Any]) -> bool:
        return key.name in self._all


class ViewKind(enum.StrEnum):
    """From where a machine was looked at."""

    GUEST = "guest"
    """From inside, by its own kernel. Bare metal is looked at in this way, too."""
    HOST = "host"
    """From outside, while it runs."""
    CONFIGURATION = "configuration"
    """By what it would be started with."""
    LOG = "log"
    """By messages only."""
    BACKEND = "back end"
    """By what a back end was started with: its devices are some machine's, told by the path of a socket."""
    JOINED = "joined"
    """From several sides."""


@dataclass(slots=True)
class Device:
    """One device as a view has it. ``name`` is the view's own: ``virtio1``, or the id of an option."""

    name: str
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a log that may matter, without control characters, cut to a sane length."""

    text: str
    place: Place


@dataclass(slots=True)
class View:
    """One machine, looked at from one side. ``problems``: what could not be read, in words."""

    kind: ViewKind
    name: str
    source: str
    """As the user named it: ``this machine``, ``vm.xml``."""
    machine: Facts = field(default_factory=Facts)
    devices: list[Device] = field(default_factory=list)
    log: list[LogLine] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    empty: bool = False
    """Nothing could be read at all: what there is to say are the problems."""
