# SPDX-License-Identifier: Apache-2.0
"""The matrix as one page that needs nothing but itself: no network, and no script for reading.

Every row opens (it is a ``details`` element) to a picture of the way its bytes took and the chain of reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from virtiova.policy import DEPARTURES
from virtiova.policy.departures import Departure
from virtiova.report.markup import Markup, join, start, tag
from virtiova.report.page import footer, head, resource
from virtiova.report.svg import HEIGHT, WIDTH, Picture, css, picture
from virtiova.report.words import VERDICTS, WAYS, bit33, device, evidence_text, iommu, machine, verdict, way
from virtiova.result import Cell, Path, Row, System

_COLUMNS: Final = ("machine", "IOMMU", "device", "bit 33", "experiment", "predicted", "observed", "evidence")
_PAGES: Final = (
    ("page A", "where the IOMMU's tables point for the address X"),
    ("page B", "where X itself points, around any IOMMU"),
    ("page C", "where the tables pointed for X before, when a mapping is changed or taken away"),
)
_TITLE: Final = "virtiova matrix"
_INTRO: Final = (
    "Every system that the virtio IOMMU patch names, as far as it could be had on this machine. Predicted is what the "
    "rule and the specification allow; observed is which page the device touched. "
    "Click a row to see the way its bytes took."
)


class _Pictures:
    """Each different picture once: rows refer to it."""

    def __init__(self) -> None:
        self.numbers: dict[Picture, int] = {}

    def use(self, shown: Picture) -> Markup:
        number = self.numbers.setdefault(shown, len(self.numbers))
        view = f"0 0 {WIDTH} {HEIGHT}"
        inside = (tag("title", shown.title), tag("use", href=f"#way-{number}"))
        return tag("svg", *inside, viewBox=view, role="img")

    def symbols(self) -> Iterator[str]:
        # Not display:none, which some browsers take to heart in what refers to it.
        yield start("svg", width="0", height="0", aria_hidden="true", style="position:absolute")
        for shown, number in self.numbers.items():
            yield tag("symbol", picture(shown), id=f"way-{number}", viewBox=f"0 0 {WIDTH} {HEIGHT}")
        yield "</svg>\n"


def page(rows: Iterable[Row], systems: Sequence[System], made: str = "") -> Iterator[str]:
    """The page in pieces. ``rows`` is gone through once for each system and once before, and never kept. ``made`` says
    when and by which command, for the footer."""
    verdicts: Counter[str] = Counter()
    paths: Counter[Path] = Counter()
    there: dict[str, dict[str, None]] = {}
    for row in rows:
        verdicts[verdict(row.cell)] += 1
        paths[row.cell.observed] += 1
        there.setdefault(row.system, {})[row.product] = None
    shown = [system for system in systems if system.id in there]
    yield "<!DOCTYPE html>\n"
    yield start("html", lang="en")
    yield head(_TITLE, "picture.css", "page.css")
    yield "<body>\n"
    yield _header(verdicts, paths, shown)
    yield "<main>\n"
    yield _filter(verdicts, paths)
    pictures = _Pictures()
    for system in shown:
        products = [product for product in there[system.id] if product]
        yield _opening(system, products)
        for row in rows:
            if row.system == system.id:
                yield _row(row, pictures, several=len(products) > 1)
        yield "</div></section>\n"
    yield "</main>\n"
    yield footer(made)
    yield from pictures.symbols()
    yield tag("script", Markup(resource("page.js")))
    yield "\n</body></html>\n"


def _header(verdicts: Counter[str], paths: Counter[Path], systems: Sequence[System]) -> Markup:
    wrong = verdicts[VERDICTS[1]] > 0
    counts = [
        tag("li", tag("b", str(verdicts[name])), f" {name}", class_="wrong" if wrong and name == VERDICTS[1] else None)
        for name in VERDICTS
        if verdicts[name] or name in VERDICTS[:2]
    ]
    links = [join(tag("a", system.title, href=f"#{system.id}"), " ") for system in systems]
    return tag(
        "header",
        tag("h1", _TITLE),
        tag("p", _INTRO),
        tag("ul", *counts, class_="counts"),
        tag("nav", *links, class_="index", aria_label="systems"),
        _legend(paths),
    )


def _legend(paths: Counter[Path]) -> Markup:
    """What the pages are, and the paths that occur."""
    entries = [(tag("b", name), words) for name, words in _PAGES]
    entries += [(tag("b", path.value, class_=f"path p-{css(path)}"), WAYS[path]) for path in Path if paths[path]]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", words)) for name, words in entries), class_="legend")


def _filter(verdicts: Counter[str], paths: Counter[Path]) -> Markup:
    """Hidden until the script that makes it work runs."""
    buttons = [_button(path.value, paths[path], f"p-{css(path)}") for path in Path if paths[path]]
    some = [(VERDICTS[1], VERDICTS[1]), (VERDICTS[2], "known departure")]
    buttons = [_button(name, verdicts[name], None, said) for name, said in some if verdicts[name]] + buttons
    label = tag("span", "show only", class_="soft")
    return tag("div", label, *buttons, tag("output", class_="soft"), class_="filter", role="group", hidden=True)


def _button(name: str, count: int, class_: str | None, said: str = "") -> Markup:
    words = f"{said or name} {count}"
    return join(tag("button", words, type="button", aria_pressed="false", data_filter=name, class_=class_), " ")


def _opening(system: System, products: Sequence[str]) -> Markup:
    seen = f"Seen on {', '.join(products)}." if products else "Nothing of it could be had here."
    names = [tag("span", name) for name in _COLUMNS]
    return join(
        start("section", class_="system", id=system.id),
        tag("h2", system.title),
        tag("p", system.words),
        tag("p", seen, class_="soft"),
        start("div", class_="rows"),
        tag("div", *names, class_="head", aria_hidden="true"),
        "\n",
    )


def _row(row: Row, pictures: _Pictures, *, several: bool) -> Markup:
    cell = row.cell
    wrong = cell.mismatch and cell.explained is None
    evidence: list[str] = [evidence_text(cell)]
    if cell.mismatch:
        said = f"explained by {cell.explained}: " if cell.explained else "not as predicted: "
        evidence.insert(0, tag("span", said, class_="verdict" if wrong else "soft"))
    where = f"{machine(cell)}, {row.product}" if several and row.product else machine(cell)
    words: list[tuple[Sequence[str], str | None]] = [
        ((where,), None),
        ((iommu(cell),), None),
        ((device(cell),), None),
        ((bit33(cell),), None),
        ((cell.experiment,), None),
        ((" or ".join(cell.predicted) or "-",), None),
        ((cell.observed.value,), f"path p-{css(cell.observed)}"),
        (evidence, "evidence"),
    ]
    columns = [
        tag("span", *parts, class_=class_, data_label=name)
        for name, (parts, class_) in zip(_COLUMNS, words, strict=True)
    ]
    return tag(
        "details",
        tag("summary", *columns),
        _chosen(cell, pictures),
        "\n",
        class_="row wrong" if wrong else "row",
        data_path=cell.observed.value,
        data_verdict=verdict(cell),
    )


def _chosen(cell: Cell, pictures: _Pictures) -> Markup:
    """What a row opens to."""
    shown = Picture.of(cell)
    left = [tag("h3", f"The bytes went {way(cell)}")] if shown else [tag("h3", "Nothing was moved")]
    if shown:
        left.append(pictures.use(shown))
    left += [part for row in DEPARTURES if row.id == cell.explained for part in _departure(row)]
    if cell.evidence.x is not None:
        left.append(tag("p", f"X = 0x{cell.evidence.x:08x}, kind of address: {cell.address}", class_="soft"))
    if cell.beside:
        left.append(tag("p", f"In the same machine, at the same time: {'; '.join(cell.beside)}", class_="soft"))
    links = [
        tag("li", tag("b", "yes" if r.answer else "no"), tag("span", r.text), tag("cite", f"{r.rule}: {r.citation}"))
        for r in cell.reasons
    ]
    right = [tag("h3", "Why that is predicted"), tag("ol", *links)] if links else []
    said = [tag("h3", "What the machine said"), tag("pre", "\n".join(cell.evidence.words))]
    right += said if cell.evidence.words else []
    if not right:
        right = [tag("p", evidence_text(cell), class_="soft")]
    return tag("div", tag("div", *left), tag("div", *right), class_="chosen")


def _departure(row: Departure) -> list[Markup]:
    """What ``virtiova explain`` says of a known departure."""
    return [
        tag("h3", f"A known departure: {row.id}"),
        tag("p", f"{row.product} {row.versions}: {row.title}."),
        tag("p", f"How that is known: {row.source}.", class_="soft"),
    ]
