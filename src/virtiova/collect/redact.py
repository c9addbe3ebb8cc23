# SPDX-License-Identifier: Apache-2.0
"""Takes passwords and keys out of what is gathered. Lines stay lines, so that a finding still names the right one.

The same expressions are Python's and those of ``sed -E``: the script for machines without Python does the same.
"""

from __future__ import annotations

import re
from typing import Final

GONE: Final = "REMOVED"
_NAMES: Final = "password|passwd|passphrase|secret|token|key|data"

WORDS: Final = (
    # name=value in an option of QEMU's, where a comma in a value is doubled
    (rf"(^|[,:;?&])(({_NAMES})=)([^,]|,,)*", r"\1\2" + GONE),
    # "name": "value" in a JSON option
    (rf'("({_NAMES})" *: *")([^"\\]|\\.)*', r"\1" + GONE),
    # scheme://user:password@host
    (r"(://[^/@ ,:]*:)[^/@ ,]*@", r"\1" + GONE + "@"),
)
XML: Final = (
    *((rf"([ :](passwd|password)=){quote}[^{quote}]*{quote}", rf"\1{quote}{GONE}{quote}") for quote in "'\""),
    # The environment that a domain is started with.
    *((rf"(<qemu:env .*value=){quote}[^{quote}]*{quote}", rf"\1{quote}{GONE}{quote}") for quote in "'\""),
    (rf"([,:;?&]({_NAMES})=)([^,'\"<]|,,)*", r"\1" + GONE),
    WORDS[2],
)
KERNEL: Final = ((r"((password|passwd|passphrase|secret|token)[^ =]*=)[^ ]*", r"\1" + GONE),)

_Rules = tuple[tuple[str, str], ...]


def redacted(text: str, rules: _Rules) -> str:
    """``text`` without what ``rules`` (`WORDS`, `XML`, `KERNEL`) name, line by line."""
    for pattern, instead in rules:
        text = re.sub(pattern.replace("[^", r"[^\n"), instead, text, flags=re.MULTILINE)
    return text


def sed(rules: _Rules) -> str:
    """The same as the arguments of ``sed -E``, quoted for a shell."""
    return " ".join("-e " + _quoted(f"s~{pattern}~{instead}~g") for pattern, instead in rules)


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
