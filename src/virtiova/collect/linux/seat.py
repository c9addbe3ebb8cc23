# SPDX-License-Identifier: Apache-2.0
"""What a virtio device sits on: a PCI function, an mmio region, a ccw subchannel, a vDPA device. Found by its path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device
from virtiova.collect.linux.read import place
from virtiova.collect.tree import LIMIT, Tree, base, text

FUNCTION: Final = r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2}\.[0-7])"
"""Domain, bus, slot and function, as sysfs has them. Patterns here are compiled when first used: few ever are."""
_ROOT: Final = r"pci([0-9a-f]{4,8}):([0-9a-f]{2})"
_CCW: Final = r"([0-9a-f]{1,2})\.([0-3])\.([0-9a-f]{4})"
_DT_MMIO: Final = r"([0-9a-f]{1,16})\.[A-Za-z0-9_,-]+"
_ACPI_MMIO: Final = r"[A-Z0-9]{7,8}:[0-9a-f]{2,4}"
_COUNTED: Final = r"virtio-mmio\.([0-9]{1,4})"
_OPTION: Final = r"virtio_mmio\.device=\S{1,20}?@(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})"
_IOMEM: Final = r"\s*([0-9a-f]{1,16})-[0-9a-f]{1,16} : (.*)"
_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class Seat:
    """``path`` is that of the parent in /sys/devices, ``address`` its name. Empty ``place``: both sides' word for it
    is not known. ``bridges``: how many it is behind."""

    path: str
    transport: str
    address: str
    place: str = ""
    bridges: int = 0
    inferred: bool = False


def find(tree: Tree, at: str) -> Seat | None:
    """What the virtio device at ``at`` sits on; None where its path is not known."""
    real = tree.real(at)
    if real is None or not real.startswith("/sys/devices/"):
        return None
    return of_parent(tree, real.rpartition("/")[0])


def of_parent(tree: Tree, parent: str) -> Seat:
    """The same, of what it sits on."""
    name = base(parent)
    if re.fullmatch(FUNCTION, name):
        return _pci(parent)
    bus = base(tree.link(f"{parent}/subsystem"))
    ccw = re.fullmatch(_CCW, name)
    if ccw and bus in ("", "ccw"):
        # The guest's channel subsystem 0 is the one that a machine calls fe, the one for virtual devices.
        image = "fe" if int(ccw[1], 16) == 0 else ccw[1]
        return Seat(parent, "ccw", name, f"ccw:{image}.{ccw[2]}.{ccw[3]}")
    if bus == "vdpa" or (not bus and re.fullmatch(r"vdpa[0-9]+", name)):
        return Seat(parent, "vdpa", name)
    if bus in ("", "platform") and (
        re.fullmatch(_DT_MMIO, name) or re.fullmatch(_ACPI_MMIO, name) or re.fullmatch(_COUNTED, name)
    ):
        start, inferred = _mmio(tree, name)
        return Seat(parent, "mmio", name, f"mmio:0x{start:x}" if start is not None else "", inferred=inferred)
    return Seat(parent, bus or "unknown", name)


def put(sits: Seat, device: Device) -> None:
    """As facts of the device."""
    where = place(sits.path)
    device.facts.put(k.TRANSPORT, sits.transport, where)
    device.facts.put(k.ADDRESS, sits.address, where)
    if sits.place:
        device.facts.put(k.PLACE, sits.place, where, Certainty.INFERRED if sits.inferred else Certainty.SEEN)
    if sits.transport == "pci":
        device.facts.put(k.BRIDGED, sits.bridges > 0, where)


def _pci(parent: str) -> Seat:
    """Bridges on the way, without their bus numbers, which firmware may assign as it likes."""
    parts = parent.split("/")[-_DEPTH:]
    chain = [match for part in parts if (match := re.fullmatch(FUNCTION, part))]
    root = next((match for part in parts if (match := re.fullmatch(_ROOT, part))), None)
    if root is None:
        return Seat(parent, "pci", base(parent), bridges=len(chain) - 1)
    domain = "" if int(root[1], 16) == 0 else f"{root[1]}:"
    way = "/".join(match[3] for match in chain)
    return Seat(parent, "pci", base(parent), f"pci:{domain}{root[2]}:{way}", len(chain) - 1)


def _mmio(tree: Tree, name: str) -> tuple[int | None, bool]:
    """Where its registers begin, and whether that only follows: by a device tree's name, else by who claims memory,
    else by the kernel's own option."""
    by_tree = re.fullmatch(_DT_MMIO, name)
    if by_tree and not re.fullmatch(_COUNTED, name):
        return int(by_tree[1], 16), False
    for line in (text(tree, "/proc/iomem", LIMIT) or "").splitlines():
        match = re.fullmatch(_IOMEM, line)
        # Who may not know addresses is told that they are 0.
        if match and name in match[2].split() and int(match[1], 16):
            return int(match[1], 16), False
    counted = re.fullmatch(_COUNTED, name)
    if counted:
        said = re.findall(_OPTION, text(tree, "/proc/cmdline") or "")
        if int(counted[1]) < len(said):
            return int(said[int(counted[1])], 0), True
    return None, False
