# SPDX-License-Identifier: Apache-2.0
"""What the pictures of a scan show: devices by the IOMMU in front of them and by their group, and which way each goes.

Beyond `MOST` devices those that go the same way are one line: a picture of a thousand arrows shows none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from virtiova.report.scan_words import Part
from virtiova.result import Path
from virtiova.result.scan import ScannedDevice

MOST: Final = 24
"""Devices that are drawn one by one."""
AROUND: Final = frozenset({Path.BYPASS, Path.MIXED})
"""Paths of which a part at least goes around the IOMMU."""
_TYPES: Final = 2
_NUMBER: Final = re.compile(r"(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Node:
    """A device; or several that go the same way, of which ``name`` says how many. ``group`` is empty where there is
    none, or several."""

    name: str
    type: str
    group: str
    verdict: Path
    about: str
    """All of it in words."""


@dataclass(frozen=True, slots=True)
class Section:
    """The devices behind one IOMMU; behind none, where ``iommu`` is empty."""

    iommu: str
    nodes: Sequence[Node]

    @property
    def around(self) -> bool:
        """Does anything go around the IOMMU?"""
        return bool(self.iommu) and any(node.verdict in AROUND for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Topology:
    """One machine. The section of what is behind no IOMMU is the last."""

    name: str
    sections: Sequence[Section]
    words: str
    """The picture in words."""

    @property
    def grouped(self) -> bool:
        """Is any device in a group?"""
        return any(node.group for section in self.sections for node in section.nodes)


def topology(part: Part, most: int = MOST) -> Topology:
    """What is drawn of a machine."""
    by_iommu: dict[str, list[ScannedDevice]] = {}
    for row in part.devices:
        by_iommu.setdefault(row.iommu, []).append(row)
    together = len(part.devices) > most
    sections = [
        Section(name, _together(by_iommu[name]) if together else _each(by_iommu[name]))
        for name in sorted(by_iommu, key=lambda name: (not name, natural(name)))
    ]
    return Topology(part.machine.name, sections, _words(part.devices))


def _each(devices: Sequence[ScannedDevice]) -> list[Node]:
    """A node each. Groups of which a part goes around come last, so that no arrow crosses theirs."""
    last = {row.group for row in devices if row.verdict in AROUND}
    order = sorted(
        devices, key=lambda row: (row.group in last, natural(row.group), row.verdict in AROUND, natural(row.name))
    )
    return [Node(row.name, row.type, row.group, row.verdict, _about(row)) for row in order]


def _together(devices: Sequence[ScannedDevice]) -> list[Node]:
    """A node for each verdict, those that go around last."""
    order = sorted(devices, key=lambda row: (row.verdict in AROUND, list(Path).index(row.verdict)))
    nodes = []
    for verdict, group in groupby(order, key=lambda row: row.verdict):
        rows = list(group)
        if len(rows) == 1:
            nodes += _each(rows)
            continue
        types = Counter(row.type for row in rows)
        said = [f"{count} {name}" for name, count in sorted(types.items(), key=lambda each: (-each[1], each[0]))]
        about = f"{len(rows)} devices ({', '.join(said)}): {verdict.value}"
        few = [*said[:_TYPES], "…"] if len(said) > _TYPES else said
        nodes.append(Node(f"{len(rows)} devices", ", ".join(few), "", verdict, about))
    return nodes


def _about(row: ScannedDevice) -> str:
    group = f", group {row.group}" if row.group else ""
    return f"{row.name} {row.type} {row.address}{group}: {row.verdict.value}"


def _words(devices: Sequence[ScannedDevice]) -> str:
    ways = Counter((row.iommu, row.verdict) for row in devices)
    said = [
        f"{count} {verdict.value}" + (f" (IOMMU {iommu})" if iommu else "")
        for (iommu, verdict), count in sorted(ways.items(), key=lambda each: (not each[0][0], each[0]))
    ]
    return ", ".join(said) or "no virtio devices"


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(text)]
