# SPDX-License-Identifier: Apache-2.0
"""A scan as text: the table of devices, and under it the findings. At most 100 columns, readable without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.report.words import plain
from virtiova.result import Path
from virtiova.result.scan import Scan, ScanFinding, ScannedDevice

WIDTH: Final = 100
_HEAD: Final = ("DEVICE", "TYPE", "ADDRESS", "BIT 33", "DMA PATH", "VERDICT", "")


def document(scan: Scan, *, verbose: bool = False) -> str:
    """The whole text."""
    return "\n".join(_lines(scan, verbose=verbose)) + "\n"


def bit33(row: ScannedDevice) -> str:
    """Bit 33 as declared."""
    if row.accepted:
        return "on"
    if row.offered is False:
        return "[not offered]"
    if row.accepted is False:
        return "[offered, not taken]" if row.offered else "[off]"
    return "[offered]" if row.offered else "?"


def verdict(row: ScannedDevice) -> str:
    """The verdict, loud where bytes go around the IOMMU."""
    return row.verdict.value.upper() if row.verdict in (Path.BYPASS, Path.STALE, Path.MIXED) else row.verdict.value


def _lines(scan: Scan, *, verbose: bool) -> Iterator[str]:
    for number, machine in enumerate(scan.machines):
        if number:
            yield ""
        if len(scan.machines) > 1:
            yield f"== {plain(machine.name)} ({machine.view})"
        rows = [row for row in scan.devices if row.machine == machine.name]
        if rows:
            yield from _table([_HEAD, *(_row(row) for row in rows)])
        else:
            yield "no virtio devices"
        for problem in machine.problems:
            yield plain(f"could not read {problem}")
        for finding in scan.findings:
            if finding.machine == machine.name:
                yield ""
                yield from _finding(finding)


def _row(row: ScannedDevice) -> tuple[str, ...]:
    marks = ",".join(row.findings)
    return tuple(map(plain, (row.name, row.type, row.address or "-", bit33(row), row.dma, verdict(row), marks)))


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def _finding(finding: ScanFinding) -> Iterator[str]:
    where = f" {finding.device}" if finding.device else ""
    yield plain(f"{finding.id}{where}: {finding.title} [{finding.severity.value}]")
    for label, words in (
        ("seen", "; ".join(map(str, finding.seen))),
        ("why", finding.why),
        *((f"fix, {product}", words) for product, words in finding.fix.items()),
    ):
        yield from textwrap.wrap(
            plain(f"{label}: {words}"), WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
