# SPDX-License-Identifier: Apache-2.0
"""Takes passwords and keys out of what is gathered. Lines stay lines, so that a finding still names the right one.

The same expressions are Python's and those of ``sed -E``: the script for machines without Python does the same.
"""

from __future__ import annotations

import re
from typing import Final

GONE: Final = "REMOVED"
_NAMES: Final = "[a-z-]*password|passwd|passphrase|secret|token|cookie|api-?key|key|sig|data"
_CREDENTIAL: Final = r"(io\.systemd\.credential[^=,'\"<]{0,200}=)"

NEXT: Final = r"^--?([a-z-]*(password|passwd|passphrase|secret|token|cookie|api-?key))$"
"""An option of its own whose value is the next word. In small letters: busybox knows no others in an address."""

WORDS: Final = (
    # name=value in an option of QEMU's, where a comma in a value is doubled
    (rf"(^|[,:;?&.])(({_NAMES})=)([^,]|,,)*", r"\1\2" + GONE),
    # a word of a kernel's options, in -append
    (r"( (password|passwd|passphrase|secret|token)[^ =]{0,200}=)[^ ]*", r"\1" + GONE),
    (r"((password|passwd|passphrase|token)=)([^ ,]|,,)*", r"\1" + GONE),
    # "name": "value" in a JSON option
    (rf'("({_NAMES})" *: *")([^"\\]|\\.)*', r"\1" + GONE),
    # scheme://user:password@host
    (r"(://[^/@ ,:]*:)[^/@ ,]*@", r"\1" + GONE + "@"),
    # what -fw_cfg and -smbios hand to the guest
    (r"(opt/[^,]{0,200},string=)([^,]|,,)*", r"\1" + GONE),
    (_CREDENTIAL + "([^,]|,,)*", r"\1" + GONE),
)
XML: Final = (
    *((rf"([ :](passwd|password)=){quote}[^{quote}]*{quote}", rf"\1{quote}{GONE}{quote}") for quote in "'\""),
    # The environment that a domain is started with.
    *((rf"(<qemu:env [^>]{{0,200}}value=){quote}[^{quote}]*{quote}", rf"\1{quote}{GONE}{quote}") for quote in "'\""),
    (rf"([,:;?&.'\"]({_NAMES})=)([^,'\"<]|,,)+", r"\1" + GONE),
    (r"((password|passwd|passphrase|token)=)([^ ,'\"<]|,,)+", r"\1" + GONE),
    # a JSON option, in either of the ways to quote it there
    (rf'("({_NAMES})" *: *")([^"\\]|\\.)*', r"\1" + GONE),
    (rf"(&quot;({_NAMES})&quot; *: *&quot;)[^&<]*", r"\1" + GONE),
    (r"(opt/[^,]{0,200},string=)([^,'\"<]|,,)*", r"\1" + GONE),
    (r"(<(dhCert|session|cookie|cookie [^>]{0,200}|entry name=['\"]opt/[^>]{0,200})>)[^<]*", r"\1" + GONE),
    (_CREDENTIAL + "[^,'\"<]*", r"\1" + GONE),
    WORDS[3],
)
KERNEL: Final = (
    (r"((password|passwd|passphrase|secret|token)[^ =]{0,200}=)[^ ]*", r"\1" + GONE),
    # dracut's netroot=iscsi:user:password@host
    (r"(iscsi:[^:@ ]{0,200}:)[^@ ]{0,200}@", r"\1" + GONE + "@"),
    (r"((io\.systemd|systemd\.set)[._]credential[^=: ]{0,200}[=:])[^ ]*", r"\1" + GONE),
)

_Rules = tuple[tuple[str, str], ...]


def redacted(text: str, rules: _Rules) -> str:
    """``text`` without what ``rules`` (`WORDS`, `XML`, `KERNEL`) name, line by line."""
    if rules is WORDS:
        text = re.sub(rf"({NEXT})\n[^\n]+", rf"\1\n{GONE}", text, flags=re.MULTILINE)
    for pattern, instead in rules:
        text = re.sub(pattern.replace("[^", r"[^\n"), instead, text, flags=re.MULTILINE | re.IGNORECASE)
    return text


def sed(rules: _Rules) -> str:
    """The same as the arguments of ``sed -E``, quoted for a shell."""
    commands = [f"s~{pattern}~{instead}~gI" for pattern, instead in rules]
    if rules is WORDS:
        # First, so that the option is not yet another: the line as it is, and something else instead of the next.
        commands.insert(0, f"/{NEXT}/{{n;s~..*~{GONE}~}}")
    return " ".join("-e " + _quoted(command) for command in commands)


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
