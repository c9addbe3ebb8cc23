# SPDX-License-Identifier: Apache-2.0
"""Three memories for the model of the gate: what a load may give, and when a store arrives. All values are immutable.

`Plain`: every access takes effect at once, in some order (sequential consistency).

`Buffered`: x86-TSO (Sewell et al., "x86-TSO: a rigorous and usable programmer's model", CACM 53(7), 2010). Stores wait
in a first-in first-out buffer of their thread, which sees them already; a seq_cst store and a system call of the futex
wait until the buffer is empty. Whether a load is relaxed, acquire or seq_cst makes no difference there.

`Views`: C11's orders as far as they are needed here, after the view machines of Kang et al. ("A promising semantics
for relaxed-memory concurrency", POPL 2017) without promises. A store is a message; of each variable a thread has seen
the messages up to some number, and may load that one or any later one. Release attaches what the storing thread has
seen, acquire takes it over. A seq_cst load gives no older message than the last seq_cst store. So a load may be stale,
and a store may arrive after a later one. Every variable has one writer, so that messages are ordered as they are
written. That a load takes effect after a later store is not modelled as such: what has not happened before the
acknowledgement by the rules of the language counts as happening after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

RELAXED, ACQUIRE, RELEASE, SEQ_CST = "relaxed", "acquire", "release", "seq_cst"


class Model(Protocol):
    """What memory does. ``Any`` is the state of one, which only the model itself looks into."""

    def __init__(self, readers: Mapping[str, Sequence[int]], threads: int) -> None:
        """``readers``: of each variable, the threads to which it matters which of its values they have seen."""

    def first(self) -> Any:
        """All variables are 0."""

    def loads(self, memory: Any, thread: int, var: str, order: str) -> Iterator[tuple[int, Any]]:
        """What a load may give, each with the memory afterwards. None: the thread has to wait."""

    def store(self, memory: Any, thread: int, var: str, value: int, order: str) -> Any | None:
        """The memory after a store. None: the thread has to wait."""

    def barrier(self, memory: Any, thread: int) -> Any | None:
        """After a full barrier, which the kernel's futex has on both sides. None: the thread has to wait."""

    def by_itself(self, memory: Any) -> Iterator[Any]:
        """What may happen without any thread."""

    def knows(self, memory: Any, thread: int, var: str) -> bool:
        """Whether all accesses to a variable so far happened before what this thread does now."""


class Plain:
    """Sequential consistency. The memory is a tuple of values."""

    def __init__(self, readers: Mapping[str, Sequence[int]], threads: int) -> None:
        self.at = {name: number for number, name in enumerate(readers)}

    def first(self) -> Any:
        return (0,) * len(self.at)

    def loads(self, memory: Any, thread: int, var: str, order: str) -> Iterator[tuple[int, Any]]:
        yield memory[self.at[var]], memory

    def store(self, memory: Any, thread: int, var: str, value: int, order: str) -> Any | None:
        at = self.at[var]
        return (*memory[:at], value, *memory[at + 1 :])

    def barrier(self, memory: Any, thread: int) -> Any | None:
        return memory

    def by_itself(self, memory: Any) -> Iterator[Any]:
        return iter(())

    def knows(self, memory: Any, thread: int, var: str) -> bool:
        return True


