# SPDX-License-Identifier: Apache-2.0
"""Scans for tests of reports, made by hand: every path, every kind of finding, and words that mean no good."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.result import Path, Reason
from virtiova.result.scan import (
    Place,
    Scan,
    ScanFinding,
    ScannedDevice,
    ScannedMachine,
    Seen,
    Severity,
    Undecided,
    merged,
)

HOSTILE: Final = (
    "</script><script>alert(1)</script>\"'&<b>]]>\x00\x1b[31m\n\ud800\uffff\u202e${x}{{y}} --> javascript:x"
)
WIDE: Final = "仮想網卡" * 12
FILE: Final = Place("libvirt", "vm.xml", 12)
SYSFS: Final = Place("sysfs", "/sys/bus/virtio/devices/virtio1/features")
REASON: Final = Reason("bit-taken", True, "the driver took bit 33", "virtio 1.4, 6.2")
_DMA: Final = {
    Path.TRANSLATED: "iova > intel > ram",
    Path.STALE: "iova > intel > ram",
    Path.BYPASS: "gpa > ram",
    Path.DIRECT: "gpa > ram",
    Path.UNKNOWN: "? > ?",
}


def device(name: str, verdict: Path = Path.TRANSLATED, **changes: object) -> ScannedDevice:
    """A device; all that is not said fits its verdict."""
    row = ScannedDevice(
        name=name,
        type="net",
        address="0000:00:02.0",
        machine="vm",
        offered=None if verdict is Path.UNKNOWN else verdict is not Path.BYPASS,
        accepted=None if verdict is Path.UNKNOWN else verdict is Path.TRANSLATED,
        backend_offered=None,
        backend_accepted=None,
        dma=_DMA.get(verdict, "-"),
        predicted=[verdict] if verdict is not Path.UNKNOWN else [Path.TRANSLATED, Path.DIRECT],
        observed=None,
        verdict=verdict,
        basis=[Seen("bit 33 is not offered", FILE)],
        assumes=["the driver accepts bit 33"],
        reasons=[REASON],
        why="nothing says whether an IOMMU is in front of it" if verdict is Path.UNKNOWN else "",
        iommu="" if verdict is Path.DIRECT else "intel",
        group="3",
        driver="virtio_net",
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def finding(name: str, id: str = "VA101", **changes: object) -> ScanFinding:
    """A finding about a device."""
    found = ScanFinding(
        id=id,
        severity=Severity.WARNING,
        machine="vm",
        device=name,
        title="goes around the IOMMU: bit 33 is not offered",
        seen=[
            Seen("bit 33 is not offered", FILE),
            Seen("the machine has an IOMMU: intel", Place("libvirt", "vm.xml", 40)),
        ],
        why="The device takes guest-physical addresses and reaches all of memory.",
        fix={"QEMU": f"add iommu_platform=on to {name}", "libvirt": "<driver iommu='on'/> in the device"},
        citation='commit 1a937693993f, "virtio: new feature to detect IOMMU device quirk": in v4.8',
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def scan() -> Scan:
    """One machine with a device of every verdict, and a finding of every kind."""
    paths = [path for path in Path if path is not Path.NOT_APPLICABLE]
    devices = [device(f"virtio{number}", path, group=str(number // 2)) for number, path in enumerate(paths)]
    by_path = {row.verdict: row.name for row in devices}
    findings = [
        finding(by_path[Path.REFUSED], "VA202", severity=Severity.ERROR, title="the features are refused"),
        finding(by_path[Path.BYPASS]),
        finding(by_path[Path.STALE], ignored="known, and in the window of maintenance"),
        finding("", "VA105", severity=Severity.NOTE, title="about the whole machine", seen=[]),
    ]
    marks = {each.device: [each.id] for each in findings}
    return Scan(
        view="guest",
        machines=[
            ScannedMachine("vm", "guest", ["vm.xml"], {"kernel": "6.1.0", "iommu": "intel"}, ["/sys/x: not permitted"])
        ],
        devices=[replace(row, findings=marks.get(row.name, [])) for row in devices],
        findings=findings,
        undecided=[
            Undecided("VA402", "vm", "virtio0", "the machine's command line (--cmdline or --pid)"),
            Undecided("VA108", "vm", "", "virtiova probe: only seeing where bytes land settles it"),
        ],
    )


def hostile() -> Scan:
    """A machine in which all that came from outside is hostile."""
    bad = device(
        HOSTILE, Path.BYPASS, machine=HOSTILE, type=HOSTILE, address=HOSTILE, dma=HOSTILE, iommu=HOSTILE,
        group=HOSTILE, driver=HOSTILE, backend=HOSTILE, why=HOSTILE, basis=[Seen(HOSTILE, Place("log", HOSTILE, 3))],
        assumes=[HOSTILE], reasons=[Reason(HOSTILE, False, HOSTILE, HOSTILE)],
    )  # fmt: skip
    unknown = replace(bad, name=f"2{HOSTILE}", verdict=Path.UNKNOWN)
    found = finding(
        HOSTILE, machine=HOSTILE, title=HOSTILE, seen=[Seen(HOSTILE, Place("log", HOSTILE, 3))], why=HOSTILE,
        fix={HOSTILE: HOSTILE}, citation=HOSTILE,
    )  # fmt: skip
    return Scan(
        view=HOSTILE,
        machines=[ScannedMachine(HOSTILE, HOSTILE, [HOSTILE], {HOSTILE: HOSTILE, "kernel": HOSTILE}, [HOSTILE])],
        devices=[bad, unknown],
        findings=[found, replace(found, ignored=HOSTILE), replace(found, device="")],
        undecided=[Undecided("VA402", HOSTILE, HOSTILE, HOSTILE)],
    )


def many(count: int, machine: str = "vm") -> Scan:
    """Devices of all verdicts in turn, with a finding for each that goes around."""
    paths = [Path.TRANSLATED, Path.BYPASS, Path.DIRECT, Path.UNKNOWN, Path.TRANSLATED]
    types = ["net", "blk", "rng", "scsi", "vsock", "fs", "gpu"]
    devices = [
        device(
            f"virtio{number}",
            paths[number % len(paths)],
            machine=machine,
            type=types[number % len(types)],
            address=f"0000:{number >> 5:02x}:{number & 31:02x}.0",
            group=str(number // 3),
        )
        for number in range(count)
    ]
    findings = [finding(row.name, machine=machine) for row in devices if row.verdict is Path.BYPASS]
    return Scan("guest", [ScannedMachine(machine, "guest", ["this machine"])], devices, findings)


def fleet(count: int, devices: int = 5) -> Scan:
    """Several machines."""
    return merged(many(devices, f"host{number}") for number in range(count))
