# SPDX-License-Identifier: Apache-2.0
"""The ways that bytes take, as pictures: each arrow ends where its verdict says, with a form besides its colour."""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

import scan_kit as kit
from virtiova.report import scan_ascii, scan_svg, scan_text, wide
from virtiova.report.scan_topology import MOST, topology
from virtiova.report.scan_words import Part, parts
from virtiova.result import Path
from virtiova.result.scan import Scan, ScannedMachine

SVG = "{http://www.w3.org/2000/svg}"
SCANS = {
    "one": kit.scan(),
    "hostile": kit.hostile(),
    "many": kit.many(60),
    "fleet": kit.fleet(12),
    "none": Scan("guest", [ScannedMachine("vm", "guest")]),
}
PATHS = [path for path in Path if path is not Path.NOT_APPLICABLE]


def part(*rows: object) -> Part:
    """A machine with these devices."""
    return Part(ScannedMachine("vm", "guest"), list(rows))  # type: ignore[arg-type]


# -- what is drawn -----------------------------------------------------------------------------------------------


def test_devices_stand_by_iommu_and_by_group() -> None:
    rows = [
        kit.device("b", group="10"),
        kit.device("a10", group="9"),
        kit.device("a9", group="9"),
        kit.device("x", iommu="virtio", group=""),
        kit.device("d", Path.DIRECT, group="1"),
        kit.device("around", Path.BYPASS, group="2"),
    ]
    shown = topology(part(*rows))
    assert [(section.iommu, [node.name for node in section.nodes]) for section in shown.sections] == [
        ("intel", ["a9", "a10", "b", "around"]),
        ("virtio", ["x"]),
        ("", ["d"]),
    ]
    assert [section.around for section in shown.sections] == [True, False, False]
    assert shown.words == "1 bypass (IOMMU intel), 3 translated (IOMMU intel), 1 translated (IOMMU virtio), 1 direct"


@pytest.mark.parametrize("count", [MOST, MOST + 1, 1000])
def test_beyond_some_number_those_that_go_the_same_way_are_one(count: int) -> None:
    (whole,) = parts(kit.many(count))
    nodes = [node for section in topology(whole).sections for node in section.nodes]
    if count == MOST:
        assert len(nodes) == count
        return
    said = {node.verdict: node.name for node in nodes}
    verdicts = Counter(row.verdict for row in whole.devices)
    assert said == {verdict: f"{number} devices" for verdict, number in verdicts.items()}


# -- SVG ---------------------------------------------------------------------------------------------------------


def drawn(*rows: object) -> ElementTree.Element:
    """The picture of one machine."""
    return ElementTree.fromstring(scan_svg.picture(part(*rows)).replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))


