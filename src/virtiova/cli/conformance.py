# SPDX-License-Identifier: Apache-2.0
"""``virtiova probe vhost-user --conformance``: ask the cases, print them, and say by the exit status what was found."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Final

from virtiova import __version__
from virtiova.cli import exits
from virtiova.cli.outputs import opened
from virtiova.conformance.case import Case, find
from virtiova.conformance.cases import CASES
from virtiova.conformance.run import guessed, run_cases
from virtiova.errors import UsageError
from virtiova.machine.backend import BackEnd
from virtiova.report import conformance as report
from virtiova.report import sarif
from virtiova.result import CaseResult, Verdict

FORMATS: Final = ("json", "sarif", "txt", "xml")


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    for name, given in (("experiment", options.experiment), ("script", options.script)):
        if given:
            raise UsageError(f"--{name} does not go with --conformance")
    if options.ring != "split":
        raise UsageError("--ring does not go with --conformance: there are cases for packed rings")
    if options.fail_on == "bypass":
        raise UsageError("--fail-on takes mismatch, unknown or never with --conformance")
    named = [*(options.output or []), *(getattr(options, "more_output", None) or [])]
    outputs = [_format_of(name) for name in named]
    cases = [find(name) for name in dict.fromkeys(options.case or CASES)]
    backend = guessed(
        BackEnd(options.socket or "", options.spawn or "", options.type or "", write=options.write, echo=options.echo)
    )
    with opened(outputs) as files:
        results = _collect(backend, cases, options)
        files.write(lambda kind: pieces(kind, results, backend))
    if not options.quiet:
        _write(results, options, backend)
    return status(results, options.fail_on)


def status(results: Iterable[CaseResult], fail_on: str = "mismatch") -> int:
    """0: no case fails; 1: one does; 3: there is a case that could not be asked, and nothing worse, or none that has an
    answer."""
    results = list(results)
    seen = {each.result for each in results}
    if fail_on == "never":
        return exits.OK
    if Verdict.FAIL in seen or (fail_on == "unknown" and Verdict.UNKNOWN in seen):
        return exits.FOUND
    unanswered = any(each.unanswered for each in results)
    return exits.OK if Verdict.PASS in seen and not unanswered else exits.COULD_NOT_LOOK


def _format_of(name: str) -> tuple[str, str]:
    kind = FilePath(name).suffix[1:]
    if kind not in FORMATS:
        raise UsageError(f"{name}: the suffix picks the format, and must be one of .{', .'.join(FORMATS)}")
    return name, kind


def help_text(case: Case) -> str:
    """What a case does, why it matters, and what a fix looks like."""
    return f"{case.does}\n\nWhy it matters: {case.why}\n\nWhat a fix looks like: {case.fix}"


def pieces(kind: str, results: Sequence[CaseResult], backend: BackEnd) -> Iterable[str]:
    """The results in a format."""
    if kind == "json":
        return [report.document(results), "\n"]
    if kind == "xml":
        return report.junit(results)
    if kind == "sarif":
        where = backend.spawn or backend.socket
        helps = {name: help_text(case) for name, case in CASES.items()}
        uri = f"vhost-user-{backend.kind or 'device'}"
        return [sarif.document(results, helps, version=__version__, where=where, uri=uri), "\n"]
    return [f"{line}\n" for line in [*report.lines(results), "", report.summary(results)]]


def _collect(backend: BackEnd, cases: Sequence[Case], options: argparse.Namespace) -> list[CaseResult]:
    show = sys.stderr.isatty() and not options.quiet
    results: list[CaseResult] = []
    for result in run_cases(backend, cases, jobs=options.jobs):
        results.append(result)
        if show:
            sys.stderr.write(f"\r{len(results)}/{len(cases)} cases")
            sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[K")
    return results


def _write(results: Sequence[CaseResult], options: argparse.Namespace, backend: BackEnd) -> None:
    if options.json:
        sys.stdout.writelines(pieces("json", results, backend))
        return
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else None
    color = options.color == "always" or (options.color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    for line in report.lines(results, width=width, color=color, verbose=options.verbose):
        print(line)
    print()
    print(report.summary(results))
    for line in report.in_words(results):
        print(line)
    if backend.guess:
        print(f"That the device is of type {backend.kind} is a guess: {backend.guess}. --type says it.")
    first = next((each.case for each in results if each.result is Verdict.FAIL), "")
    if first:
        print(
            f"'virtiova explain {first}' says why that case matters, and what a fix looks like; likewise of all others."
        )
