# SPDX-License-Identifier: Apache-2.0
"""Pages that are to be looked for in the kernel's table: it is asked by a call that answers at once, but only after the
look at the rings that missed them is over. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

from virtiova.serve.misses import Want, Wanted


class Lookups(Wanted):
    """What is to be looked for."""

    def __init__(self) -> None:
        super().__init__()
        self._todo: list[Want] = []

    def ask(self, wants: Iterable[Want], now: float) -> list[bytes]:
        """Note them for `due`. There is nothing to send."""
        self._todo += self._fresh(wants, now)
        return []

    def due(self) -> list[Want]:
        """What was asked for since the last time."""
        todo, self._todo = self._todo, []
        return todo

    def drop(self, wants: Iterable[Want]) -> None:
        """These are not looked for now, nor refused: whoever still wants them asks again."""
        for want in wants:
            self._asked.pop(want, None)

    def open(self, want: Want) -> bool:
        """Whether nothing has come of it yet."""
        return self.awaited((want,))

    def forget(self) -> None:
        """All addresses mean something else from here on."""
        super().forget()
        self._todo.clear()
