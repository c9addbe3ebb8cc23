# SPDX-License-Identifier: Apache-2.0
"""``virtiova gather``: an archive of what a scan reads of this machine, or the script that makes one."""

from __future__ import annotations

import argparse
import sys

from virtiova.cli import exits
from virtiova.cli.outputs import private
from virtiova.errors import UsageError


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.script:
        return _script(options)
    if options.output is None:
        raise UsageError("where to? -o box.tar.gz, or -o - for standard output")
    if options.output == "-" and sys.stdout.isatty():
        raise UsageError("an archive is not for a terminal; -o box.tar.gz, or redirect standard output")
    from virtiova.collect.gather import gather

    if options.output == "-":
        outcome = gather(sys.stdout.buffer, qmp=options.qmp, logs=options.log)
    else:
        with private(options.output) as file:
            outcome = gather(file, qmp=options.qmp, logs=options.log)
    if not options.quiet:
        for problem in outcome.problems:
            print(f"virtiova: could not read {problem}", file=sys.stderr)
    return exits.OK if outcome.files and not outcome.missed else exits.COULD_NOT_LOOK


def _script(options: argparse.Namespace) -> int:
    if options.qmp or options.log:
        raise UsageError("the script takes neither --qmp nor --log")
    from virtiova.collect.gather_script import script

    if options.output in (None, "-"):
        sys.stdout.write(script())
    else:
        with private(options.output) as file:
            file.write(script().encode())
    return exits.OK
