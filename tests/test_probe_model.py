# SPDX-License-Identifier: Apache-2.0
"""The probe on the in-process machine: liars are caught, nobody else is accused, silence is no answer."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable

import pytest

from probe_kit import GENERAL, KINDS, Cells, model_cells, observed, wrong
from virtiova import probe
from virtiova.addr import AddressKind
from virtiova.device.rng import Rng
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import FlatSpace
from virtiova.machine.model import Behaviour, ModelDevice, ModelIommu, ModelMachine
from virtiova.machine.model_transport import ModelTransport
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import find
from virtiova.probe.paths import PAST
from virtiova.probe.rig import LENGTH
from virtiova.result import Cell, Path
from virtiova.ring.chain import Chain

BEHAVIOURS: tuple[Behaviour, ...] = ("honest", "quirky", "lying")
PATHS = ("device-writes", "device-reads", "ring", "indirect", "split-buffer")
TABLES = ("empty-tables", "past-end", "unmapped", "read-only", "write-only", "unmap")


def cell_of(make: Callable[[], ModelMachine], name: str) -> Cell:
    return run_cell(make, find(name), machine="model", iommu="soft", device="model")


# -- who is who ----------------------------------------------------------------------------------------------------


def classify(cells: list[Cell]) -> str:
    """What a stranger makes of a device, from its cells only."""
    if any(cell.mismatch and cell.explained is None for cell in cells):
        return "lying"
    return "honest" if any(cell.offered for cell in cells) else "quirky"


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_they_are_told_apart(seed: int) -> None:
    dice = random.Random(seed)
    shuffled = [pair for pair in itertools.product(BEHAVIOURS, KINDS) for _ in range(2)]
    dice.shuffle(shuffled)
    wanted = ("device-writes", "ring", dice.choice(PATHS), dice.choice(TABLES))
    answers = [classify(list(probe.model(behaviour, kind, wanted))) for behaviour, kind in shuffled]
    assert answers == [behaviour for behaviour, _ in shuffled]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PATHS, *TABLES, "unmap-stale", "remap", "remap-stale"])
def test_one_experiment_is_enough_to_catch_a_liar(kind: str, name: str) -> None:
    cell = model_cells("lying", kind)[name]
    if cell.observed is Path.NOT_APPLICABLE:
        assert (kind, name) in {("rng", "device-reads"), ("rng", "write-only")}
        return
    assert (cell.offered, cell.accepted) == (True, True)
    assert (cell.observed, cell.mismatch, cell.explained) == (Path.BYPASS, True, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iommu", ["soft", "none"])
@pytest.mark.parametrize("behaviour", ["honest", "quirky"])
def test_nobody_else_is_accused(behaviour: str, kind: str, iommu: str) -> None:
    cells = model_cells(behaviour, kind, iommu)
    assert list(cells) == GENERAL
    assert wrong(list(cells.values())) == []
    assert all(cell.explained is None for cell in cells.values())


def test_without_an_iommu_nobody_can_lie() -> None:
    for kind in KINDS:
        assert wrong(list(model_cells("lying", kind, "none").values())) == []


# -- what each experiment sees --------------------------------------------------------------------------------------

HONEST = {
    "msi": "translated",
    "empty-tables": "blocked",
    "translation-off": "direct",
    "bus-master-off": "blocked",
    "device-writes": "translated",
    "device-reads": "translated",
    "ring": "translated",
    "indirect": "translated",
    "split-buffer": "translated",
    "past-end": "blocked",
    "unmapped": "blocked",
    "read-only": "blocked",
    "write-only": "blocked",
    "unmap": "blocked",
    "unmap-stale": "stale",
    "remap": "translated",
    "remap-stale": "stale",
    "not-taken": "refused",
    "carry-on": "blocked",
    "no-version-1": "bypass",
    "renegotiate": "refused",
}
QUIRKY = {name: "bypass" for name in (*PATHS, *TABLES, "unmap-stale", "remap", "remap-stale", "renegotiate")} | {
    "msi": "translated",
    "translation-off": "direct",
    "bus-master-off": "blocked",
    "never-offered": "refused",
}
NONE = {name: "direct" for name in ("msi", *PATHS)} | {"bus-master-off": "blocked"}


def without_reads(cells: dict[str, str], kind: str) -> dict[str, str]:
    return {k: v for k, v in cells.items() if kind != "rng" or k not in ("device-reads", "write-only")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen(kind: str) -> None:
    assert observed(model_cells("honest", kind)) == without_reads(HONEST, kind)
    assert observed(model_cells("quirky", kind)) == without_reads(QUIRKY, kind)
    refused = {"not-taken": "refused", "renegotiate": "refused", "carry-on": "blocked", "no-version-1": "direct"}
    assert observed(model_cells("honest", kind, "none")) == without_reads(NONE | refused, kind)
    declined = {"never-offered": "refused", "renegotiate": "direct"}
    assert observed(model_cells("quirky", kind, "none")) == without_reads(NONE | declined, kind)


def test_every_experiment_is_in_the_table() -> None:
    assert set(GENERAL) == HONEST.keys() | QUIRKY.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_apply_says_why(kind: str) -> None:
    for behaviour, iommu in itertools.product(BEHAVIOURS, ("soft", "none")):
        for cell in model_cells(behaviour, kind, iommu).values():
            if cell.observed is Path.NOT_APPLICABLE:
                assert cell.evidence.note
                assert (cell.predicted, cell.address) == ([], AddressKind.UNKNOWN)
                assert not cell.mismatch


def test_the_kind_of_address() -> None:
    def kinds(cells: Cells) -> set[str]:
        return {cells[name].address for name in PATHS}

    assert kinds(model_cells("honest")) == {"iova"}
    assert kinds(model_cells("quirky")) == {"gpa"}
    assert kinds(model_cells("honest", "blk", "none")) == {"gpa"}
    assert model_cells("honest")["translation-off"].address == "gpa"


@pytest.mark.parametrize(
    ("insists", "not_taken", "predicted"),
    [
        (True, Path.REFUSED, [Path.REFUSED]),
        (None, Path.BYPASS, [Path.BYPASS, Path.REFUSED]),
        (False, Path.BYPASS, [Path.BYPASS]),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_whether_a_device_insists(
    kind: ModelDevice, insists: bool | None, not_taken: Path, predicted: list[Path]
) -> None:
    def make() -> ModelMachine:
        return ModelMachine("honest", kind, insists=insists)

    for name in ("not-taken", "renegotiate"):
        cell = cell_of(make, name)
        assert (cell.observed, cell.predicted) == (not_taken, predicted)
        assert (cell.offered, cell.accepted) == (True, False)
    carried = cell_of(make, "carry-on")
    assert carried.observed is (Path.BLOCKED if insists else Path.NOT_APPLICABLE)
    assert cell_of(make, "device-writes").observed is Path.TRANSLATED


def test_one_that_is_said_to_insist_and_does_not() -> None:
    class Lax(ModelMachine):
        def __init__(self) -> None:
            super().__init__("honest", insists=False)
            self.insists = True

    cell = cell_of(Lax, "not-taken")
    assert (cell.observed, cell.predicted, cell.mismatch) == (Path.BYPASS, [Path.REFUSED], True)


# -- silence ---------------------------------------------------------------------------------------------------------


class Dumb(ModelMachine):
    """Negotiates, and then never looks at a ring."""

    def __init__(self, behaviour: Behaviour, kind: ModelDevice, iommu: ModelIommu) -> None:
        super().__init__(behaviour, kind, iommu=iommu)
        registers = self.transport
        assert isinstance(registers, ModelTransport)
        registers._device.pending = lambda queue: False  # type: ignore[method-assign]


class Hung(Dumb):
    """The same, and every wait lasts as long as it may: nobody can know that nothing will come."""

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        time.sleep(min(seconds, 0.02))
        return super().wait(done, seconds)


@pytest.mark.parametrize("machine", [Dumb, Hung])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", ["honest", "quirky"])
def test_a_device_that_never_completes_is_unknown(machine: type[Dumb], kind: ModelDevice, behaviour: Behaviour) -> None:
    begun = time.monotonic()
    for name in GENERAL:
        cell = cell_of(lambda: machine(behaviour, kind, "soft"), name)
        if cell.evidence.features_ok is False and not cell.evidence.carried_on:
            assert cell.observed is Path.REFUSED
        else:
            assert cell.observed in (Path.UNKNOWN, Path.NOT_APPLICABLE), name
        assert not cell.mismatch
    assert time.monotonic() - begun < 20


def test_a_device_that_dies_half_way_is_unknown_from_then_on() -> None:
    """The first request, before the tables change, is served; what comes after it is silence, not isolation."""

    class Tired(ModelMachine):
        def __init__(self) -> None:
            super().__init__("honest", "blk")
            registers = self.transport
            assert isinstance(registers, ModelTransport)
            device = registers._device
            serve = device.handle
            left = [1]

            def handle(queue: int, chain: object) -> None:
                left[0] -= 1
                serve(queue, chain)  # type: ignore[arg-type]

            device.handle = handle  # type: ignore[method-assign]
            device.pending = lambda queue: left[0] > 0  # type: ignore[method-assign]

    assert cell_of(Tired, "device-writes").observed is Path.TRANSLATED
    for name in ("unmap", "unmap-stale", "remap", "remap-stale"):
        assert cell_of(Tired, name).observed is Path.UNKNOWN, name


def test_lost_messages_leave_bypass_and_direct_open() -> None:
    """Page B was reached; whether around an IOMMU or with none in front, only a control can say."""

    class Mute(ModelMachine):
        def __init__(self, behaviour: Behaviour) -> None:
            super().__init__(behaviour, "blk")
            assert self.transport is not None
            self.transport.msi = None

    for name in (*PATHS, "translation-off"):
        cell = cell_of(lambda: Mute("quirky"), name)
        assert (cell.observed, cell.evidence.control) == (Path.UNKNOWN, "none"), name
        assert not cell.mismatch
    assert cell_of(lambda: Mute("quirky"), "msi").observed is Path.NOT_APPLICABLE
    assert cell_of(lambda: Mute("honest"), "device-writes").observed is Path.TRANSLATED, "page A says it all"
    assert cell_of(lambda: Mute("lying"), "device-writes").observed is Path.UNKNOWN


class Torn(ModelMachine):
    """Honest but for some bytes: after the first ``through`` bytes of its payload it forgets the IOMMU."""

    def __init__(self, through: int) -> None:
        super().__init__("honest", "rng")
        registers = self.transport
        assert isinstance(registers, ModelTransport)
        assert isinstance(self.ram, MappedRam)
        flat = FlatSpace(self.ram)

        def handle(queue: int, chain: Chain) -> None:
            chain.write(os.urandom(through))
            chain._space = flat
            chain.write(os.urandom(chain.writable))

        registers._device.handle = handle  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "through", "path"),
    [
        ("device-writes", 0, Path.MIXED),  # data around, used ring through
        ("device-writes", LENGTH // 2, Path.MIXED),
        ("device-writes", LENGTH, Path.TRANSLATED),
        ("split-buffer", LENGTH // 2, Path.MIXED),  # the first page through, the second one around
        ("split-buffer", LENGTH, Path.TRANSLATED),
        ("ring", 0, Path.MIXED),  # copy A was read, and page B written
    ],
)
def test_a_device_that_forgets_the_iommu_for_some_bytes_is_mixed(name: str, through: int, path: Path) -> None:
    cell = cell_of(lambda: Torn(through), name)
    assert (cell.observed, cell.predicted) == (path, [Path.TRANSLATED])
    assert cell.mismatch is (path is Path.MIXED)


def test_the_byte_past_the_end_of_one_that_does_not_ask() -> None:
    cell = cell_of(lambda: Torn(LENGTH - PAST), "past-end")
    assert (cell.predicted, cell.mismatch) == ([Path.BLOCKED], True)


@pytest.mark.parametrize("behaviour", ["quirky", "lying"])
def test_bytes_that_happen_to_be_the_paint_do_not_hide_a_device(behaviour: Behaviour) -> None:
    """An entropy device may write any byte: the watched ones must be so many that none of it is an accident."""

    class Painter(ModelMachine):
        def __init__(self) -> None:
            super().__init__(behaviour, "rng")
            registers = self.transport
            assert isinstance(registers, ModelTransport)
            assert isinstance(registers._device, Rng)
            registers._device._source = lambda count: b"p" * count

    assert cell_of(Painter, "device-writes").observed is Path.BYPASS
    assert cell_of(Painter, "past-end").observed is Path.BYPASS
