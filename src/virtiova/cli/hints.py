# SPDX-License-Identifier: Apache-2.0
"""What to say of a command line that cannot be: what was probably meant, in a form that can be typed."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.errors import UsageError

_DEVICE: Final = re.compile(r"(virtio|vhost-user)-\w.*-(pci|device)\b|edu$|rtl8139$")
_SOCKET: Final = re.compile(r".*/.*|.*\.sock")
_ALIKE: Final = 0.7
"""Where there are few names, all of them are said rather than one that is far off."""
BEHAVIOURS: Final = ("honest", "quirky", "lying", "stale")
_KINDS_OF_NAME: Final = ("kind", "target")
"""Sub-commands that are names of things, and are typed without the command before them."""


def choice(parser: argparse.ArgumentParser, argument: str, rest: str) -> UsageError:
    """For an ``invalid choice`` of ``argument``, as argparse says it: the nearest one, or all."""
    word = rest.split("'")[1]
    for action in parser._actions:
        if argument not in (action.metavar, action.dest, "/".join(action.option_strings)):
            continue
        if isinstance(action, argparse._SubParsersAction):
            return _command(parser, argument.lower(), word, action)
        return UsageError.unknown(f"value of {argument}", word, action.choices or (), alike=_ALIKE)
    return UsageError(f"{argument}: {rest}")


def _command(
    parser: argparse.ArgumentParser, what: str, word: str, commands: argparse._SubParsersAction[argparse.ArgumentParser]
) -> UsageError:
    for prog in _below(parser):
        if prog.endswith(f" {word}"):
            return UsageError(f"unknown {what} {word!r}; did you mean {prog!r}?")
    if what == "target":
        meant = ""
        if _DEVICE.match(word):
            meant = f"virtiova probe qemu --device {word}"
        elif _SOCKET.fullmatch(word):
            meant = f"virtiova probe vhost-user {word}"
        elif word in BEHAVIOURS:
            meant = f"virtiova probe model {word}"
        if meant:
            return UsageError(f"unknown {what} {word!r}; did you mean {meant!r}?")
    if what == "command" and os.path.exists(word):
        return UsageError(f"unknown {what} {word!r}; did you mean 'virtiova scan {word}'?")
    return UsageError.unknown(what, word, commands.choices, alike=_ALIKE)


def _below(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The whole names of sub-commands of sub-commands that are names of things."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                for inner in sub._actions:
                    if isinstance(inner, argparse._SubParsersAction) and inner.dest in _KINDS_OF_NAME:
                        yield from (each.prog for each in inner.choices.values())


def named(top: argparse.ArgumentParser, words: Sequence[str]) -> bool:
    """Is any of these words the name of a command?"""
    return not _sub(top).keys().isdisjoint(words)


def check_target(top: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """`UsageError` for an option of a target (``--device``) where no target is named: argparse would take what
    follows it for the target."""
    command = _sub(top).get(words[0]) if words else None
    targets = _sub(command) if command is not None else {}
    if command is None or not targets or targets.keys() & set(words):
        return
    own = _options(command)
    for word in words[1:]:
        name = word.split("=")[0]
        if not name.startswith("--") or any(option.startswith(name) for option in own):
            continue
        having = {key: sub for key, sub in targets.items() if name in _options(sub)}
        needing = [
            key for key, sub in having.items() if any(a.required for a in sub._actions if name in a.option_strings)
        ]
        if len(needing) == 1:
            raise UsageError(f"{name} goes with '{having[needing[0]].prog}'")
        if having:
            *most, last = having
            names = f"{', '.join(most)} or {last}" if most else last
            raise UsageError(f"{name} goes with a target: {names}")


def _sub(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}
