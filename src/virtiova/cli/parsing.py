# SPDX-License-Identifier: Apache-2.0
"""What all commands' options are parsed with: nearest names for what was mistyped, and nothing given twice."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Final, NoReturn, TypeAlias

from virtiova.cli import hints
from virtiova.errors import UsageError

_seen: Final[set[str]] = set()
"""The options with one value that this command line has had so far, before and after the command's name."""


class Once(argparse.Action):
    """An option with one value: given twice, one of the two would be lost without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        if self.dest in _seen:
            raise UsageError(f"{option_string} is given twice")
        _seen.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An option or command that was mistyped is answered with the nearest one, like every other name."""

    top = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.top:
            _seen.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments":
            word = rest.split()[0]
            if word.split("=")[0] in self.names():
                raise UsageError(f"{word} does not belong here")
            raise UsageError.unknown("option", word, self.names())
        argument = kind.removeprefix("argument ")
        if "invalid choice" in rest:
            raise hints.choice(self, argument, rest)
        if match := re.fullmatch(r"invalid (int|float) value: (.*)", rest):
            raise UsageError(f"{argument} takes a number, not {match[2]}")
        raise UsageError(message.removeprefix("argument "))

    def names(self) -> set[str]:
        """All options and commands, those of the commands included."""
        found: set[str] = set()
        for action in self._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                found.update(action.choices)
                for parser in action.choices.values():
                    found |= parser.names()
        return found


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def common(command: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every command that runs cells."""
    command.add_argument(
        "--jobs",
        action=Once,
        type=int,
        metavar="N",
        default=argparse.SUPPRESS if inherit else None,
        help="cells at a time (default: one a core)",
    )
    command.add_argument(
        "--fail-on",
        action=Once,
        choices=("mismatch", "bypass", "unknown", "never"),
        default=argparse.SUPPRESS if inherit else "mismatch",
        help="what counts as found (default: mismatch)",
    )
    command.add_argument(
        "--color",
        action=Once,
        choices=("auto", "always", "never"),
        default=argparse.SUPPRESS if inherit else "auto",
        help="default: auto; NO_COLOR is obeyed",
    )
