# SPDX-License-Identifier: Apache-2.0
"""The page and its pictures: whole by themselves, readable without script, deaf to hostile words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path as FilePath
from xml.etree import ElementTree

import pytest

import report_kit as kit
from browser_kit import Browser, started
from virtiova.cli import outputs
from virtiova.policy import DEPARTURES
from virtiova.report import html, svg
from virtiova.report import matrix as report
from virtiova.report.json import cell_object
from virtiova.report.markup import Markup, join, tag, text
from virtiova.report.text import table
from virtiova.result import SCHEMA, Evidence, Path, Row

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def browser(tmp_path: FilePath) -> Iterator[Browser]:
    """A browser for one test."""
    yield from started(tmp_path)


class Page(HTMLParser):
    """The elements of a page, with what an element must have to be well formed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def page(rows: kit.Rows) -> str:
    return "".join(html.page(rows, kit.SYSTEMS))


# -- markup ------------------------------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "a < b & c", class_='"x"') == '<p class="&quot;x&quot;">a &lt; b &amp; c</p>'
    assert join(tag("b", "x"), "<i>") == "<b>x</b>&lt;i&gt;"
    assert tag("meta", http_equiv="x", hidden=True, title=None) == '<meta http-equiv="x" hidden/>'
    assert isinstance(text("x"), Markup)
    assert text("a\x00\x1b\ud800b\n") == "a\ufffd\ufffd\ufffdb\n"
    assert text("a\u202eb\u2066\u2029") == "a\ufffdb\ufffd\u2029"


# -- the page ----------------------------------------------------------------------------------------------------


def test_rows_stand_by_system() -> None:
    found = Page(page(kit.rows()))
    assert [attributes["id"] for attributes in found.all("section")] == ["plain", "real"]
    paths = [attributes["data-path"] for attributes in found.all("details")]
    others = [path.value for path in Path if path is not Path.DIRECT]
    assert paths == ["direct", *others, "bypass", "bypass"]
    wrong = [attributes for attributes in found.all("details") if attributes["class"] == "row wrong"]
    assert [attributes["data-verdict"] for attributes in wrong] == ["not as predicted"]


def test_every_row_has_its_picture_and_reasons() -> None:
    source = page(kit.rows())
    found = Page(source)
    used = [attributes["href"] for attributes in found.all("use")]
    drawn = {f"#{attributes['id']}" for attributes in found.all("symbol")}
    assert len(used) == len(kit.rows().rows) - 1, "nothing is drawn where nothing applied"
    assert set(used) == drawn
    assert source.count("the driver took bit 33") == len(kit.rows().rows)


