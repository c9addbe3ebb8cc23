# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of the gate's protocol: the programs of main thread and workers, and a search of all states.

One main thread takes a mapping away and acknowledges it, a stated number of times; workers do a stated number of
batches each. A step is one memory access, one system call, or what the memory does by itself (`memory_models`). The
programs are lists of the operations of ``gate.h``, function by function: `atoms` gives those of a function, and a test
compares them with the header.

The mapping is one entry with a generation; to take it away is to store the next one. A worker loads the entry once a
batch, and then touches the page that it leads to. Acknowledging generation g promises that its page is not touched any
more: neither by an access that starts later, nor by one that started earlier and has not arrived yet.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from memory_models import ACQUIRE, MODELS, RELAXED, RELEASE, SEQ_CST, Model

EVERYBODY: Final = 1 << 30
LOADS: Final = {"load", "entry", "wait"}


class Op(NamedTuple):
    """One step of a program.

    ``of`` is the function of ``gate.h`` that it belongs to, "" if to none, and ``how`` the word before it there. A
    "load" of 0 goes on at the label ``zero``, "jump" at ``zero`` in any case, "either" there or behind it.
    """

    kind: str
    var: str = ""
    value: int = 0
    order: str = ""
    of: str = ""
    how: str = ""
    zero: str = ""

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.kind, self.var, self.value or "", self.order) if part != "")


Program = tuple[Op, ...]


def leave(me: int, out: str) -> Program:
    of = "vv_gate_leave"
    return (
        Op("store", f"busy{me}", 0, SEQ_CST, of),
        Op("load", "stop", 0, SEQ_CST, of, "if", zero=out),
        Op("wake", f"busy{me}", EVERYBODY, of=of),
    )


def worker(me: int, batches: int) -> Program:
    """What worker ``me`` does: so many batches, each inside of the gate."""
    of = "vv_gate_enter"
    steps: list[Op] = []
    for batch in range(batches):
        look, come, enter, out = (f"{batch} {word}" for word in ("look", "come", "in", "out"))
        steps += [
            Op("label", look),
            Op("load", "stop", 0, ACQUIRE, of, "while", zero=come),
            Op("wait", "stop", 1, of=of),
            Op("jump", zero=look),
            Op("label", come),
            Op("store", f"busy{me}", 1, SEQ_CST, of),
            Op("load", "stop", 0, SEQ_CST, of, "if not", zero=enter),
            *leave(me, look),
            Op("jump", zero=look),
            Op("label", enter),
            Op("entry", "entry", 0, RELAXED),
            Op("touch", f"page{me}"),
            Op("touch", f"page{me}"),
            *leave(me, out),
            Op("label", out),
        ]
    return tuple(steps)


def await_idle(each: int, label: str) -> Program:
    """The main thread looks for a while, and then sleeps; how long it looks is open."""
    of = "vv_gate_await"
    return (
        Op("label", label),
        Op("load", f"busy{each}", 0, SEQ_CST, of, "while", zero=f"{label} idle"),
        Op("either", zero=label),
        Op("wait", f"busy{each}", 1, of=of),
        Op("jump", zero=label),
        Op("label", f"{label} idle"),
    )


def main_thread(workers: int, gates: int) -> Program:
    """What the main thread does: so many mappings are taken away, each under the gate."""
    steps: list[Op] = []
    for generation in range(1, gates + 1):
        steps += [Op("store", "stop", 1, SEQ_CST, "vv_gate_close")]
        for each in range(workers):
            steps += await_idle(each, f"{generation} await {each}")
        steps += [Op("store", "entry", generation + 1, RELAXED), Op("acknowledge", "", generation)]
        steps += [Op("store", "stop", 0, RELEASE, "vv_gate_open"), Op("wake", "stop", EVERYBODY, of="vv_gate_open")]
    return tuple(steps)


def atoms(program: Program, function: str) -> list[str]:
    """The operations of a function of ``gate.h``, the first time that the program goes through it."""
    found: list[str] = []
    for op in program:
        if op.of == function:
            value = "" if op.kind in {"load", "wake"} else str(op.value)
            found.append(" ".join(filter(None, (op.how, op.kind, op.var.rstrip("0123456789"), value, op.order))))
        elif op.of and found and found[-1] != f"call {op.of}":
            found.append(f"call {op.of}")
        elif op.kind in {"entry", "acknowledge"} and found:
            break
    return found


