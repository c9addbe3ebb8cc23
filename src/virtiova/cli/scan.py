# SPDX-License-Identifier: Apache-2.0
"""``virtiova scan``: collects from what was named, judges, and reports."""

from __future__ import annotations

import argparse
import sys

from virtiova.cli import exits
from virtiova.cli.scan_inputs import views
from virtiova.report import scan_text
from virtiova.result.scan import Scan, Severity
from virtiova.scan import scan_views


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    found = views(options, options.rest)
    scan = scan_views(found)
    if not options.quiet:
        sys.stdout.write(scan_text.document(scan, verbose=options.verbose))
    if all(view.empty for view in found):
        return exits.COULD_NOT_LOOK
    return exits.FOUND if counts(scan, options.fail_on) else exits.OK


def counts(scan: Scan, fail_on: str) -> bool:
    """Is anything found that counts?"""
    if fail_on == "never":
        return False
    worst = Severity(fail_on).rank
    return any(each.severity.rank <= worst and not each.ignored for each in scan.findings)
