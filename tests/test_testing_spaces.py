# SPDX-License-Identifier: Apache-2.0
"""`check_address_space`: honest spaces pass, each mistake is found by the check that is made for it, in few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

import virtiova.testing
from space_mutants import MUTANTS, Flickers, Mine
from virtiova import _core
from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import AddressSpace, MediatedSpace, Miss, Span, flat_spans
from virtiova.errors import UsageError
from virtiova.iommu.soft import SoftIommu
from virtiova.testing import (
    Behind,
    Check,
    CheckFailed,
    Memory,
    Space,
    Table,
    address_space_checks,
    behind,
    check_address_space,
)

USER = 0x7000_0000_0000


class Regions:
    """A front end's memory table over a `Memory`: user addresses are guest-physical ones and `USER`."""

    homes: tuple[tuple[int, int, int, _core.Window], ...] = ()

    def __init__(self, memory: Memory) -> None:
        self.ram = memory.ram
        self.window = _core.Window(memory.buffer)
        self.place = memory.place

    def gpa_of(self, uva: UVA, length: int) -> Sequence[Span] | Miss:
        return flat_spans(self.ram, uva - USER, length, Access.RW)

    def window_of(self, gpa: GPA, length: int) -> tuple[_core.Window, int]:
        return self.window, self.place(gpa)

    def watch(self, gone: Callable[[], None]) -> None:
        pass


class Answered(Behind):
    """An `Iotlb`, filled as a front end does."""

    def __init__(self, memory: Memory, space: Callable[[Memory, Iotlb], AddressSpace]) -> None:
        iotlb = Iotlb(Regions(memory))
        super().__init__(space(memory, iotlb), Table())

        def invalidate(iova: int, size: int) -> None:
            iotlb.invalidate(iova, size)

        self.update = lambda iova, gpa, size, access: iotlb.update(iova, size, UVA(gpa + USER), access)
        self.invalidate = invalidate


class Programmed(Behind):
    """A `SoftIommu`, which poisons what is unmapped, and caches until it is told."""

    def __init__(self, memory: Memory) -> None:
        iommu = SoftIommu(memory.ram)
        iommu.enable()
        super().__init__(MediatedSpace(memory.ram, iommu), Table())

        def update(iova: int, gpa: int, size: int, access: Access) -> None:
            iommu.map(IOVA(iova), GPA(gpa), size, access)
            iommu.invalidate()

        def invalidate(iova: int, size: int) -> None:
            before = bytes(memory.buffer)
            end = iova + size
            for page in [page for page in iommu._table if iova <= page < end]:
                iommu.unmap(IOVA(page), PAGE_SIZE)
            iommu.invalidate()
            memory.buffer[:] = before

        self.update, self.invalidate = update, invalidate


HONEST: dict[str, tuple[int, Callable[[Memory], Space]]] = {
    "mine": (PAGE_SIZE, Mine),
    "table": (16, behind(MediatedSpace, 16)),
    "soft": (PAGE_SIZE, Programmed),
    "iotlb": (16, lambda memory: Answered(memory, lambda memory, iotlb: MediatedSpace(memory.ram, iotlb))),
    "cached": (256, lambda memory: Answered(memory, lambda memory, iotlb: CachedSpace(memory.ram, iotlb))),
    "cached pages": (PAGE_SIZE, lambda memory: Answered(memory, lambda memory, iotlb: CachedSpace(memory.ram, iotlb))),
}
SETS = [
    pytest.param(check, id=f"{name}-{check}")
    for name, (granule, make) in HONEST.items()
    for check in address_space_checks(make, granule=granule, examples=15)
    if name != "mine" or str(check) not in {"sized", "translate"}
]


@pytest.mark.parametrize("check", SETS)
def test_what_is_right_passes(check: Check) -> None:
    check()


