# SPDX-License-Identifier: Apache-2.0
"""What becomes of a scan: which findings are not to count, files by their suffix, and standard output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Final

from virtiova import __version__
from virtiova.cli.outputs import made
from virtiova.errors import UsageError
from virtiova.result.scan import Scan
from virtiova.scan.ignore import Ignore, apply, lines, option
from virtiova.scan.rules import RULES

SUFFIXES: Final = {
    "txt": "text",
    "json": "json",
    "jsonl": "jsonl",
    "sarif": "sarif",
    "html": "html",
    "svg": "svg",
    "prom": "prom",
    "parquet": "parquet",
}
"""The format of a file, by its suffix."""
_LARGEST: Final = 1 << 20


def files(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The files that are to be written, each with its format. Raises `UsageError` for a suffix that says none."""
    if options.json and options.format not in (None, "json"):
        raise UsageError(f"-j is --format json, and {options.format} is asked for as well")
    if options.picture and chosen(options) != "text":
        raise UsageError("--picture goes under the table of --format text")
    named = [_format_of(name) for name in options.output or []]
    if any(kind == "parquet" for _, kind in named):
        from virtiova.report import parquet

        parquet.check()
    return named


def _format_of(name: str) -> tuple[str, str]:
    kind = SUFFIXES.get(os.path.splitext(name)[1][1:])
    if kind is None:
        raise UsageError(f"{name}: the suffix picks the format, and must be one of .{', .'.join(SUFFIXES)}")
    return name, kind


def chosen(options: argparse.Namespace) -> str:
    """The format on standard output."""
    return "json" if options.json else options.format or "text"


# -- what is not to count ----------------------------------------------------------------------------------------


def ignores(options: argparse.Namespace) -> list[Ignore]:
    """What was named. Raises `UsageError` for what does not exist or cannot be read."""
    ids = [rule.id for rule in RULES]
    found = [option(word, ids) for word in options.ignore]
    for name in options.ignore_file:
        try:
            with open(name, "rb") as file:
                data = file.read(_LARGEST + 1)
        except OSError as error:
            raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
        found += lines(data, name, ids)
    return found


def ignore(scan: Scan, named: list[Ignore]) -> None:
    """Mark what is not to count, and say what there was nothing of."""
    for each in apply(scan, named):
        print(f"virtiova: {each.said}: nothing of it is found", file=sys.stderr)


# -- formats -----------------------------------------------------------------------------------------------------


def pieces(kind: str, scan: Scan, options: argparse.Namespace) -> Iterable[str | bytes]:
    """The scan in a format, as it is written to a file."""
    if kind == "text":
        from virtiova.report import scan_text

        return (f"{line}\n" for line in scan_text.lines(scan, verbose=options.verbose))
    if kind == "prom":
        import time

        from virtiova.report import scan_prometheus

        return [scan_prometheus.document(scan, version=__version__, now=time.time())]
    if kind == "parquet":
        from virtiova.report import fleet, parquet

        return parquet.pieces(fleet.rows(scan))
    if kind == "ascii":
        from virtiova.report import scan_ascii

        return [scan_ascii.document(scan)]
    if kind == "svg":
        from virtiova.report import scan_svg

        return scan_svg.document(scan)
    if kind == "html":
        from virtiova.report import scan_html

        return scan_html.page(scan, made(options.typed))
    if kind == "sarif":
        from virtiova.report import scan_sarif

        return [scan_sarif.document(scan, RULES, version=__version__, folder=os.getcwd())]
    from virtiova.report import scan_json

    return scan_json.lines(scan) if kind == "jsonl" else [scan_json.document(scan)]


def show(scan: Scan, options: argparse.Namespace) -> None:
    """On standard output."""
    kind = chosen(options)
    if options.quiet:
        return
    if kind != "text":
        sys.stdout.writelines(piece for piece in pieces(kind, scan, options) if isinstance(piece, str))
        return
    from virtiova.report import scan_text

    terminal = sys.stdout.isatty()
    color = options.color == "always" or (options.color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    sys.stdout.writelines(
        f"{line}\n" for line in scan_text.lines(scan, verbose=options.verbose, color=color, picture=options.picture)
    )
