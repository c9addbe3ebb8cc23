# SPDX-License-Identifier: Apache-2.0
"""What all outputs of a scan share: bit 33 and verdicts in words, findings by machine, and the same finding of many
devices as one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.report import wide
from virtiova.result import Path, path_order
from virtiova.result.scan import Place, Scan, ScanFinding, ScannedDevice, ScannedMachine, Severity, Undecided

LOUD: Final = frozenset({Path.BYPASS, Path.STALE, Path.MIXED})
"""Verdicts that are said loudly: memory is reached that the IOMMU's tables do not grant."""
_NAME: Final = 40
"""Columns of a name in a sentence."""


@dataclass(slots=True)
class Part:
    """One machine with all that is said of it."""

    machine: ScannedMachine
    devices: list[ScannedDevice] = field(default_factory=list)
    findings: list[ScanFinding] = field(default_factory=list)
    undecided: list[Undecided] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, device: ScannedDevice) -> list[ScanFinding]:
        """The findings about one device."""
        return [each for each in self.findings if each.device == device.name]

    def marks(self) -> dict[str, list[str]]:
        """Ids by device, those that are ignored in brackets."""
        found: dict[str, dict[str, None]] = {}
        for each in self.findings:
            found.setdefault(each.device, {})[f"({each.id})" if each.ignored else each.id] = None
        return {device: list(ids) for device, ids in found.items()}


def parts(scan: Scan) -> list[Part]:
    """By machine, in order. Machines of one name are one."""
    found: dict[str, Part] = {}
    for machine in scan.machines:
        found.setdefault(machine.name, Part(machine)).problems += machine.problems
    unnamed = ScannedMachine("", scan.view)
    for row in scan.devices:
        found.setdefault(row.machine, Part(unnamed)).devices.append(row)
    for finding in scan.findings:
        found.setdefault(finding.machine, Part(unnamed)).findings.append(finding)
    for each in scan.undecided:
        found.setdefault(each.machine, Part(unnamed)).undecided.append(each)
    return list(found.values())


def bit33(row: ScannedDevice) -> str:
    """Bit 33 as declared."""
    if row.accepted:
        return "on"
    if row.offered is False:
        return "[not offered]"
    if row.accepted is False:
        return "[offered, not taken]" if row.offered else "[off]"
    return "[offered]" if row.offered else "?"


def verdict(row: ScannedDevice) -> str:
    """The verdict, loud where bytes go around the IOMMU."""
    return row.verdict.value.upper() if row.verdict in LOUD else row.verdict.value


def declared(row: ScannedDevice) -> str:
    """The four bits of a device in words, as far as they are known."""
    said = [
        f"{who} {done}" if value else f"{who} not {done}"
        for who, done, value in (
            ("bit 33", "offered", row.offered),
            ("bit 33", "accepted", row.accepted),
            ("by the back end", "offered", row.backend_offered),
            ("from the back end", "accepted", row.backend_accepted),
        )
        if value is not None
    ]
    return ", ".join(said) or "nothing is known of bit 33"


def platform(machine: ScannedMachine) -> str:
    """What a machine is, in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.platform.items())


_NOT_READ: Final = {"rule": "known", "assumed": "assumed"}


def told(places: Sequence[Place]) -> tuple[str, Sequence[Place]]:
    """How a finding's piece of evidence is introduced, and the places to name: what was not read has none."""
    word = _NOT_READ.get(places[0].source) if places else None
    return (word, ()) if word else ("seen", places)


# -- the same finding of many devices ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Block:
    """A finding, and all devices of a machine that it is about. ``seen``: what was seen in words, and all places of
    it. Fixes are kept by product, and by what they say when no device is named."""

    finding: ScanFinding
    devices: list[str] = field(default_factory=list)
    seen: dict[str, list[Place]] = field(default_factory=dict)
    _fixes: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def take(self, each: ScanFinding) -> None:
        """The same finding of one more device."""
        if each.device and each.device not in self.devices:
            self.devices.append(each.device)
        for seen in each.seen:
            places = self.seen.setdefault(seen.text, [])
            if seen.place not in places[-_NEAR:]:
                places.append(seen.place)
        for product, words in each.fix.items():
            texts = self._fixes.setdefault(product, {}).setdefault(_general(words, each.device), [])
            if words not in texts[-1:]:
                texts.append(words)

    def fixes(self) -> Iterator[tuple[str, str]]:
        """Product and fix: one for each way in which they differ by more than the device's name, the first few."""
        for product, by_text in self._fixes.items():
            shown = list(by_text.values())[:_VARIANTS]
            left_out = len(by_text) > _VARIANTS or any(len(texts) > 1 for texts in by_text.values())
            for number, texts in enumerate(shown, 1):
                last = number == len(shown) and left_out
                yield product, f"{texts[0]} (all {len(self.devices)} likewise)" if last else texts[0]


_NEAR: Final = 8
"""Places before it that a place is compared with: rules say the same of devices one after the other."""
_VARIANTS: Final = 3


def blocks(findings: Iterable[ScanFinding]) -> list[Block]:
    """Findings that differ only in their device, as one."""
    found: dict[tuple[str, ...], Block] = {}
    for each in findings:
        key = (each.id, each.severity.value, each.title, each.why, each.ignored, *each.fix)
        found.setdefault(key, Block(each)).take(each)
    return list(found.values())


def _general(words: str, device: str) -> str:
    """A fix without the device's name."""
    return re.sub(rf"(?<![\w-]){re.escape(device)}(?![\w-])", "*", words) if device and device in words else words


# -- counts ------------------------------------------------------------------------------------------------------


def summary(scan: Scan) -> str:
    """The last line: how many of what."""
    verdicts = Counter(row.verdict for row in scan.devices)
    listed = ", ".join(f"{verdicts[path]} {path.value}" for path in path_order(verdicts))
    counts = [f"{_number(len(scan.devices), 'device')}{f' ({listed})' if listed else ''}"]
    if len(scan.machines) > 1:
        counts.insert(0, _number(len(scan.machines), "machine"))
    live = [each for each in scan.findings if not each.ignored]
    severities = Counter(each.severity for each in live)
    kinds = ", ".join(f"{severities[severity]} {severity.value}" for severity in Severity if severities[severity])
    counts.append(f"{_number(len(live), 'finding')} ({kinds})" if live else "no findings")
    ignored = len(scan.findings) - len(live)
    counts += [f"{ignored} ignored"] if ignored else []
    counts += [f"{len(scan.undecided)} undecided"] if scan.undecided else []
    return ", ".join(counts)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Sequence[str], most: int) -> str:
    """Names one after the other; beyond ``most`` only how many more."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def settles(settle: str) -> str:
    """What would settle an open question, as the end of a sentence."""
    return settle if "settle" in settle else f"{settle} would settle it"


def open_questions(part: Part, most: int) -> Iterator[str]:
    """What could not be decided of a machine, and what would settle it: a line for each rule, with the devices."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in part.undecided:
        names = found.setdefault((each.id, each.settle), [])
        names += [wide.cut_middle(each.device, _NAME)] if each.device else []
    for (rule, settle), names in found.items():
        yield f"{f'{rule} {listed(names, most)}'.rstrip()}: {settles(settle)}"
