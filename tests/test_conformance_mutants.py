# SPDX-License-Identifier: Apache-2.0
"""The table of mistakes: each conformance case fails on a back end of ours with the mistake that it is for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mutants import MUTANTS
from virtiova.conformance.case import find
from virtiova.conformance.cases import CASES
from virtiova.conformance.run import Examiner
from virtiova.machine.backend import BackEnd
from virtiova.result import Verdict

MUTANT = Path(__file__).with_name("mutant.py")


def test_each_case_has_a_mistake_that_it_is_for() -> None:
    assert {name.partition("/")[0] for name in MUTANTS} == set(CASES)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mistake_is_found(name: str) -> None:
    row = MUTANTS[name]
    backend = BackEnd(spawn=f"{sys.executable} {MUTANT} {name} {row.command}", kind=row.kind)
    with Examiner(backend) as examiner:
        result = examiner.ask(find(name.partition("/")[0]))
        for _ in range(2):
            # On a loaded machine the ordinary may take too long for there to be an answer.
            if result.result is Verdict.UNKNOWN:
                result = examiner.ask(find(name.partition("/")[0]))
    assert result.result is Verdict.FAIL, result


SETTINGS = {(row.command, row.given): name for name, row in MUTANTS.items()}


@pytest.mark.parametrize("name", SETTINGS.values())
def test_without_a_mistake_nothing_is_found(name: str) -> None:
    """The settings of the table, with no mistake planted."""
    setting = MUTANTS[name]
    kind, command = setting.kind, f"{sys.executable} {MUTANT} without:{name} {setting.command}"
    asked = {
        name.partition("/")[0]
        for name, row in MUTANTS.items()
        if (row.command, row.given) == (setting.command, setting.given)
    }
    with Examiner(BackEnd(spawn=command, kind=kind)) as examiner:
        results = {name: examiner.ask(find(name)) for name in sorted(asked)}
    assert {name for name, result in results.items() if result.result is not Verdict.PASS} == set(), results
