# SPDX-License-Identifier: Apache-2.0
"""``virtiova scan`` of many files: the summary, and the files that others go on with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Final

from virtiova.cli import exits, scan_outputs
from virtiova.cli.fleet import Fleet, executor_for
from virtiova.cli.outputs import opened
from virtiova.errors import UsageError
from virtiova.report import fleet as report
from virtiova.result.scan import Scan, Severity, merged
from virtiova.scan.ignore import Ignore, apply

_MANY: Final = 8
"""So many machines are read one by one; of more there is a summary."""


def wanted(options: argparse.Namespace) -> bool:
    """Whether it is a fleet that is scanned: many files, or one of the options for that."""
    if not options.summary and not options.scheduler and len(options.inputs) <= _MANY:
        return False
    if any(getattr(options, name) for name in ("qmp", "cmdline", "pid", "log", "rest")):
        raise UsageError("a fleet is files and folders only: scan the rest by itself")
    return True


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    named, ignores = scan_outputs.files(options), scan_outputs.ignores(options)
    with opened(named) as files, Fleet(options.inputs) as fleet:
        with executor_for(options.jobs, options.scheduler) as executor:
            fleet.run(executor, send=options.scheduler is not None, show=sys.stderr.isatty() and not options.quiet)
        unused = set(ignores)
        summary = report.Summary()
        worst: int | None = None
        read = False
        for scan in _judged(fleet, ignores, unused):
            summary.add(scan)
            ranks = [each.severity.rank for each in scan.findings if not each.ignored]
            worst = min([*ranks, *([worst] if worst is not None else [])], default=None)
            read = read or any(machine.platform or machine.view != "configuration" for machine in scan.machines)
        for each in sorted(unused, key=str):
            print(f"virtiova: {each.said}: nothing of it is found", file=sys.stderr)
        files.write(lambda kind: _pieces(kind, fleet, ignores, options))
        if not options.quiet:
            sys.stdout.writelines(_standard(fleet, summary, ignores, options))
    if not read and not summary.devices:
        return exits.COULD_NOT_LOOK
    limit = -1 if options.fail_on == "never" else Severity(options.fail_on).rank
    return exits.FOUND if worst is not None and worst <= limit else exits.OK


def _judged(fleet: Iterable[Scan], ignores: list[Ignore], unused: set[Ignore] | None = None) -> Iterator[Scan]:
    """The scans, with what is not to count marked."""
    for scan in fleet:
        left = apply(scan, ignores)
        if unused is not None:
            unused &= set(left)
        yield scan


def _standard(
    fleet: Iterable[Scan], summary: report.Summary, ignores: list[Ignore], options: argparse.Namespace
) -> Iterable[str]:
    kind = scan_outputs.chosen(options)
    if kind != "text":
        return (piece for piece in _pieces(kind, fleet, ignores, options) if isinstance(piece, str))
    return (f"{line}\n" for line in summary.lines(verbose=options.verbose))


def _pieces(
    kind: str, fleet: Iterable[Scan], ignores: list[Ignore], options: argparse.Namespace
) -> Iterator[str | bytes]:
    """A format, in pieces. Where a format is one document, all of it is in memory once."""
    if kind == "parquet":
        from virtiova.report import parquet

        yield from parquet.pieces(row for scan in _judged(fleet, ignores) for row in report.rows(scan))
        return
    if kind == "jsonl":
        for scan in _judged(fleet, ignores):
            yield from scan_outputs.pieces(kind, scan, options)
        return
    yield from scan_outputs.pieces(kind, merged(_judged(fleet, ignores)), options)
