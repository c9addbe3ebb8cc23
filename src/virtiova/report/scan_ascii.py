# SPDX-License-Identifier: Apache-2.0
"""The ways that bytes take as a picture of plain characters, for a terminal or a mail: through the IOMMU, around it, or
stopped at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.report import wide
from virtiova.report.scan_topology import AROUND, Node, Section, Topology, topology
from virtiova.report.scan_words import LOUD, Part, parts
from virtiova.report.words import plain
from virtiova.result import Path
from virtiova.result.scan import Scan

_GROUP: Final = 8
_LONGEST: Final = (18, 24)
"""Columns that a name and a type take at the most."""
_VERDICT: Final = 10
_LANE: Final = 8
_BOX: Final = 14
_OUT: Final = 8
_THROUGH: Final = {Path.TRANSLATED: "-", Path.STALE: ".", Path.MIXED: "-", Path.DIRECT: "="}
"""What an arrow through the IOMMU's box is drawn with."""


def document(scan: Scan) -> str:
    """The pictures of all machines."""
    several = len(scan.machines) > 1
    said = []
    for part in parts(scan):
        said += [f"== {wide.cut_middle(plain(part.machine.name), 60)}"] if several else []
        said += [*picture(part), ""]
    return "".join(f"{line}\n" for line in said[:-1])


def picture(part: Part) -> Iterator[str]:
    """One machine, at most 100 columns wide."""
    shown = topology(part)
    nodes = [node for section in shown.sections for node in section.nodes]
    if not nodes:
        yield "no virtio devices"
        return
    drawn = _Lines(shown, nodes)
    for number, section in enumerate(shown.sections):
        if number:
            yield drawn.line("", " " * (_LANE + _BOX + _OUT))
        yield from _section(drawn, section)


class _Lines:
    """Lines with what is said of a device on the left, its way in the middle, and memory on the right."""

    def __init__(self, shown: Topology, nodes: Sequence[Node]) -> None:
        longest = [
            max(wide.width(plain(node.name)) for node in nodes),
            max(wide.width(plain(node.type)) for node in nodes),
        ]
        self._sizes = [min(size, most) for size, most in zip(longest, _LONGEST, strict=True)]
        self._group = _GROUP if shown.grouped else 0
        self._left = self._group + sum(self._sizes) + _VERDICT + 3

    def line(self, label: str, way: str) -> str:
        """Any line."""
        return f"{wide.pad(label, self._left)}{way}| ram |"

    def device(self, node: Node, group: str, way: str) -> str:
        """The line of a device; ``group`` is empty where it was said on the line before."""
        said = node.verdict.value.upper() if node.verdict in LOUD else node.verdict.value
        cells = [
            wide.pad(wide.cut_middle(plain(text), size), size)
            for text, size in zip((node.name, node.type, said), (*self._sizes, _VERDICT), strict=True)
        ]
        first = wide.cut(plain(f"[{group}"), _GROUP - 2) + "]" if group else ""
        return self.line(wide.pad(first, self._group) + " ".join(cells), way)


def _section(drawn: _Lines, section: Section) -> Iterator[str]:
    edge = f"+{'-' * (_BOX - 2)}+"
    blank, out = " " * _LANE, " " * _OUT
    if section.iommu:
        name = wide.pad(wide.cut(plain(section.iommu), _BOX - 4), _BOX - 4)
        yield drawn.line("", f"{blank}{edge}{out}")
        yield drawn.line("", f"{blank}| {name} |{out}")
    group, around = "", False
    for node in section.nodes:
        yield drawn.device(node, node.group if node.group != group else "", _way(node.verdict, section, around))
        group = node.group
        around = around or (bool(section.iommu) and node.verdict in AROUND)
    if section.iommu:
        yield drawn.line("", f"{_lane(' ', around)}{edge}{out}")
    if around:
        yield drawn.line("", f"    '{'-' * (_LANE + _BOX + _OUT - 6)}>")


def _lane(fill: str, around: bool) -> str:
    """Between device and IOMMU: the way around runs down in it."""
    return f"{fill * 4}|{fill * (_LANE - 5)}" if around else fill * _LANE


def _way(verdict: Path, section: Section, around: bool) -> str:
    """One arrow. ``around``: that of a device above is on its way down already."""
    if not section.iommu:
        return _nothing_in_front(verdict)
    box = f"|{' ' * (_BOX - 2)}|"
    if verdict is Path.BYPASS:
        return f"----{'+' if around else '.'}{' ' * (_LANE - 5)}{box}{' ' * _OUT}"
    if verdict is Path.MIXED:
        return f"----+---{'-' * _BOX}{'-' * (_OUT - 1)}>"
    if verdict in _THROUGH:
        fill = _THROUGH[verdict]
        return f"{_lane(fill, around)}|{fill * (_BOX - 2)}|{fill * (_OUT - 1)}>"
    if verdict is Path.BLOCKED:
        return f"{_lane('-', around)[:-1]}X{box}{' ' * _OUT}"
    if verdict is Path.REFUSED:
        return f"X{_lane(' ', around)[1:]}{box}{' ' * _OUT}"
    return ("- - | -?" if around else "- - - -?") + box + " " * _OUT


def _nothing_in_front(verdict: Path) -> str:
    whole = _LANE + _BOX + _OUT
    if verdict is Path.REFUSED:
        return "X" + " " * (whole - 1)
    if verdict is Path.BLOCKED:
        return "-" * (whole // 2) + "X" + " " * (whole - whole // 2 - 1)
    if verdict in (Path.UNKNOWN, Path.NOT_APPLICABLE):
        return wide.pad("- " * (whole // 4) + "?", whole)
    return ("=" if verdict is Path.DIRECT else "-") * (whole - 1) + ">"
