# SPDX-License-Identifier: Apache-2.0
"""``name,key=value,...`` as QEMU takes it, JSON in its place, and the sections of a ``-readconfig`` file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Final

from virtiova.errors import ProtocolError

Pairs = list[tuple[str, str]]
_ON: Final = frozenset({"on", "yes", "true", "y"})
_OFF: Final = frozenset({"off", "no", "false", "n"})
# A doubled comma stands for one.
_ITEM: Final = re.compile(r"((?:[^,]+|,,)*+)(?:,|\Z)")
_SECTION: Final = re.compile(r'\[\s*([\w-]{1,63})\s*(?:"([^"]{0,255})")?\s*\]', re.ASCII)
_ENTRY: Final = re.compile(r'([\w.-]{1,255})\s*=\s*"([^"]*)"', re.ASCII)
_DEEPEST: Final = 32
_MOST: Final = 4096


def switch(value: str) -> bool | None:
    """A boolean in QEMU's words; None: it is none."""
    word = value.lower()
    return True if word in _ON else False if word in _OFF else None


def pairs(text: str, first: str = "") -> Pairs:
    """``text`` as keys and values, in its order. ``first`` is the key of a first item that names none. Of the others,
    a bare ``key`` means ``on``, and a bare ``nokey`` ``off``."""
    found: Pairs = []
    at = 0
    while at < len(text):
        match = _ITEM.match(text, at)
        assert match is not None  # it matches the empty string
        item, at = match[1].replace(",,", ","), match.end()
        key, equals, value = item.partition("=")
        if equals:
            found.append((key, value))
        elif first and not found:
            found.append((first, item))
        elif item.startswith("no") and len(item) > 2:
            found.append((item[2:], "off"))
        elif item:
            found.append((item, "on"))
        if len(found) > _MOST:
            raise ProtocolError(f"more than {_MOST} options in one: {text[:40]!r}")
    return found


def from_json(text: str, option: str) -> Pairs:
    """A JSON object as keys and values: booleans as ``on`` and ``off``, what is nested with dots in its key."""
    try:
        read = json.loads(text)
        found = list(_flat(read, "", 0)) if isinstance(read, dict) else None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"-{option} {text[:60]!r}: no JSON that QEMU would take: {str(error)[:80]}") from error
    if found is None:
        raise ProtocolError(f"-{option} {text[:60]!r}: JSON, but no object")
    return found


def _flat(value: object, key: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    items: Iterable[tuple[object, object]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield key, _scalar(value, key)
        return
    for name, inner in items:
        yield from _flat(inner, f"{key}.{name}" if key else str(name), depth + 1)


def _scalar(value: object, key: str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and key == "addr":
        # As a number, unlike as text, it is slot and function in one.
        return f"{value >> 3:x}.{value & 7}" if 0 <= value < 256 else ""
    # Half of a pair of surrogates is no character.
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def sections(data: bytes, name: str) -> Iterator[tuple[str, str, Pairs, int]]:
    """The sections of a ``-readconfig`` file: group, id, entries, line."""
    group, identity, line = "", "", 0
    entries: Pairs = []
    for number, raw in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
        text = raw.strip()
        if not text or text.startswith("#"):
            continue
        if section := _SECTION.fullmatch(text):
            if group:
                yield group, identity, entries, line
            group, identity, line, entries = section[1], section[2] or "", number, []
        elif group and (entry := _ENTRY.fullmatch(text)):
            entries.append((entry[1], entry[2]))
        else:
            raise ProtocolError(f"{name}:{number}: neither a section nor an entry: {text[:60]!r}")
    if group:
        yield group, identity, entries, line
