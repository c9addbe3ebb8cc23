# SPDX-License-Identifier: Apache-2.0
"""The page of a scan: whole by itself, deaf to hostile words; in a real browser found, filtered, folded and printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest

import scan_kit as kit
from browser_kit import Browser, started
from test_report_html import Page
from virtiova.report import scan_html
from virtiova.result import Path
from virtiova.result.scan import Scan, ScannedMachine, merged

SHOWN = "[...document.querySelectorAll('.row')].filter(r => r.checkVisibility()).map(r => r.id)"


def page(scan: Scan) -> str:
    """The page."""
    return "".join(scan_html.page(scan, "2026-11-23 · virtiova scan"))


# -- what is in it -----------------------------------------------------------------------------------------------


def test_every_device_and_finding_is_there() -> None:
    found = Page(page(kit.scan()))
    rows = [each for each in found.all("details") if each["class"] == "row"]
    assert [row["data-verdict"] for row in rows] == [row.verdict.value for row in kit.scan().devices]
    assert [row.get("data-ids") for row in rows][:2] == [None, "VA101"]
    findings = [each["data-finding"] for name, each in found.elements if "finding" in (each.get("class") or "").split()]
    assert findings == ["VA202", "VA101", "VA101", "VA105"]
    words = " ".join(found.words)
    for said in (
        "ignored: known, and in the window of maintenance",
        "add iommu_platform=on to virtio1",
        "vm.xml:12",
        "could not read: /sys/x: not permitted",
        "could not be decided: VA402 virtio0: the machine's command line",
        "nothing says whether an IOMMU is in front of it",
        "the driver accepts bit 33",
        "bit 33 not offered, bit 33 not accepted",
    ):
        assert said in words


def test_a_chain_of_reasons_is_there_once_and_led_to() -> None:
    found = Page(page(kit.many(50)))
    assert "".join(found.words).count("the driver took bit 33") == 1
    ids = {each["id"] for _, each in found.elements if "id" in each}
    led_to = [each["href"] or "" for each in found.all("a")]
    assert led_to.count("#why-1") == 50
    assert {each[1:] for each in led_to} <= ids


@pytest.mark.parametrize("scan", [kit.scan(), kit.hostile(), kit.fleet(3), Scan()])
def test_it_needs_nothing_but_itself(scan: Scan) -> None:
    source = page(scan)
    found = Page(source)
    assert not re.search(r"\b(src|srcset|action|formaction|poster|data)=", re.sub(r"<script>.*</script>", "", source))
    assert "url(" not in source
    assert "@import" not in source
    assert not found.all("link")
    assert all((each.get("href") or "#").startswith("#") for _, each in found.elements)
    assert len(found.all("script")) == 1
    (policy,) = [each["content"] for each in found.all("meta") if each.get("http-equiv")]
    assert (policy or "").startswith("default-src 'none'")
    source.encode()


def test_hostile_words_are_no_markup() -> None:
    harmless, evil = Page(page(kit.scan())), Page(page(kit.hostile()))
    assert {name for name, _ in evil.elements} <= {name for name, _ in harmless.elements}
    allowed = {key for _, attributes in harmless.elements for key in attributes}
    assert {key for _, attributes in evil.elements for key in attributes} <= allowed
    assert not any(ord(c) < 32 and c not in "\t\n\r" for c in "".join(evil.words))


def test_many_machines_have_no_pictures_and_no_list_of_links() -> None:
    few, many = Page(page(kit.fleet(3))), Page(page(kit.fleet(60)))
    assert (len(few.all("figure")), len(many.all("figure"))) == (6, 0)
    assert (len(few.all("nav")), len(many.all("nav"))) == (1, 0)


# -- in a real browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all these tests: starting it takes longer than any of them."""
    yield from started(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def opened(browser: Browser, tmp_path: FilePath) -> Any:
    """Opens the page of a scan."""

    def open_page(scan: Scan, width: int = 1280, height: int = 900) -> Browser:
        path = tmp_path / "scan.html"
        path.write_text(page(scan), "utf-8")
        browser.media("")
        browser.window(width, height)
        browser.open(path)
        return browser

    return open_page


def test_devices_are_found_by_what_is_typed_and_pressed(opened: Any) -> None:
    browser = opened(kit.scan())
    assert len(browser.run(SHOWN)) == 8
    browser.type("input", "VIRTIO3  net")
    assert browser.run(SHOWN) == ["d3"]
    assert browser.run("document.querySelector('output').textContent") == "1 of 8 devices"
    browser.type("input", "virtio_net")
    assert len(browser.run(SHOWN)) == 8, "the driver is not in the row, and is found nevertheless"
    browser.click("button[data-filter=bypass]")
    browser.click("button[data-filter=direct]")
    assert browser.run(SHOWN) == ["d1", "d2"]
    findings = "[...document.querySelectorAll('.finding')].filter(f => f.checkVisibility()).map(f => f.dataset.finding)"
    assert "VA202" not in browser.run(findings)
    browser.click("button[data-filter=VA101]")
    assert browser.run(SHOWN) == ["d1"]
    browser.type("input", "nothing like that")
    assert browser.run(SHOWN) == []
    assert browser.run("document.querySelector('section.machine').checkVisibility()") is False


def test_a_finding_leads_to_its_device(opened: Any) -> None:
    browser = opened(kit.scan())
    inside = "document.querySelector('#d1 .facts').checkVisibility()"
    assert browser.run(inside) is False
    browser.click(".finding a[href='#d1']")
    browser.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert browser.run("document.querySelector('#d1').open") is True


def test_a_thousand_devices_are_there_and_filtered_without_delay(opened: Any) -> None:
    browser = opened(kit.many(1000))
    loaded = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    cost = browser.run(
        """(() => {
          const field = document.querySelector("input");
          const costs = [];
          for (const words of ["virtio99", "blk", "intel net", "no such", ""]) {
            field.value = words;
            const start = performance.now();
            field.dispatchEvent(new Event("input"));
            document.body.getBoundingClientRect();
            costs.push(performance.now() - start);
          }
          return costs;
        })()"""
    )
    assert len(browser.run(SHOWN)) == 1000
    # Here 0.4 s and at most 25 ms; what is asserted leaves room for a machine that is busy with other things.
    assert loaded < 5000
    assert max(cost) < 500


@pytest.mark.parametrize("scan", [kit.scan(), kit.hostile(), kit.fleet(3)])
def test_a_phone_shows_all_of_it(opened: Any, scan: Scan) -> None:
    browser = opened(scan, 320, 640)
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= 320
    beyond = """[...document.querySelectorAll('body *:not(svg *)')]
        .filter(each => each.getBoundingClientRect().right > 321).map(each => each.outerHTML.slice(0, 80))"""
    assert browser.run(beyond) == []
    figures = "['wide', 'narrow'].map(name => document.querySelector(`figure.${name}`).checkVisibility())"
    assert browser.run(figures) == [False, True]
    size = (
        "Math.min(...[...document.querySelectorAll('figure.narrow text')].map(t => t.getBoundingClientRect().height))"
    )
    assert browser.run(size) > 10, "words in the picture can be read"


def test_paper_has_everything_unfolded(opened: Any) -> None:
    browser = opened(kit.scan())
    inside = """[...document.querySelectorAll('.row .facts, .ignored .fixes')]
        .filter(each => each.checkVisibility()).length"""
    filtered = "document.querySelector('.filter').checkVisibility()"
    assert (browser.run(inside), browser.run(filtered)) == (0, True)
    browser.media("print")
    assert (browser.run(inside), browser.run(filtered)) == (9, False)
    assert browser.printed().startswith(b"%PDF")
    browser.media("")
    assert browser.run(inside) == 0, "and is folded again"


def test_the_dark_is_dark(opened: Any) -> None:
    browser = opened(kit.scan())
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(paper)
    browser.media("", prefers_color_scheme="dark")
    assert (light, browser.run(paper)) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")


def test_hostile_words_run_nowhere(opened: Any) -> None:
    evil = "<img src=x onerror=window.hit=1><script>window.hit=2</script>\"'><svg onload=window.hit=3>javascript:hit=4"
    names = [evil, kit.HOSTILE, "${window.hit=5}", "d1", "__proto__"]
    rows = [kit.device(name, Path.BYPASS, machine=evil, group=evil, iommu=evil, driver=evil) for name in names]
    other = Scan("guest", [ScannedMachine(evil, evil, [evil], {evil: evil}, [evil])], rows)
    scan = merged([kit.hostile(), other])
    scan.findings += [kit.finding(row.name, id, machine=evil, why=evil) for row in rows for id in ("VA101", evil)]
    scan.findings.append(replace(scan.findings[-1], ignored=evil))
    browser = opened(scan)
    browser.type("input", "img")
    for button in range(browser.run("document.querySelectorAll('button').length")):
        browser.run(f"document.querySelectorAll('button')[{button}].click()")
    browser.run("document.querySelectorAll('a').forEach(each => each.click())")
    assert browser.run("window.hit === undefined") is True
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img, [onerror], [onload]').length") == 0
    assert browser.run("[...document.querySelectorAll('.row')].at(-1).querySelector('span').textContent") == "__proto__"
