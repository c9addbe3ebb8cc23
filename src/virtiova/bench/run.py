# SPDX-License-Identifier: Apache-2.0
"""Rounds of jobs: in each, every subject does every job that it can, by turns, over a fresh connection.

A subject is started anew in every round; one that takes a processor all the time, for every job. What fails is written
down, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from virtiova import _load
from virtiova.bench.front import Sample, Session
from virtiova.bench.memory import Memory, Shape
from virtiova.bench.plan import ALONE, PAGES, Comparison, Job, RingKind, Wanted, comparisons, has_bit, jobs, takes
from virtiova.bench.rows import Document, Row, Setting, Trust
from virtiova.bench.subjects import Place, Running, Subject
from virtiova.bench.table import mapped
from virtiova.errors import MachineError, NotPossibleError, UsageError, VirtiovaError

RATE: Final = "requests/s"
_P50: Final = "latency, median"
_P99: Final = "latency, 99 %"
_GIVEN_UP: Final = 3
"""Failures one after the other, after which a subject is left alone."""
ALONE_DEPTHS: Final = (1, 32, 128)
_MOMENT: Final = 0.002


@dataclass(frozen=True, slots=True)
class How:
    """How often, how long, and where."""

    rounds: int = 9
    seconds: float = 0.2
    realtime: bool = False
    """Both sides come before all other programs: these get a twentieth of the time, if they want it."""


@dataclass(slots=True)
class Found:
    """Samples by round, and what went wrong."""

    samples: dict[int, Sample] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


Say = Callable[[str], None]


class Run:
    """All rounds of one kind. ``say`` is told what is being done."""

    def __init__(self, wanted: Wanted, how: How, say: Say) -> None:
        self._wanted, self._how, self._say = wanted, how, say
        self._subjects = wanted.chosen()
        if not self._subjects and not wanted.named:
            raise UsageError(f"no subject of bench {wanted.kind} has {' or '.join(wanted.subjects)} in its name")
        self._jobs = jobs(wanted)
        if not wanted.named and not any(takes(subject, job) for job in self._jobs for subject in self._subjects):
            names = ", ".join(subject.name for subject in self._subjects)
            raise UsageError(f"nothing is left to measure: no setting that was asked for is one of {names}")
        self.place = place(how.realtime)
        self.trust = Trust()
        self._found: dict[tuple[str, Setting], Found] = {}
        self._bases: dict[tuple[str, Setting], Found] = {}
        """By the setting that each is held against."""
        self._failed: dict[str, int] = {}
        self._running: dict[str, Running] = {}
        self._round = 0

    def listed(self) -> Iterator[str]:
        """What would be measured, a line for each setting of each subject."""
        yield f"{'':<27} DEPTH FRONT  RING    MAPPED"
        for setting in self._alone():
            yield f"{ALONE:<27} {setting.depth:>5} {setting.front:<6} {setting.ring:<7}"
        for job in self._jobs:
            for setting in job.settings():
                for subject in self._subjects:
                    if has_bit(subject, job):
                        where = mapped(setting)
                        line = f"{subject.name:<27} {setting.depth:>5} {setting.front:<6} {setting.ring:<7} {where}"
                        yield f"{line}  {_lacks(subject, job)}".rstrip()

    def document(self) -> Document:
        """Measure it all."""
        self.trust.reasons += doubts(self.place)
        steal = Steal()
        with placed(self.place):
            try:
                for number in range(self._how.rounds):
                    self._round = number
                    self._one_round()
            finally:
                self._stop()
            self.trust.stolen = steal.share()
        rows = list(self._rows())
        words = about(self.place, self._how)
        if self._wanted.kind == "blk":
            words.append(f"images of {self._wanted.image * 4} KiB, read into random ones of {PAGES['blk']} pages")
        return Document(rows, words, self.trust.verdict(rows))

    def _one_round(self) -> None:
        for setting in self._alone():
            self._keep(ALONE, setting, alone(setting.depth, self._how.seconds, self.place, setting.ring))
        for number, job in enumerate(self._jobs):
            self._say(f"round {self._round + 1} of {self._how.rounds}: {number + 1} of {len(self._jobs)}")
            turn = (self._round + number) % max(1, len(self._subjects))
            with contextlib.closing(Memory(Shape(job.mappings, job.pages))) as memory:
                for subject in self._subjects[turn:] + self._subjects[:turn]:
                    if takes(subject, job) and not subject.missing and self._failed.get(subject.name, 0) < _GIVEN_UP:
                        self._try(subject, job, memory)
        self._stop()

    def _try(self, subject: Subject, job: Job, memory: Memory) -> None:
        left = list(job.settings())
        try:
            running = self._running.get(subject.name)
            if running is None:
                running = self._running[subject.name] = Running(subject, self.place, self._wanted.image)
            if job.mappings > 1 and not subject.package:
                self._base(running, job)
            for setting, sample in self._samples(running, job, memory):
                left.remove(setting)
                self._keep(subject.name, setting, sample)
            self._failed[subject.name] = 0
        except VirtiovaError as error:
            if not isinstance(error, NotPossibleError):
                self._failed[subject.name] = self._failed.get(subject.name, 0) + 1
            for setting in left:
                self._of(subject.name, setting).failures.append(f"round {self._round + 1}: {error}")
            self._end(subject)
        finally:
            if subject.spins:
                self._end(subject)

    def _samples(self, running: Running, job: Job, memory: Memory) -> Iterator[tuple[Setting, Sample]]:
        image = self._wanted.image
        if not running.filled:
            with contextlib.closing(Memory(Shape(0, 1024))) as plain, session(running, plain) as writer:
                writer.fill(image)
            running.filled = True
        with session(running, memory, packed=job.ring == "packed") as front:
            if running.subject.kind == "net":
                front.frames()
            else:
                front.reads(image, zeros=running.subject.data == "zeros")
            for setting in job.settings():
                yield setting, front.sample(job.depth, self._how.seconds, sleeping=setting.front == "sleep")
            self.trust.waited += front.waits.waited
            self.trust.looked += front.waits.looked

    def _base(self, running: Running, job: Job) -> None:
        """The same with one mapping, just before: a machine whose speed changes within a round must not decide."""
        pages = PAGES[running.subject.kind]
        with contextlib.closing(Memory(Shape(1, pages))) as memory:
            one = replace(job, mappings=1, pages=pages)
            for setting, sample in self._samples(running, one, memory):
                key = replace(setting, mappings=job.mappings, pages=job.pages)
                self._bases.setdefault((running.subject.name, key), Found()).samples[self._round] = sample

    def _end(self, subject: Subject) -> None:
        running = self._running.pop(subject.name, None)
        if running is not None:
            running.close()

    def _stop(self) -> None:
        for subject in self._subjects:
            self._end(subject)

    # -- what came of it

    def _of(self, subject: str, setting: Setting) -> Found:
        return self._found.setdefault((subject, setting), Found())

    def _keep(self, subject: str, setting: Setting, sample: Sample) -> None:
        self._of(subject, setting).samples[self._round] = sample
        self.trust.samples += 1
        self.trust.disturbed += sample.disturbed > 0.5

    def _rows(self) -> Iterator[Row]:
        kind = self._wanted.kind
        for setting in self._alone():
            rates = [sample.rate for sample in self._of(ALONE, setting).samples.values()]
            yield Row(kind, ALONE, setting, RATE, "1/s", tuple(rates))
        for job in self._jobs:
            for setting in job.settings():
                for subject in self._subjects:
                    if takes(subject, job):
                        yield from self._rows_of(subject, setting)
                    elif has_bit(subject, job):
                        yield Row(kind, subject.name, setting, RATE, "1/s", note=_lacks(subject, job))

    def _alone(self) -> Iterator[Setting]:
        for ring in self._wanted.rings if self._wanted.alone else ():
            for depth in ALONE_DEPTHS:
                yield Setting(depth=depth, front="poll", ring=ring)

    def _rows_of(self, subject: Subject, setting: Setting) -> Iterator[Row]:
        found = self._of(subject.name, setting)
        samples = list(found.samples.values())
        note = subject.missing or _note(found, self._how.rounds)
        row = Row(self._wanted.kind, subject.name, setting, RATE, "1/s", note=note)
        yield replace(row, samples=tuple(sample.rate for sample in samples))
        yield replace(row, samples=tuple(sample.p50 for sample in samples), figure=_P50, unit="us")
        yield replace(row, samples=tuple(sample.p99 for sample in samples), figure=_P99, unit="us")
        for comparison in comparisons(subject, setting):
            ratio = self._ratio(row, found, comparison)
            if ratio is not None:
                yield ratio

    def _ratio(self, row: Row, found: Found, comparison: Comparison) -> Row | None:
        """To the other one's figure of the same round. None where the other was not asked for at all."""
        other = self._found.get((comparison.beside, comparison.setting))
        if comparison.beside == row.subject:
            other = self._bases.get((row.subject, row.setting), other)
        peer = next((one for one in self._subjects if one.name == comparison.beside), None)
        if peer is None or (other is None and not peer.missing):
            return None
        ratios = tuple(
            sample.rate / other.samples[number].rate
            for number, sample in found.samples.items()
            if other is not None and number in other.samples and other.samples[number].rate
        )
        note = row.note or peer.missing or ("" if ratios or other is None else _note(other, self._how.rounds))
        return replace(
            row,
            figure="ratio",
            unit="x",
            samples=ratios,
            note=note,
            beside=comparison.beside,
            beside_setting=None if comparison.setting == row.setting else comparison.setting,
            target=comparison.target,
        )


