# SPDX-License-Identifier: Apache-2.0
"""Fault records of one IOMMU, sorted by the device that they are about."""

from __future__ import annotations

from collections import deque
from typing import Final

from virtiova.ports import Fault

MOST: Final = 1024
"""Records kept for one device; older ones give way. Whoever asks now and then sees all."""
_NOT_RECORDED: Final = -1


class FaultSorter:
    """Records as they are read from hardware go in; each device takes its own.

    A device that nobody opened (`open`) has none kept. A record without a source is kept only where there is one
    device that it can be about. ``open(None)``: every record is for whoever takes with None.
    """

    def __init__(self) -> None:
        self._found: dict[int | None, deque[Fault]] = {}

    def open(self, source: int | None) -> None:
        """Keep the records about a device from now on."""
        self._found.setdefault(source, deque(maxlen=MOST))

    def add(self, fault: Fault) -> None:
        """A record, fresh from the hardware."""
        if fault.source == _NOT_RECORDED and len(self._found) == 1:
            (only,) = self._found.values()
            only.append(fault)
            return
        for source in (fault.source, None):
            if source in self._found:
                self._found[source].append(fault)

    def take(self, source: int | None) -> list[Fault]:
        """The records about a device since the last call, oldest first."""
        found = list(self._found[source])
        self._found[source].clear()
        return found