# -- the states --------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """``at``: the step that each thread does next; ``leaf``: the generation that each has loaded; ``asleep``: who is
    in a futex; ``patience``: how often each may still come back from there for no reason; ``acked``: the last promise.
    """

    memory: Any
    at: tuple[int, ...]
    leaf: tuple[int, ...]
    asleep: tuple[bool, ...]
    patience: tuple[int, ...]
    acked: int


class BrokenError(Exception):
    """A step that breaks the promise."""


def put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


@dataclass(frozen=True)
class Found:
    """What came of a search. ``trace``: the steps to what is wrong, the shortest way."""

    states: int
    steps: int
    wrong: str = ""
    trace: tuple[str, ...] = ()


class Search:
    """All states of ``programs``, thread 0 being the main thread, over one model of memory.

    ``spurious``: how often each worker's futex returns although nobody woke it, as futexes may.
    """

    def __init__(self, programs: Sequence[Program], model: str, spurious: int = 0) -> None:
        self.programs = programs
        self.labels = [{op.var: at for at, op in enumerate(program) if op.kind == "label"} for program in programs]
        self.pages = [f"page{each}" for each in range(len(programs) - 1)]
        # The pages are there to be judged, by the thread that acknowledges.
        readers: dict[str, set[int]] = {page: {0} for page in self.pages}
        for thread, program in enumerate(programs):
            for op in program:
                if op.kind in {"store", "wake", *LOADS}:
                    readers.setdefault(op.var, set()).update([thread] * (op.kind in LOADS))
        self.memory: Model = MODELS[model]({var: sorted(who) for var, who in readers.items()}, len(programs))
        self.spurious = spurious

    def first(self) -> State:
        count = len(self.programs)
        nothing = (0,) * count
        state = State(self.memory.first(), nothing, (1,) * count, (False,) * count, (self.spurious,) * count, acked=0)
        for thread in range(count):
            state = self.go(state, thread, 0)
        return state

    def go(self, state: State, thread: int, at: int) -> State:
        """``thread`` goes on at a step, or behind it if that one only says where to go."""
        program = self.programs[thread]
        while at < len(program) and program[at].kind in {"label", "jump"}:
            at = at + 1 if program[at].kind == "label" else self.labels[thread][program[at].zero]
        return state._replace(at=put(state.at, thread, at))

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """All that may happen next, each with its name. Raises `BrokenError` where a promise is broken."""
        for memory in self.memory.by_itself(state.memory):
            yield "memory: a store arrives", state._replace(memory=memory)
        for thread, program in enumerate(self.programs):
            at = state.at[thread]
            if state.asleep[thread]:
                if state.patience[thread]:
                    woken = state._replace(
                        asleep=put(state.asleep, thread, False),
                        patience=put(state.patience, thread, state.patience[thread] - 1),
                    )
                    yield f"thread {thread}: wakes for no reason", self.go(woken, thread, at + 1)
            elif at < len(program):
                name = f"thread {thread}: {program[at]}"
                for after in self.step(state, thread, program[at]):
                    yield name, after

    def step(self, state: State, thread: int, op: Op) -> Iterator[State]:
        at, memory = state.at[thread], state.memory
        match op.kind:
            case "store":
                stored = self.memory.store(memory, thread, op.var, op.value, op.order)
                if stored is not None:
                    yield self.go(state._replace(memory=stored), thread, at + 1)
            case "load":
                for value, loaded in self.memory.loads(memory, thread, op.var, op.order):
                    yield self.go(
                        state._replace(memory=loaded), thread, at + 1 if value else self.labels[thread][op.zero]
                    )
            case "either":
                yield self.go(state, thread, at + 1)
                yield self.go(state, thread, self.labels[thread][op.zero])
            case "entry":
                for value, loaded in self.memory.loads(memory, thread, op.var, op.order):
                    leaf = put(state.leaf, thread, max(value, 1))
                    yield self.go(state._replace(memory=loaded, leaf=leaf), thread, at + 1)
            case "touch":
                if state.leaf[thread] <= state.acked:
                    raise BrokenError(f"thread {thread} touches page {state.leaf[thread]} after it was acknowledged")
                touched = self.memory.store(memory, thread, op.var, 1, RELAXED)
                yield self.go(state._replace(memory=touched), thread, at + 1)
            case "acknowledge":
                for each in self.pages:
                    if not self.memory.knows(memory, thread, each):
                        raise BrokenError(f"page {op.value} is acknowledged, and an access to {each} is on its way")
                yield self.go(state._replace(acked=op.value), thread, at + 1)
            case "wait":
                yield from self.wait(state, thread, op)
            case "wake":
                yield from self.wake(state, thread, op)
            case _:
                raise AssertionError(op)

    def wait(self, state: State, thread: int, op: Op) -> Iterator[State]:
        """Compare and fall asleep at once: the kernel does both under a lock."""
        at, memory = state.at[thread], self.memory.barrier(state.memory, thread)
        if memory is not None:
            for value, loaded in self.memory.loads(memory, thread, op.var, SEQ_CST):
                if value == op.value or op.value < 0:
                    yield state._replace(memory=loaded, asleep=put(state.asleep, thread, True))
                else:
                    yield self.go(state._replace(memory=loaded), thread, at + 1)

    def wake(self, state: State, thread: int, op: Op) -> Iterator[State]:
        memory = self.memory.barrier(state.memory, thread)
        if memory is None:
            return
        sleepers = [
            each
            for each, asleep in enumerate(state.asleep)
            if asleep and self.programs[each][state.at[each]].var == op.var
        ]
        # Fewer than there are: any of them.
        for chosen in [sleepers] if op.value >= len(sleepers) else [[each] for each in sleepers]:
            after = state._replace(memory=memory)
            for each in chosen:
                after = self.go(after._replace(asleep=put(after.asleep, each, False)), each, after.at[each] + 1)
            yield self.go(after, thread, state.at[thread] + 1)

    def done(self, state: State) -> bool:
        return all(at == len(program) for at, program in zip(state.at, self.programs, strict=True))

    def run(self, most: int = 3_000_000) -> Found:
        """Look at all states, breadth first; stop at the first that is wrong."""
        start = self.first()
        number = {start: 0}
        came: list[tuple[int, str]] = [(0, "")]
        before: list[list[int]] = [[]]
        ends: list[int] = []
        queue = deque([start])
        steps = 0
        while queue:
            state = queue.popleft()
            here = number[state]
            moved = False
            try:
                for name, after in self.steps(state):
                    steps += 1
                    moved = moved or after != state
                    if after not in number:
                        number[after] = len(came)
                        came.append((here, name))
                        before.append([])
                        queue.append(after)
                    before[number[after]].append(here)
            except BrokenError as error:
                return Found(len(came), steps, str(error), trace(came, here))
            if not moved:
                if not self.done(state):
                    return Found(len(came), steps, "nobody can go on", trace(came, here))
                ends.append(here)
            if len(came) > most:
                raise RuntimeError(f"more than {most} states")
        lost = self.without_end(before, ends)
        if lost is not None:
            return Found(len(came), steps, "from here on nobody comes to the end", trace(came, lost))
        return Found(len(came), steps)

    @staticmethod
    def without_end(before: Sequence[Sequence[int]], ends: Sequence[int]) -> int | None:
        """The first state from which no way leads to an end: threads that go round for ever."""
        reached = bytearray(len(before))
        todo = list(ends)
        for each in ends:
            reached[each] = 1
        while todo:
            for each in before[todo.pop()]:
                if not reached[each]:
                    reached[each] = 1
                    todo.append(each)
        lost = reached.find(0)
        return None if lost < 0 else lost


def programs(workers: int, gates: int, batches: int) -> tuple[Program, ...]:
    return main_thread(workers, gates), *(worker(each, batches) for each in range(workers))


def trace(came: Sequence[tuple[int, str]], at: int) -> tuple[str, ...]:
    names: list[str] = []
    while at:
        at, name = came[at]
        names.append(name)
    return tuple(reversed(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 2), ("gates", 1), ("batches", 1), ("spurious", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args()
    wrong = 0
    for model in MODELS:
        found = Search(programs(options.workers, options.gates, options.batches), model, options.spurious).run()
        print(f"{model}: {found.states} states, {found.steps} steps: {found.wrong or 'nothing wrong'}", flush=True)
        for line in found.trace:
            print(f"    {line}")
        wrong += bool(found.wrong)
    return wrong != 0


if __name__ == "__main__":
    raise SystemExit(main())
