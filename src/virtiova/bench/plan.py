# SPDX-License-Identifier: Apache-2.0
"""What is measured with what, in which order, and what each figure is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from virtiova.bench.rows import Setting, Target
from virtiova.bench.subjects import FILE, HANDLER, MEMORY, NET, NULL, SUBJECTS, TESTPMD, URING, Kind, Subject

DEPTHS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
MAPPINGS: Final = (1, 16, 256, 1024, 2000, 4096, 16384, 65536)
QUICK_DEPTHS: Final = (1, 32)
QUICK_MAPPINGS: Final = (1, 2000, 65536)
PAGES: Final[dict[Kind, int]] = {"blk": 4096, "net": 8192}
"""Host pages that requests are about."""
IMAGE: Final = 256
"""Pages of a disk's image: 1 MiB, which stays in a cache, as null-co has nothing to read from."""
SWEEP: Final[dict[Kind, int]] = {"blk": 32, "net": 128}
"""The depth at which the number of mappings varies."""
Front = Literal["poll", "sleep"]
FRONTS: Final[tuple[Front, ...]] = ("poll", "sleep")
RingKind = Literal["split", "packed"]
RINGS: Final[tuple[RingKind, ...]] = ("split", "packed")
ALONE: Final = "front end alone"
"""The smallest device there is, to see what the front end itself is good for."""
DEEPEST: Final[dict[Kind, int]] = {"blk": 170, "net": 256}
"""As many requests as the ring has room for: three descriptors each of 512, one of 256."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user wants of it all; an empty sequence is everything."""

    kind: Kind
    depths: Sequence[int] = DEPTHS
    mappings: Sequence[int] = MAPPINGS
    bits: Sequence[bool] = (False, True)
    fronts: Sequence[str] = FRONTS
    subjects: Sequence[str] = ()
    image: int = IMAGE
    """Pages of a disk's image."""
    rings: Sequence[RingKind] = ("split",)

    @property
    def alone(self) -> bool:
        """Whether the front end is to be measured by itself, too."""
        return "poll" in self.fronts and (not self.subjects or self.named)

    @property
    def named(self) -> bool:
        """Whether that was asked for by its name."""
        return any(word.lower() in ALONE for word in self.subjects)

    def chosen(self) -> list[Subject]:
        """The subjects: those whose name has one of the words in it."""
        words = [word.lower() for word in self.subjects]
        return [one for one in SUBJECTS[self.kind] if not words or any(word in one.name.lower() for word in words)]


@dataclass(frozen=True, slots=True)
class Job:
    """Settings that one connection serves, one after the other."""

    mappings: int
    pages: int
    depth: int
    fronts: tuple[Front, ...]
    ring: RingKind = "split"

    def settings(self) -> Iterator[Setting]:
        """Each of them."""
        for front in self.fronts:
            yield Setting(self.mappings, self.pages, self.depth, front, self.ring)


def jobs(wanted: Wanted) -> list[Job]:
    """For each kind of ring depth varies with the bit off, and with one mapping; then the number of mappings, at one
    depth, polling."""
    return [replace(job, ring=ring) for ring in RINGS if ring in wanted.rings for job in _jobs(wanted)]


def _jobs(wanted: Wanted) -> list[Job]:
    pages, sweep = PAGES[wanted.kind], SWEEP[wanted.kind]
    fronts = tuple(front for front in FRONTS if front in wanted.fronts)
    found = [
        Job(mappings, pages, depth, fronts)
        for mappings, bit in ((0, False), (1, True))
        if bit in wanted.bits and (not bit or 1 in wanted.mappings)
        for depth in wanted.depths
    ]
    if True in wanted.bits and "poll" in wanted.fronts:
        found += [Job(number, pages, sweep, ("poll",)) for number in wanted.mappings if number > 1]
        if wanted.kind == "net":
            if sweep not in wanted.depths and 1 in wanted.mappings:
                found.append(Job(1, pages, sweep, ("poll",)))
            # Every mapping a page of its own: what that costs is the processor's caches' as well.
            found += [Job(number, number, sweep, ("poll",)) for number in wanted.mappings if number > pages]
    return found


def takes(subject: Subject, job: Job) -> bool:
    """Whether the subject has that job: none with bit 33, or over packed rings, for who does not offer these."""
    return has_bit(subject, job) and (subject.packed or job.ring == "split")


def has_bit(subject: Subject, job: Job) -> bool:
    """Whether bit 33 does not stand in the way."""
    return subject.bit or job.mappings == 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ratio of a subject's figure to another's, or to its own with another setting."""

    beside: str
    setting: Setting
    target: Target | None = None


_AT_LEAST: Final = {MEMORY.name: 2.0, FILE.name: 1.5, HANDLER.name: 1.0}
_BESIDE: Final = {MEMORY.name: NULL, FILE.name: URING, HANDLER.name: URING}


def comparisons(subject: Subject, setting: Setting) -> Iterator[Comparison]:
    """What its requests a second are held against, with the targets that are set for some."""
    if subject.name in _BESIDE and setting.mappings <= 1:
        # They offer no bit 33, so that theirs is off in either case.
        target = None
        if setting.ring != "split":
            pass
        elif setting.bit and setting.front == "poll" and setting.depth in (1, 32):
            target = Target(_AT_LEAST[subject.name])
        elif setting.bit and setting.front == "sleep" and setting.depth == 1 and subject is not HANDLER:
            target = Target(3.0)
        yield Comparison(_BESIDE[subject.name].name, replace(setting, mappings=0), target)
    if subject is NET:
        usual = replace(setting, depth=SWEEP["net"], front="poll", ring="split")
        wanted = setting == usual and setting.mappings in (1, 256, 2000)
        yield Comparison(TESTPMD.name, setting, Target(2.0) if wanted else None)
    if setting.mappings > 1 and subject.bit:
        aliased = setting.mappings == 65536 and setting.pages == PAGES["net"] and setting.ring == "split"
        own = replace(setting, mappings=1, pages=PAGES[subject.kind])
        yield Comparison(subject.name, own, Target(0.8) if subject is NET and aliased else None)
