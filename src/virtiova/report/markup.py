# SPDX-License-Identifier: Apache-2.0
"""Elements of HTML and SVG whose text is escaped by construction: only `Markup` goes in as it is."""

from __future__ import annotations

import re
from html import escape
from typing import Final

# Control characters have no place in either, nor what turns the direction of all text that follows; what a machine said
# may hold any of them.
_CONTROL: Final = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_VOID: Final = frozenset({"meta", "line", "path", "rect", "circle", "use", "br", "input"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Anything as text, never as markup."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(_CONTROL.sub("\ufffd", value), quote=True))


def join(*parts: str) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(text(part) for part in parts))


def start(name: str, /, **attributes: object) -> Markup:
    """An opening tag. ``class_`` is ``class``, ``_`` is ``-``; None leaves an attribute out, True has no value."""
    said = [name]
    for key, value in attributes.items():
        key_text = key.rstrip("_").replace("_", "-")
        if value is True:
            said.append(key_text)
        elif value is not None and value is not False:
            said.append(f'{key_text}="{text(str(value))}"')
    return Markup(f"<{' '.join(said)}>")


def tag(name: str, /, *parts: str, **attributes: object) -> Markup:
    """A whole element."""
    opening = start(name, **attributes)
    if name in _VOID and not parts:
        return Markup(f"{opening[:-1]}/>")
    return Markup(f"{opening}{join(*parts)}</{name}>")
