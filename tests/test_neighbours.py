# SPDX-License-Identifier: Apache-2.0
"""Questions about neighbours: what the others were at is evidence, and without it there is no answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from judge_again import judge_again
from mix_kit import PLATFORMS, SHARED, TWO, WAYS, mixed, of_two, skip_if_missing, ways
from probe_kit import wrong
from virtiova.addr import IOVA
from virtiova.probe.edu import ControlRig
from virtiova.probe.neighbours import QueueWork
from virtiova.probe.rig import Rig
from virtiova.report.json import document
from virtiova.report.words import evidence_text
from virtiova.result import Cell, Path

pytestmark = pytest.mark.qemu

PAGES = {"translated": ["A"], "bypass": ["B"], "direct": ["B"]}


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    skip_if_missing(request)


def idle(cell: Cell) -> list[str]:
    """The neighbours that had nothing under way when this device had its request."""
    return [each.device for each in cell.evidence.neighbours if not each.under_way]


def all_under_way(platform: str, expected: list[str]) -> tuple[Cell, ...]:
    """A device may look at its ring without being told to, and QEMU's disks do so once after they have polled: what
    one of them was to be at is then over too early, and said to be. So there are three attempts."""
    for _ in range(3):
        cells = mixed(platform, "at-once")
        if all(idle(cell) == expected for cell in cells if cell.experiment != "control"):
            break
        mixed.cache_clear()
    return cells


@pytest.mark.parametrize("platform", [*PLATFORMS, *SHARED])
def test_all_others_are_at_work_at_once_each_on_its_own_way(platform: str) -> None:
    # What the network chip is told it does within the telling.
    never = ["rtl8139"] if "sun4u" in platform else []
    cells = all_under_way(platform, never)
    for cell in cells:
        if cell.experiment == "control":
            continue
        seen = sorted((each.device, each.pages) for each in cell.evidence.neighbours)
        assert seen == sorted((other.device, PAGES[other.observed]) for other in cells if other is not cell)
        assert all(each.done for each in cell.evidence.neighbours)
        assert idle(cell) == never
        assert evidence_text(cell).endswith(f"; {len(cells) - 1 - len(never)} others under way")
        assert judge_again(json.loads(document([cell]))["cells"][0]) == cell.observed


@pytest.mark.parametrize("platform", [*PLATFORMS, *SHARED])
def test_the_owner_of_a_page_has_just_used_it(platform: str) -> None:
    for cell in mixed(platform, "others-page"):
        if cell.experiment == "others-page":
            assert [(each.done, each.pages) for each in cell.evidence.neighbours] == [(True, ["A"])]
            assert judge_again(json.loads(document([cell]))["cells"][0]) == cell.observed


def no_longer_mapped(rig: Rig) -> None:
    for other in rig.others:
        other.iommu.unmap(IOVA(other.data.addr), 4096)
        other.iommu.invalidate()


def alone(rig: Rig) -> None:
    rig.others = []


@pytest.mark.parametrize(
    ("name", "before", "note"),
    [
        ("at-once", alone, "no other device had a request under way"),
        ("at-once", no_longer_mapped, "what virtio-rng-pci had under way did not complete"),
        ("others-page", no_longer_mapped, "virtio-rng-pci did not use the mapping .*: its bytes did not arrive"),
    ],
)
def test_without_the_neighbours_part_there_is_no_answer(name: str, before: Callable[[Rig], None], note: str) -> None:
    cell = of_two(TWO, name, before)[0]
    assert (cell.observed, cell.mismatch) == (Path.UNKNOWN, False)
    assert re.fullmatch(note, cell.evidence.note)
    assert evidence_text(cell).startswith(cell.evidence.note)
    assert cell.evidence.witnesses, "what was seen of the device itself stays"
    assert judge_again(json.loads(document([cell]))["cells"][0]) == "unknown"


@pytest.mark.parametrize("name", ["at-once", "others-page"])
@pytest.mark.parametrize("other", [*TWO[1:], "edu"])
def test_a_neighbour_that_is_not_told_has_nothing_under_way(
    name: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: object) -> None: ...

    devices = [TWO[0], other]
    assert [cell.observed for cell in of_two(devices, name)][:1] == [
        Path.BLOCKED if name == "others-page" else Path.TRANSLATED
    ]
    monkeypatch.setattr(QueueWork, "start", never)
    monkeypatch.setattr(ControlRig, "start", never)
    cell = of_two(devices, name)[0]
    assert (cell.observed, [each.done for each in cell.evidence.neighbours]) == (Path.UNKNOWN, [False])


def test_where_nobody_else_goes_through_a_mapping_there_is_no_page_of_anothers() -> None:
    cell = of_two([TWO[0], "virtio-rng-pci"], "others-page")[0]
    assert cell.observed is Path.NOT_APPLICABLE
    assert "no other device of this machine goes through a mapping" in cell.evidence.note


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_device_reaches_what_is_mapped_for_another(platform: str) -> None:
    """Behind one IOMMU, with the very address that its neighbour has just used."""
    cells = mixed(platform, "others-page")
    assert wrong(cells) == []
    assert ways(cells) == ("blocked", "bypass", "translated", "bypass", "blocked", "direct", "direct")
    for cell in cells:
        if cell.observed is Path.BLOCKED:
            assert cell.evidence.live
            assert not [w for w in cell.evidence.witnesses if w.touched and w.role == "data"]


@pytest.mark.parametrize("platform", SHARED)
def test_where_all_share_one_table_they_share_what_is_mapped(platform: str) -> None:
    cells = mixed(platform, "others-page")
    assert wrong(cells) == []
    assert ways(cells) == WAYS[: len(cells)]


def test_a_domain_that_has_the_others_page_would_show() -> None:
    """The same question where the answer is another: the neighbour's page is in this device's tables as well."""

    def map_it(rig: Rig) -> None:
        for other in rig.others:
            rig.ops.map(other.data)

    cells = of_two(TWO, "others-page", map_it)
    assert [(cell.observed, cell.mismatch) for cell in cells] == [(Path.TRANSLATED, True)] * 2
