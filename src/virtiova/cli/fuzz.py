# SPDX-License-Identifier: Apache-2.0
"""``virtiova fuzz vhost-user``: play until something is found or the time is over, and say how it can be seen again."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Final

from virtiova.cli import exits
from virtiova.cli.outputs import opened
from virtiova.conformance.run import guessed
from virtiova.errors import MachineError, UsageError
from virtiova.fuzz.campaign import Played, campaign
from virtiova.fuzz.findings import Finding
from virtiova.fuzz.script import script
from virtiova.machine.backend import BackEnd
from virtiova.run.executor import Executor
from virtiova.run.processes import Processes

_PRELOAD: Final = ("virtiova.fuzz.campaign",)


def run(options: argparse.Namespace) -> int:
    """The command; the exit status: 1 if something was found."""
    for name in ("jobs", "sequences"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UsageError(f"--{name} takes a number from 1 on")
    if not 0 < options.time < 1e7:
        raise UsageError("--time takes a number of seconds, more than 0")
    backend = BackEnd(spawn=options.spawn, kind=options.type or "", echo=options.echo)
    backend.check()
    backend = guessed(backend)
    outputs = [(options.output, "py")] if options.output else []
    begun = time.monotonic()
    with opened(outputs) as files:
        total, finding = _play(options, backend)
        text = "" if finding is None else script(finding, backend)
        if text:
            files.write(lambda _: [text])
    seconds = time.monotonic() - begun
    if options.json:
        print(_document(options, total, finding, seconds))
    elif not options.quiet:
        _say(options, total, finding, seconds, text)
    return exits.OK if finding is None else exits.FOUND


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


def _play(options: argparse.Namespace, backend: BackEnd) -> tuple[Played, Finding | None]:
    show = sys.stderr.isatty() and not options.quiet
    sequences = steps = unfit = 0
    finding: Finding | None = None
    with _executor(options) as executor:
        pieces = campaign(executor, backend, options.seed, options.time, options.sequences)
        with contextlib.closing(pieces):
            for done in pieces:
                if done.value is None:
                    raise MachineError(done.lost)
                sequences += done.value.sequences
                steps += done.value.steps
                unfit += done.value.unfit
                if show:
                    sys.stderr.write(f"\r{sequences} sequences")
                    sys.stderr.flush()
                if done.value.finding is not None:
                    finding = done.value.finding
                    break
    if show:
        sys.stderr.write("\r\x1b[K")
    return Played(sequences, steps, unfit), finding


def _document(options: argparse.Namespace, total: Played, finding: Finding | None, seconds: float) -> str:
    found = None
    if finding is not None:
        found = {
            "kind": finding.kind,
            "seen": finding.seen,
            "sequence": finding.sequence,
            "again": finding.again,
            "steps": [list(step) for step in finding.steps],
            "words": finding.words,
        }
    document = {
        "seed": options.seed,
        "sequences": total.sequences,
        "steps": total.steps,
        "unfit": total.unfit,
        "seconds": round(seconds, 3),
        "finding": found,
    }
    return json.dumps(document, indent=2)


def _say(options: argparse.Namespace, total: Played, finding: Finding | None, seconds: float, text: str) -> None:
    played = f"seed {options.seed}: {total.sequences} sequences of {total.steps} steps in {seconds:.1f} s"
    if total.unfit:
        played += f", {total.unfit} not begun: the back end cannot be set up so"
    if finding is None:
        print(f"{played}: nothing found")
        return
    again = "seen again, of a fresh process" if finding.again else "not seen again of a fresh process"
    print(f"{finding.kind}: {finding.seen}")
    print(f"in sequence {finding.sequence}, {again}; {played}")
    for line in finding.words[-3:]:
        print(f"  {line}")
    if options.output:
        print(f"{options.output} {'shows it again' if finding.again else 'has its steps'}")
    else:
        print()
        print(text, end="")
