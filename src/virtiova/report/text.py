# SPDX-License-Identifier: Apache-2.0
"""Cells as a table for people: plain, aligned, readable without colour."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from virtiova.report.words import VERDICTS, bit33, device, evidence_text, iommu, machine, plain, verdict
from virtiova.result import NO_ANSWER, Cell, Path

_HEAD: Final = ("MACHINE", "IOMMU", "DEVICE", "BIT 33", "EXPERIMENT", "PREDICTED", "OBSERVED", "EVIDENCE")
_RED, _GREEN, _DIM, _OFF = "\x1b[31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"
_NARROWEST: Final = 24
_INDENT: Final = "    "


def table(cells: Sequence[Cell], *, width: int | None = None, color: bool = False) -> str:
    """The table, one line a cell; with a ``width`` evidence that does not fit goes on under its own column, or
    where that would be too narrow, on lines of its own."""
    return "\n".join(table_lines(cells, width=width, color=color))


def table_lines(cells: Iterable[Cell], *, width: int | None = None, color: bool = False) -> Iterator[str]:
    """The same line by line. ``cells`` is gone through twice, and not kept."""
    widths = [len(name) for name in _HEAD[:-1]]
    for cell in cells:
        widths = [max(old, len(text)) for old, text in zip(widths, _row(cell), strict=False)]
    start = sum(widths) + 2 * len(widths)
    own_lines = width is not None and width - start < _NARROWEST
    yield _join([*_HEAD[:-1], "" if own_lines else _HEAD[-1]], widths).rstrip()
    for cell in cells:
        for line in _lines(_row(cell), widths, start, width, _color(cell) if color else ""):
            yield line.rstrip()


def summary(cells: Iterable[Cell]) -> str:
    """One line: how many cells, and how many of which kind."""
    count = Counter(verdict(cell) for cell in cells)
    said = [f"{count['as predicted']} as predicted"]
    said += [f"{count[kind]} {kind}" for kind in VERDICTS[1:] if count[kind]]
    noun = "cell" if count.total() == 1 else "cells"
    return f"{count.total()} {noun}: {', '.join(said)}"


def in_words(cells: Sequence[Cell]) -> list[str]:
    """What was seen, a sentence for each bit and front: which way the bytes went, and in how many cells; then what the
    cells are that none of these sentences counts."""
    lines = []
    counted = 0
    for bit, title in ((True, "With bit 33"), (False, "Without bit 33")):
        count = Counter(cell.observed for cell in cells if cell.offered is bit and cell.accepted is bit)
        total = count[Path.TRANSLATED] + count[Path.BYPASS]
        said = ((Path.TRANSLATED, "through the IOMMU"), (Path.BYPASS, "around the IOMMU"))
        counted += total
        went = [f"{way} ({count[path]} of {total} cells)" for path, way in said if count[path]]
        if went:
            lines.append(f"{title} the bytes went {', '.join(went)}.")
    if direct := sum(cell.observed is Path.DIRECT for cell in cells):
        lines.append(f"Where nothing translates they went straight to memory ({direct} cells).")
    controls = Counter(f"{cell.observed} by {cell.device}, the control" for cell in cells if _left(cell, control=True))
    others = Counter(cell.observed.value for cell in cells if _left(cell, control=False))
    left = [f"{count} {name}" for name, count in (others + controls).items()]
    if lines and left:
        number = len(cells) - counted - direct
        lines.append(f"The other {number} {'cell' if number == 1 else 'cells'}: {', '.join(left)}.")
    return lines


def _left(cell: Cell, *, control: bool) -> bool:
    """Is it a cell that no sentence about bit 33 counts?"""
    with_bit = cell.offered is not None and cell.offered is cell.accepted
    counted = cell.observed is Path.DIRECT or (with_bit and cell.observed in (Path.TRANSLATED, Path.BYPASS))
    return not counted and control is (cell.offered is None and bool(cell.evidence.witnesses))


def chains(cells: Sequence[Cell]) -> str:
    """Why each cell is predicted as it is: the chain of reasons, for ``-v``."""
    blocks = []
    for cell in cells:
        head = f"{device(cell)} {bit33(cell)} {cell.experiment}: {', '.join(cell.predicted) or 'nothing'}"
        steps = [f"  {'yes' if r.answer else 'no ':3} {r.rule}: {r.text}\n      [{r.citation}]" for r in cell.reasons]
        words = [f"  said: {plain(line)}" for line in cell.evidence.words]
        blocks.append("\n".join([head, *steps, *words]))
    return "\n\n".join(blocks)


def _row(cell: Cell) -> tuple[str, ...]:
    observed = cell.observed.value
    return (
        machine(cell),
        iommu(cell),
        device(cell),
        bit33(cell),
        cell.experiment,
        "|".join(cell.predicted) or "-",
        observed.upper() if cell.mismatch and cell.explained is None else observed,
        _verdict(cell) + evidence_text(cell),
    )


def _verdict(cell: Cell) -> str:
    if not cell.mismatch:
        return ""
    return f"explained by {cell.explained}: " if cell.explained else "NOT AS PREDICTED: "


def _join(row: Sequence[str], widths: Sequence[int]) -> str:
    fixed = "  ".join(text.ljust(size) for text, size in zip(row, widths, strict=False))
    return f"{fixed}  {row[-1]}"


def _lines(row: Sequence[str], widths: Sequence[int], start: int, width: int | None, color: str) -> list[str]:
    if width is None or start + len(row[-1]) <= width:
        return [_paint(_join(row, widths), color)]
    if width - start >= _NARROWEST:
        first, *rest = textwrap.wrap(row[-1], width - start) or [""]
        return [_paint(_join([*row[:-1], first], widths), color), *(" " * start + line for line in rest)]
    wrapped = textwrap.wrap(row[-1], max(_NARROWEST, width - len(_INDENT)))
    return [_paint(_join([*row[:-1], ""], widths), color), *(_INDENT + line for line in wrapped)]


def _color(cell: Cell) -> str:
    if cell.mismatch:
        return _DIM if cell.explained else _RED
    return _DIM if cell.observed in NO_ANSWER else _GREEN


def _paint(line: str, color: str) -> str:
    return f"{color}{line}{_OFF}" if color else line
