# SPDX-License-Identifier: Apache-2.0
"""A scan as text: the table of devices, and under it the findings. At most 100 columns, readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from virtiova.report import wide
from virtiova.report.scan_words import (
    LOUD,
    Block,
    Part,
    bit33,
    blocks,
    declared,
    listed,
    open_questions,
    parts,
    platform,
    summary,
    told,
    verdict,
)
from virtiova.report.words import plain
from virtiova.result import NO_ANSWER, Path
from virtiova.result.scan import Place, Scan, ScannedDevice, Severity

WIDTH: Final = 100
_HEAD: Final = ("DEVICE", "TYPE", "ADDRESS", "BIT 33", "DMA PATH", "VERDICT", "")
_VERDICT: Final = 5
_LEAST: Final = (8, 5, 12, 6, 8, 7)
"""Columns that a cell is never cut below, as far as it is that long at all."""
_MARKS: Final = 5
"""Of the last column: one id."""
_GAP: Final = "  "
_NAME: Final = 40
"""Columns of a name in a sentence."""
_MOST: Final = 6
"""Devices and places that are listed where it is not asked for all."""
_RED, _GREEN, _YELLOW, _DIM, _BOLD, _OFF = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_SEVERITIES: Final = {Severity.ERROR: _RED, Severity.WARNING: _YELLOW, Severity.NOTE: _DIM}


def document(scan: Scan, *, verbose: bool = False, color: bool = False) -> str:
    """The whole text."""
    return "".join(f"{line}\n" for line in lines(scan, verbose=verbose, color=color))


def lines(scan: Scan, *, verbose: bool = False, color: bool = False, picture: bool = False) -> Iterator[str]:
    """The same line by line. ``picture``: with one under each table."""
    several = len(scan.machines) > 1
    for part in parts(scan):
        if several:
            yield _paint(f"== {_name(part.machine.name)} ({part.machine.view})", _BOLD, color)
        yield from _machine(part, verbose=verbose, color=color, picture=picture)
        yield ""
    yield from wide.wrap(summary(scan), WIDTH)


def _machine(part: Part, *, verbose: bool, color: bool, picture: bool) -> Iterator[str]:
    if verbose and part.machine.platform:
        yield from _said("", platform(part.machine), indent="")
    if part.devices:
        yield from table(part, color=color)
    elif part.machine.view != "log" and (part.machine.platform or not part.problems):
        yield "no virtio devices"
    yield from _unknown(part.devices)
    if picture and part.devices:
        from virtiova.report import scan_ascii

        yield ""
        yield from (line.rstrip() for line in scan_ascii.picture(part))
    if verbose:
        for row in part.devices:
            yield ""
            yield from _device(row)
    for block in blocks(each for each in part.findings if not each.ignored):
        yield ""
        yield from _finding(block, verbose=verbose, color=color)
    closing = [*_closing(part, verbose=verbose)]
    if closing:
        yield ""
        yield from closing


# -- the table ---------------------------------------------------------------------------------------------------


def table(part: Part, *, color: bool = False) -> Iterator[str]:
    """The devices of one machine, one line each; ids that find no room go on below."""
    marks = part.marks()
    rows = [_row(row) for row in part.devices]
    widths = _widths(rows, bool(marks.keys() - {""}))
    room = WIDTH - sum(widths) - len(_GAP) * len(widths)
    yield _join(_HEAD[:-1], widths).rstrip()
    for device, row in zip(part.devices, rows, strict=True):
        ids = [*wide.wrap(", ".join(marks.get(device.name, ())), room)] or [""]
        cells = [wide.cut_middle(word, size) for word, size in zip(row, widths, strict=True)]
        line = _join(cells[:_VERDICT], widths)
        loud = _paint(cells[_VERDICT], _color(device), color)
        blanks = " " * (widths[_VERDICT] - wide.width(cells[_VERDICT]))
        yield f"{line}{_GAP}{loud}{blanks}{_GAP}{ids[0]}".rstrip()
        yield from (" " * (WIDTH - room) + more for more in ids[1:])


def _row(row: ScannedDevice) -> tuple[str, ...]:
    return tuple(map(plain, (row.name, row.type, row.address or "-", bit33(row), row.dma, verdict(row))))


def _widths(rows: Sequence[Sequence[str]], marked: bool) -> list[int]:
    """What each column takes. The widest give way until the line fits."""
    head = [wide.width(word) for word in _HEAD[:-1]]
    widths = [max(size, *(wide.width(row[column]) for row in rows)) for column, size in enumerate(head)]
    left = WIDTH - len(_GAP) * (len(widths) - 1) - (len(_GAP) + _MARKS if marked else 0)
    while sum(widths) > left:
        column = max(range(len(widths)), key=lambda each: widths[each] - _LEAST[each])
        widths[column] -= 1
    return widths


def _join(words: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(wide.pad(word, size) for word, size in zip(words, widths, strict=False))


def _color(row: ScannedDevice) -> str:
    if row.verdict in LOUD or row.verdict is Path.REFUSED:
        return _RED
    return _YELLOW if row.verdict in NO_ANSWER else _GREEN


# -- under it ----------------------------------------------------------------------------------------------------


def _unknown(devices: Iterable[ScannedDevice]) -> Iterator[str]:
    """Why a verdict is unknown, once for all devices of which the same is true."""
    found: dict[str, list[str]] = {}
    for row in devices:
        if row.verdict is Path.UNKNOWN and row.why:
            found.setdefault(row.why, []).append(_name(row.name))
    for why, names in found.items():
        yield from _said(f"unknown, {listed(names, _MOST)}", why, indent="")


def _device(row: ScannedDevice) -> Iterator[str]:
    """What there is to say of one device when everything is to be said."""
    more = [row.type, row.address, f"driver {row.driver}" if row.driver else ""]
    more += [f"group {row.group}" if row.group else "", f"back end {row.backend}" if row.backend else ""]
    yield from _said(_name(row.name), ", ".join(filter(None, more)), indent="")
    yield from _said("declared", declared(row))
    yield from _said("predicted", " or ".join(row.predicted) or "nothing")
    yield from _said("observed", row.observed.value if row.observed is not None else "nobody looked")
    for seen in row.basis:
        yield from _said("basis", str(seen))
    for text in row.assumes:
        yield from _said("assumes", text)
    if row.reasons and row.assumes:
        yield from _said("", "the rule, if what is assumed is so:", indent="  ")
    for reason in dict.fromkeys(row.reasons):
        yield from _said("yes" if reason.answer else "no", f"{reason.rule}: {reason.text} [{reason.citation}]")


def _finding(block: Block, *, verbose: bool, color: bool) -> Iterator[str]:
    finding = block.finding
    names = [_name(name) for name in block.devices]
    one = f" {names[0]}" if len(names) == 1 else ""
    head, *rest = wide.wrap(plain(f"{finding.id}{one}: {finding.title} [{finding.severity.value}]"), WIDTH, rest="  ")
    yield _paint(head, _SEVERITIES[finding.severity], color)
    yield from rest
    if len(names) > 1:
        yield from _said(f"{len(names)} devices", ", ".join(names))
    for text, places in block.seen.items():
        label, named = told(places)
        yield from _said(label, f"{text}{_places(named, len(named) if verbose else _MOST)}")
    yield from _said("why", finding.why)
    for product, words in block.fixes():
        yield from _said(f"fix, {product}", words)
    if verbose:
        yield from _said("source", finding.citation)


def _places(places: Sequence[Place], most: int) -> str:
    return f" ({listed([str(place) for place in places], most)})" if places else ""


def _closing(part: Part, *, verbose: bool) -> Iterator[str]:
    """What could not be read or decided, and what is not to count."""
    for problem in part.problems:
        yield from _said("could not read", problem, indent="")
    for question in open_questions(part, len(part.undecided) if verbose else _MOST):
        yield from _said("could not be decided", question, indent="")
    if verbose:
        for block in blocks(each for each in part.findings if each.ignored):
            about = " ".join([block.finding.id, listed([_name(name) for name in block.devices], _MOST)]).rstrip()
            yield from _said("ignored", f"{about}: {block.finding.title}: {block.finding.ignored}", indent="")


def _said(label: str, words: str, *, indent: str = "  ") -> Iterator[str]:
    text = plain(f"{label}: {words}" if label else words)
    yield from wide.wrap(text, WIDTH, first=indent, rest=f"{indent}  ")


def _name(name: str) -> str:
    return wide.cut_middle(plain(name), _NAME)


def _paint(text: str, color: str, wanted: bool) -> str:
    return f"{color}{text}{_OFF}" if wanted and text else text
