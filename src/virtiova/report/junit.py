# SPDX-License-Identifier: Apache-2.0
"""The matrix as JUnit XML: a suite for each system, a test case for each cell, for CI systems to show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from virtiova.report.words import bit33, device, evidence_text, iommu, verdict, way
from virtiova.result import Row, System

# XML 1.0 has no place for these, not even escaped; QEMU's words may hold any of them.
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def suites(rows: Iterable[Row], systems: Sequence[System]) -> Iterator[str]:
    """The document in pieces. ``rows`` is gone through several times and not kept.

    A cell that is not as predicted is a failure; one without an answer an error; one that could not be had, and one
    that does not apply, is skipped with the reason. A known departure passes, and says so.
    """
    counts = Counter((row.system, _kind(row)) for row in rows)
    yield '<?xml version="1.0" encoding="UTF-8"?>\n'
    yield f'<testsuites name="virtiova matrix"{_totals(Counter(kind for _, kind in counts.elements()))}>\n'
    for system in systems:
        own = Counter({kind: count for (name, kind), count in counts.items() if name == system.id})
        if not own.total():
            continue
        yield f"  <testsuite name={attribute(system.title)} id={attribute(system.id)}{_totals(own)}>\n"
        yield from (_case(row) for row in rows if row.system == system.id)
        yield "  </testsuite>\n"
    yield "</testsuites>\n"


def _kind(row: Row) -> str:
    return {"not as predicted": "failures", "unknown": "errors", "not applicable": "skipped"}.get(
        verdict(row.cell), "passed"
    )


def _totals(count: Counter[str]) -> str:
    named = "".join(f' {kind}="{count[kind]}"' for kind in ("failures", "errors", "skipped"))
    return f' tests="{count.total()}"{named}'


def _case(row: Row) -> str:
    cell = row.cell
    where = ".".join(filter(None, (row.product.replace(" ", "-"), cell.machine, iommu(cell))))
    name = f"{device(cell)} {bit33(cell)} {cell.experiment}"
    head = f"    <testcase classname={attribute(where)} name={attribute(name)}"
    predicted = "|".join(cell.predicted) or "nothing"
    message = f"predicted {predicted}, observed {cell.observed}: {evidence_text(cell)}"
    kind = _kind(row)
    if kind == "skipped":
        return f"{head}><skipped message={attribute(evidence_text(cell))}/></testcase>\n"
    if kind == "passed":
        said = f"{message}; explained by {cell.explained}" if cell.explained else message
        return f"{head}><system-out>{body(said)}</system-out></testcase>\n"
    element = "failure" if kind == "failures" else "error"
    reasons = "\n".join(f"{'yes' if r.answer else 'no'} {r.rule}: {r.text} [{r.citation}]" for r in cell.reasons)
    text = body(f"{message}\nbytes went: {way(cell)}\n{reasons}")
    return f"{head}><{element} message={attribute(message)}>{text}</{element}></testcase>\n"


def attribute(text: str) -> str:
    """An attribute's value, in quotes."""
    return quoteattr(_NOT_XML.sub("\ufffd", text))


def body(text: str) -> str:
    """Text of an element."""
    return escape(_NOT_XML.sub("\ufffd", text))
