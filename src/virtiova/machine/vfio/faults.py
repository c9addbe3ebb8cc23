# SPDX-License-Identifier: Apache-2.0
"""The kernel's log as fault records: what its IOMMU drivers print of an access that was stopped."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final

from virtiova.ports import Fault

_DMAR: Final = re.compile(
    r"DMAR: \[DMA (?P<kind>Read|Write)[^\]]*\] Request device \[(?P<source>[0-9a-f:.]{7})\](?: PASID \w+)? "
    r"fault addr (?:0x)?(?P<address>[0-9a-f]{1,16}) \[fault reason (?P<code>0x[0-9a-f]+|\d+)\] ?(?P<words>[^\n]*)"
)
_AMD: Final = re.compile(
    r"(?P<source>[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): AMD-Vi: Event logged \[IO_PAGE_FAULT domain=\S+ "
    r"address=0x(?P<address>[0-9a-f]{1,16}) flags=0x(?P<flags>[0-9a-f]+)"
)
_AMD_WRITE: Final = 1 << 5
_LONGEST: Final = 8192
_MOST: Final = 4096
"""Lines looked at in one go."""


def parse(line: str) -> Fault | None:
    """The fault that a line of the log tells of."""
    if match := _DMAR.search(line):
        words = match["words"].strip() or f"reason {match['code']}"
        return Fault(int(match["address"], 16), match["kind"] == "Write", _source(match["source"]), words, ())
    if match := _AMD.search(line):
        write = bool(int(match["flags"], 16) & _AMD_WRITE)
        return Fault(int(match["address"], 16), write, _source(match["source"]), "I/O page fault", ())
    return None


def _source(text: str) -> int:
    try:
        bus, rest = text.split(":")
        slot, function = rest.split(".")
        return int(bus, 16) << 8 | int(slot, 16) << 3 | int(function, 16)
    except ValueError:
        return -1


class KernelLog:
    """``/dev/kmsg`` from now on, for one device. Where it may not be read there are no faults, which proves nothing."""

    def __init__(self, source: int) -> None:
        self._source = source
        self._fd = -1
        self.words: list[str] = []
        """The lines that were faults, as they were."""
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def readable(self) -> bool:
        """May it be read?"""
        return self._fd >= 0

    def read(self) -> list[Fault]:
        """The faults since the last call. The kernel prints ten in five seconds at most."""
        found: list[Fault] = []
        for _ in range(_MOST if self.readable else 0):
            try:
                record = os.read(self._fd, _LONGEST)
            except BlockingIOError:
                break
            except OSError:
                # EPIPE: records were overwritten before they were read. The next read goes on with the oldest.
                continue
            line = record.decode("utf-8", "replace").partition(";")[2].partition("\n")[0]
            fault = parse(line)
            if fault is not None and fault.source == self._source:
                found.append(fault)
                self.words.append(line)
        return found

    def close(self) -> None:
        """May be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
