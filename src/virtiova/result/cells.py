# SPDX-License-Identifier: Apache-2.0
"""One experiment on one device: what was declared, predicted and observed, and the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field

from virtiova.addr import AddressKind
from virtiova.result import NO_ANSWER, Path, Reason, Sides


@dataclass(frozen=True, slots=True)
class Witness:
    """One page that was painted before and looked at after.

    ``page`` is ``A`` (where the IOMMU points), ``B`` (where the bare address points) or ``C`` (where the IOMMU
    pointed before the tables changed). ``role`` says what lies there: ``data`` and ``data2`` (the payload, and its
    second page), ``ring`` (the used ring), ``via-A`` and ``via-B`` (a payload that only a device that read copy A
    or B of a ring or table knows of), ``control`` (what the control wrote), ``mapped`` (what the device wrote to X by
    descriptor beforehand, which shows where the tables really lead; no judge asks for it). ``before`` and ``after`` are
    equally long hex strings from ``offset`` of the page.
    """

    role: str
    page: str
    gpa: int
    offset: int
    before: str
    after: str

    @property
    def touched(self) -> bool:
        """Did any byte change?"""
        return self.before != self.after


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the device gave away after it read memory, beside what each candidate page held.

    ``arrived`` and the values of ``pages`` are hex strings of equal length; ``gpas`` says where each page lies.
    """

    role: str
    arrived: str
    pages: dict[str, str]
    gpas: dict[str, int]


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault of the IOMMU in words, with its raw words."""

    address: int
    write: bool | None
    source: int
    reason: str
    raw: list[int]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What another device of the machine was at while this one was asked: one request, to write to a page of its own.

    ``under_way``: it was published, and not over, when this device's was published too. ``done``: the device used it,
    or, of a control device, its bytes arrived. ``pages``: where they arrived, by the letters of `Witness`.
    """

    device: str
    under_way: bool
    done: bool
    pages: list[str]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Enough for someone else to judge the cell again."""

    x: int | None = None
    """The address that the driver gave to the device."""
    transfer: str = "none"
    """Who moved the bytes in question: ``write`` or ``read`` (by the device), ``none``."""
    features_ok: bool | None = None
    """FEATURES_OK as re-read; null where there is no such step."""
    refused_by_machine: bool = False
    """The machine would not start with that device; ``words`` says why."""
    carried_on: bool = False
    """The driver went on although FEATURES_OK had been refused."""
    witnesses: list[Witness] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    control: str = "none"
    """How it was seen whether an IOMMU is in front: ``msi-x``, the name of another device (``edu``, ``rtl8139``),
    ``neighbour`` (the other disk of a guest), ``machine`` (it has none for such a device), ``none``."""
    faults: list[FaultRecord] = field(default_factory=list)
    live: str = ""
    """What shows that the device was alive; empty if nothing does."""
    status: int | None = None
    """The device status at the end. Never used to judge."""
    words: list[str] = field(default_factory=list)
    """What the machine itself said."""
    note: str = ""
    """Why there is no answer, where there is none; what was seen is there all the same."""
    neighbours: list[Neighbour] = field(default_factory=list)
    """Where the question is about several devices: what the others were at, and what came of it."""
    inside: dict[str, str] = field(default_factory=dict)
    """Of a booted guest: what it says of the device itself."""
    outside: dict[str, str] = field(default_factory=dict)
    """Of a booted guest: what was seen of the device without its help, and in ``seen`` all that in one line."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One experiment on one device: declared, predicted, observed."""

    machine: str
    iommu: str
    device: str
    experiment: str
    offered: bool | None
    accepted: bool | None
    address: AddressKind
    predicted: list[Path]
    observed: Path
    explained: str | None
    evidence: Evidence
    reasons: list[Reason] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    """What else was seen, beside the path, that the prediction does not allow, in words."""
    sides: Sides | None = None
    """Of the prediction: which sides payload and structures take where the path is ``mixed``."""
    iommu_options: str = ""
    """What the IOMMU was told: ``key=value,...`` as on the command line."""
    device_options: str = ""
    """What the device was told besides bit 33."""
    number: int = 0
    """Which of several devices in one machine it is, from 1; 0: it is alone."""
    beside: list[str] = field(default_factory=list)
    """The other devices of the machine, in their order, as they were asked for."""

    @property
    def mismatch(self) -> bool:
        """Was something seen that is not among the predicted? No answer is no mismatch."""
        if self.observed in NO_ANSWER:
            return False
        return self.observed not in self.predicted or bool(self.disagreements)


@dataclass(frozen=True, slots=True)
class System:
    """A system as the patch of 2016 names them: a part of the matrix. ``words`` say what is expected of it."""

    id: str
    title: str
    words: str


@dataclass(frozen=True, slots=True)
class Row:
    """A cell where it stands in the matrix: its system, and the product (with version) that it was run on."""

    system: str
    product: str
    cell: Cell
