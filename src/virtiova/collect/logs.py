# SPDX-License-Identifier: Apache-2.0
"""Logs: of a guest's kernel (``dmesg``, ``journalctl``, a serial console), of QEMU and libvirt, of back ends.

Of a log are kept the lines that some rule asks for, and the facts that it states. If it holds several starts, it is
the last one that counts: what was said before may have been mended since.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.collect.facts import Key, LogLine, View, ViewKind
from virtiova.result.scan import Place

BYTES: Final = 64 << 20
"""What is read of a log; of more, the end."""
EACH: Final = 200
"""Lines kept of each message."""
_CHARACTERS: Final = 500
"""Of each line that is kept."""
_TRIES: Final = 50
"""Lines that only look like a start are passed over, so many."""
_REACH: Final = 8192
"""How far around a message its line is looked for."""
_ESCAPE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]P^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_VIRTIO: Final = re.compile(rb"virtio\d")
_PACKED: Final = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"LPKSHHRH": "systemd's journal"}


def collect(data: bytes, name: str) -> View:
    """What the bytes of a log say; ``name`` is what the user calls it."""
    view = View(ViewKind.LOG, name, name)
    packed = next((what for magic, what in _PACKED.items() if data.startswith(magic)), "")
    if not data or packed:
        view.problems.append(f"{name}: {f'packed ({packed}); unpack it first' if packed else 'the log is empty'}")
        view.empty = True
        return view
    first = 1
    if len(data) > BYTES:
        view.problems.append(f"the first {len(data) - BYTES} bytes of {name}: only the last {BYTES} are looked at")
        first += data.count(b"\n", 0, len(data) - BYTES)
        data = data[-BYTES:]
    for position, line in _lines(data, _last_start(data), first):
        view.log.append(LogLine(plain(_line_at(data, position)), Place("log", name, line)))
    _machine(view)
    view.log = [LogLine(_cut(line.text), line.place) for line in view.log]
    return view


def plain(raw: bytes) -> str:
    """A line as text, without escape sequences and control characters."""
    text = _ESCAPE.sub(b"", raw).decode("utf-8", "replace").replace("\t", " ")
    return "".join(char for char in text if char.isprintable()).strip()


def _cut(words: str) -> str:
    return words if len(words) <= _CHARACTERS else words[:_CHARACTERS] + "..."


def _last_start(data: bytes) -> int:
    """Where the last start of a kernel, or of a domain's QEMU, begins; 0: there is none."""
    end = len(data)
    best = 0
    for banner in (m.LINUX, m.LIBVIRT_START):
        end, needle = len(data), banner.text.encode()
        for _ in range(_TRIES):
            end = data.rfind(needle, best, end)
            if end < 0:
                break
            begin = _begin(data, end)
            if _BANNER.search(plain(data[begin : end + _CHARACTERS])):
                best = begin
                break
    return best


_BANNER: Final = re.compile(
    # After a time stamp, a level, or the journal's "Nov 23 20:00:00 host kernel:"; nothing that only quotes it.
    r"^(?:<\d+>)?(?:[\[(][^\])]*[\])] ?|\S{3} +\d+ [\d:]+ \S+ kernel: |\S+ \S+ kernel: |[\d-]+[ T][\d:.,+Z]+: )*"
    r"(?:\[ *[\d.]+\] )?(?:Linux version \d|starting up libvirt version: \d)"
)


def _begin(data: bytes, position: int) -> int:
    low = max(0, position - _REACH)
    return max(data.rfind(b"\n", low, position) + 1, low)


def _line_at(data: bytes, position: int) -> bytes:
    high = position + _REACH
    end = data.find(b"\n", position, high)
    return data[_begin(data, position) : end if end >= 0 else high]


