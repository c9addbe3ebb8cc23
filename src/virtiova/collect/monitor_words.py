# SPDX-License-Identifier: Apache-2.0
"""What QEMU's monitor for people says, as values. It has no promised form: what is not understood is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_ESCAPES: Final = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")
_FLAT_RAM: Final = re.compile(r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (\S+)")
_XP: Final = re.compile(r"^[0-9a-f]+: ((?:0x[0-9a-f]{2} ?)+)\s*$", re.M)
_SPACE: Final = re.compile(r'^ AS "([^"\n]{1,100})", root: ([^\n]{1,100})$', re.M)
_NAME_LIMIT: Final = 60
_PIECES: Final = 1024


def printable(text: str) -> str:
    """Text without what would move a terminal's cursor."""
    plain = _ESCAPES.sub("", text)
    return "".join(c if c.isprintable() else " " for c in plain).rstrip()


@dataclass(frozen=True, slots=True)
class FlatView:
    """One view of ``info mtree -f``: the address spaces that share it (name, root), and the region that it shows."""

    spaces: tuple[tuple[str, str], ...]
    root: str
    body: str


def flat_views(mtree: str) -> list[FlatView]:
    """All views of ``info mtree -f``."""
    found = []
    for view in re.split(r"(?m)^FlatView #", mtree.replace("\r", "")):
        head, mark, body = view.partition("Root memory region: ")
        if mark:
            root, _, rest = body.partition("\n")
            spaces = tuple((match[1], match[2]) for match in _SPACE.finditer(head))
            found.append(FlatView(spaces, printable(root)[:_NAME_LIMIT], rest))
    return found


def ram_map(mtree: str) -> list[tuple[int, int]]:
    """First and last address of each piece of RAM, from ``info mtree -f``: of the view of the memory itself."""
    for view in flat_views(mtree):
        if any(name == "memory" for name, _ in view.spaces):
            found = (_FLAT_RAM.match(line) for line in view.body.splitlines())
            return [(int(m[1], 16), int(m[2], 16)) for m in found if m][:_PIECES]
    return []


def region_of(mtree: str, source: int) -> str:
    """What VT-d puts in front of a device on the root bus, from ``info mtree -f``: ``vtd-01.0-dmar`` translates,
    ``vtd-nodmar`` lets through. Empty where it is not told, as for other IOMMUs and behind root ports."""
    if source >> 8:
        return ""
    wanted = ("vtd-root", f"vtd-{source >> 3:02x}.{source & 7}")
    return next((view.root for view in flat_views(mtree) if wanted in view.spaces), "")


_OF_FUNCTION: Final = (
    # Each IOMMU of QEMU names a device's address space by its slot and function; none of them names the bus.
    (re.compile(r"vtd-(?P<slot>[0-9a-f]{2})\.(?P<function>[0-7])"), 1),
    (re.compile(r"virtio-iommu-memory-region-\d+-(?P<devfn>\d{1,3})"), 1),
    (re.compile(r"smmuv3-iommu-memory-region-(?P<devfn>\d{1,3})-\d+"), 1),
    (re.compile(r"amd_iommu_devfn_(?P<devfn>\d{1,3})"), 0),
)


def dma_roots(mtree: str) -> dict[int, list[str]]:
    """By slot << 3 | function: the regions that an IOMMU has put in front of devices of that number, on any bus.

    More than one where they are on several buses: which is whose is not told.
    """
    found: dict[int, list[str]] = {}
    for view in flat_views(mtree):
        for space in view.spaces:
            for pattern, part in _OF_FUNCTION:
                match = pattern.fullmatch(space[part])
                if match is None:
                    continue
                said = match.groupdict()
                devfn = int(said["devfn"]) if "devfn" in said else int(said["slot"], 16) << 3 | int(said["function"])
                roots = found.setdefault(devfn, [])
                if view.root not in roots:
                    roots.append(view.root)
    return found


def in_ram(ram: Iterable[tuple[int, int]], address: int) -> bool:
    """Is there RAM at ``address``?"""
    return any(first <= address <= last for first, last in ram)


def xp_bytes(said: str) -> bytes | None:
    """The bytes of ``xp /NxbADDRESS``; None where there is no memory."""
    rows = _XP.findall(said)
    return bytes(int(item, 16) for row in rows for item in row.split()) if rows else None


_NETDEV: Final = re.compile(r"^ ?\\? ?(?P<id>[\w.-]{1,80}): index=\d+,type=(?P<type>[a-z0-9-]{1,30})", re.M)


def netdevs(said: str) -> dict[str, str]:
    """Kinds of net back ends by id, from ``info network``: ``vhost-user``, ``tap``, ``user``."""
    return {match["id"]: match["type"] for match in _NETDEV.finditer(said) if match["type"] != "nic"}
