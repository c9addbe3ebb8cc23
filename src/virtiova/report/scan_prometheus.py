# SPDX-License-Identifier: Apache-2.0
"""A scan in Prometheus' text exposition format, for the textfile collector of node_exporter: gauges, in a stable order.

Series are labelled so that none occurs twice, whatever machines and devices are called: one file may hold a fleet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from virtiova.report.scan_words import Part, parts
from virtiova.result.scan import SCHEMA, Scan, ScanFinding, ScannedDevice

_Labels = tuple[tuple[str, str], ...]
_PREFIX: Final = "virtiova_scan_"
_ABOUT: Final = {
    "info": "Who made this, and in which version.",
    "timestamp_seconds": "When it was scanned, in seconds since 1970.",
    "machine_info": "A machine that was looked at, from which side, and what it is.",
    "devices": "Virtio devices by type and by where their bytes go.",
    "device_info": "A virtio device: bit 33 as declared, the IOMMU in front, and where its bytes go.",
    "finding": "A rule that applies: 1. ignored is true where the user said that it does not count.",
    "undecided": "Rules that could not be decided from what was given.",
    "problems": "What could not be read.",
}
_PLATFORM: Final = ("arch", "hypervisor", "iommu", "kernel", "machine-type", "vmm", "vmm-version")
_BITS: Final = {True: "on", False: "off", None: "unknown"}


def document(scan: Scan, *, version: str, now: float) -> str:
    """All of it. ``now``: when it was scanned, in seconds since 1970."""
    return "".join(_lines(scan, version, now))


def _lines(scan: Scan, version: str, now: float) -> Iterator[str]:
    by_machine = parts(scan)
    yield from _metric("info", {(("schema", SCHEMA), ("version", version)): 1})
    yield from _metric("timestamp_seconds", {(): int(now)})
    yield from _metric("machine_info", {_machine(part): 1 for part in by_machine})
    counts = Counter(_kind(part, row) for part in by_machine for row in part.devices)
    yield from _metric("devices", counts)
    yield from _metric("device_info", {_device(part, row): 1 for part in by_machine for row in part.devices})
    yield from _metric("finding", {_finding(part, each): 1 for part in by_machine for each in part.findings})
    yield from _metric("undecided", {_of(part): len(part.undecided) for part in by_machine})
    yield from _metric("problems", {_of(part): len(part.problems) for part in by_machine})


def _of(part: Part) -> _Labels:
    return (("machine", part.machine.name),)


def _machine(part: Part) -> _Labels:
    said = part.machine.platform
    return (
        *_of(part),
        ("view", part.machine.view),
        *((key.replace("-", "_"), said.get(key, "")) for key in _PLATFORM),
    )


def _kind(part: Part, row: ScannedDevice) -> _Labels:
    return (*_of(part), ("type", row.type), ("verdict", row.verdict.value))


def _device(part: Part, row: ScannedDevice) -> _Labels:
    return (
        *_of(part),
        ("device", row.name),
        ("type", row.type),
        ("address", row.address),
        ("offered", _BITS[row.offered]),
        ("accepted", _BITS[row.accepted]),
        ("iommu", row.iommu),
        ("group", row.group),
        ("verdict", row.verdict.value),
    )


def _finding(part: Part, each: ScanFinding) -> _Labels:
    return (
        *_of(part),
        ("device", each.device),
        ("id", each.id),
        ("severity", each.severity.value),
        ("ignored", "true" if each.ignored else "false"),
    )


def _metric(name: str, series: Mapping[_Labels, int]) -> Iterator[str]:
    yield f"# HELP {_PREFIX}{name} {_ABOUT[name]}\n# TYPE {_PREFIX}{name} gauge\n"
    for labels in sorted(series):
        listed = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
        yield f"{_PREFIX}{name}{f'{{{listed}}}' if listed else ''} {series[labels]}\n"


def _escaped(value: str) -> str:
    """A label's value: a backslash, a quote and a line feed are escaped, and all of it is UTF-8."""
    said = value.encode("utf-8", "replace").decode()
    return said.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
