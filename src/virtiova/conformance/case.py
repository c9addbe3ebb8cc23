# SPDX-License-Identifier: Apache-2.0
"""The register of cases: a question, the sentence that it rests on, why it matters, and what a fix looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtiova.errors import UsageError
from virtiova.spec import Citation

if TYPE_CHECKING:
    from virtiova.conformance.stand import Stand

Ask = Callable[["Stand"], str]
"""Put the question. Returns what was seen of a back end that passes, in one sentence; else raises what `stand` has for
that (`CaseFailedError`, `CaseUnclearError`, `NotApplicableError`)."""


class CaseFailedError(Exception):
    """The back end does what it must not, or not what it must; the message says what was seen."""


class CaseUnclearError(Exception):
    """What was seen is allowed in one reading of the specification and forbidden in another. ``readings`` are both."""

    def __init__(self, seen: str, *readings: str) -> None:
        super().__init__(seen)
        self.readings = readings


@dataclass(frozen=True, slots=True)
class Case:
    """One question to a back end. ``id`` is stable for ever. ``kinds`` are the device types that it is for; empty:
    all. ``why`` is what goes wrong in the field with a back end that fails, ``fix`` where its author has to look."""

    id: str
    title: str
    citation: Citation
    why: str
    fix: str
    ask: Ask
    kinds: tuple[str, ...] = ()

    @property
    def does(self) -> str:
        """What the case does, in words."""
        return " ".join((self.ask.__doc__ or "").split())


CASES: Final[dict[str, Case]] = {}
"""All cases by their ids, in the order in which they are asked."""


def case(name: str, title: str, citation: Citation, *kinds: str, why: str, fix: str) -> Callable[[Ask], Ask]:
    """Register a function as a case; its docstring says what it does."""

    def register(ask: Ask) -> Ask:
        if name in CASES:
            raise ValueError(f"two cases are called {name}")
        CASES[name] = Case(name, title, citation, why, fix, ask, kinds)
        return ask

    return register


def find(name: str) -> Case:
    """The case of that id; `UsageError` with the nearest one if there is none."""
    try:
        return CASES[name]
    except KeyError:
        raise UsageError.unknown("case", name, CASES) from None


def vhost_user(place: str, gist: str) -> Citation:
    """A sentence of the vhost-user protocol, in our words: QEMU ``docs/interop/vhost-user.rst`` at commit 028f2361d0c2,
    with messages named as later versions do. ``place`` is a heading there, a message or a protocol feature."""
    return Citation("vhost-user protocol", place, gist)
