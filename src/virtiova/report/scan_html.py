# SPDX-License-Identifier: Apache-2.0
"""A scan as one page that needs nothing but itself: no network, and no script for reading.

A machine is a section: its picture, its findings, and a row for each device, which opens to what that rests on. The
chains of reasons, of which many devices share one, are at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.report.markup import Markup, join, start, tag
from virtiova.report.page import footer, head, resource
from virtiova.report.scan_svg import NARROW, WIDE, picture
from virtiova.report.scan_words import (
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
    verdict,
)
from virtiova.report.svg import css
from virtiova.report.words import WAYS
from virtiova.result import Path, Reason
from virtiova.result.scan import Scan, ScannedDevice

_TITLE: Final = "virtiova scan"
_COLUMNS: Final = ("device", "type", "address", "bit 33", "DMA path", "verdict", "findings")
_INTRO: Final = (
    "What each virtio device is said to do: whether its bytes pass the IOMMU that is in front of it, or go around. "
    "Nothing was tried out. Open a row to see what that rests on."
)
_PICTURES: Final = 20
"""With more machines than that a page has no pictures."""
_LINKS: Final = 40
"""Machines that are listed at the top."""
_PLACES: Final = 6
_WAYS: Final = WAYS | {Path.UNKNOWN: "what is known does not say where"}

_Chain = tuple[Reason, ...]


class _Chains:
    """Each different chain of reasons once, with how many devices it is of."""

    def __init__(self) -> None:
        self.count: Counter[_Chain] = Counter()
        self._numbers: dict[_Chain, int] = {}

    def use(self, row: ScannedDevice) -> int:
        chain = tuple(dict.fromkeys(row.reasons))
        self.count[chain] += 1
        return self._numbers.setdefault(chain, len(self._numbers) + 1)

    def all(self) -> Iterator[Markup]:
        for chain, number in self._numbers.items():
            links = [
                tag(
                    "li",
                    tag("b", "yes" if r.answer else "no"),
                    tag("span", r.text),
                    tag("cite", f"{r.rule}: {r.citation}"),
                )
                for r in chain
            ]
            of = f"{self.count[chain]} device{'s' if self.count[chain] != 1 else ''}"
            heading = tag("h3", f"{number} ", tag("span", f"of {of}", class_="soft"))
            yield tag("div", heading, tag("ol", *links), class_="chain", id=f"why-{number}")


def _link(reason: Reason) -> Markup:
    answer = tag("b", "yes" if reason.answer else "no")
    return tag("li", answer, tag("span", reason.text), tag("cite", f"{reason.rule}: {reason.citation}"))


def page(scan: Scan, made: str = "") -> Iterator[str]:
    """The page in pieces. ``made`` says when and by which command, for the footer."""
    by_machine = parts(scan)
    yield "<!DOCTYPE html>\n"
    yield start("html", lang="en")
    yield head(_title(by_machine), "picture.css", "page.css", "scan.css")
    yield start("body", class_="scan") + "\n"
    yield _header(scan, by_machine)
    yield "<main>\n"
    yield _filter(scan)
    chains, first = _Chains(), 0
    for number, part in enumerate(by_machine):
        yield from _machine(number, first, part, chains, drawn=len(by_machine) <= _PICTURES)
        first += len(part.devices)
    if chains.count:
        yield tag("section", tag("h2", "Why that is predicted"), *chains.all(), class_="why")
    yield "</main>\n"
    yield footer(made)
    yield tag("script", Markup(resource("scan.js")))
    yield "\n</body></html>\n"


def _title(machines: Sequence[Part]) -> str:
    return f"{machines[0].machine.name}: {_TITLE}" if len(machines) == 1 else _TITLE


def _header(scan: Scan, machines: Sequence[Part]) -> Markup:
    verdicts = Counter(row.verdict for row in scan.devices)
    live = Counter(each.severity.value for each in scan.findings if not each.ignored)
    counts = [tag("li", tag("b", str(len(scan.devices))), " devices")]
    counts += [
        tag(
            "li",
            tag("b", str(count)),
            f" {name}{'s' if count != 1 else ''}",
            class_="wrong" if name == "error" else None,
        )
        for name, count in live.items()
    ]
    links = [join(tag("a", part.machine.name, href=f"#m{number}"), " ") for number, part in enumerate(machines)]
    legend = [
        tag("div", tag("dt", tag("b", path.value, class_=f"path p-{css(path)}")), tag("dd", _WAYS[path]))
        for path in Path
        if verdicts[path]
    ]
    return tag(
        "header",
        tag("h1", _TITLE),
        tag("p", _INTRO),
        tag("ul", *counts, class_="counts"),
        tag("p", summary(scan), class_="soft"),
        tag("nav", *links, class_="index", aria_label="machines") if 1 < len(machines) <= _LINKS else Markup(""),
        tag("dl", *legend, class_="legend"),
    )


def _filter(scan: Scan) -> Markup:
    """Hidden until the script that makes it work runs."""
    verdicts = Counter(row.verdict for row in scan.devices)
    ids = Counter(each.id for each in scan.findings if each.device and not each.ignored)
    buttons = [_button("verdict", path.value, verdicts[path], f"p-{css(path)}") for path in Path if verdicts[path]]
    buttons += [_button("finding", name, ids[name], None) for name in sorted(ids)]
    words = tag(
        "input", type="search", placeholder="name, type, address, driver, ...", aria_label="show only devices with"
    )
    label = tag("span", "show only", class_="soft")
    return tag("div", label, words, *buttons, tag("output", class_="soft"), class_="filter", role="group", hidden=True)


def _button(kind: str, name: str, count: int, class_: str | None) -> Markup:
    said = f"{name} {count}"
    button = tag("button", said, type="button", aria_pressed="false", data_kind=kind, data_filter=name, class_=class_)
    return join(button, " ")


# -- a machine ---------------------------------------------------------------------------------------------------


def _machine(number: int, first: int, part: Part, chains: _Chains, *, drawn: bool) -> Iterator[str]:
    machine = part.machine
    yield start("section", class_="machine", id=f"m{number}")
    yield tag("h2", machine.name or "a machine", " ", tag("small", machine.view, class_="soft"))
    about = [platform(machine), f"from {', '.join(machine.sources)}" if machine.sources else ""]
    yield tag("p", "; ".join(filter(None, about)), class_="soft")
    if drawn and part.devices:
        yield tag("figure", picture(part, WIDE), class_="wide")
        yield tag("figure", picture(part, NARROW), class_="narrow")
    numbers = {row.name: first + index for index, row in enumerate(part.devices)}
    for block in blocks(part.findings):
        yield _finding(block, numbers)
    if part.devices:
        yield start("div", class_="rows")
        yield tag("div", *(tag("span", name) for name in _COLUMNS), class_="head", aria_hidden="true")
        marks = part.marks()
        for row in part.devices:
            yield "\n" + _row(row, numbers[row.name], marks.get(row.name, []), chains.use(row), machine.name)
        yield "</div>"
    elif machine.view != "log" and (machine.platform or not part.problems):
        yield tag("p", "no virtio devices")
    yield _closing(part)
    yield "</section>\n"


def _finding(block: Block, numbers: dict[str, int]) -> Markup:
    finding = block.finding
    heading = tag(
        "h3",
        tag("b", finding.severity.value, class_=f"severity s-{finding.severity.value}"),
        tag("code", finding.id),
        f" {finding.title}",
    )
    devices = [
        join(tag("a", name, href=f"#d{numbers[name]}") if name in numbers else name, " ") for name in block.devices
    ]
    seen = [
        tag("li", text, " ", tag("cite", listed([str(place) for place in places], _PLACES)))
        for text, places in block.seen.items()
    ]
    fixes = [tag("div", tag("dt", product), tag("dd", tag("code", words))) for product, words in block.fixes()]
    inside = [
        tag("p", *devices, class_="devices") if devices else Markup(""),
        tag("ul", *seen, class_="seen") if seen else Markup(""),
        tag("p", finding.why),
        tag("dl", *fixes, class_="fixes"),
        tag("p", finding.citation, class_="soft source"),
    ]
    attributes = {"data_finding": finding.id, "data_devices": "1" if block.devices else None}
    if finding.ignored:
        said = tag("summary", heading, tag("span", f" ignored: {finding.ignored}", class_="soft"))
        return tag("details", said, *inside, class_="finding ignored", **attributes)
    return tag("article", heading, *inside, class_=f"finding s-{finding.severity.value}", **attributes)


def _row(row: ScannedDevice, number: int, marks: Sequence[str], chain: int, machine: str) -> Markup:
    words: list[tuple[str, str | None]] = [
        (row.name, None),
        (row.type, None),
        (row.address or "-", None),
        (bit33(row), None),
        (row.dma, None),
        (verdict(row), f"path p-{css(row.verdict)}"),
        (", ".join(marks) or "-", None),
    ]
    columns = [
        tag("span", said, class_=class_, data_label=name) for name, (said, class_) in zip(_COLUMNS, words, strict=True)
    ]
    return tag(
        "details",
        tag("summary", *columns),
        _chosen(row, chain),
        class_="row",
        id=f"d{number}",
        data_verdict=row.verdict.value,
        data_ids=" ".join(mark for mark in marks if not mark.startswith("(")) or None,
        data_more=" ".join(filter(None, (machine, row.driver, row.iommu, row.backend, f"group{row.group}"))),
    )


def _chosen(row: ScannedDevice, chain: int) -> Markup:
    """What a row opens to."""
    said = [
        ("declared", declared(row)),
        ("predicted", " or ".join(row.predicted) or "nothing"),
        ("observed", row.observed.value if row.observed is not None else "nobody looked"),
        ("unknown, since", row.why if row.verdict is Path.UNKNOWN else ""),
        ("IOMMU in front", row.iommu),
        ("IOMMU group", row.group),
        ("driver", row.driver),
        ("back end", row.backend),
    ]
    facts = [tag("div", tag("dt", name), tag("dd", words)) for name, words in said if words]
    basis = [tag("li", seen.text, " ", tag("cite", str(seen.place))) for seen in row.basis]
    right = [tag("h3", "What that rests on"), tag("ul", *basis)] if basis else []
    right += (
        [tag("h3", "Taken for granted"), tag("ul", *(tag("li", each) for each in row.assumes))] if row.assumes else []
    )
    right += (
        [
            tag(
                "p",
                tag(
                    "a",
                    f"Why that is predicted{', if what is assumed is so' if row.assumes else ''} ({chain})",
                    href=f"#why-{chain}",
                ),
            )
        ]
        if row.reasons
        else []
    )
    return tag("div", tag("dl", *facts, class_="facts"), tag("div", *right), class_="chosen")


def _closing(part: Part) -> Markup:
    said = [tag("li", f"could not read: {problem}") for problem in part.problems]
    for question in open_questions(part, _PLACES):
        said.append(tag("li", f"could not be decided: {question}"))
    return tag("ul", *said, class_="soft closing") if said else Markup("")
