# SPDX-License-Identifier: Apache-2.0
"""What a rule is: a row with an id that is stable for ever, and a question to what was collected."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

from virtiova.collect.facts import Certainty, Device, Fact, Facts, Key, LogLine, View
from virtiova.collect.messages import Message
from virtiova.policy import Front
from virtiova.result import Path
from virtiova.result.scan import Place, ScannedDevice, Seen, Severity
from virtiova.scan.front import in_front
from virtiova.scan.judge import assumed
from virtiova.scan.naming import is_about
from virtiova.spec import Citation

T = TypeVar("T")


class About(enum.StrEnum):
    """What a rule is asked of."""

    DEVICE = "device"
    MACHINE = "machine"


class Input(enum.StrEnum):
    """What would settle a rule that could not be decided. Said to the user as it is."""

    GUEST = "a scan inside the guest, or what 'virtiova gather' took there"
    GUEST_LOG = "the guest's kernel log (--log)"
    QMP = "the running machine's monitor (--qmp)"
    COMMAND_LINE = "the machine's command line (--cmdline or --pid)"
    QEMU_LOG = "what QEMU printed when it started (--log)"
    BACKEND_LOG = "the back end's log (--log)"
    BACKEND = "the back end's command line and version"
    DRIVER_VERSION = "the version of the guest's driver"
    PROBE = "virtiova probe: only seeing where bytes land settles it"


@dataclass(frozen=True, slots=True)
class Open:
    """An answer: it cannot be said, and what would settle it."""

    settle: Input


@dataclass(frozen=True, slots=True)
class Hit:
    """An answer: the rule applies. ``values`` fill the braces in the rule's fixes; ``severity`` replaces the rule's."""

    seen: Sequence[Seen]
    values: dict[str, str] = field(default_factory=dict)
    severity: Severity | None = None


Answer: TypeAlias = Hit | Open | None
"""None: it does not apply."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a rule looks at: one device (None for a rule about the machine), its row, and the machine around it."""

    view: View
    device: Device | None
    row: ScannedDevice | None
    rows: Sequence[ScannedDevice] = ()

    @property
    def machine(self) -> Facts:
        """The machine's facts."""
        return self.view.machine

    @property
    def facts(self) -> Facts:
        """The device's facts; a machine's rule has none."""
        return self.device.facts if self.device is not None else Facts()

    def get(self, key: Key[T]) -> T | None:
        """What is known of the device; else of the machine."""
        found = self.facts.get(key)
        return self.machine.get(key) if found is None else found

    def fact(self, key: Key[T]) -> Fact[T] | None:
        """The same, with where it was read."""
        return self.facts.fact(key) or self.machine.fact(key)

    @property
    def offered(self) -> bool | None:
        """Bit 33 as offered, also where that only follows."""
        return assumed(self.view, self.device)[0][0] if self.device is not None else None

    @property
    def verdict(self) -> Path | None:
        """Where the device's bytes go, by its row; a machine's rule has none."""
        return self.row.verdict if self.row is not None else None

    @property
    def front(self) -> Front | None:
        """What is in front of the device; None: it is not known, or the rule is about the machine."""
        return in_front(self.view, self.device).front if self.device is not None else None

    def basis(self) -> list[Seen]:
        """What the device's row rests on."""
        return list(self.row.basis) if self.row is not None else []

    def seen(self, *keys: Key[Any]) -> list[Seen]:
        """What was seen of these keys, as far as anything was."""
        facts: Iterable[Fact[Any] | None] = (self.fact(key) for key in keys)
        return [fact.seen() for fact in facts if fact is not None]

    def said(self, *needles: str) -> list[Seen]:
        """The lines of the logs that hold one of these strings, the first few."""
        found = [line for line in self.view.log if any(needle in line.text for needle in needles)]
        return [Seen(line.text, line.place) for line in found[:_LINES]]

    def lines(self, *messages: Message) -> list[Seen]:
        """The lines with one of these messages, the first few: those about the device, or all for a machine's rule."""
        device, view = self.device, self.view
        found = [
            line
            for line in view.log
            if any(message.text in line.text for message in messages)
            and (device is None or is_about(line, device, view))
        ]
        return [quote(line) for line in found[:_LINES]]

    def stated(self, key: Key[T]) -> list[Fact[T]]:
        """All that was read of the device for this key; not what is a product's default, nor what only follows."""
        return [fact for fact in self.facts.all(key) if fact.certainty <= Certainty.SAID]

    def has_log(self) -> bool:
        """Was any log given?"""
        return bool(self.view.log)


_LINES: Final = 4


def quote(line: LogLine) -> Seen:
    """A line of a log as something that was seen."""
    return Seen(line.text, line.place)


def taken_for(text: str) -> Seen:
    """Something that was taken for granted."""
    return Seen(text, Place("assumed", "assumed"))


def by_rule(text: str) -> Seen:
    """Something that was not read but follows."""
    return Seen(text, Place("rule", "by rule"))


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. ``fix`` is by product: ``QEMU``, ``libvirt``, ``kernel`` (its command line), ``guest``, ``back end``,
    ``Cloud Hypervisor``, ``Kata``; braces are filled from `Hit.values`, and with ``{device}`` and ``{type}``.

    ``evidence`` says where the rule is known from: commits, threads, issues.
    """

    id: str
    title: str
    severity: Severity
    about: About
    ask: Callable[[Look], Answer]
    why: str
    fix: dict[str, str]
    citation: Citation
    evidence: str = ""
