# SPDX-License-Identifier: Apache-2.0
"""``virtiova scan``: collects from what was named, judges, and reports."""

from __future__ import annotations

import argparse
import sys

from virtiova.cli import exits
from virtiova.collect.facts import View
from virtiova.report import scan_text
from virtiova.result.scan import Scan, Severity
from virtiova.scan import scan_views


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    views = collect(options)
    scan = scan_views(views)
    if not options.quiet:
        sys.stdout.write(scan_text.document(scan, verbose=options.verbose))
    if views and all(view.empty for view in views):
        return exits.COULD_NOT_LOOK
    return exits.FOUND if counts(scan, options.fail_on) else exits.OK


def collect(options: argparse.Namespace) -> list[View]:
    """A view for each input; of this machine if none is named."""
    from virtiova.collect import linux
    from virtiova.collect.tree import LiveTree

    return [linux.collect(LiveTree())]


def counts(scan: Scan, fail_on: str) -> bool:
    """Is anything found that counts?"""
    if fail_on == "never":
        return False
    worst = Severity(fail_on).rank
    return any(each.severity.rank <= worst and not each.ignored for each in scan.findings)