def _lacks(subject: Subject, job: Job) -> str:
    """Why it has no figure, which is known before."""
    return subject.missing if takes(subject, job) else "n/a: it has no packed rings"


def _note(found: Found, rounds: int) -> str:
    """What to say of failures, the first one in its own words."""
    if not found.failures:
        return "" if found.samples else "not measured: given up"
    return f"failed in {rounds - len(found.samples)} of {rounds} rounds; {found.failures[0]}"[:300]


@contextlib.contextmanager
def session(running: Running, memory: Memory, told: int | None = None, *, packed: bool = False) -> Iterator[Session]:
    """A fresh connection."""
    sock = running.connect()
    try:
        subject = running.subject
        front = Session(
            sock,
            memory,
            running.gone,
            net=subject.kind == "net",
            pid=running.pid,
            told=told,
            shares=subject.spins,
            packed=packed,
        )
    except BaseException:
        sock.close()
        raise
    try:
        yield front
    finally:
        front.close()


def alone(depth: int, seconds: float, where: Place, kind: RingKind = "split") -> Sample:
    """Empty requests, given back by a thread of this process on the other processor."""
    with contextlib.closing(Memory(Shape(0, 1))) as memory:
        ring = memory.ring(0, 256)
        fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        try:
            packed = kind == "packed"
            driver = _load.Driver(memory.map, ring, kick=fds[0], call=fds[1], packed=packed)
            driver.prepare(_load.EMPTY)
            thread = threading.Thread(target=_echo, args=(memory, ring, seconds + 0.2, where, packed))
            thread.start()
            try:
                driver.run(depth, 0.05)
                rates = []
                for _ in range(max(3, round(seconds / _MOMENT))):
                    driver.forget()
                    driver.run(depth, _MOMENT)
                    tally = driver.tally()
                    rates.append(tally["done"] / max(1, tally["nanoseconds"]) * 1e9)
            finally:
                thread.join()
                driver.release()
        finally:
            for fd in fds:
                os.close(fd)
    if driver.wrong:
        raise MachineError(f"the device in this process brought {driver.wrong}")
    p50, p99 = (driver.latency(part) / 1e3 for part in (0.5, 0.99))
    # A moment in which one of the two did not run at all says nothing of what the front end can do.
    rates = sorted(rate for rate in rates if rate) or [0.0]
    return Sample(rates[len(rates) // 2], p50, p99, 0, 0.0)


def _echo(memory: Memory, ring: tuple[int, int, int, int], seconds: float, where: Place, packed: bool) -> None:
    os.sched_setaffinity(0, {where.back})
    _load.echo(memory.map, ring, seconds, packed=packed)


# -- where


def place(realtime: bool = False) -> Place:
    """The first two processors that this process may have."""
    processors = sorted(os.sched_getaffinity(0))
    return Place(processors[0], processors[min(1, len(processors) - 1)], realtime)


@contextlib.contextmanager
def placed(where: Place) -> Iterator[None]:
    """This thread on the front end's processor, and before other programs if that is wanted; as before after that."""
    before, policy, param = os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setaffinity(0, {where.front})
        if where.realtime:
            try:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            except PermissionError:
                raise NotPossibleError("--realtime needs the privilege for it (CAP_SYS_NICE)") from None
        yield
    finally:
        os.sched_setscheduler(0, policy, param)
        os.sched_setaffinity(0, before)


def doubts(where: Place) -> list[str]:
    """What speaks against any run here."""
    if where.front == where.back:
        return ["front end and back end share one processor"]
    return []


def about(where: Place, how: How) -> list[str]:
    """Where and how, in sentences."""
    kernel = os.uname()
    words = [
        f"front end on processor {where.front}, back end on processor {where.back}, of {os.cpu_count()}; "
        f"{kernel.sysname} {kernel.release}, {_model()}",
        f"{how.rounds} rounds, {how.seconds:g} s a sample, a fresh connection each; medians (least..most); "
        "a ratio is the median of the rounds' ratios",
    ]
    if where.realtime:
        words.append("both sides before all other programs (SCHED_RR)")
    return words


def _model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "uarch", "cpu model"):
                return value.strip()
    return os.uname().machine


class Steal:
    """The processors' time that a hypervisor keeps, as far as the kernel is told."""

    def __init__(self) -> None:
        self._stolen = _stolen()
        self._began = time.monotonic()

    def share(self) -> float:
        """Since the start, of all processors."""
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return (_stolen() - self._stolen) / max(0.1, seconds)


def _stolen() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/stat", encoding="ascii") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The same, begun elsewhere."""
    turn %= max(1, len(names))
    return [*names[turn:], *names[:turn]]
