# SPDX-License-Identifier: Apache-2.0
"""``virtiova matrix``: every system that the patch names, as far as it can be had here."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Final

from virtiova.cli import exits
from virtiova.cli.outputs import made, opened
from virtiova.cli.probe import status
from virtiova.cli.progress import clear, on_terminal
from virtiova.errors import UsageError
from virtiova.machine.qemu import suites
from virtiova.machine.qemu.installation import Installation
from virtiova.matrix import SYSTEMS, Extent, Planned, Selection, answer, boards, plan, run_planned
from virtiova.matrix.plan import Plan
from virtiova.report import matrix as report
from virtiova.result import Row
from virtiova.run.executor import Executor
from virtiova.run.processes import Processes
from virtiova.run.results import Results, fingerprint

FORMATS: Final = ("json", "html", "svg", "xml", "txt")
_PRELOAD: Final = ("virtiova.matrix.work",)


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    outputs = [_format_of(name) for name in options.output or []]
    if options.jobs is not None and options.jobs < 1:
        raise UsageError("--jobs takes a number from 1 on")
    chosen = Selection(tuple(options.only), tuple(options.skip))
    wanted = plan(chosen, _installations(options, chosen), Extent(options.full, options.guests, options.offline))
    if not wanted.tasks:
        raise UsageError("--only and --skip leave nothing")
    if options.list:
        for line in _listing(wanted):
            print(line)
        return exits.OK
    name = fingerprint(wanted.tasks)
    path = FilePath(options.results) if options.results else None
    with opened(outputs) as files, Results(path, Row, name, wanted.count) as results:
        try:
            collect(wanted, results, options)
        except KeyboardInterrupt as error:
            clear()
            kept = f"{path} has" if path else "--results FILE keeps"
            so_far = f" after {len(results)} of {wanted.count} cells; {kept} what is done"
            raise KeyboardInterrupt(*(error.args or (signal.SIGINT,)), so_far) from error
        files.write(lambda kind: pieces(kind, results, made(options.typed)))
        if not options.quiet:
            _write(options, results)
        return status((row.cell for row in results), options.fail_on)


def _installations(options: argparse.Namespace, chosen: Selection) -> list[Installation]:
    """The QEMUs besides this machine's own; those of a suite of Debian are fetched, or say why not."""
    needed = boards(chosen)
    try:
        return [suites.named(name, needed, offline=options.offline, progress=on_terminal()) for name in options.qemu]
    finally:
        clear()


def _format_of(name: str) -> tuple[str, str]:
    kind = FilePath(name).suffix[1:]
    if kind not in FORMATS:
        raise UsageError(f"{name}: the suffix picks the format, and must be one of .{', .'.join(FORMATS)}")
    return name, kind


def pieces(kind: str, rows: Results[Row], made: str = "") -> Iterator[str]:
    """A format of the report, in pieces: never all of it in memory."""
    if kind == "txt":
        return (f"{line}\n" for line in report.text(rows, SYSTEMS))
    if kind == "json":
        return report.json(rows, SYSTEMS)
    if kind == "xml":
        from virtiova.report import junit

        return junit.suites(rows, SYSTEMS)
    if kind == "svg":
        from virtiova.report import svg

        return svg.matrix(rows, SYSTEMS)
    from virtiova.report import html

    return html.page(rows, SYSTEMS, made)


def _write(options: argparse.Namespace, rows: Results[Row]) -> None:
    if options.json:
        sys.stdout.writelines(pieces("json", rows))
        return
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else None
    color = options.color == "always" or (options.color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    sys.stdout.writelines(f"{line}\n" for line in report.text(rows, SYSTEMS, width=width, color=color))


@contextlib.contextmanager
def _executor(options: argparse.Namespace) -> Iterator[Executor]:
    if not options.scheduler:
        yield Processes(options.jobs, preload=_PRELOAD)
        return
    from virtiova.run.cluster import Cluster

    cluster = Cluster(options.scheduler)
    try:
        yield cluster
    finally:
        cluster.close()


def collect(wanted: Plan, results: Results[Row], options: argparse.Namespace) -> None:
    """Run what has no result yet."""
    count = wanted.count
    if results.repaired:
        print(f"virtiova: {results.path}: the last line was half written, and was cut off", file=sys.stderr)
    if len(results):
        print(f"virtiova: {results.path}: going on after {len(results)} of {count} cells", file=sys.stderr)
    for number, planned in wanted.numbered():
        if planned.missing and number not in results:
            _add(results, number, run_planned(planned))
    if len(results) == count:
        return
    show = sys.stderr.isatty() and not options.quiet
    under_way: dict[int, Planned] = {}

    def todo() -> Iterator[tuple[int, Planned]]:
        for number, planned in wanted.numbered():
            if any(n not in results for n in range(number, number + planned.span)):
                under_way[number] = planned
                yield number, planned

    with _executor(options) as executor, contextlib.closing(executor.run(run_planned, todo())) as answers:
        for done in answers:
            _add(results, done.number, answer(under_way.pop(done.number), done))
            if show:
                sys.stderr.write(f"\r{len(results)}/{count} cells")
                sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[K")


def _add(results: Results[Row], number: int, rows: list[Row]) -> None:
    """What comes of one task; of a boot that was cut in half when the file was, only what is missing."""
    for n, row in enumerate(rows, number):
        if n not in results:
            results.add(n, row)


def _listing(wanted: Plan) -> Iterator[str]:
    """The plan: what would be run, and what cannot be."""
    for planned in wanted.tasks:
        why = f"  n/a: {planned.missing}" if planned.missing else ""
        for task in planned.rows or (planned.task,):
            yield f"{planned.system:8} {task.machine} {task.iommu} {' + '.join(task.devices)} {task.experiment}{why}"
