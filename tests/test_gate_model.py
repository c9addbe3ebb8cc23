# SPDX-License-Identifier: Apache-2.0
"""The gate's protocol in all interleavings, and in all interleavings with a mistake in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gate_model import Search, atoms, main_thread, programs, worker
from gate_mutants import HARMLESS, OTHERS, generated
from memory_models import MODELS

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "src" / "virtiova" / "gate.h"
FUNCTIONS = ("vv_gate_leave", "vv_gate_enter", "vv_gate_close", "vv_gate_await", "vv_gate_open")
MUTANTS = {**dict(generated(programs(1, 1, 2))), **OTHERS}


SIZES = [(1, 2), (2, 1)]
"""Mappings taken away, batches of each worker."""
LONG = [(model, size, spurious) for model in ("sc", "tso") for size in [*SIZES, (2, 2)] for spurious in (0, 1)]
LONG += [("c11", size, 0) for size in SIZES]


@pytest.mark.parametrize("model", MODELS)
def test_every_interleaving(model: str) -> None:
    found = Search(programs(2, 1, 1), model).run()
    assert not found.wrong, "\n".join(found.trace)
    assert found.states > 2000, "two workers do more than that"


@pytest.mark.parametrize("model", MODELS)
def test_a_futex_may_return_for_no_reason(model: str) -> None:
    found = Search(programs(1, 2, 1), model, spurious=1).run()
    assert not found.wrong, "\n".join(found.trace)


@pytest.mark.sweep
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("model", "size", "spurious"), LONG)
def test_every_interleaving_of_more(model: str, size: tuple[int, int], spurious: int) -> None:
    found = Search(programs(2, *size), model, spurious).run()
    assert not found.wrong, "\n".join(found.trace)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in HARMLESS])
def test_every_mistake_is_found(name: str) -> None:
    for size in ((1, 1, 2), (2, 1, 1)):
        right = programs(*size)
        wrong = tuple(map(MUTANTS[name], right))
        for model in MODELS:
            if wrong != right and Search(wrong, model).run().wrong:
                return
    pytest.fail("the search finds nothing wrong with it")


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_so(name: str) -> None:
    """So that the table of these has nothing in it that is not."""
    right = programs(2, 1, 1)
    wrong = tuple(map(MUTANTS[name], right))
    assert wrong != right
    for model in MODELS:
        assert not Search(wrong, model).run().wrong


def test_more_than_one_memory_is_needed() -> None:
    """The mistake of every such protocol: harmless unless stores wait in a buffer."""
    wrong = tuple(map(MUTANTS["vv_gate_enter: store busy = 1: release"], programs(1, 1, 1)))
    assert [name for name in MODELS if Search(wrong, name).run().wrong] == ["tso", "c11"]
    wrong = tuple(map(MUTANTS["vv_gate_open: store stop = 0: relaxed"], programs(1, 1, 2)))
    assert [name for name in MODELS if Search(wrong, name).run().wrong] == ["c11"]


# -- the model is that of the header -----------------------------------------------------------------------------

ATOM = re.compile(
    r"(?:(?P<how>while|if) \((?P<no>!?))?"
    r"(?:__atomic_(?P<kind>load|store)_n\(&?(?:\w+->)?(?P<var>\w+)(?:, (?P<value>\d+))?, __ATOMIC_(?P<order>\w+)\)"
    r"|vv_futex_(?P<futex>wait|wake)\(&?(?:\w+->)?(?P<word>\w+)(?:, (?P<seen>\w+))?\)"
    r"|(?P<other>__atomic_\w+|syscall)"
    r"|(?P<call>vv_gate_\w+)\()"
)


def body(function: str) -> str:
    found = re.search(rf"^static inline \w+ {function}\(.*?\)\n{{\n(.*?)^}}", HEADER.read_text(), re.M | re.S)
    assert found, f"{HEADER.name} has no {function}"
    return found[1]


def written(function: str) -> list[str]:
    """The atomic operations and calls of a function of the header, in order, in the words of the model."""
    found: list[str] = []
    for match in ATOM.finditer(body(function)):
        how = (match["how"] or "") + (" not" if match["no"] else "")
        if match["call"]:
            found.append(f"call {match['call']}")
        elif match["futex"]:
            found.append(" ".join(filter(None, (match["futex"], match["word"], match["seen"]))))
        else:
            assert not match["other"], f"{function} has {match['other']}, of which the model knows nothing"
            words = (how, match["kind"], match["var"], match["value"], match["order"].lower())
            found.append(" ".join(filter(None, words)))
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_model_is_the_header(function: str) -> None:
    modelled = atoms(worker(0, 1), function) or atoms(main_thread(1, 1), function)
    # The header leaves it to the caller to close the gate and then to await each worker.
    assert written(function) == [step for step in modelled if step != "call vv_gate_await"]


def test_the_header_has_no_other_functions_of_the_gate() -> None:
    """`vv_gate_wanted` only makes a batch end early: what it sees decides nothing that the promise rests on."""
    found = re.findall(r"^static inline .*?(vv_gate_\w+)\(", HEADER.read_text(), re.M)
    assert {*found} == {*FUNCTIONS, "vv_gate_wanted"}


def test_the_search_as_a_program() -> None:
    command = [sys.executable, str(ROOT / "tests" / "gate_model.py"), "--workers", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"(\w+: \d+ states, \d+ steps: nothing wrong\n){3}", done.stdout)
