# SPDX-License-Identifier: Apache-2.0
"""`check_device`: our devices and an honest one pass, each mistake is found by the check that is made for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from device_mutants import ASKS, MUTANTS, Echo
from virtiova.device.base import Device
from virtiova.device.blk import Blk
from virtiova.device.console import Console
from virtiova.device.net import Net
from virtiova.device.rng import Rng
from virtiova.device.store import MemoryStore
from virtiova.testing import Ask, Check, CheckFailed, check_device, device_checks


class Wire:
    """Whatever is sent is gone."""

    def send(self, data: bytes, /) -> None:
        pass

    def full(self) -> bool:
        return False


OURS: dict[str, Callable[[], Device]] = {
    "blk": lambda: Blk(MemoryStore(bytearray(8192)), serial=b"a serial number"),
    "read-only blk": lambda: Blk(MemoryStore(bytearray(512))),
    "rng": Rng,
    "net": lambda: Net(Wire()),
    "console": lambda: Console(Wire(), columns=80, rows=25),
}
SETS = [
    pytest.param(check, id=f"{name}-{check}")
    for name, make in OURS.items()
    for check in device_checks(make, examples=25)
] + [pytest.param(check, id=f"echo-{check}") for check in device_checks(Echo, requests=ASKS)]


@pytest.mark.parametrize("check", SETS)
def test_what_is_right_passes(check: Check) -> None:
    check()


@pytest.mark.parametrize(("make", "check"), [pytest.param(*row, id=f"{row[0].__name__}-{row[1]}") for row in MUTANTS])
def test_each_mistake_is_found_by_the_check_for_it(make: type[Device], check: str) -> None:
    with pytest.raises(CheckFailed, match=f"^check_device: 1 of 1 checks: {check}\n") as caught:
        check_device(make, requests=ASKS, only=[check])
    (outcome,) = caught.value.outcomes
    assert outcome.words.startswith(f"{check}: not so: ")
    assert "    device = make()" in outcome.words


def test_every_check_has_a_mistake_that_it_finds() -> None:
    assert {check for _, check in MUTANTS} == {str(check) for check in device_checks(Echo)}


def test_without_requests_any_bytes_do_if_they_are_answered() -> None:
    report = check_device(Echo, only=["answers", "cut"], examples=10)
    assert {outcome.result for outcome in report} == {"pass"}

    class Silent(Echo):
        def pending(self, queue: int) -> bool:
            return False

    report = check_device(Silent, only=["answers", "declares"])
    assert {outcome.name: outcome.result for outcome in report} == {"answers": "n/a", "declares": "pass"}
    assert "`requests`" in report["answers"].words
    with pytest.raises(CheckFailed, match="was not used"):
        check_device(Silent, requests=ASKS, only=["answers"])


def test_answers_that_are_not_the_same_twice_are_compared_by_length() -> None:
    report = check_device(Rng, requests=[Ask("dice", b"", 100)], only=["answers", "packed", "cut"], examples=10)
    assert {outcome.result for outcome in report} == {"pass"}


def test_what_a_device_raised_is_the_cause() -> None:
    class Breaks(Echo):
        def config(self) -> bytes:
            raise RuntimeError("no configuration today")

    with pytest.raises(CheckFailed, match="no configuration today") as caught:
        check_device(Breaks, only=["declares"])
    assert isinstance(caught.value.__cause__, RuntimeError)
