# SPDX-License-Identifier: Apache-2.0
"""What strict mappings cost a real guest: a Debian kernel that maps and unmaps every buffer, beside QEMU's own disk.

One guest under TCG has the same disk several times: served by us and QEMU's own, each with strict mappings, with lazy
ones, and with bit 33 off; and read at random in pieces of 4 KiB by turns. How fast an emulated processor is says
nothing about anybody; the ratio of strict to off does, beside the same ratio of QEMU's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.bench.guest_machine import SIZE_MIB, Assets, Disk, Guest, assets
from virtiova.bench.rows import Document, Row, Setting, Trust
from virtiova.bench.run import RATE, How, Say, Steal, rotated
from virtiova.bench.waits import Waits
from virtiova.errors import NotPossibleError, UsageError, VirtiovaError

STRICT, LAZY = "DMA", "DMA-FQ"
OURS_OFF: Final = Disk("virtiova bit off", True, "")
THEIRS_OFF: Final = Disk("QEMU's own, bit off", False, "")
DISKS: Final = (
    Disk("virtiova strict", True, STRICT),
    Disk("virtiova lazy", True, LAZY),
    OURS_OFF,
    Disk("virtiova strict, direct", True, STRICT, ",indirect_desc=off"),
    Disk("QEMU's own, strict", False, STRICT),
    Disk("QEMU's own, lazy", False, LAZY),
    THEIRS_OFF,
    Disk("QEMU's own, strict, direct", False, STRICT, ",indirect_desc=off"),
)
"""``direct``: without indirect tables, which are one more buffer to be mapped for every request."""
BESIDE: Final = {
    "virtiova strict": "QEMU's own, strict",
    "virtiova lazy": "QEMU's own, lazy",
    "virtiova strict, direct": "QEMU's own, strict, direct",
}
DEPTHS: Final = (1, 32)
RATIO: Final = "ratio"
RATIOS: Final = "ratio of ratios"
COUNTED: Final = ("misses", "invalidates", "kicks", "calls")
_GIVEN_UP: Final = 2
"""Guests that came to nothing, after which no more are started."""


@dataclass(slots=True)
class _Found:
    """Samples of one disk and depth, by round."""

    rates: dict[int, float] = field(default_factory=dict)
    counted: dict[str, dict[int, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class GuestRun:
    """All rounds of it."""

    def __init__(self, how: How, say: Say, *, depths: Sequence[int] = (), subjects: Sequence[str] = ()) -> None:
        self._how, self._say = how, say
        if how.realtime:
            raise UsageError("bench guest has no --realtime: QEMU's threads would be in each other's way")
        words = [word.lower() for word in subjects]
        self._disks = [one for one in DISKS if not words or any(word in one.name.lower() for word in words)]
        if not self._disks:
            raise UsageError(f"no subject of bench guest has {' or '.join(subjects)} in its name")
        self._depths = tuple(depths) or DEPTHS
        self._found = {(disk.name, depth): _Found() for disk in self._disks for depth in self._depths}
        self._missing = ""
        self._complaints: list[str] = []
        self._packages: tuple[str, ...] = ()
        self.trust = Trust()

    def listed(self) -> Iterator[str]:
        """What would be measured, a line for each."""
        for disk in self._disks:
            for depth in self._depths:
                yield f"{disk.name:<27} depth {depth}"

    def document(self) -> Document:
        """Measure it all."""
        steal = Steal()
        try:
            self._say("fetching kernel and tools")
            files = assets()
        except NotPossibleError as reason:
            self._missing = f"n/a: {reason}"
        else:
            self._packages = files.packages
            self._rounds(files)
        if not self._missing:
            self.trust.stolen = steal.share()
        rows = list(self._rows())
        return Document(rows, self._about(), [*self.trust.verdict(rows), *self._complaints])

    def _about(self) -> list[str]:
        kernel = f"{os.uname().sysname} {os.uname().release}"
        said = [
            f"one guest under TCG on {os.cpu_count()} processors of {kernel}; nobody is bound to one of them",
            f"{self._how.rounds} rounds, {self._how.seconds:g} s a sample; medians (least..most); a ratio is the "
            "median of the rounds' ratios",
        ]
        if self._packages:
            said.append(f"in the guest: {', '.join(self._packages)}")
        said.append(
            f"4 KiB at random out of {SIZE_MIB} MiB with O_DIRECT, as many readers as the depth says; "
            "ours: serve blk --memory; QEMU's own: virtio-blk-pci on null-co, read-zeroes=on"
        )
        return said

    def _rounds(self, files: Assets) -> None:
        done = failed = 0
        while done < self._how.rounds and failed < _GIVEN_UP:
            try:
                self._say("the guest boots")
                with Guest(files, self._disks) as guest:
                    while done < self._how.rounds:
                        self._say(f"round {done + 1} of {self._how.rounds}")
                        self._round(guest, done)
                        done += 1
                    self._complaints = [f"the guest's kernel complains: {line[:200]}" for line in guest.complaints()]
            except VirtiovaError as error:
                failed += 1
                for found in self._found.values():
                    found.failures.append(f"round {done + 1}: {error}"[:400])

    def _round(self, guest: Guest, turn: int) -> None:
        for number in map(int, rotated([str(at) for at in range(len(self._disks))], turn)):
            disk = self._disks[number]
            for depth in self._depths:
                found = self._found[disk.name, depth]
                waits = Waits(guest.process.pid)
                before = guest.counters(disk)
                waits.look()
                found.rates[turn] = guest.read(disk, depth, self._how.seconds)
                quiet = waits.quiet(int(self._how.seconds * 1e9))
                self.trust.samples += 1
                self.trust.disturbed += not quiet
                self.trust.waited += waits.waited
                self.trust.looked += waits.looked
                _count(found, turn, before, guest.counters(disk))

    # -- rows

    def _rows(self) -> Iterator[Row]:
        for depth in self._depths:
            for disk in self._disks:
                yield from self._of(disk, depth)

    def _of(self, disk: Disk, depth: int) -> Iterator[Row]:
        found = self._found[disk.name, depth]
        note = self._missing or (f"{len(found.failures)} guests failed; {found.failures[0]}" if found.failures else "")
        setting = Setting(depth=depth)
        yield Row("guest", disk.name, setting, RATE, RATE, tuple(found.rates.values()), note)
        for name, samples in found.counted.items():
            yield Row("guest", disk.name, setting, f"{name} a request", "", tuple(samples.values()))
        off = OURS_OFF if disk.ours else THEIRS_OFF
        if disk.bit and off in self._disks:
            own = self._ratio(disk.name, off.name, depth)
            yield Row("guest", disk.name, setting, RATIO, "x", tuple(own.values()), note, beside=off.name)
            other = BESIDE.get(disk.name, "")
            if (other, depth) in self._found and THEIRS_OFF in self._disks:
                theirs = self._ratio(other, THEIRS_OFF.name, depth)
                both = tuple(own[turn] / theirs[turn] for turn in own if theirs.get(turn))
                yield Row("guest", disk.name, setting, RATIOS, "x", both, note, beside=other)

    def _ratio(self, one: str, other: str, depth: int) -> dict[int, float]:
        """Of the rates in the same round."""
        first, second = self._found[one, depth].rates, self._found[other, depth].rates
        return {turn: rate / second[turn] for turn, rate in first.items() if second.get(turn)}


def _count(found: _Found, turn: int, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """What there was of it for each request between two looks at the counters."""
    requests = after.get("requests", 0) - before.get("requests", 0)
    if requests <= 0:
        return
    for name in COUNTED:
        with contextlib.suppress(KeyError):
            found.counted.setdefault(name, {})[turn] = (after[name] - before[name]) / requests
