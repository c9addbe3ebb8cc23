# SPDX-License-Identifier: Apache-2.0
"""Rows for tests of reports, made by hand: every path, every verdict, and words that mean no good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from virtiova.addr import AddressKind
from virtiova.result import Cell, Evidence, Path, Reason, Row, System, Witness

HOSTILE: Final = "</script><script>alert(1)</script>\"'&<b>]]>\x00\x1b[31m\ud800\uffff javascript:x"
SYSTEMS: Final = (
    System("plain", "Plain & simple", "Nothing <is> in front."),
    System("real", "A device behind a real IOMMU", "Tables are set up."),
    System("empty", "Of which there is nothing", "Not shown."),
)


def cell(observed: Path, *predicted: Path, **changes: object) -> Cell:
    """A cell; what is predicted is what is observed unless it is said."""
    touched = {Path.TRANSLATED: "A", Path.STALE: "C", Path.BYPASS: "B", Path.DIRECT: "B"}.get(observed)
    witnesses = [Witness("data", page, 0x800000, 0, "00", "ff" if page == touched else "00") for page in "AB"]
    base = Cell(
        machine="q35",
        iommu="none" if observed is Path.DIRECT else "intel",
        device="virtio-blk-pci",
        experiment="device-writes",
        offered=True,
        accepted=True,
        address=AddressKind.IOVA,
        predicted=list(predicted or (observed,)),
        observed=observed,
        explained=None,
        evidence=Evidence(x=0xA00000, transfer="write", witnesses=witnesses, live="alive"),
        reasons=[Reason("bit-taken", True, "the driver took bit 33", "virtio 1.4, 6.2")],
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def hostile() -> Cell:
    """A cell in which all that came from outside is hostile."""
    return cell(
        Path.UNKNOWN,
        Path.TRANSLATED,
        machine=HOSTILE,
        iommu=HOSTILE,
        device=HOSTILE,
        experiment=HOSTILE,
        evidence=Evidence(note=HOSTILE, words=[HOSTILE, HOSTILE]),
        reasons=[Reason(HOSTILE, False, HOSTILE, HOSTILE)],
    )


class Rows:
    """Rows that can be gone through again and again, like those from a file."""

    def __init__(self, *rows: Row) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def rows() -> Rows:
    """One cell of every path, and one of every verdict."""
    wrong = cell(Path.BYPASS, Path.TRANSLATED, experiment="ring")
    return Rows(
        Row("plain", "QEMU 7.2.22", cell(Path.DIRECT)),
        *(Row("real", "QEMU 7.2.22", cell(path)) for path in Path if path is not Path.DIRECT),
        Row("real", "QEMU 10.0.2", wrong),
        Row("real", "QEMU 10.0.2", replace(wrong, explained="QEMU-BUS-MASTER")),
    )