def test_it_needs_nothing_but_itself() -> None:
    source = page(kit.rows())
    found = Page(source)
    assert not re.search(r"\b(src|srcset|action|formaction|poster|data)=", re.sub(r"<script>.*</script>", "", source))
    assert "url(" not in source
    assert "@import" not in source
    assert not found.all("link")
    references = [a.get("href") or "" for tag, a in found.elements if "href" in a]
    assert all(reference.startswith("#") for reference in references)
    (policy,) = [a["content"] for a in found.all("meta") if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_it_reads_without_script() -> None:
    """All rows are there and open by themselves; only the filter, which would not work, is hidden."""
    found = Page(page(kit.rows()))
    assert [a["class"] for a in (attributes for _, attributes in found.elements) if "hidden" in a] == ["filter"]
    assert len(found.all("summary")) == len(kit.rows().rows)


def test_hostile_words_stay_words() -> None:
    harmless, evil = Page(page(kit.rows())), Page(page(kit.Rows(Row("real", kit.HOSTILE, kit.hostile()))))
    assert len(evil.all("script")) == 1
    assert {name for name, _ in evil.elements} <= {name for name, _ in harmless.elements} | {"pre"}
    allowed = {key for _, attributes in harmless.elements for key in attributes}
    assert {key for _, attributes in evil.elements for key in attributes} <= allowed
    assert any("</script><script>alert(1)</script>" in words for words in evil.words)
    assert not any(ord(c) < 32 and c not in "\t\n\r" for c in "".join(evil.words))


def test_it_can_be_written_as_utf_8(tmp_path: FilePath) -> None:
    rows = kit.Rows(Row("real", kit.HOSTILE, kit.hostile()))
    for number, pieces in enumerate((html.page(rows, kit.SYSTEMS), svg.matrix(rows, kit.SYSTEMS))):
        with open(tmp_path / str(number), "w", encoding="utf-8") as file:
            file.writelines(pieces)


# -- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(Path))
def test_a_picture_of_every_path(path: Path) -> None:
    drawn = svg.cell(kit.cell(path))
    if path is Path.NOT_APPLICABLE:
        assert drawn is None
        return
    root = ElementTree.fromstring(drawn or "")
    assert path.value in (root.findtext(f"{SVG}title") or "")
    ways = [e for e in root.iter() if "d-way" in (e.get("class") or "")]
    assert bool(ways) is (path is not Path.UNKNOWN)
    hit = [e for e in root.iter() if "d-hit" in (e.get("class") or "")]
    wanted = {Path.MIXED: 2, Path.BLOCKED: 0, Path.REFUSED: 0, Path.UNKNOWN: 0}
    assert len(hit) == wanted.get(path, 1)


def test_what_was_predicted_is_drawn_where_it_was_missed() -> None:
    drawn = svg.cell(kit.cell(Path.BYPASS, Path.TRANSLATED)) or ""
    assert "d-predicted" in re.sub(r"<style>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = svg.cell(kit.cell(Path.BYPASS)) or ""
    assert "d-predicted" not in re.sub(r"<style>.*?</style>", "", drawn, flags=re.DOTALL)


def test_the_grid() -> None:
    root = ElementTree.fromstring("".join(svg.matrix(kit.rows(), kit.SYSTEMS)))
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert {"device-writes", "ring", "Plain & simple", "translated", "n/a"} <= set(words)
    assert sum("d-wrong" in (e.get("class") or "") for e in root.iter()) == 1
    evil = ElementTree.fromstring("".join(svg.matrix(kit.Rows(Row("real", "", kit.hostile())), kit.SYSTEMS)))
    assert {e.tag for e in evil.iter()} <= {e.tag for e in root.iter()}


def test_no_rule_leans_on_an_ancestor() -> None:
    """What a row refers to by ``use`` has none that a style sheet would see."""
    style = re.sub(r"/\*.*?\*/", "", svg.style(), flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", style)
    assert selectors
    for selector in ",".join(s for s in selectors if "@" not in s).split(","):
        assert " " not in selector.strip(), selector


# -- text and JSON -----------------------------------------------------------------------------------------------


def test_text_by_system() -> None:
    lines = list(report.text(kit.rows(), kit.SYSTEMS, width=100))
    assert lines[0] == "PLAIN & SIMPLE  [plain]"
    assert "seen on QEMU 7.2.22, QEMU 10.0.2" in lines
    assert not any("Of which there is nothing" in line for line in lines)
    assert lines[-1] == (
        "11 cells: 7 as predicted, 1 not as predicted, 1 a known departure of the product, 1 unknown, 1 not applicable"
    )


def test_json_is_the_probes_schema() -> None:
    found = json.loads("".join(report.json(kit.rows(), kit.SYSTEMS)))
    assert found["schema"] == SCHEMA
    assert [system["id"] for system in found["systems"]] == ["plain", "real", "empty"]
    assert len(found["cells"]) == 11
    first = found["cells"][0]
    assert (first["system"], first["product"], first["observed"]) == ("plain", "QEMU 7.2.22", "direct")
    assert json.loads("".join(report.json(kit.Rows(), kit.SYSTEMS)))["cells"] == []


# -- in a real browser -------------------------------------------------------------------------------------------


def test_the_footer_says_when_and_how_but_not_whose_cluster() -> None:
    typed = ["matrix", "--scheduler", "tcp://its.name:8786", "-o", "a b.html", "--scheduler=tcp://its.name:1"]
    made = outputs.made(typed)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d · virtiova matrix --scheduler ADDRESS -o 'a b.html' --scheduler=ADDRESS", made
    )
    words = Page("".join(html.page(kit.rows(), kit.SYSTEMS, made))).words
    assert any(made in word for word in words)


def test_a_known_departure_is_explained_and_can_be_filtered() -> None:
    (row,) = [row for row in DEPARTURES if row.id == "QEMU-BUS-MASTER"]
    words = Page(page(kit.rows())).words
    assert f"A known departure: {row.id}" in words
    assert any(row.title in word for word in words)
    buttons = {a["data-filter"] for a in Page(page(kit.rows())).all("button")}
    assert {"not as predicted", "a known departure of the product"} <= buttons


@pytest.mark.parametrize(("rows", "classes"), [(kit.rows(), ["wrong"]), (kit.Rows(next(iter(kit.rows()))), [])])
def test_nothing_wrong_is_nothing_red(rows: kit.Rows, classes: list[str]) -> None:
    assert [a["class"] for a in Page(page(rows)).all("li") if "wrong" in (a.get("class") or "")] == classes


def test_every_column_has_its_name_where_there_is_no_head() -> None:
    labels = [a["data-label"] for a in Page(page(kit.rows())).all("span") if "data-label" in a]
    names = ["machine", "IOMMU", "device", "bit 33", "experiment", "predicted", "observed", "evidence"]
    assert labels == names * len(list(kit.rows()))


@pytest.mark.parametrize(
    ("experiment", "observed", "said"),
    [
        (
            "gpu-remap",
            Path.STALE,
            ["before: X to page C", "now: X to page A", "page C: X before", "page A: mapped at X"],
        ),
        ("unmap-stale", Path.STALE, ["before: X to page C", "now: X to nothing", "page A: elsewhere"]),
        ("unmapped", Path.BLOCKED, ["X to nothing", "page A: elsewhere", "page B: X itself"]),
        ("ring", Path.TRANSLATED, ["X to page A", "page A: mapped at X", "page B: X itself"]),
    ],
)
def test_a_picture_says_what_the_tables_say(experiment: str, observed: Path, said: list[str]) -> None:
    drawn = svg.cell(kit.cell(observed, experiment=experiment))
    assert drawn is not None
    texts = [element.text for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert [text for text in said if text not in texts] == []


@pytest.mark.sweep
def test_the_filter_in_a_real_browser(browser: Browser, tmp_path: FilePath) -> None:
    path = tmp_path / "matrix.html"
    rows = kit.Rows(*kit.rows().rows, Row("real", kit.HOSTILE, kit.hostile()))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(html.page(rows, kit.SYSTEMS))
    browser.open(path)
    shown = "[...document.querySelectorAll('.row')].filter(r => r.checkVisibility()).map(r => r.dataset.path)"
    assert len(browser.run(shown)) == len(rows.rows)
    browser.click("button[data-filter=bypass]")
    assert browser.run(shown) == ["bypass"] * 3
    assert browser.run("[...document.querySelectorAll('section')].map(s => s.checkVisibility())") == [False, True]
    browser.click("button[data-filter=direct]")
    assert browser.run(shown) == ["direct", *["bypass"] * 3]
    browser.click("button[data-filter=bypass]")
    browser.click("button[data-filter=direct]")
    browser.click("button[data-filter='not as predicted']")
    assert browser.run(shown) == ["bypass"]
    assert browser.run("document.querySelector('output').textContent") == f"1 of {len(rows.rows)} cells"
    # A row opens to a picture that is really drawn, in colour.
    browser.click(".row:not([hidden]) summary")
    box = browser.run("document.querySelector('.row[open] svg').getBoundingClientRect().toJSON()")
    assert box["width"] > 300
    assert box["height"] > 60
    drawn = "getComputedStyle(document.querySelector('symbol .d-way')).strokeWidth"
    assert browser.run(drawn) == "3px"
    assert browser.run("document.querySelectorAll('script').length") == 1


# -- booted guests -------------------------------------------------------------------------------------------------


def test_guests_of_one_machine_are_told_apart() -> None:
    """They differ in what the kernel was told, which only the platform's name says."""
    outside = {"seen": "ring at 0x1000"}
    names = ("x86-vtd", "x86-vtd-strict-and-long")
    guests = [kit.cell(Path.TRANSLATED, evidence=Evidence(inside={"platform": n}, outside=outside)) for n in names]
    rows = kit.Rows(*(Row("real", f"a real kernel: {n}", guest) for n, guest in zip(names, guests, strict=True)))
    assert [line.split()[0] for line in table(guests).splitlines()[1:]] == list(names)
    grid = "".join(svg.matrix(rows, kit.SYSTEMS))
    assert ">x86-vtd<" in grid
    assert ">x86-vtd-stri…<" in grid
    assert f">{names[1]} virtio-blk-pci" in grid


def test_only_guests_have_two_sides_in_json() -> None:
    sides = {"inside": {"platform": "x86-vtd"}, "outside": {"seen": "ring at 0x1000"}}
    guest = cell_object(kit.cell(Path.TRANSLATED, evidence=Evidence(**sides)))  # type: ignore[arg-type]
    assert {name: guest["evidence"][name] for name in sides} == sides
    assert not sides.keys() & cell_object(kit.cell(Path.TRANSLATED))["evidence"].keys()
