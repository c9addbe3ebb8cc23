# SPDX-License-Identifier: Apache-2.0
"""Many scans: a summary by finding and by machine, and one row a device for whoever goes on with them elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from virtiova.report.words import plain
from virtiova.result import Path, path_order
from virtiova.result.scan import Scan, ScanFinding, Severity

_MACHINES: Final = 40
"""Machines listed without ``-v``."""
_NAME: Final = 60
WIDTH: Final = 100


@dataclass(slots=True)
class _Kind:
    """One finding, over all machines."""

    title: str
    severity: Severity
    machines: set[str] = field(default_factory=set)
    count: int = 0
    ignored: int = 0


@dataclass(slots=True)
class _Host:
    """One machine with something to say."""

    name: str
    devices: int
    around: int
    findings: Counter[str]
    worst: int


class Summary:
    """Counts, while scans go by: nothing of a machine is kept but what a line of the summary needs."""

    def __init__(self) -> None:
        self.machines = 0
        self.devices = 0
        self.verdicts: Counter[Path] = Counter()
        self.problems: list[str] = []
        self._kinds: dict[str, _Kind] = {}
        self._hosts: list[_Host] = []

    def add(self, scan: Scan) -> None:
        """Count one scan."""
        for machine in scan.machines:
            rows = [row for row in scan.devices if row.machine == machine.name]
            self.machines += 1
            self.devices += len(rows)
            self.verdicts.update(row.verdict for row in rows)
            self.problems += machine.problems
            found = [each for each in scan.findings if each.machine == machine.name]
            counting = [each for each in found if not each.ignored]
            for each in found:
                self._count(each)
            if counting:
                around = sum(row.verdict is Path.BYPASS for row in rows)
                worst = min(each.severity.rank for each in counting)
                ids = Counter(each.id for each in counting)
                self._hosts.append(_Host(machine.name, len(rows), around, ids, worst))

    def _count(self, each: ScanFinding) -> None:
        kind = self._kinds.setdefault(each.id, _Kind(each.title, each.severity))
        if each.ignored:
            kind.ignored += 1
            return
        kind.count += 1
        kind.machines.add(each.machine)
        if each.severity.rank < kind.severity.rank:
            kind.severity = each.severity

    def lines(self, *, verbose: bool = False) -> Iterator[str]:
        """The summary as text: in all, by finding, by machine, and what could not be read."""
        paths = path_order(self.verdicts)
        said = ", ".join(f"{self.verdicts[p]} {p.upper() if p is Path.BYPASS else p.value}" for p in paths)
        yield f"{_many(self.machines, 'machine')}, {_many(self.devices, 'device')}{': ' if said else ''}{said}"
        yield from self._by_finding()
        yield from self._by_machine(verbose=verbose)
        if self.problems:
            yield ""
            shown = self.problems if verbose else self.problems[:_MACHINES]
            yield from (plain(f"could not read {words}")[: WIDTH * 2] for words in shown)
            yield from _rest(len(self.problems) - len(shown))

    def _by_finding(self) -> Iterator[str]:
        kinds = sorted(self._kinds.items(), key=lambda item: (item[1].severity.rank, -item[1].count, item[0]))
        if not kinds:
            return
        yield ""
        yield from _table(
            ("FINDING", "SEVERITY", "MACHINES", "TIMES", "WHAT"),
            [
                (name, kind.severity.value, str(len(kind.machines)), _times(kind), plain(kind.title))
                for name, kind in kinds
            ],
        )

    def _by_machine(self, *, verbose: bool) -> Iterator[str]:
        hosts = sorted(self._hosts, key=lambda host: (host.worst, -host.findings.total(), host.name))
        if not hosts:
            return
        shown = hosts if verbose else hosts[:_MACHINES]
        yield ""
        yield from _table(
            ("MACHINE", "DEVICES", "BYPASS", "FINDINGS"),
            [(_cut(plain(h.name)), str(h.devices), str(h.around), _ids(h.findings)) for h in shown],
        )
        yield from _rest(len(hosts) - len(shown))


def rows(scan: Scan) -> Iterator[dict[str, Any]]:
    """One row a device, flat; what is said of a machine as a whole is a row of its own, without a device."""
    for machine in scan.machines:
        about = {
            "machine": machine.name,
            "view": machine.view,
            "sources": machine.sources,
            "platform": sorted(f"{key}={value}" for key, value in machine.platform.items()),
        }
        found = [each for each in scan.findings if each.machine == machine.name]
        devices = [row for row in scan.devices if row.machine == machine.name]
        for row in devices:
            yield {
                **about,
                "device": row.name,
                **{name: getattr(row, name) for name in _COLUMNS},
                "predicted": [path.value for path in row.predicted],
                "observed": row.observed.value if row.observed is not None else None,
                "verdict": row.verdict.value,
                "findings": [_flat(each) for each in found if each.device == row.name],
                "problems": [],
            }
        whole = [each for each in found if not each.device]
        if whole or machine.problems or not devices:
            empty = dict.fromkeys((*_COLUMNS, "observed", "verdict"))
            yield {
                **about,
                "device": None,
                **empty,
                "predicted": [],
                "findings": [_flat(each) for each in whole],
                "problems": machine.problems,
            }


_COLUMNS: Final = (
    "type",
    "address",
    "offered",
    "accepted",
    "backend_offered",
    "backend_accepted",
    "dma",
    "iommu",
    "group",
    "driver",
    "backend",
)


def _flat(each: ScanFinding) -> dict[str, str]:
    return {"id": each.id, "severity": each.severity.value, "title": each.title, "ignored": each.ignored}


def _table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(line[n]) for line in (head, *body)) for n in range(len(head))]
    for line in (head, *body):
        yield "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()[:WIDTH]


def _ids(found: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in sorted(found.items()))


def _times(kind: _Kind) -> str:
    return f"{kind.count} (+{kind.ignored} ignored)" if kind.ignored else str(kind.count)


def _cut(name: str) -> str:
    """The start and the end: what tells names apart may be either."""
    return name if len(name) <= _NAME else f"{name[: _NAME // 2]}...{name[-(_NAME // 2 - 3) :]}"


def _rest(count: int) -> Iterable[str]:
    return [f"... and {count} more (-v lists all)"] if count > 0 else []


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
