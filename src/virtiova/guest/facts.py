# SPDX-License-Identifier: Apache-2.0
"""What a guest's console and QEMU's traces say, as values. Nothing that they send is trusted."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect.monitor_words import printable
from virtiova.errors import ProtocolError

MARK: Final = "@virtiova "
BOX: Final = "@box "
_BOX_LIMIT: Final = 8 << 20
LINE_LIMIT: Final = 4096
LAST_LINES: Final = 40
_FACTS_LIMIT: Final = 400
_VALUE_LIMIT: Final = 200
_KEY: Final = re.compile(r"[a-z0-9_]{1,40}")
_DISK: Final = re.compile(r"(?P<id>[a-z0-9-]{1,20}) (?P<key>[a-z0-9_]{1,40})=(?P<value>.*)")
PAGE_MASK: Final = 0xFFF


@dataclass(slots=True)
class Inside:
    """What the guest said of itself. ``disks`` is by the name that we gave a disk. ``ended``: it said all it has."""

    values: dict[str, str] = field(default_factory=dict)
    disks: dict[str, dict[str, str]] = field(default_factory=dict)
    ended: bool = False


class Console:
    """A console as it comes in: facts out of the marked lines, and the last lines for people. Bounded in all."""

    def __init__(self) -> None:
        self.inside = Inside()
        self._line = bytearray()
        self._cut = False
        self._facts = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._box: list[str] = []
        self._boxed = 0

    def feed(self, data: bytes) -> None:
        """Take in what came."""
        for piece in data.splitlines(keepends=True):
            whole = piece.endswith((b"\n", b"\r"))
            room = LINE_LIMIT - len(self._line)
            self._line += piece.rstrip(b"\r\n")[: max(0, room)]
            if whole:
                self._take(printable(self._line.decode("utf-8", "replace")))
                self._line.clear()

    def last_lines(self) -> list[str]:
        """The last lines, the unfinished one included, without control characters."""
        rest = printable(self._line.decode("utf-8", "replace"))
        return [*self._last, *([rest] if rest else [])]

    def box(self) -> bytes:
        """What the guest's script gathered. Raises `ProtocolError` if it did not come whole; empty if there is none."""
        try:
            found = base64.b64decode("".join(self._box), validate=True)
        except ValueError as error:
            raise ProtocolError(f"what the guest gathered is not base64: {error}") from error
        if found and hashlib.sha256(found).hexdigest() != self.inside.values.get("box"):
            raise ProtocolError(f"0x{len(found):x} bytes came of what the guest gathered, with another checksum")
        return found

    def _take(self, line: str) -> None:
        if line.startswith(BOX):
            self._boxed += len(line)
            if self._boxed <= _BOX_LIMIT:
                self._box.append(line[len(BOX) :])
            return
        _, mark, said = line.partition(MARK)
        if not mark:
            if line:
                self._last.append(line[:_VALUE_LIMIT])
            return
        key, _, value = said.partition(" ")
        if not _KEY.fullmatch(key) or self._facts >= _FACTS_LIMIT:
            return
        self._facts += 1
        if key == "disk":
            match = _DISK.match(value)
            if match:
                self.inside.disks.setdefault(match["id"], {})[match["key"]] = match["value"].strip()[:_VALUE_LIMIT]
            return
        self.inside.values[key] = value.strip()[:_VALUE_LIMIT]
        self.inside.ended |= key == "end"


def feature(features: str, bit: int) -> bool | None:
    """Bit ``bit`` of sysfs' ``features``, a string of 0 and 1 from bit 0 on; None if it says nothing."""
    if bit >= len(features) or features[bit] not in "01":
        return None
    return features[bit] == "1"


