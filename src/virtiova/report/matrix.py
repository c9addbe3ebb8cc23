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
from virtiova.result import SCHEMA, Cell, Row, System


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
    """A heading, what is to be expected, and a table for every system that has rows; a summary at the end. Lines."""
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
