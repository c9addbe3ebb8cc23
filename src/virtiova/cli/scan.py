# SPDX-License-Identifier: Apache-2.0
"""``virtiova scan``: collects from what was named, judges, and reports."""

from __future__ import annotations

import argparse

from virtiova.cli import exits, scan_outputs
from virtiova.cli.outputs import opened
from virtiova.cli.scan_inputs import views
from virtiova.result.scan import Scan, Severity
from virtiova.scan import scan_views


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.inputs:
        from virtiova.cli import fleet, fleet_report

        options.inputs = fleet.expand(options.inputs)
        if fleet_report.wanted(options):
            return fleet_report.run(options)
    named, ignores = scan_outputs.files(options), scan_outputs.ignores(options)
    with opened(named) as files:
        found = views(options, options.rest)
        scan = scan_views(found)
        scan_outputs.ignore(scan, ignores)
        files.write(lambda kind: scan_outputs.pieces(kind, scan, options))
    scan_outputs.show(scan, options)
    if counts(scan, options.fail_on) and not all(view.empty for view in found):
        return exits.FOUND
    # Also where others could be read: what was asked for has no answer.
    return exits.COULD_NOT_LOOK if any(view.empty for view in found) else exits.OK


def counts(scan: Scan, fail_on: str) -> bool:
    """Is anything found that counts?"""
    if fail_on == "never":
        return False
    worst = Severity(fail_on).rank
    return any(each.severity.rank <= worst and not each.ignored for each in scan.findings)
