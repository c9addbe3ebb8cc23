# SPDX-License-Identifier: Apache-2.0
"""The matrix for people and programs, system by system: text and JSON.

``rows`` of all functions is gone through several times and never kept: it may be read from a file each time.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import msgspec

from virtiova.report.json import cell_object
from virtiova.report.text import summary, table_lines
from virtiova.result import SCHEMA, Cell, Path, Row, System

_REASONS = 20
"""Reasons that are repeated at the end: a report does not grow in memory with what is in it."""


class _Part(Iterable[Cell]):
    """The cells of one system, on one product."""

    def __init__(self, rows: Iterable[Row], system: str) -> None:
        self._rows = rows
        self._system = system

    def __iter__(self) -> Iterator[Cell]:
        return (row.cell for row in self._rows if row.system == self._system)


def text(
    rows: Iterable[Row], systems: Sequence[System], *, width: int | None = None, color: bool = False
) -> Iterator[str]:
    """A heading, what is to be expected, and a table for every system that has rows; at the end a summary, and
    what could not be run and how to get it. Lines."""
    there = {row.system for row in rows}
    for system in systems:
        if system.id not in there:
            continue
        yield f"{system.title.upper()}  [{system.id}]"
        yield from textwrap.wrap(system.words, min(width or 100, 100))
        products = [product for product, _ in groupby(r.product for r in rows if r.system == system.id) if product]
        yield f"seen on {', '.join(dict.fromkeys(products))}" if products else "seen on nothing here"
        yield ""
        yield from table_lines(_Part(rows, system.id), width=width, color=color)
        yield ""
    yield summary(row.cell for row in rows)
    yield from not_run(rows)


def not_run(rows: Iterable[Row]) -> Iterator[str]:
    """The platforms that could not be had here, by the reason, which says how to get them. Lines."""
    found: dict[str, dict[str, None]] = {}
    more = False
    for row in rows:
        cell = row.cell
        # What ran on a product and is n/a says so in its own row; here is what there was nothing to run on for.
        if cell.observed is Path.NOT_APPLICABLE and not row.product.startswith("QEMU "):
            if cell.evidence.note in found or len(found) < _REASONS:
                found.setdefault(cell.evidence.note, {})[f"{cell.machine} with {cell.iommu}"] = None
            else:
                more = True
    if found:
        yield ""
        yield "not run here:"
    for why, platforms in found.items():
        words = f"{', '.join(platforms)}: {why}"
        yield from textwrap.wrap(words, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    if more:
        yield "  and more, for the reasons that their rows give"


def row_object(row: Row) -> dict[str, object]:
    """A row as an element of ``cells``: the probe's object, with its system and product."""
    return {"system": row.system, "product": row.product, **cell_object(row.cell)}


def json(rows: Iterable[Row], systems: Sequence[System]) -> Iterator[str]:
    """The probe's schema, with the systems beside the cells. One line a cell; pieces of text."""
    encode = msgspec.json.encode
    yield f'{{"schema":{encode(SCHEMA).decode()},\n"systems":{encode(list(systems)).decode()},\n"cells":['
    for index, row in enumerate(rows):
        yield (",\n" if index else "\n") + encode(row_object(row)).decode()
    yield "\n]}\n"
