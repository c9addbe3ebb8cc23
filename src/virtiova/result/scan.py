# SPDX-License-Identifier: Apache-2.0
"""What a scan says: machines, devices, findings, and what could not be decided. Plain and serialisable."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from virtiova.result import Path, Reason

SCHEMA: Final = "virtiova/scan/1"


class Severity(enum.StrEnum):
    """How bad a finding is. The names are those of SARIF's levels, worst first."""

    ERROR = "error"
    """It does not work, or memory is open to a device that is meant to be kept out."""
    WARNING = "warning"
    """It works, and most likely is not what was meant."""
    NOTE = "note"
    """Worth knowing; nothing needs to change."""

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something was read: kind of source, its name as the user knows it, and the line in it (1-based; 0: none).

    ``source`` is one of ``sysfs``, ``debugfs``, ``pci``, ``proc``, ``firmware``, ``qmp``, ``command line``,
    ``libvirt``, ``kata``, ``log``, ``gathered``; ``rule`` and ``assumed`` where nothing was read: a rule says so, or it
    was taken for granted.
    """

    source: str
    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing that was seen, in words, and where it was read."""

    text: str
    place: Place

    def __str__(self) -> str:
        return f"{self.text} ({self.place})"


@dataclass(frozen=True, slots=True)
class ScannedDevice:
    """One virtio device: declared, predicted, observed.

    ``machine`` names the one it is in, ``address`` where it is there. ``offered`` and ``accepted`` are bit 33 between
    device and driver, ``backend_offered`` and ``backend_accepted`` between the machine and a back end outside of it:
    two different facts. All four are null where they are not known. ``predicted`` is what the rule allows;
    ``observed`` is null unless something was seen. ``verdict``: the one path that this comes to, or ``unknown`` with
    ``why``. ``basis`` is what it rests on, ``assumes`` what was taken for granted.
    """

    name: str
    type: str
    address: str
    machine: str
    offered: bool | None
    accepted: bool | None
    backend_offered: bool | None
    backend_accepted: bool | None
    dma: str
    """What the bytes pass: ``iova > intel > ram``, ``gpa > ram``."""
    predicted: list[Path]
    observed: Path | None
    verdict: Path
    basis: list[Seen] = field(default_factory=list)
    assumes: list[str] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    why: str = ""
    iommu: str = ""
    """The IOMMU in front, by its name in the output; empty: none is known of."""
    group: str = ""
    driver: str = ""
    backend: str = ""
    """Who serves it outside of the machine: ``vhost``, ``vhost-user``, ``vdpa``; empty: the machine itself."""
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ScanFinding:
    """A rule that applies. ``fix`` is by product. ``device`` is empty where it is about the whole machine.

    ``ignored``: why it does not count, where the user said so.
    """

    id: str
    severity: Severity
    machine: str
    device: str
    title: str
    seen: list[Seen]
    why: str
    fix: dict[str, str]
    citation: str
    ignored: str = ""


@dataclass(frozen=True, slots=True)
class Undecided:
    """A rule that cannot be decided from what was given, and which further input would settle it."""

    id: str
    machine: str
    device: str
    settle: str


@dataclass(frozen=True, slots=True)
class ScannedMachine:
    """One machine: how it was looked at, what it is, and what could not be read."""

    name: str
    view: str
    """``guest``, ``host``, ``configuration``, ``log``, or ``joined``."""
    sources: list[str] = field(default_factory=list)
    platform: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Scan:
    """All of it. ``view`` is the machine's, or ``several``."""

    view: str = ""
    machines: list[ScannedMachine] = field(default_factory=list)
    devices: list[ScannedDevice] = field(default_factory=list)
    findings: list[ScanFinding] = field(default_factory=list)
    undecided: list[Undecided] = field(default_factory=list)

    def renamed(self, old: str, new: str) -> Scan:
        """The same, with another name for a machine."""
        return Scan(
            self.view,
            [replace(each, name=new) if each.name == old else each for each in self.machines],
            [replace(each, machine=new) if each.machine == old else each for each in self.devices],
            [replace(each, machine=new) if each.machine == old else each for each in self.findings],
            [replace(each, machine=new) if each.machine == old else each for each in self.undecided],
        )


def apart(scans: Iterable[Scan]) -> Iterator[Scan]:
    """The same; two machines of one name are told apart by where they are from."""
    taken: set[str] = set()
    for each in scans:
        scan = each
        for machine in each.machines:
            name = _free(machine, taken)
            taken.add(name)
            if name != machine.name:
                scan = scan.renamed(machine.name, name)
        yield scan


def merged(scans: Iterable[Scan]) -> Scan:
    """All of them as one, with no two machines of one name."""
    whole = Scan()
    for scan in apart(scans):
        whole.machines += scan.machines
        whole.devices += scan.devices
        whole.findings += scan.findings
        whole.undecided += scan.undecided
    whole.view = whole.machines[0].view if len(whole.machines) == 1 else "several"
    return whole


def _free(machine: ScannedMachine, taken: set[str]) -> str:
    """A name that no other machine has: its own, with where it is from if need be, with a number in the worst case."""
    plain = machine.name or "machine"
    if plain not in taken:
        return plain
    longer = f"{plain} ({', '.join(machine.sources)})"
    number, name = 1, longer
    while name in taken:
        number += 1
        name = f"{longer} {number}"
    return name
