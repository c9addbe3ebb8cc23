# SPDX-License-Identifier: Apache-2.0
"""Spaces that are wrong on purpose: each fails the experiments that are about what it does wrong, and only those."""

from __future__ import annotations

import pytest

from probe_kit import KINDS, model_cells
from ring_kit import make_ram
from virtiova import probe
from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import Miss, Span
from virtiova.dma.wrong import MAX_PAGES, SPACES, StaleTranslator
from virtiova.errors import AccessError
from virtiova.iommu.soft import SoftIommu
from virtiova.result import Path

PLATFORM = {"msi", "translation-off", "bus-master-off"}
NEGOTIATION = {"not-taken", "carry-on", "never-offered", "no-version-1", "renegotiate"}
INVALIDATION = {"unmap", "remap"}


def mismatches(behaviour: str, kind: str) -> dict[str, Path]:
    cells = model_cells(behaviour, kind).values()
    return {cell.experiment: cell.observed for cell in cells if cell.mismatch}


@pytest.mark.parametrize("kind", [*KINDS, "console"])
def test_stale_fails_the_invalidation_experiments_and_only_those(kind: str) -> None:
    assert mismatches("stale", kind) == dict.fromkeys(INVALIDATION, Path.STALE)


@pytest.mark.parametrize("kind", [*KINDS, "console"])
def test_leaky_fails_the_translation_experiments_and_only_those(kind: str) -> None:
    """A lying device is one with a leaky space. All that depends on translation goes around; all else is as it was."""
    seen = mismatches("lying", kind)
    every = {name for name, cell in model_cells("lying", kind).items() if cell.observed is not Path.NOT_APPLICABLE}
    assert seen == dict.fromkeys(every - PLATFORM - NEGOTIATION, Path.BYPASS)
    assert {"device-writes", "ring", "indirect", "unmapped", "read-only", *INVALIDATION} <= set(seen)


@pytest.mark.parametrize("behaviour", ["lying", "stale"])
def test_without_an_iommu_neither_shows(behaviour: str) -> None:
    assert not any(cell.mismatch for cell in probe.model(behaviour, iommu="none"))


# -- by hand

X = 0x7000_0000_0000


@pytest.fixture
def parts() -> tuple[MappedRam, SoftIommu]:
    ram = make_ram(0x8000)
    soft = SoftIommu(ram)
    soft.enable()
    soft.map(IOVA(X), GPA(0x1000), 2 * PAGE_SIZE)
    return ram, soft


def test_names() -> None:
    assert set(SPACES) == {"honest", "leaky", "stale"}


def test_honest_is_not_wrong(parts: tuple[MappedRam, SoftIommu]) -> None:
    ram, soft = parts
    space = SPACES["honest"](ram, soft)
    space.write(X, b"through")
    assert ram.read(GPA(0x1000), 7) == b"through"
    soft.unmap(IOVA(X), PAGE_SIZE)
    soft.invalidate()
    with pytest.raises(AccessError):
        space.write(X, b"again")


def test_leaky_goes_around(parts: tuple[MappedRam, SoftIommu]) -> None:
    ram, soft = parts
    space = SPACES["leaky"](ram, soft)
    space.write(0x4000, b"around")
    assert ram.read(GPA(0x4000), 6) == b"around"
    assert soft.faults() == []
    with pytest.raises(AccessError):
        space.write(X, b"no RAM there")


def test_stale_goes_on(parts: tuple[MappedRam, SoftIommu]) -> None:
    ram, soft = parts
    space = SPACES["stale"](ram, soft)
    space.write(X + 0xFFE, b"old!")
    soft.unmap(IOVA(X), 2 * PAGE_SIZE)
    soft.invalidate()
    space.write(X + 0xFFE, b"more")
    assert ram.read(GPA(0x1FFE), 4) == b"more"
    assert soft.faults() == []
    with pytest.raises(AccessError):
        space.read(X, 4)
    assert len(soft.faults()) == 1, "reading was never allowed before"
    assert SPACES["stale"](ram, soft).translate(X, 4, Access.WRITE) != [Span(GPA(0x1000), 4)]


def test_stale_asks_for_what_is_no_ram_any_more() -> None:
    """A page that was RAM and is not: nothing but the true answer is left."""
    ram = make_ram(0x4000)
    soft = SoftIommu(ram)
    soft.enable()
    soft.map(IOVA(X), GPA(0x2000), PAGE_SIZE)
    translator = StaleTranslator(ram, soft)
    assert translator.lookup(X, 8, Access.READ) == [Span(GPA(0x2000), 8)]
    ram._blocks = ()
    soft._table.clear()
    soft.invalidate()
    assert isinstance(translator.lookup(X, 8, Access.READ), Miss)


def test_stale_keeps_no_more_than_it_may(parts: tuple[MappedRam, SoftIommu]) -> None:
    class Endless:
        def lookup(self, address: int, length: int, access: Access) -> list[Span]:
            return [Span(GPA(0x1000 + address % PAGE_SIZE), length)]

    translator = StaleTranslator(parts[0], Endless())
    for page in range(MAX_PAGES + 5):
        translator.lookup(page * PAGE_SIZE, 1, Access.READ)
    assert len(translator._kept) == 5
