# SPDX-License-Identifier: Apache-2.0
"""Pictures: the way of one cell's bytes, and the matrix as a grid. Colours are those of ``page.css``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Final

from virtiova.report.markup import Markup, join, start, tag
from virtiova.report.words import bit33, device, iommu, machine, told, verdict, way
from virtiova.result import NO_ANSWER, Cell, Path, Row, System

NAMESPACE: Final = "http://www.w3.org/2000/svg"
WIDTH: Final = 640
HEIGHT: Final = 170
_MID: Final = 85
_THROUGH: Final = {
    Path.TRANSLATED: ("A",),
    Path.STALE: ("C",),
    Path.BYPASS: ("B",),
    Path.DIRECT: ("B",),
    Path.MIXED: ("A", "B"),
}
_TWO: Final = {"A": 52, "B": 118}
_THREE: Final = {"C": 50, "A": 92, "B": 136}
_LABEL: Final = {"A": "page A: mapped at X", "B": "page B: X itself", "C": "page C: X before"}
_MAPPED: Final = ("X to page A",)
_MOVED: Final = ("before: X to page C", "now: X to page A")
_TAKEN: Final = ("before: X to page C", "now: X to nothing")
_NOTHING: Final = ("X to nothing",)
_TABLES: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("remap", "remap-stale", "gpu-remap"), _MOVED),
    **dict.fromkeys(("unmap", "unmap-stale"), _TAKEN),
    **dict.fromkeys(("unmapped", "gpu-unmapped", "empty-tables"), _NOTHING),
    "read-only": ("X to page A, read-only",),
    "write-only": ("X to page A, write-only",),
}
"""What the IOMMU's tables say of X, by experiment, where it is not the usual."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that a picture shows. Equal for many cells, so that a page draws each once."""

    device: str
    iommu: str
    observed: Path
    predicted: tuple[Path, ...]
    aside: bool = False
    """Is there an IOMMU, and the device on a bus that is led around it?"""
    tables: tuple[str, ...] = _MAPPED
    """What the IOMMU's tables say of X; two lines if they said something else before."""

    @classmethod
    def of(cls, cell: Cell) -> Picture | None:
        """The picture for a cell; None where nothing was observed that could be drawn."""
        if cell.observed is Path.NOT_APPLICABLE:
            return None
        missed = tuple(cell.predicted) if cell.mismatch or cell.observed is Path.UNKNOWN else ()
        aside = "place=bypass" in cell.device_options.split(",") or "bypass-bus=on" in cell.iommu_options.split(",")
        tables = _TABLES.get(cell.experiment, _MAPPED)
        return cls(cell.device, cell.iommu, cell.observed, missed, aside and cell.iommu != "none", tables)

    @property
    def pages(self) -> dict[str, int]:
        """The pages that are drawn, from above, and how far down."""
        return _THREE if (self.iommu != "none" and len(self.tables) > 1) or self.observed is Path.STALE else _TWO

    @property
    def title(self) -> str:
        """What it shows, for whoever does not see it."""
        front = f"IOMMU {self.iommu}" if self.iommu != "none" else "no IOMMU"
        front += " on other buses" if self.aside else ""
        front += f" ({', '.join(self.tables)})" if self.iommu != "none" and self.tables != _MAPPED else ""
        missed = f"; predicted: {' or '.join(self.predicted)}" if self.predicted else ""
        return f"{self.device}, {front}, memory: {self.observed}{missed}"


def picture(shown: Picture) -> Markup:
    """The inside of an SVG of `WIDTH` x `HEIGHT`: device, IOMMU, memory, and the arrow through or around."""
    parts = [
        _box(8, _MID - 26, 150, 52, shown.device, "the device, given X", "d-box"),
        _memory(shown),
    ]
    if shown.iommu == "none":
        parts.append(tag("text", "nothing in front", x=284, y=_MID + 52, class_="d-note", text_anchor="middle"))
    else:
        off = shown.observed is Path.DIRECT and not shown.aside
        words = ("for other buses",) if shown.aside else (("does not translate",) if off else shown.tables)
        parts.append(_front(shown.iommu, words, "d-box d-off" if off else "d-box d-front"))
    for path in shown.predicted:
        parts += [_arrow(page, path, shown, "d-predicted") for page in _THROUGH.get(path, ())]
    return join(*parts, *_observed(shown))