def number(text: str | None) -> int | None:
    """A count that the guest printed, or None."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None


# -- the emulator's translations -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Translated:
    """One mapping that the emulated IOMMU used: ``mask`` covers the low bits that pass through as they are."""

    source: int | None
    base: int
    mask: int
    target: int


_VTD: Final = re.compile(
    r"vtd_dmar_translate.* dev (?P<bus>[0-9a-f]{1,2}):(?P<slot>[0-9a-f]{1,2})\.(?P<func>[0-9a-f]{1,2})"
    r" iova 0x(?P<iova>[0-9a-f]{1,16}) -> gpa 0x(?P<gpa>[0-9a-f]{1,16}) mask 0x(?P<mask>[0-9a-f]{1,16})"
)
_SMMU: Final = re.compile(
    r"smmuv3_translate_success.* sid=0x(?P<sid>[0-9a-f]{1,4}) iova=0x(?P<iova>[0-9a-f]{1,16})"
    r" translated=0x(?P<gpa>[0-9a-f]{1,16})"
)
_SMMU_BYPASS: Final = re.compile(r"smmuv3_translate_bypass.* sid=0x(?P<sid>[0-9a-f]{1,4}) ")
_SPAPR: Final = re.compile(
    r"spapr_iommu_xlate.* liobn=0x(?P<liobn>[0-9a-f]{1,16}) 0x(?P<iova>[0-9a-f]{1,16})"
    r" -> 0x(?P<gpa>[0-9a-f]{1,16}) perm=\d+ mask=0x(?P<mask>[0-9a-f]{1,16})"
)
_WINDOW_64: Final = 1 << 59
"""Where the second window of a pseries PHB begins. The trace names the offset in the window, and the window by the
last byte of the LIOBN (QEMU, include/hw/pci-host/spapr.h, SPAPR_PCI_LIOBN)."""
_DISTINCT_LIMIT: Final = 65536


class Translations:
    """The translations of a boot, counted. Bounded: what does not fit is only counted."""

    def __init__(self) -> None:
        self.total = 0
        self.let_through: dict[int, int] = {}
        """How often the IOMMU said that it lets a source's address through as it is."""
        self._counts: dict[Translated, int] = {}
        self._line = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in a piece of the trace log."""
        *lines, rest = (bytes(self._line) + data).split(b"\n")
        self._line = bytearray(rest[-LINE_LIMIT:])
        for line in lines:
            self.take(line[:LINE_LIMIT].decode("ascii", "replace"))

    def take(self, line: str) -> None:
        """One line of the trace log."""
        bypass = _SMMU_BYPASS.search(line)
        if bypass:
            source = int(bypass["sid"], 16)
            self.let_through[source] = self.let_through.get(source, 0) + 1
            return
        found = _translated(line)
        if found is None:
            return
        self.total += 1
        if found in self._counts or len(self._counts) < _DISTINCT_LIMIT:
            self._counts[found] = self._counts.get(found, 0) + 1

    def of(self, source: int | None, address: int) -> tuple[int, int | None]:
        """How often ``address`` was translated for a device, and where to. (0, None): never.

        ``source`` is the device's requester id. A trace that names no devices counts for every one.
        """
        count, target = 0, None
        for found, times in self._counts.items():
            theirs = found.source is None or source is None or found.source == source
            if theirs and address & ~found.mask == found.base:
                count += times
                target = found.target | (address & found.mask)
        return count, target


def _translated(line: str) -> Translated | None:
    match = _VTD.search(line)
    if match:
        source = int(match["bus"], 16) << 8 | int(match["slot"], 16) << 3 | (int(match["func"], 16) & 7)
        return _masked(source, int(match["iova"], 16), int(match["gpa"], 16), int(match["mask"], 16))
    match = _SMMU.search(line)
    if match:
        return _masked(int(match["sid"], 16), int(match["iova"], 16), int(match["gpa"], 16), PAGE_MASK)
    match = _SPAPR.search(line)
    if match:
        window = int(match["liobn"], 16) & 0xFF
        start = _WINDOW_64 if window == 1 else 0
        return _masked(None, start + int(match["iova"], 16), int(match["gpa"], 16), int(match["mask"], 16))
    return None


def _masked(source: int | None, iova: int, gpa: int, mask: int) -> Translated | None:
    if mask & (mask + 1):  # not of the form 0...01...1
        return None
    return Translated(source, iova & ~mask, mask, gpa & ~mask)