def _lines(data: bytes, start: int, first: int) -> Iterator[tuple[int, int]]:
    """Where the lines are that are kept, and their numbers; ``first`` is that of the first line."""
    hits: dict[int, int] = {}
    for message in m.MESSAGES:
        needle, at, found = message.text.encode(), start, 0
        while found < EACH and (at := data.find(needle, at)) >= 0:
            hits.setdefault(_begin(data, at), at)
            found += 1
            at = _next(data, at)
    for found, match in enumerate(_VIRTIO.finditer(data, start)):
        if found == EACH:
            break
        hits.setdefault(_begin(data, match.start()), match.start())
    seen, line = 0, first
    for begin in sorted(hits):
        line += data.count(b"\n", seen, begin)
        seen = begin
        yield hits[begin], line


def _next(data: bytes, position: int) -> int:
    """The start of the next line, or, where that is far, so far on."""
    end = data.find(b"\n", position, position + _REACH)
    return end + 1 if end >= 0 else position + _REACH


# -- facts -----------------------------------------------------------------------------------------------------------

_FIRST: Final[tuple[tuple[Key[str], re.Pattern[str], str], ...]] = (
    (k.KERNEL, re.compile(r"Linux version (\d\S*)"), "{}"),
    (k.KERNEL_OPTIONS, re.compile(r"Kernel command line: (.*)"), "{}"),
    (k.VMM_VERSION, re.compile(r"starting up libvirt version: .*qemu version: (\d+(?:\.\d+)*)"), "{}"),
    (k.BACKEND_PRODUCT, re.compile(r"RTE Version: '?DPDK (\d[\w.-]*)"), "dpdk {}"),
    (k.BACKEND_PRODUCT, re.compile(r"Starting SPDK v(\d[\w.-]*)"), "spdk {}"),
)
_HYPERVISORS: Final = re.compile(r"Hypervisor detected: (.+)")
_DOMAINS: Final = re.compile(r"Default domain type: (\w+)")
_ENCRYPTED: Final = re.compile(r"Memory Encryption Features active: *(.*)")
_DMAR: Final = re.compile(r"\b(dmar\d+): reg_base_addr ")


def _machine(view: View) -> None:
    """What the lines state of the machine."""
    put, machine = view.machine.put, view.machine
    for line in view.log:
        for key, pattern, words in _FIRST:
            if key not in machine and (found := pattern.search(line.text)):
                put(key, words.format(found[1].strip()), line.place)
        if k.RESTRICTED not in machine and (found := _ENCRYPTED.search(line.text)) and restricted(found[1]):
            put(k.RESTRICTED, restricted(found[1]), line.place)
        if (found := _DOMAINS.search(line.text)) and found[1] == "Passthrough":
            put(k.IOMMU_BYPASS, "pt", line.place)
        if (found := _HYPERVISORS.search(line.text)) and k.HYPERVISOR not in machine:
            put(k.HYPERVISOR, "xen" if found[1].startswith("Xen") else found[1].lower(), line.place)
    for key, implied in ((k.KERNEL, (k.OS, "linux")), (k.VMM_VERSION, (k.VMM, "qemu"))):
        if fact := machine.fact(key):
            put(*implied, fact.place)
    _units(view)


def restricted(features: str) -> str:
    """What the kernel lists as active, as `RESTRICTED`; empty for AMD's SME, which hides no memory from devices."""
    words = features.split()
    if "TDX" in words:
        return "tdx"
    return next((mark.lower() for mark in ("SEV-SNP", "SEV-ES", "SEV") if mark in words), "")


def _units(view: View) -> None:
    """The IOMMU units: those that the firmware describes, and those that the kernel set up. One line is one unit."""
    described = [line for line in view.log if m.DRHD.text in line.text]
    if described:
        view.machine.put(k.IOMMU_UNITS, len(described), described[0].place)
    units: dict[str, Place] = {}
    for line in view.log:
        if found := _DMAR.search(line.text):
            units.setdefault(found[1], line.place)
        elif m.AMD_UNIT.text in line.text and "AMD-Vi" in line.text:
            units[f"ivhd{len(units)}"] = line.place
    if units:
        view.machine.put(k.IOMMUS, tuple(units), next(iter(units.values())))
