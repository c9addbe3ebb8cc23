# SPDX-License-Identifier: Apache-2.0
"""The script that gathers where there is no Python, made of the same list of files."""

from __future__ import annotations

from importlib import resources
from typing import Final

from virtiova.collect import redact
from virtiova.collect.box import HEADER, SCHEMA
from virtiova.collect.files import BACKENDS, CPU, DMESG, HYPERVISORS, IOMEM, IOMEM_LINES, KERNEL_OPTIONS, ROWS, XML, Row


def script() -> str:
    """The whole script, for a POSIX shell."""
    text = resources.files("virtiova.collect").joinpath("gather.sh").read_text(encoding="utf-8")
    for mark, words in _PARTS.items():
        text = text.replace(f"@{mark}@", words)
    return text


def _row(row: Row) -> str:
    """``for d in FOLDERS; do at "$d" && { link ...; get ...; }; done``"""
    does = []
    for verb, names in (("link", row.links), ("get", row.files)):
        if names:
            does.append(f"    {verb} " + " ".join(f'"$d"/{name}' for name in names))
    if not does:
        return f'for d in {row.folder}; do at "$d"; done'
    return "\n".join([f"for d in {row.folder}; do", '    at "$d" || continue', *does, "done"])


_PARTS: Final = {
    "ROWS": "\n".join(map(_row, ROWS)),
    "CPU": CPU,
    "IOMEM": IOMEM,
    "LINES": "'" + "|".join(IOMEM_LINES) + "'",
    "OPTIONS": KERNEL_OPTIONS,
    "HYPERVISORS": " | ".join(HYPERVISORS),
    "BACKENDS": " | ".join(BACKENDS),
    "XMLRULES": redact.sed(redact.XML),
    "XML": " ".join(XML),
    "WORDS": redact.sed(redact.WORDS),
    "KERNEL": redact.sed(redact.KERNEL),
    "DMESG": "'" + "|".join(DMESG) + "'",
    "SCHEMA": SCHEMA,
    "HEADER": HEADER,
}
