# SPDX-License-Identifier: Apache-2.0
"""The gate's protocol with one mistake each: every order weakened, every step left out, and some more.

Each is refuted by the search, or it is in `HARMLESS` with the reason. So the search is able to fail, and the protocol
has nothing in it that it does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from gate_model import Op, Program
from memory_models import ACQUIRE, RELAXED, RELEASE, SEQ_CST

Change = Callable[[Program], Program]
"""What becomes of the program of every thread; one that has nothing to change stays as it is."""

WEAKER: Final = {
    ("store", SEQ_CST): (RELEASE, RELAXED),
    ("store", RELEASE): (RELAXED,),
    ("load", SEQ_CST): (ACQUIRE, RELAXED),
    ("load", ACQUIRE): (RELAXED,),
}


def place(op: Op) -> str:
    """What a reader calls a step: function, what it does, to which variable."""
    value = f" = {op.value}" if op.kind == "store" else ""
    return f"{op.of}: {op.how} {op.kind} {op.var.rstrip('0123456789')}{value}".replace(":  ", ": ")


def each(program: Program, where: str, become: Callable[[Op], tuple[Op, ...]]) -> Program:
    return tuple(new for op in program for new in (become(op) if op.of and place(op) == where else (op,)))


def left_out(op: Op) -> tuple[Op, ...]:
    """Nothing; for a load, as if it had given 0."""
    return (Op("jump", zero=op.zero),) if op.kind == "load" else ()


def generated(programs: tuple[Program, ...]) -> Iterator[tuple[str, Change]]:
    """Every step of ``gate.h`` left out, and every order of it weakened by one or two steps."""
    ops = {place(op): op for program in programs for op in program if op.of}
    for where, op in ops.items():
        yield f"{where}: left out", partial(each, where=where, become=left_out)
        for order in WEAKER.get((op.kind, op.order), ()):
            yield f"{where}: {order}", replaced(where, order=order)


def swapped(first: str, second: str) -> Change:
    """Two steps of one function in the other order, wherever the first is directly before the second."""

    def change(program: Program) -> Program:
        steps = list(program)
        for at in range(len(steps) - 1):
            if place(steps[at]) == first and place(steps[at + 1]) == second:
                steps[at], steps[at + 1] = steps[at + 1], steps[at]
        return tuple(steps)

    return change


def moved(kind: str, behind: str) -> Change:
    """The step of that kind (or store to that variable) goes behind the next, or else the last, that is ``behind``."""

    def change(program: Program) -> Program:
        steps: list[Op] = []
        held: list[Op] = []
        for op in program:
            if kind in {op.kind, f"{op.kind} {op.var}"}:
                held.append(op)
                continue
            steps.append(op)
            if place(op) == behind:
                steps += held
                held = []
        return tuple(steps)

    return change


def first_of(kind: str) -> Change:
    """Of all steps of this kind only the first is left: what was looked up is kept for the next batch."""

    def change(program: Program) -> Program:
        found = [at for at, op in enumerate(program) if op.kind == kind]
        return tuple(op for at, op in enumerate(program) if at not in found[1:])

    return change


def replaced(where: str, **fields: Any) -> Change:
    return lambda program: each(program, where, lambda op: (op._replace(**fields),))


def one_worker_only(program: Program) -> Program:
    """The main thread waits for the first worker and forgets the others."""
    return tuple(op for op in program if op.of != "vv_gate_await" or op.var == "busy0")


OTHERS: Final[dict[str, Change]] = {
    "the worker looks before it says that it is busy": swapped(
        "vv_gate_enter: store busy = 1", "vv_gate_enter: if not load stop"
    ),
    "one worker is woken": replaced("vv_gate_open: wake stop", value=1),
    "woken before the gate is open": swapped("vv_gate_open: store stop = 0", "vv_gate_open: wake stop"),
    "asleep without another look": replaced("vv_gate_enter: wait stop", value=-1),
    "only one worker is waited for": one_worker_only,
    "the translation is changed once the gate is open": moved("store entry", "vv_gate_open: wake stop"),
    "acknowledged before the gate is closed": lambda program: tuple(
        sorted(program, key=lambda op: op.kind != "acknowledge")
    ),
    "what was looked up is kept for the next batch": first_of("entry"),
}

HARMLESS: Final = {
    "vv_gate_await: wait busy: left out": "looks for ever instead of sleeping",
    "vv_gate_enter: while load stop: left out": "says that it is busy, and takes it back, instead of sleeping",
    "vv_gate_enter: wait stop: left out": "looks for ever instead of sleeping",
    "vv_gate_enter: while load stop: relaxed": "the look that decides is the one after busy = 1",
}
