# SPDX-License-Identifier: Apache-2.0
"""The results as text: a table for each way of the front end and each mapping, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from virtiova.bench.rows import Document, Row, Setting

_NAME: Final = 28
_WAYS: Final = {"poll": "polls", "sleep": "sleeps"}
_IOTLB_FIGURES: Final = ("pair", "pair, acknowledged", "miss")


def text(document: Document) -> Iterator[str]:
    """Lines: where and how it was measured, the tables, the targets, and whether to believe it."""
    yield from document.about
    blocks: dict[str, list[Row]] = {}
    for row in document.rows:
        blocks.setdefault(_title(row), []).append(row)
    for title, rows in blocks.items():
        yield ""
        yield title
        yield from _TABLES.get(rows[0].bench, _requests)(rows)
    yield from _targets(document.rows)
    yield ""
    if document.against:
        yield "NOT TO BE TRUSTED:"
        yield from (f"  {reason}" for reason in document.against)
    else:
        yield "Nothing speaks against this run: both sides had their processors, and the figures are steady."


def _title(row: Row) -> str:
    setting = row.setting
    if row.bench == "iotlb":
        return "IOTLB messages, us"
    if row.bench == "vfio":
        return "mappings of a real IOMMU: pages a second, and us of a pair"
    if row.bench == "guest":
        return "a Linux guest's reads of 4 KiB"
    if not setting.pages:
        over = ", over a packed ring" if setting.ring == "packed" else ""
        return f"what the front end can do{over}: empty requests, given back by a thread of this process"
    ring = ", packed ring" if setting.ring == "packed" else ""
    return f"{row.bench}{ring}, {mapped(setting)}, the front end {_WAYS.get(setting.front, setting.front)}"


def mapped(setting: Setting) -> str:
    """Bit 33, and how much is mapped."""
    if not setting.bit:
        return "bit 33 off"
    if setting.mappings == 1:
        return f"bit 33 on, 1 mapping of {setting.pages} pages"
    count = min(setting.mappings, setting.pages)
    return f"bit 33 on, {setting.mappings} mappings of 4 KiB onto {count} pages"


# -- requests ------------------------------------------------------------------------------------------------------


def _requests(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"  {'':<{_NAME}} {'DEPTH':>5} {'PER S':>6} {'(LEAST..MOST)':<15} {'50 % us':>7} {'99 % us':>7} {'TO PEER':>7} "
        f"{'TO 1':>6}  TARGET"
    )
    grouped: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.setting.depth, row.subject), []).append(row)
    for (depth, subject), found in grouped.items():
        yield _line(subject, depth, found).rstrip()
        notes = sorted({row.note for row in found if row.note and row.figure == "requests/s"})
        yield from (f"      {line}" for note in notes for line in _wrapped(note))


def _line(subject: str, depth: int, found: Sequence[Row]) -> str:
    rate = next((row for row in found if row.figure == "requests/s"), None)
    delays = [next((row.mid for row in found if row.figure == f"latency, {part}"), None) for part in ("median", "99 %")]
    ratios = [row for row in found if row.figure == "ratio"]
    peer = next((row for row in ratios if row.beside != subject), None)
    own = next((row for row in ratios if row.beside == subject), None)
    spread = f"({number(rate.low)}..{number(rate.high)})" if rate is not None and rate.samples else ""
    middle = number(rate.mid) if rate is not None else "-"
    targets = ", ".join(_verdict(row) for row in ratios if row.target is not None)
    return (
        f"  {subject:<{_NAME}} {depth:>5} {middle:>6} {spread:<15} {_delay(delays[0]):>7} {_delay(delays[1]):>7} "
        f"{_times(peer):>7} {_times(own):>6}  {targets}"
    )


def _verdict(row: Row) -> str:
    return {None: "n/a", True: "met", False: "NOT MET"}[row.met]


def _times(row: Row | None) -> str:
    return "" if row is None or row.mid is None else f"{row.mid:.2f}"


def _delay(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def number(value: float | None) -> str:
    """Three digits and a unit, as in ``12.3M``."""
    if value is None:
        return "-"
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _wrapped(note: str, width: int = 94) -> list[str]:
    lines = [""]
    for word in note.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{word} "
    return [line.rstrip()[:width] for line in lines]


# -- the IOTLB -----------------------------------------------------------------------------------------------------


def _iotlb(rows: Sequence[Row]) -> Iterator[str]:
    yield f"  {'':<{_NAME}} RESIDENT  {'PAIR':<20} {'PAIR, ACKNOWLEDGED':<20} MISS"
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.subject, row.setting.mappings), []).append(row)
    for (subject, resident), found in grouped.items():
        cells = [_spread(next(row for row in found if row.figure == figure)) for figure in _IOTLB_FIGURES]
        yield f"  {subject:<{_NAME}} {resident:>8}  {cells[0]:<20} {cells[1]:<20} {cells[2]}".rstrip()
        notes = sorted({row.note for row in found if row.note and row.unit == "us"})
        yield from (f"      {line}" for note in notes for line in _wrapped(note))


def _spread(row: Row) -> str:
    if row.mid is None or row.low is None or row.high is None:
        return "-"
    return f"{_delay(row.mid)} ({_delay(row.low)}..{_delay(row.high)})"


# -- a guest -------------------------------------------------------------------------------------------------------


def _guest(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        f"  {'':<{_NAME}} {'DEPTH':>5} {'PER S':>6} {'(LEAST..MOST)':<15} {'TO OFF':>6} {'TO OWN':>6} {'MISSES':>6} "
        f"{'INVALID.':>8} {'KICKS':>5} {'CALLS':>5}"
    )
    said: set[str] = set()
    grouped: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.setting.depth, row.subject), []).append(row)
    for (depth, subject), found in grouped.items():
        of = {row.figure: row for row in found}
        rate = of["requests/s"]
        spread = f"({number(rate.low)}..{number(rate.high)})" if rate.samples else ""
        counted = [of.get(f"{name} a request") for name in ("misses", "invalidates", "kicks", "calls")]
        yield (
            f"  {subject:<{_NAME}} {depth:>5} {number(rate.mid):>6} {spread:<15} {_times(of.get('ratio')):>6} "
            f"{_times(of.get('ratio of ratios')):>6} {_times(counted[0]):>6} {_times(counted[1]):>8} "
            f"{_times(counted[2]):>5} {_times(counted[3]):>5}"
        ).rstrip()
        if rate.note and rate.note not in said:
            said.add(rate.note)
            yield from (f"      {line}" for line in _wrapped(rate.note))


# -- VFIO ----------------------------------------------------------------------------------------------------------


def _vfio(rows: Sequence[Row]) -> Iterator[str]:
    yield f"  {'':<{_NAME}} {'SIZE':>8} {'BATCH':>5}  {'MAPPED':<21} {'UNMAPPED':<21} {'PAIR us':>7} {'TO OURS':>7}"
    grouped: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.subject, row.setting.pages, row.setting.depth), []).append(row)
    for (subject, pages, batch), found in grouped.items():
        of = {row.figure: row for row in found}
        if not pages:
            # Not of mappings of a size: the software's messages, and what a call costs by itself.
            yield from (f"  {_said(subject, row):<{_NAME + 59}} {_delay(row.mid):>7}" for row in found)
            continue
        size = f"{pages >> 8} MiB" if pages >= 256 else f"{4 * pages} KiB"
        cells = [_rates(of[figure]) for figure in ("pages mapped/s", "pages unmapped/s")]
        yield (
            f"  {subject:<{_NAME}} {size:>8} {batch:>5}  {cells[0]:<21} {cells[1]:<21} {_delay(of['pair'].mid):>7} "
            f"{_times(of.get('pair: ratio')):>7}"
        ).rstrip()


def _said(subject: str, row: Row) -> str:
    what = "" if row.figure == "call" else f", {row.figure} of IOTLB messages"
    return f"{subject}{what}"


def _rates(row: Row) -> str:
    return f"{number(row.mid)} ({number(row.low)}..{number(row.high)})" if row.samples else "-"


_TABLES: Final = {"iotlb": _iotlb, "guest": _guest, "vfio": _vfio}


# -- targets -------------------------------------------------------------------------------------------------------


def _targets(rows: Iterable[Row]) -> Iterator[str]:
    """Each target once more, with what it was held against."""
    wanted = [row for row in rows if row.target is not None]
    if not wanted:
        return
    yield ""
    yield "targets: the ratio of two figures of the same round, median (least..most)"
    for row in wanted:
        what = f"{row.subject} / {row.beside if row.beside != row.subject else 'the same at 1 mapping'}"
        spread = f"{_times(row)} ({_times_of(row.low)}..{_times_of(row.high)}), " if row.samples else ""
        yield f"  {_verdict(row):<8} {spread}wanted {row.target}"
        yield f"           {what}, {_place(row)}"
        yield from (f"      {line}" for line in (_wrapped(row.note) if row.note else ()))


def _times_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _place(row: Row) -> str:
    setting = row.setting
    if row.bench == "iotlb":
        other = row.beside_setting.mappings if row.beside_setting is not None else setting.mappings
        return f"{setting.mappings} / {other} resident"
    if row.bench == "net":
        return "1 mapping" if setting.mappings == 1 else f"{setting.mappings} mappings"
    return f"depth {setting.depth}, {_WAYS.get(setting.front, '')}"