def classes(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """All elements of a class."""
    return [each for each in root.iter() if name in (each.get("class") or "").split()]


def right_end(path: ElementTree.Element) -> float:
    """The right-most point of a path."""
    return max(float(x) for x in re.findall(r"[ML](\d+)", path.get("d") or ""))


@pytest.mark.parametrize("path", PATHS)
def test_an_arrow_ends_where_its_verdict_says(path: Path) -> None:
    root = drawn(kit.device("virtio0", path, iommu="" if path is Path.DIRECT else "intel"))
    boxes = [float(each.get("x") or 0) for each in classes(root, "d-box")]
    memory = max(boxes)
    fronts = [x for x in boxes if x != memory]
    assert len(fronts) == (path is not Path.DIRECT)
    end = max(right_end(each) for each in classes(root, "d-way"))
    reaches = path in (Path.TRANSLATED, Path.STALE, Path.BYPASS, Path.DIRECT, Path.MIXED)
    heads = classes(root, "d-head")
    assert len(heads) == (2 if path is Path.MIXED else 1 if reaches else 0)
    if reaches:
        assert memory - 10 <= end <= memory
    else:
        assert end < min(fronts), "it stops at the IOMMU, or before"
    assert bool(classes(root, "d-around")) is (path in (Path.BYPASS, Path.MIXED))
    texts = [each.text for each in root.iter(f"{SVG}text")]
    assert ("?" in texts) is (path is Path.UNKNOWN)
    assert "virtio0" in texts


def test_around_is_below_the_box_and_through_is_in_it() -> None:
    root = drawn(kit.device("a"), kit.device("b", Path.BYPASS))
    (front,) = classes(root, "d-front")
    top, height = float(front.get("y") or 0), float(front.get("height") or 0)
    heads = {
        each.get("class"): float((each.get("d") or "").split("L")[1].split()[1]) for each in classes(root, "d-head")
    }
    assert top < heads["d-head p-translated"] < top + height
    assert heads["d-head p-bypass"] > top + height


def test_every_way_has_a_form_of_its_own() -> None:
    """Seen without colour, no two are the same."""
    forms = set()
    for path in PATHS:
        root = drawn(kit.device("virtio0", path, iommu="" if path is Path.DIRECT else "intel"))
        ways = [each for each in root.iter() if "d-" in (each.get("class") or "") and each.tag != f"{SVG}text"]
        names = Counter(re.sub(r"p-\w+", "", each.get("class") or "").strip() for each in ways)
        ends = tuple(round(right_end(each)) for each in classes(root, "d-way"))
        forms.add((tuple(sorted(names.items())), ends))
    assert len(forms) == len(PATHS)


@pytest.mark.parametrize("name", SCANS)
def test_files_are_whole_and_harmless(name: str) -> None:
    root = ElementTree.fromstring("".join(scan_svg.document(SCANS[name])))
    assert {each.tag.removeprefix(SVG) for each in root.iter()} <= {
        "svg", "title", "style", "rect", "g", "text", "path", "circle",
    }  # fmt: skip
    allowed = {"viewBox", "width", "height", "role", "class", "x", "y", "rx", "d", "cx", "cy", "r"}
    allowed |= {"text-anchor", "transform"}
    assert {key for each in root.iter() for key in each.attrib} <= allowed
    height = float(root.get("height") or 0)
    for each in root.iter(f"{SVG}g"):
        assert float(re.findall(r"translate\(0 (\d+)\)", each.get("transform") or "translate(0 0)")[0]) < height


def test_a_file_of_many_machines_draws_the_rest_as_one() -> None:
    root = ElementTree.fromstring("".join(scan_svg.document(kit.fleet(12))))
    titles = [each.text for each in classes(root, "d-title")]
    assert titles == [*(f"host{number}" for number in range(8)), "4 more machines, together"]


# -- plain characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCANS)
def test_plain_pictures_fit_and_memory_is_a_straight_wall(name: str) -> None:
    text = scan_ascii.document(SCANS[name])
    assert all(char.isprintable() or char == "\n" for char in text)
    for block in re.split(r"\n\n|== .*\n", text):
        walls = {wide.width(line) for line in block.splitlines() if line.endswith("| ram |")}
        assert len(walls) <= 1
        assert all(wall <= 100 for wall in walls)


def test_plain_arrows() -> None:
    text = scan_ascii.document(kit.scan())
    ways = {
        line.split("net ")[1].split()[0]: line.split("net ")[1][11:] for line in text.splitlines() if "net " in line
    }
    assert ways == {
        "translated": "--------|------------|------->| ram |",
        "BYPASS": "----.   |            |        | ram |",
        "blocked": "----|--X|            |        | ram |",
        "MIXED": "----+------------------------>| ram |",
        "STALE": "........|............|.......>| ram |",
        "refused": "X       |            |        | ram |",
        "unknown": "- - - -?|            |        | ram |",
        "direct": "=============================>| ram |",
    }
    assert "    '------------------------>| ram |" in text


def test_the_picture_goes_under_the_table() -> None:
    lines = [*scan_text.lines(kit.scan(), picture=True)]
    (own,) = parts(kit.scan())
    shown = [line.rstrip() for line in scan_ascii.picture(own)]
    start = lines.index(shown[0])
    assert lines[start : start + len(shown)] == shown
