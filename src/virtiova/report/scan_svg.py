# SPDX-License-Identifier: Apache-2.0
"""The ways that bytes take as a picture: devices by group, the IOMMUs, memory, and an arrow through or around.

Every way has a form besides its colour: through the IOMMU is a line across its box with a dot in it, around is a thick
broken line below the box, a stop is a cross, and what is not known is dotted and ends in a question mark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.report import wide
from virtiova.report.markup import Markup, join, start, tag
from virtiova.report.scan_topology import AROUND, Node, Section, Topology, topology
from virtiova.report.scan_words import LOUD, Part, parts
from virtiova.report.svg import NAMESPACE, css, style
from virtiova.result import Path
from virtiova.result.scan import Scan, ScannedMachine

_MACHINES: Final = 8
"""Machines that are drawn one by one."""
_MARGIN: Final = 12
_GAP: Final = 14
_STRIP: Final = 26
"""Above the first device behind an IOMMU: the IOMMU's name."""
_CHANNEL: Final = 36
"""Below the last: the way around."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things stand, in pixels. ``narrow`` is for a phone: two lines a device."""

    width: int
    box: int
    """How wide a device is."""
    row: int
    lane: int
    """Between devices and IOMMU: the way around goes down in it."""
    iommu: int
    memory: int
    name: int
    """Characters of a device's name."""
    group: int
    narrow: bool = False

    @property
    def memory_x(self) -> int:
        """Memory's left edge."""
        return self.width - _MARGIN - self.memory


WIDE: Final = Layout(width=780, box=330, row=32, lane=56, iommu=130, memory=92, name=17, group=46)
NARROW: Final = Layout(width=330, box=132, row=44, lane=36, iommu=52, memory=36, name=16, group=20, narrow=True)


def document(scan: Scan) -> Iterator[str]:
    """The pictures of all machines below each other, as a file; in pieces."""
    drawn = []
    height = _MARGIN
    several = len(scan.machines) > 1
    for name, part in _shown(parts(scan)):
        title = tag("text", wide.cut(name, 80), x=_MARGIN, y=height + 16, class_="d-title") if several else Markup("")
        height += 26 if several else 0
        shown = topology(part)
        drawn.append(join(title, tag("g", _inside(shown, WIDE), transform=f"translate(0 {height})")))
        height += _height(shown, WIDE) + _GAP
    yield start(
        "svg", xmlns=NAMESPACE, viewBox=f"0 0 {WIDE.width} {height}", width=WIDE.width, height=height, role="img"
    )
    yield join(tag("title", "virtiova scan"), tag("style", Markup(style())))
    yield tag("rect", width=WIDE.width, height=height, class_="d-paper")
    yield from drawn
    yield "</svg>\n"


def picture(part: Part, layout: Layout = WIDE) -> Markup:
    """One machine, to be part of a page that has the style already."""
    shown = topology(part)
    height = _height(shown, layout)
    inside = (tag("title", f"{shown.name}: {shown.words}"), _inside(shown, layout))
    return tag("svg", *inside, viewBox=f"0 0 {layout.width} {height}", width=layout.width, height=height, role="img")


def _shown(machines: list[Part]) -> Iterator[tuple[str, Part]]:
    """Each machine; beyond `_MACHINES` all others are drawn as one."""
    few = machines if len(machines) <= _MACHINES + 1 else machines[:_MACHINES]
    yield from ((part.machine.name, part) for part in few)
    if others := machines[len(few) :]:
        devices = [row for part in others for row in part.devices]
        yield f"{len(others)} more machines, together", Part(ScannedMachine("", ""), devices)


# -- one machine -------------------------------------------------------------------------------------------------


def _height(shown: Topology, layout: Layout) -> int:
    tall = sum(_tall(section, layout) for section in shown.sections)
    return _MARGIN + max(tall + _GAP * (len(shown.sections) - 1), 60) + 22


def _tall(section: Section, layout: Layout) -> int:
    strip = _STRIP if section.iommu else 0
    return strip + len(section.nodes) * layout.row + (_CHANNEL if section.around else 0)