class Buffered:
    """x86-TSO. The memory is (values, a buffer of (variable, value) for each thread)."""

    def __init__(self, readers: Mapping[str, Sequence[int]], threads: int) -> None:
        self.at = {name: number for number, name in enumerate(readers)}
        self.threads = threads

    def first(self) -> Any:
        return ((0,) * len(self.at), ((),) * self.threads)

    def loads(self, memory: Any, thread: int, var: str, order: str) -> Iterator[tuple[int, Any]]:
        values, buffers = memory
        at = self.at[var]
        yield next((value for name, value in reversed(buffers[thread]) if name == at), values[at]), memory

    def store(self, memory: Any, thread: int, var: str, value: int, order: str) -> Any | None:
        values, buffers = memory
        at = self.at[var]
        if order == SEQ_CST:
            return None if buffers[thread] else ((*values[:at], value, *values[at + 1 :]), buffers)
        mine = (*buffers[thread], (at, value))
        return values, (*buffers[:thread], mine, *buffers[thread + 1 :])

    def barrier(self, memory: Any, thread: int) -> Any | None:
        return None if memory[1][thread] else memory

    def by_itself(self, memory: Any) -> Iterator[Any]:
        values, buffers = memory
        for thread, buffer in enumerate(buffers):
            if buffer:
                at, value = buffer[0]
                later = (*buffers[:thread], buffer[1:], *buffers[thread + 1 :])
                yield (*values[:at], value, *values[at + 1 :]), later

    def knows(self, memory: Any, thread: int, var: str) -> bool:
        """No access is on its way: what arrives later is seen when it does."""
        return all(at != self.at[var] for buffer in memory[1] for at, _ in buffer)


class Views:
    """C11. The memory is (messages of each variable: (value, view or None); views of the threads; seq_cst's view)."""

    def __init__(self, readers: Mapping[str, Sequence[int]], threads: int) -> None:
        self.at = {name: number for number, name in enumerate(readers)}
        self.readers = tuple(readers.values())
        self.threads = threads

    def first(self) -> Any:
        nothing = (0,) * len(self.at)
        return (((0, nothing),),) * len(self.at), (nothing,) * self.threads, nothing

    def loads(self, memory: Any, thread: int, var: str, order: str) -> Iterator[tuple[int, Any]]:
        messages, views, strong = memory
        at, view = self.at[var], views[thread]
        first = max(view[at], strong[at]) if order == SEQ_CST else view[at]
        for number in range(first, len(messages[at])):
            value, attached = messages[at][number]
            seen = (*view[:at], number, *view[at + 1 :])
            if order in {ACQUIRE, SEQ_CST} and attached:
                seen = tuple(map(max, seen, attached))
            yield value, self.short(messages, (*views[:thread], seen, *views[thread + 1 :]), strong)

    def store(self, memory: Any, thread: int, var: str, value: int, order: str) -> Any | None:
        messages, views, strong = memory
        at = self.at[var]
        number = len(messages[at])
        seen = (*views[thread][:at], number, *views[thread][at + 1 :])
        message = (value, seen if order in {RELEASE, SEQ_CST} else None)
        if order == SEQ_CST:
            strong = (*strong[:at], number, *strong[at + 1 :])
        after = (*messages[:at], (*messages[at], message), *messages[at + 1 :])
        return self.short(after, (*views[:thread], seen, *views[thread + 1 :]), strong)

    def barrier(self, memory: Any, thread: int) -> Any | None:
        messages, views, strong = memory
        both = tuple(map(max, views[thread], strong))
        return self.short(messages, (*views[:thread], both, *views[thread + 1 :]), both)

    def short(self, messages: Any, views: Any, strong: Any) -> Any:
        """Without the messages that all readers have left behind: the same state in fewer numbers."""
        base = [
            min((views[each][at] for each in readers), default=len(messages[at]) - 1)
            for at, readers in enumerate(self.readers)
        ]
        if not any(base):
            return messages, views, strong

        def less(view: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(number - low if number > low else 0 for number, low in zip(view, base, strict=True))

        kept = tuple(
            tuple((value, view and less(view)) for value, view in old[low:])
            for old, low in zip(messages, base, strict=True)
        )
        return kept, tuple(map(less, views)), less(strong)

    def by_itself(self, memory: Any) -> Iterator[Any]:
        return iter(())

    def knows(self, memory: Any, thread: int, var: str) -> bool:
        at = self.at[var]
        seen: int = memory[1][thread][at]
        return seen == len(memory[0][at]) - 1


MODELS: dict[str, type[Model]] = {"sc": Plain, "tso": Buffered, "c11": Views}
