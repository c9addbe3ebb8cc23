# SPDX-License-Identifier: Apache-2.0
"""Questions to QEMU's monitor: asked now and kept, or answered out of what was kept elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final, Protocol

from virtiova.collect.monitor import CommandError, Monitor
from virtiova.collect.monitor_words import printable
from virtiova.errors import MachineError, ProtocolError

SCHEMA: Final = "virtiova/qmp/1"
_LIMIT: Final = 100_000
"""Answers taken of a transcript."""
_TOTAL_SECONDS: Final = 60.0
_TOTAL_BYTES: Final = 64 << 20
_WORD: Final = 1 << 24
_ERROR: Final = 200
_HARMLESS: Final = ("query-", "x-query-virtio", "qom-get", "qom-list")
_HARMLESS_LINES: Final = ("info ", "xp ")


class Ask(Protocol):
    """Who answers questions."""

    def ask(self, command: str, **arguments: str | int) -> Any:
        """The answer, of any form. `CommandError`: QEMU said no; `MachineError`: no more answers will come."""


def human(ask: Ask, line: str) -> str:
    """A command of the monitor for people; its words."""
    said = ask.ask("human-monitor-command", **{"command-line": line})
    return said if isinstance(said, str) else ""


class Live:
    """Asks a monitor and keeps all that is said. Never asks for anything that could change the machine."""

    def __init__(self, monitor: Monitor) -> None:
        self.asked: list[dict[str, Any]] = []
        self._monitor = monitor
        self._deadline = time.monotonic() + _TOTAL_SECONDS
        self._left = _TOTAL_BYTES

    def ask(self, command: str, **arguments: str | int) -> Any:
        line = str(arguments.get("command-line", ""))
        if command == "human-monitor-command":
            harmless = line.startswith(_HARMLESS_LINES) and "\n" not in line
        else:
            harmless = command.startswith(_HARMLESS)
        assert harmless, f"{command} {line}"
        if time.monotonic() > self._deadline:
            raise MachineError(f"QEMU's monitor: not all was answered in {_TOTAL_SECONDS:.0f} s; the rest is not known")
        entry: dict[str, Any] = {"command": command, "arguments": arguments}
        try:
            entry["answer"] = self._monitor.execute(command, **arguments)
        except CommandError as error:
            entry["error"] = {"class": error.kind, "desc": str(error)}
            self.asked.append(entry)
            raise
        self._left -= _size(entry["answer"])
        if self._left < 0:
            raise MachineError(f"QEMU's monitor: more than {_TOTAL_BYTES >> 20} MiB of answers; the rest is not known")
        self.asked.append(entry)
        return entry["answer"]


class Replay:
    """Answers out of a transcript, which may be anybody's. The same question is answered in the order it was asked."""

    def __init__(self, transcript: object) -> None:
        if not isinstance(transcript, dict) or transcript.get("schema") != SCHEMA:
            raise ProtocolError(f"no transcript of a monitor: its schema is not {SCHEMA}")
        self._answers: dict[Any, deque[dict[Any, Any]]] = {}
        asked = transcript.get("asked")
        for entry in asked[:_LIMIT] if isinstance(asked, list) else []:
            key = _key(entry.get("command"), entry.get("arguments")) if isinstance(entry, dict) else None
            if key is not None:
                self._answers.setdefault(key, deque()).append(entry)
        self.empty = not self._answers

    def ask(self, command: str, **arguments: str | int) -> Any:
        held = self._answers.get(_key(command, arguments))
        if not held:
            raise CommandError(f"{command} was not asked", "NotAsked")
        # The last answer is given again: whoever asks twice where it was asked once learns nothing new.
        entry = held.popleft() if len(held) > 1 else held[0]
        if "answer" in entry:
            return entry["answer"]
        error = entry.get("error")
        said = error if isinstance(error, dict) else {}
        raise CommandError(printable(str(said.get("desc"))[:_ERROR]), str(said.get("class"))[:_ERROR])


def _key(command: object, arguments: object) -> Any:
    """What makes a question the same question; None for what is none."""
    if not isinstance(command, str) or not isinstance(arguments, dict | None):
        return None
    items = (arguments or {}).items()
    if not all(isinstance(name, str) and isinstance(value, str | int) for name, value in items):
        return None
    return command, tuple(sorted((name, str(value)) for name, value in items))


def _size(answer: object) -> int:
    """About how many bytes an answer takes. Its depth is bounded by the parser's."""
    if isinstance(answer, str):
        return len(answer)
    if isinstance(answer, dict):
        return sum(len(str(key)[:_WORD]) + _size(value) for key, value in answer.items())
    return 8 + sum(map(_size, answer)) if isinstance(answer, list) else 8


def whole(value: object, limit: int = 1 << 64) -> int | None:
    """A number from 0 up to below ``limit``; None for anything else, such as truth values and NaN."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit else None


def word(value: object, limit: int = 200) -> str:
    """Text without control characters, cut; empty for what is no text."""
    return printable(value[:limit]) if isinstance(value, str) else ""


def mappings(value: object, limit: int = 4096) -> list[dict[str, Any]]:
    """The objects of a list, up to ``limit``; of anything else none."""
    return [item for item in value[:limit] if isinstance(item, dict)] if isinstance(value, list) else []