def _inside(shown: Topology, layout: Layout) -> Markup:
    left = _MARGIN + (layout.group if shown.grouped else 0)
    boxes: list[Markup] = []
    ways: list[Markup] = []
    y = _MARGIN + 10
    first = y
    for section in shown.sections:
        top = y + (_STRIP if section.iommu else 0)
        if section.iommu:
            boxes.append(_front(section, layout, left, y))
        boxes += _groups(section, layout, top)
        for number, node in enumerate(section.nodes):
            boxes.append(_device(node, layout, left, top + number * layout.row))
        ways += _ways(section, layout, left, top)
        y += _tall(section, layout) + _GAP
    if not shown.sections:
        boxes.append(tag("text", "no virtio devices", x=left, y=first + 30, class_="d-note"))
    if shown.grouped and not layout.narrow:
        boxes.append(tag("text", "group", x=_MARGIN - 4, y=first + 4, class_="d-note"))
    memory = _memory(layout, first, max(y - _GAP - first, 40))
    return join(*boxes, memory, *ways)


def _memory(layout: Layout, y: int, height: int) -> Markup:
    x = layout.memory_x
    name = "RAM" if layout.narrow else "memory"
    middle = x + layout.memory // 2
    return join(
        tag("rect", x=x, y=y, width=layout.memory, height=height, rx=6, class_="d-box"),
        tag("text", name, x=middle, y=y + 18, class_="d-name", text_anchor="middle"),
    )