def _observed(shown: Picture) -> list[Markup]:
    pages = _THROUGH.get(shown.observed)
    if pages:
        return [_arrow(page, shown.observed, shown, f"d-way p-{css(shown.observed)}") for page in pages]
    if shown.observed is Path.BLOCKED:
        end, front = (222, True) if shown.iommu != "none" else (300, False)
        y = 64 if front else _MID
        return [
            tag("path", d=f"M158 {_MID} C190 {_MID} 190 {y} {end - 14} {y}", class_="d-way p-blocked"),
            _cross(end - 8, y, "p-blocked"),
        ]
    if shown.observed is Path.REFUSED:
        words = tag("text", "refused", x=190, y=_MID + 24, class_="d-note", text_anchor="middle")
        return [_cross(190, _MID, "p-refused"), words]
    return [tag("text", "?", x=190, y=_MID + 10, class_="d-doubt", text_anchor="middle")]


def _arrow(page: str, path: Path, shown: Picture, class_: str) -> Markup:
    """From the device to a page: over the IOMMU's box, below it, or where there is none."""
    y = shown.pages[page]
    head = tag("path", d=f"M{458} {y - 6} L470 {y} L{458} {y + 6}", class_=class_)
    if path in (Path.TRANSLATED, Path.STALE) or page == "A":
        line = f"M158 {_MID - 8} C190 {_MID - 8} 190 64 222 64 L346 64 C400 64 400 {y} 468 {y}"
    elif shown.aside or (shown.iommu != "none" and path is not Path.DIRECT):
        line = f"M158 {_MID + 8} C190 {_MID + 8} 190 136 230 136 L350 136 C410 136 410 {y} 468 {y}"
    else:
        line = f"M158 {_MID} C300 {_MID} 330 {y} 468 {y}"
    return join(tag("path", d=line, class_=class_), head)


def _memory(shown: Picture) -> Markup:
    pages = _THROUGH.get(shown.observed, ())
    parts = [
        tag("rect", x=470, y=8, width=162, height=154, rx=6, class_="d-box"),
        tag("text", "memory", x=551, y=28, class_="d-name", text_anchor="middle"),
    ]
    half = 18 if len(shown.pages) < 3 else 16
    for page, y in shown.pages.items():
        hit = f"d-page d-hit p-{css(shown.observed)}" if page in pages else "d-page"
        parts.append(tag("rect", x=480, y=y - half, width=142, height=2 * half, rx=4, class_=hit))
        mapped = shown.iommu != "none" and shown.tables[-1].find("page A") >= 0
        label = "page A: elsewhere" if page == "A" and not mapped else _LABEL[page]
        parts.append(tag("text", label, x=551, y=y + 4, class_="d-note", text_anchor="middle"))
    return join(*parts)


