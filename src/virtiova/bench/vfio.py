# SPDX-License-Identifier: Apache-2.0
"""What a mapping costs in a real IOMMU, through VFIO: to make it, and to take it away.

One buffer of 2 MiB is mapped at many IOVAs, so that what is measured is neither memory nor its pinning for the first
time. No device is driven: it has no permission to do DMA. Held against the IOTLB messages of a back end of ours, which
make and take back mappings in software.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from virtiova.bench.front import Session
from virtiova.bench.iotlb import ACKNOWLEDGED, PAIR, acknowledged_pairs, block_pairs
from virtiova.bench.memory import PAGE, Memory, Shape
from virtiova.bench.rows import Document, Row, Setting, Trust
from virtiova.bench.run import How, Say, Steal, about, doubts, place, placed, rotated, session
from virtiova.bench.subjects import NET, Running
from virtiova.bench.waits import Waits
from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.vfio.calls import call
from virtiova.machine.vfio.container import Opened
from virtiova.machine.vfio.limits import Limits
from virtiova.machine.vfio.machine import in_a_machine
from virtiova.wire import vfio

HUGE: Final = 2 << 20
PAGES: Final = (1, 16, 512)
"""Of a mapping: 4 KiB, 64 KiB, 2 MiB."""
BATCHES: Final = (1, 64)
"""Mappings that are made before they are taken back, with one call."""
MAP: Final = "pages mapped/s"
UNMAP: Final = "pages unmapped/s"
CALL: Final = "call"
RATIO: Final = "pair: ratio"
OURS: Final = "VFIO"
_RESIDENT: Final = 1000
_MADV_HUGEPAGE: Final = 14
_HIGHEST: Final = 1 << 38
_READ_WRITE: Final = vfio.DmaFlag.READ | vfio.DmaFlag.WRITE


class Maps:
    """A container with the device's group in it, and where in it to map."""

    def __init__(self, address: str) -> None:
        self._cleanup = contextlib.ExitStack()
        try:
            opened = Opened(address)
            self._cleanup.callback(opened.close)
            self._container = opened.container
            self.address = opened.address
            self._base = _base(Limits(opened.container), max(BATCHES) * HUGE)
            memory = mmap.mmap(-1, 2 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._cleanup.callback(memory.close)
            with contextlib.suppress(OSError):
                memory.madvise(_MADV_HUGEPAGE)
            window = ctypes.c_char.from_buffer(memory)
            start = ctypes.addressof(window)
            del window
            self._address = -(-start // HUGE) * HUGE
            for at in range(0, 2 * HUGE, PAGE):
                memory[at] = 1
        except BaseException:
            self.close()
            raise

    def batch(self, pages: int, count: int) -> tuple[int, int]:
        """Nanoseconds that it took to make ``count`` mappings, and to take them all back with one call."""
        size = pages * PAGE
        made = [vfio.map_dma(self._base + number * size, self._address, size, _READ_WRITE) for number in range(count)]
        back = vfio.unmap_dma(self._base, count * size)
        begin = time.monotonic_ns()
        for one in made:
            call(self._container, "VFIO_IOMMU_MAP_DMA", vfio.IOMMU_MAP_DMA, one)
        middle = time.monotonic_ns()
        call(self._container, "VFIO_IOMMU_UNMAP_DMA", vfio.IOMMU_UNMAP_DMA, back)
        end = time.monotonic_ns()
        if vfio.unmapped(back) != count * size:
            raise NotPossibleError(f"VFIO unmapped 0x{vfio.unmapped(back):x} bytes of 0x{count * size:x}")
        return middle - begin, end - middle

    def nothing(self, count: int = 100) -> float:
        """Microseconds of a call that does nothing: what each of the others has in it."""
        begin = time.monotonic_ns()
        for _ in range(count):
            call(self._container, "VFIO_GET_API_VERSION", vfio.GET_API_VERSION)
        return (time.monotonic_ns() - begin) / 1e3 / count

    def close(self) -> None:
        """Let go of the device; what is mapped goes with it. May be called more than once."""
        self._cleanup.close()


def _base(limits: Limits, size: int) -> int:
    """Where ``size`` bytes may be mapped, in the highest range that a small IOMMU has, too."""
    for first, last in reversed(limits.ranges):
        start = min(_HIGHEST, last + 1 - size) // HUGE * HUGE
        if start >= first:
            return start
    raise NotPossibleError(f"this IOMMU has no {size >> 20} MiB of IOVAs in one piece: {limits.words()}")


class VfioRun:
    """All rounds of it."""

    def __init__(self, address: str, how: How, say: Say, *, quick: bool = False, subjects: Sequence[str] = ()) -> None:
        self._given, self._how, self._say = address, how, say
        words = [word.lower() for word in subjects]
        self._wanted = [name for name in (OURS, NET.name) if not words or any(word in name.lower() for word in words)]
        if not self._wanted:
            raise UsageError(f"no subject of bench vfio has {' or '.join(subjects)} in its name")
        sizes = (PAGES[0], PAGES[-1]) if quick else PAGES
        self._settings = [Setting(pages=pages, depth=batch) for pages in sizes for batch in BATCHES]
        self.place = place(how.realtime)
        self.trust = Trust()
        self._found: dict[Setting, dict[str, dict[int, float]]] = {setting: {} for setting in self._settings}
        self._calls: dict[int, float] = {}
        self._software: dict[str, dict[int, float]] = {}

    def listed(self) -> Iterator[str]:
        """What would be measured, a line each."""
        if OURS in self._wanted:
            yield from (f"{OURS:<27} {_size(one):>8}, batches of {one.depth}" for one in self._settings)
        if NET.name in self._wanted:
            yield f"{NET.name:<27} pairs of IOTLB messages, {_RESIDENT} resident"

    def document(self) -> Document:
        """Measure it all. Raises `NotPossibleError` with what is missing, as the probe does."""
        self.trust.reasons += doubts(self.place)
        steal = Steal()
        with contextlib.ExitStack() as stack:
            maps = stack.enter_context(contextlib.closing(Maps(self._given)))
            software = self._session(stack) if NET.name in self._wanted else None
            stack.enter_context(placed(self.place))
            for turn in range(self._how.rounds):
                self._say(f"round {turn + 1} of {self._how.rounds}")
                self._round(turn, maps, software)
            self.trust.stolen = steal.share()
            said = f"mappings of {maps.address}'s IOMMU; a pair is one mapping made and taken back"
        rows = list(self._rows())
        where = [*about(self.place, self._how), said]
        if in_a_machine():
            where.append("this is a virtual machine: its program plays the IOMMU, so that only ratios say anything")
        return Document(rows, where, self.trust.verdict(rows))

    def _session(self, stack: contextlib.ExitStack) -> Session:
        memory = stack.enter_context(contextlib.closing(Memory(Shape(_RESIDENT + 256, 2048))))
        running = stack.enter_context(contextlib.closing(Running(NET, self.place, 1)))
        return stack.enter_context(session(running, memory, told=_RESIDENT))

    def _round(self, turn: int, maps: Maps, software: Session | None) -> None:
        """Each setting once, and the software's pairs between them; who is first changes."""
        work: dict[str, Callable[[], None]] = {}
        if OURS in self._wanted:
            work = {repr(one): partial(self._mapped, turn, maps, one) for one in self._settings}
        if software is not None:
            work[NET.name] = partial(self._messages, turn, software)
        for name in rotated(list(work), turn):
            waits = Waits(os.getpid())
            waits.look()
            begin = time.monotonic_ns()
            work[name]()
            quiet = waits.quiet(time.monotonic_ns() - begin)
            self.trust.samples += 1
            self.trust.disturbed += not quiet
            self.trust.waited += waits.waited
            self.trust.looked += waits.looked

    def _mapped(self, turn: int, maps: Maps, setting: Setting) -> None:
        found, count = self._found[setting], setting.depth
        maps.batch(setting.pages, count)
        made: list[int] = []
        back: list[int] = []
        end = time.monotonic() + self._how.seconds
        while time.monotonic() < end or len(made) < 3:
            one, other = maps.batch(setting.pages, count)
            made.append(one)
            back.append(other)
        mapped, unmapped = _middle(made), _middle(back)
        found.setdefault(MAP, {})[turn] = setting.pages * count * 1e9 / max(1, mapped)
        found.setdefault(UNMAP, {})[turn] = setting.pages * count * 1e9 / max(1, unmapped)
        found.setdefault(PAIR, {})[turn] = (mapped + unmapped) / count / 1e3
        self._calls[turn] = maps.nothing()

    def _messages(self, turn: int, software: Session) -> None:
        for figure, measure in ((PAIR, block_pairs), (ACKNOWLEDGED, acknowledged_pairs)):
            self._software.setdefault(figure, {})[turn] = measure(software, _RESIDENT, self._how.seconds / 2)

    # -- rows

    def _rows(self) -> Iterator[Row]:
        for setting in self._settings if OURS in self._wanted else ():
            figures = self._found[setting]
            for figure, unit in ((MAP, "pages/s"), (UNMAP, "pages/s"), (PAIR, "us")):
                yield Row("vfio", OURS, setting, figure, unit, tuple(figures.get(figure, {}).values()))
            beside = self._software.get(ACKNOWLEDGED, {})
            if beside:
                # Batches are against messages in blocks; a mapping alone, which is gone when the call returns, is
                # against a pair that is acknowledged.
                beside = beside if setting.depth == 1 else self._software[PAIR]
                own = figures[PAIR]
                samples = tuple(value / beside[turn] for turn, value in own.items() if beside.get(turn))
                yield Row("vfio", OURS, setting, RATIO, "x", samples, beside=NET.name)
        if OURS in self._wanted:
            yield Row("vfio", f"{OURS}, a call that does nothing", Setting(), CALL, "us", tuple(self._calls.values()))
        for figure, found in self._software.items():
            yield Row("vfio", NET.name, Setting(), figure, "us", tuple(found.values()))


def _middle(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


def _size(setting: Setting) -> str:
    size = setting.pages * PAGE
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