def _front(section: Section, layout: Layout, left: int, y: int) -> Markup:
    """The IOMMU's box, as high as what is behind it."""
    x = _iommu_x(layout, left)
    height = _STRIP + len(section.nodes) * layout.row
    name = wide.cut(
        section.iommu if layout.narrow else f"IOMMU {section.iommu}", layout.iommu // 8 - (not layout.narrow)
    )
    off = all(node.verdict is Path.DIRECT for node in section.nodes)
    return join(
        tag(
            "rect", x=x, y=y, width=layout.iommu, height=height, rx=6, class_="d-box d-off" if off else "d-box d-front"
        ),
        tag("text", name, x=x + layout.iommu // 2, y=y + 18, class_="d-name", text_anchor="middle"),
    )


def _iommu_x(layout: Layout, left: int) -> int:
    end = left + layout.box
    room = layout.memory_x - end
    return end + max(layout.lane, (room - layout.iommu) // 2)


def _groups(section: Section, layout: Layout, top: int) -> Iterator[Markup]:
    """A bracket beside the devices of one group."""
    begin = 0
    for number, node in enumerate(section.nodes):
        if number + 1 < len(section.nodes) and section.nodes[number + 1].group == node.group:
            continue
        if node.group:
            y, end = top + begin * layout.row + 3, top + (number + 1) * layout.row - 3
            x = _MARGIN + layout.group - 8
            yield tag("path", d=f"M{x + 4} {y} L{x} {y} L{x} {end} L{x + 4} {end}", class_="d-group")
            label = wide.cut(node.group, 2 if layout.narrow else 5)
            yield join(
                tag("text", tag("title", f"IOMMU group {node.group}"), label, x=x - 4, y=(y + end) // 2 + 4,
                    class_="d-note", text_anchor="end"),
            )  # fmt: skip
        begin = number + 1


def _device(node: Node, layout: Layout, left: int, y: int) -> Markup:
    height = layout.row - 6
    said = node.verdict.value.upper() if node.verdict in LOUD else node.verdict.value
    path = f"p-{css(node.verdict)}"
    line = y + 3 + (17 if layout.narrow else height // 2 + 5)
    parts: list[Markup] = [
        tag("title", node.about),
        tag("rect", x=left, y=y + 3, width=layout.box, height=height, rx=5, class_="d-page"),
        tag("rect", x=left, y=y + 3, width=6, height=height, rx=3, class_=f"d-stripe {path}"),
        tag("text", wide.cut(node.name, layout.name), x=left + 14, y=line, class_="d-name"),
    ]
    if layout.narrow:
        words = f"{wide.cut(node.type, 10)}, {said}"
        parts.append(tag("text", words, x=left + 14, y=line + 15, class_="d-note"))
    else:
        parts.append(tag("text", wide.cut(node.type, 15), x=left + 156, y=line, class_="d-note"))
        parts.append(tag("text", said, x=left + layout.box - 8, y=line, class_=f"d-said {path}", text_anchor="end"))
    return tag("g", *parts)


# -- arrows ------------------------------------------------------------------------------------------------------


def _ways(section: Section, layout: Layout, left: int, top: int) -> Iterator[Markup]:
    begin, front = left + layout.box, _iommu_x(layout, left)
    lane = begin + (front - begin) // 2
    rows = [top + number * layout.row + layout.row // 2 for number in range(len(section.nodes))]
    if section.around:
        first = next(y for y, node in zip(rows, section.nodes, strict=True) if node.verdict in AROUND)
        yield _around(layout, lane, first, top + len(rows) * layout.row + 12)
    if not layout.narrow:
        y = rows[-1] + layout.row // 2 + 26 if section.around else rows[0] + 14
        words = "around the IOMMU" if section.around else "" if section.iommu else "nothing is in front"
        yield tag("text", words, x=front + layout.iommu // 2, y=y, class_="d-note", text_anchor="middle")
    for y, node in zip(rows, section.nodes, strict=True):
        yield from _way(node.verdict, section, layout, (begin, lane, front), y)


def _around(layout: Layout, lane: int, first: int, below: int) -> Markup:
    """What all share that go around: down beside the IOMMU, and below it to memory."""
    end = layout.memory_x - 3
    return join(
        tag("path", d=f"M{lane} {first} L{lane} {below} L{end - 4} {below}", class_="d-way d-around p-bypass"),
        _head(end, below, "p-bypass"),
    )


def _way(verdict: Path, section: Section, layout: Layout, x: tuple[int, int, int], y: int) -> Iterator[Markup]:
    begin, lane, front = x
    path = f"p-{css(verdict)}"
    end = layout.memory_x - 3
    stop = front if section.iommu else (begin + end) // 2
    if section.iommu and verdict in AROUND:
        yield tag("path", d=f"M{begin} {y} L{lane} {y}", class_="d-way d-around p-bypass")
        yield tag("circle", cx=lane, cy=y, r=5, class_="d-dot p-bypass")
        if verdict is Path.BYPASS:
            return
    if verdict is Path.REFUSED:
        yield _cross(begin + 12, y, path)
    elif verdict is Path.BLOCKED:
        yield tag("path", d=f"M{begin} {y} L{stop - 16} {y}", class_=f"d-way {path}")
        yield _cross(stop - 10, y, path)
    elif verdict in (Path.UNKNOWN, Path.NOT_APPLICABLE):
        yield tag("path", d=f"M{begin + 3} {y} L{stop - 16} {y}", class_=f"d-way d-unsure {path}")
        yield tag("text", "?", x=stop - 9, y=y + 6, class_="d-asked", text_anchor="middle")
    else:
        form = {Path.DIRECT: " d-direct", Path.STALE: " d-stale"}.get(verdict, "")
        yield tag("path", d=f"M{begin} {y} L{end - 4} {y}", class_=f"d-way{form} {path}")
        yield _head(end, y, path)
        if section.iommu:
            yield _gate(front + layout.iommu // 2, y, verdict, path)


def _gate(x: int, y: int, verdict: Path, path: str) -> Markup:
    """Inside of the IOMMU: a dot where it translates, a square where it lets through, a ring where that is stale."""
    if verdict is Path.DIRECT:
        return tag("rect", x=x - 5, y=y - 5, width=10, height=10, class_=f"d-ring {path}")
    return tag("circle", cx=x, cy=y, r=6, class_=f"{'d-ring' if verdict is Path.STALE else 'd-dot'} {path}")


def _head(x: int, y: int, path: str) -> Markup:
    return tag("path", d=f"M{x - 9} {y - 5} L{x} {y} L{x - 9} {y + 5} Z", class_=f"d-head {path}")


def _cross(x: int, y: int, path: str) -> Markup:
    return tag("path", d=f"M{x - 6} {y - 6} L{x + 6} {y + 6} M{x - 6} {y + 6} L{x + 6} {y - 6}", class_=f"d-way {path}")