def _box(x: int, y: int, width: int, height: int, name: str, words: str, class_: str) -> Markup:
    """A box with a name and words under it."""
    middle, line = x + width // 2, y + height // 2 - 4
    return join(
        tag("rect", x=x, y=y, width=width, height=height, rx=6, class_=class_),
        tag("text", short(name, width // 8), x=middle, y=line, class_="d-name", text_anchor="middle"),
        tag("text", words, x=middle, y=line + 18, class_="d-note", text_anchor="middle"),
    )


def _front(name: str, words: Sequence[str], class_: str) -> Markup:
    """The IOMMU's box. An arrow goes between its name and what its tables say."""
    x, width, first = 218, 132, 92 if len(words) == 1 else 84
    return join(
        tag("rect", x=x, y=14, width=width, height=92, rx=6, class_=class_),
        tag("text", short(name, width // 8), x=x + width // 2, y=39, class_="d-name", text_anchor="middle"),
        *(
            tag("text", line, x=x + width // 2, y=first + 15 * number, class_="d-note", text_anchor="middle")
            for number, line in enumerate(words)
        ),
    )


def _cross(x: int, y: int, class_: str) -> Markup:
    return tag(
        "path", d=f"M{x - 9} {y - 9} L{x + 9} {y + 9} M{x - 9} {y + 9} L{x + 9} {y - 9}", class_=f"d-way {class_}"
    )


def short(name: str, length: int) -> str:
    """A name that fits."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def css(path: Path) -> str:
    """A path as the name of a class."""
    return path.value.replace("/", "")


def cell(cell: Cell) -> Markup | None:
    """One cell's picture as an SVG file of its own; None if there is nothing to draw."""
    shown = Picture.of(cell)
    if shown is None:
        return None
    view = f"0 0 {WIDTH} {HEIGHT}"
    title = tag("title", shown.title)
    return tag("svg", title, tag("style", Markup(style())), picture(shown), xmlns=NAMESPACE, viewBox=view, role="img")


# -- the matrix as a grid ----------------------------------------------------------------------------------------

_DEVICE: Final = 230
_BIT: Final = 420
_LEFT: Final = 500
_COLUMN: Final = 74
_LINE: Final = 22
_HEAD: Final = 130

_Key = tuple[str, str, str, str, str, str]


def _key(row: Row) -> _Key:
    c = row.cell
    bit = "" if c.offered is None else ("bit 33" if c.offered else "no bit 33")
    return row.system, row.product, machine(c), iommu(c), _brief(c), bit


def _brief(cell: Cell) -> str:
    """The device, with its number among several and no more, where there is little room."""
    return f"{cell.number} {told(cell)}" if cell.number else device(cell)


def _lines(rows: Iterable[Row]) -> Iterator[tuple[_Key, Iterable[Row]]]:
    """The rows that make one line each. Those of a device alone follow each other; in a machine with several each
    experiment asks all of them, so that the rows of one such platform are sorted by device first."""
    for (_, _, _, _, several), block in groupby(rows, lambda row: (*_key(row)[:4], bool(row.cell.number))):
        if not several:
            yield from groupby(block, _key)
            continue
        devices: dict[int, list[Row]] = {}
        for row in block:
            devices.setdefault(row.cell.number, []).append(row)
        for number in sorted(devices):
            yield _key(devices[number][0]), devices[number]


def matrix(rows: Iterable[Row], systems: Sequence[System]) -> Iterator[str]:
    """A grid: a line for each device, a column for each experiment, a word and a colour for each path. In pieces."""
    experiments = list(dict.fromkeys(row.cell.experiment for row in rows if row.cell.experiment != "*"))
    column = {name: index for index, name in enumerate(experiments)}
    lines = sum(1 for _ in _lines(rows))
    titles = len({row.system for row in rows})
    width = _LEFT + max(4, len(experiments)) * _COLUMN + 60
    height = _HEAD + lines * _LINE + titles * 46 + 20
    yield start("svg", xmlns=NAMESPACE, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")
    yield join(tag("title", "virtiova matrix"), tag("style", Markup(style())))
    yield tag("rect", width=width, height=height, class_="d-paper")
    for name, index in column.items():
        x, y = _LEFT + index * _COLUMN + _COLUMN // 2, _HEAD - 10
        yield tag("text", name, x=x, y=y, class_="d-name", transform=f"rotate(-40 {x} {y})")
    named = {system.id: system.title for system in systems}
    y, last = _HEAD, ""
    for key, group in _lines(rows):
        if key[0] != last:
            last = key[0]
            y += 46
            yield tag("text", named.get(last, last), x=12, y=y - 16, class_="d-title")
        yield from _grid_line(key, group, column, y)
        y += _LINE
    yield "</svg>\n"


def _grid_line(key: _Key, group: Iterable[Row], column: dict[str, int], y: int) -> Iterator[Markup]:
    _, _, where, front, what, bit = key
    for x, words in ((12, short(where, 13)), (100, short(front, 22)), (_DEVICE, short(what, 27)), (_BIT, bit)):
        yield tag("text", words, x=x, y=y + 15, class_="d-note")
    for row in group:
        shown = row.cell
        if shown.experiment not in column:
            yield tag("text", short(shown.evidence.note, 100), x=_LEFT, y=y + 15, class_="d-note")
            continue
        x = _LEFT + column[shown.experiment] * _COLUMN
        wrong = " d-wrong" if shown.mismatch and not shown.explained else ""
        words = f"{where} {what} {bit33(shown)} {shown.experiment}: {verdict(shown)}; {way(shown)}"
        square = tag(
            "rect",
            x=x,
            y=y + 1,
            width=_COLUMN - 4,
            height=_LINE - 3,
            rx=3,
            class_=f"d-fill p-{css(shown.observed)}{wrong}",
        )
        class_ = "d-dim" if shown.observed in NO_ANSWER else "d-word"
        label = tag("text", shown.observed.value, x=x + _COLUMN // 2 - 2, y=y + 15, class_=class_, text_anchor="middle")
        yield tag("g", tag("title", words), square, label)


def style() -> str:
    """The style sheet of all pictures."""
    return files("virtiova.report").joinpath("picture.css").read_text("utf-8")