@pytest.mark.parametrize(("name", "make", "check"), [pytest.param(*row, id=f"{row[0]}-{row[2]}") for row in MUTANTS])
def test_each_mistake_is_found_by_the_check_for_it(name: str, make: Callable[[Memory], Space], check: str) -> None:
    with pytest.raises(CheckFailed, match=f"^check_address_space: 1 of 1 checks: {check}\n") as caught:
        check_address_space(make, only=[check])
    (outcome,) = caught.value.outcomes
    steps = [line for line in outcome.words.splitlines() if line.startswith("    space.")]
    assert 1 <= len(steps) <= 8, "not the shortest history"


def test_every_check_has_a_mistake_that_it_finds() -> None:
    assert {row[2] for row in MUTANTS} == {str(check) for check in address_space_checks(Mine)}


def test_the_history_that_is_shown_shows_it() -> None:
    """What is printed is Python, and to be run by hand."""
    (make,) = (row[1] for row in MUTANTS if row[0] == "joined")
    with pytest.raises(CheckFailed) as caught:
        check_address_space(make, only=["neighbours"])
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    space.")]
    seen = []
    for honest in (Mine, make):
        names: dict[str, Any] = {"space": honest(Memory()), "Access": Access, "payload": virtiova.testing.payload}
        exec("\n".join(lines[:-1]), names)
        seen.append(eval(lines[-1], names) if "read" in lines[-1] else bytes(names["space"].memory.buffer))
    assert seen[0] != seen[1]


def test_the_same_seed_shows_the_same() -> None:
    (make,) = (row[1] for row in MUTANTS if row[0] == "exact")
    words = set()
    for _ in range(2):
        with pytest.raises(CheckFailed) as caught:
            check_address_space(make, only=["invalidate"], seed=5)
        words.add(str(caught.value))
    assert len(words) == 1


def test_what_is_different_each_time_is_said_so() -> None:
    with pytest.raises(CheckFailed, match=r"does not always give the same|gave other bytes"):
        check_address_space(Flickers, only=["moves", "any-history"])


def test_a_cache_may_forget() -> None:
    class Forgetful(Mine):
        """All but four pages are lost at the next update."""

        def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
            self.pages = dict(list(self.pages.items())[-4:])
            super().update(iova, gpa, size, access)

    class Lost(Mine):
        def update(self, iova: int, gpa: int, size: int, access: Access) -> None:
            if iova % (2 * PAGE_SIZE):
                super().update(iova, gpa, size, access)

    report = check_address_space(Forgetful, forgets=True, only=["any-history", "replaces", "moves"])
    assert [outcome.result for outcome in report] == ["pass"] * 3
    with pytest.raises(CheckFailed):
        check_address_space(Forgetful, only=["invalidate"])
    with pytest.raises(CheckFailed):
        check_address_space(Lost, forgets=True, only=["moves"])


def test_what_is_expected_to_fail_must() -> None:
    report = check_address_space(behind(MediatedSpace), only=["moves"])
    assert [(outcome.name, outcome.result) for outcome in report] == [("moves", "pass")]
    (make,) = (row[1] for row in MUTANTS if row[0] == "truncated")
    report = check_address_space(make, only=["invalidate-all", "sized"], expected={"invalidate-all": "known"})
    assert {outcome.name: outcome.result for outcome in report} == {"invalidate-all": "expected", "sized": "n/a"}
    assert "n/a       sized" in str(report)
    with pytest.raises(CheckFailed, match=r"moves: expected to fail \(once\), but: pass"):
        check_address_space(Mine, only=["moves"], expected={"moves": "once"})


def test_what_the_code_under_test_raised_is_the_cause() -> None:
    (make,) = (row[1] for row in MUTANTS if row[0] == "raises")
    with pytest.raises(CheckFailed, match="raised KeyError") as caught:
        check_address_space(make, only=["unmapped"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_narrow_addresses() -> None:
    report = check_address_space(Mine, width=39, only=["top", "wrap", "invalidate-all", "any-history"], examples=20)
    assert {outcome.result for outcome in report} == {"pass"}


@pytest.mark.parametrize("options", [{"granule": 8192}, {"granule": 48}, {"width": 20}, {"only": ["mvoes"]}])
def test_what_cannot_be_asked_for(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"wanted|did you mean"):
        check_address_space(Mine, **options)  # type: ignore[arg-type]
