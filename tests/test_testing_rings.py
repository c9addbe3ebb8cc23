# SPDX-License-Identifier: Apache-2.0
"""`check_ring`: our ends and somebody else's pass, each mistake is found by the check that is made for it."""

from __future__ import annotations

import pytest

from ring_driver_mutants import DRIVERS, driver
from ring_mutants import DEVICES, device
from virtiova.errors import UsageError
from virtiova.testing import (
    Begin,
    Check,
    CheckFailed,
    DriverEnd,
    NotApplicable,
    Place,
    check_ring,
    our_device,
    our_driver,
    ring_checks,
)

LONG = {"split-lasts"}
"""Once, with both ends of ours."""
SETS = {
    "our device": ring_checks(device=our_device, examples=20),
    "our driver": ring_checks(driver=our_driver, examples=20),
    "tiny device": ring_checks(device=device(), examples=10),
    "tiny driver": ring_checks(driver=driver(), examples=10),
}
CHECKS = [
    pytest.param(check, id=f"{name}-{check}")
    for name, checks in SETS.items()
    for check in checks
    if str(check) not in LONG or name == "our device"
]


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_right_passes(check: Check) -> None:
    check()


ROWS = [
    pytest.param(role, wrong, f"{kind}-{name}", id=f"{role}-{kind}-{wrong}-{name}")
    for role, rows in (("device", DEVICES), ("driver", DRIVERS))
    for wrong, name, kinds in rows
    for kind in kinds
]


@pytest.mark.parametrize(("role", "wrong", "check"), ROWS)
def test_each_mistake_is_found_by_the_check_for_it(role: str, wrong: str, check: str) -> None:
    end = {"device": {"device": device(wrong)}, "driver": {"driver": driver(wrong)}}[role]
    with pytest.raises(CheckFailed, match=f"^check_ring: 1 of 1 checks: {check}\n") as caught:
        check_ring(**end, only=[check])
    (outcome,) = caught.value.outcomes
    steps = [line for line in outcome.words.splitlines() if line.startswith("    ")]
    assert 2 <= len(steps) <= 12, f"not the shortest history:\n{outcome.words}"


def test_every_check_has_a_mistake_that_it_finds() -> None:
    for rows, checks, spare in (
        (DEVICES, ring_checks(device=our_device), set[str]()),
        # Whose memory it is does not matter to a driver that goes by its region.
        (DRIVERS, ring_checks(driver=our_driver), {"scattered", "any-order"}),
    ):
        named = {f"{kind}-{name}" for _, name, kinds in rows for kind in kinds}
        assert named | {f"{kind}-{name}" for kind in ("split", "packed") for name in spare} == set(map(str, checks))


def test_a_method_that_is_not_there_is_not_checked() -> None:
    class Plain:
        def __init__(self, place: Place) -> None:
            inner = our_device(place)
            self.pop, self.push = inner.pop, inner.push

    names = ["split-moves", "split-kicks", "split-interrupts", "packed-put-back"]
    report = check_ring(device=Plain, only=names, examples=20)
    assert {outcome.name: outcome.result for outcome in report} == dict.fromkeys(names[1:], "n/a") | {
        "split-moves": "pass"
    }


def test_an_end_that_only_begins_at_0() -> None:
    def fresh(place: Place) -> DriverEnd:
        if place.begin.start:
            raise NotApplicable("begins at 0")
        return our_driver(place)

    report = check_ring(driver=fresh, only=["split-around", "packed-moves"], examples=20)
    assert [(outcome.name, outcome.result) for outcome in report] == [("split-around", "n/a"), ("packed-moves", "pass")]


def test_what_an_end_lacks_is_not_asked_of_it() -> None:
    names = {str(check) for check in ring_checks(device=our_device)}
    fewer = {str(check) for check in ring_checks(device=our_device, lacks=["indirect", "event-idx"])}
    assert "split-not-taken" in fewer < names
    assert {"split-indirect", "packed-kicks-event-idx", "split-nested", "packed-table-length"} <= names - fewer
    with pytest.raises(UsageError, match="indirect, event-idx"):
        check_ring(device=our_device, lacks=["direct"])  # type: ignore[list-item]


def test_what_is_not_the_drivers_mistake() -> None:
    """A device that never asks not to be notified is simple, not wrong."""

    class Simple:
        def __init__(self, place: Place) -> None:
            inner = our_device(place)
            self.pop, self.push, self.enable_notify = inner.pop, inner.push, inner.enable_notify

        def disable_notify(self) -> None:
            pass

    report = check_ring(device=Simple, only=["split-kicks", "packed-kicks"], examples=30)
    assert {outcome.result for outcome in report} == {"pass"}


@pytest.mark.parametrize("kind", ["split", "packed"])
def test_much_junk(kind: str) -> None:
    """A hostile driver: whatever lies in the ring, our device end touches nothing outside of its space."""
    check_ring(device=our_device, only=[f"{kind}-junk"], examples=150, seed=1)


def test_histories_print_as_what_was_done() -> None:
    assert str(Begin(packed=True, size=4)) == "ring = Begin(packed=True, size=4)"
    with pytest.raises(CheckFailed) as caught:
        check_ring(device=device("counts one more"), only=["split-moves"])
    assert "    driver.add(readable=[" in str(caught.value)
    assert "bytes, wanted" in str(caught.value)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(UsageError, match="neither"):
        check_ring()
    with pytest.raises(UsageError, match="split, packed"):
        check_ring(device=our_device, kinds=["round"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="did you mean 'split-loop'"):
        check_ring(device=our_device, only=["split-lop"])
