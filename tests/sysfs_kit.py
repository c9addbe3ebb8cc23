# SPDX-License-Identifier: Apache-2.0
"""Trees of files as Linux systems show them, written below a folder: what a collector is given instead of /."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from virtiova.collect import linux
from virtiova.collect.facts import Device, View
from virtiova.collect.tree import LiveTree
from virtiova.result.scan import Scan, ScannedDevice
from virtiova.scan import scan_view

BIT_33 = 1 << 33
VERSION_1 = 1 << 32
GOOD = 0x0F


def features(word: int, bits: int = 64) -> str:
    """Features as sysfs prints them: from bit 0 on."""
    return "".join(str(word >> bit & 1) for bit in range(bits)) + "\n"


class Box:
    """A system's files below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/class/iommu", "sys/kernel/iommu_groups", "sys/bus/virtio/devices", "sys/bus/pci/devices"):
            (root / folder).mkdir(parents=True)
        self.file("/proc/sys/kernel/osrelease", "6.1.0-56-amd64\n")
        self.file("/proc/sys/kernel/hostname", "box\n")

    def at(self, path: str) -> Path:
        """Where a file of the system lies."""
        return self.root / path.lstrip("/")

    def file(self, path: str, content: str | bytes = "") -> None:
        """A file with everything above it."""
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_bytes(content.encode() if isinstance(content, str) else content)

    def link(self, path: str, target: str) -> None:
        """A link to an absolute path of the system's, written relative as sysfs does."""
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).symlink_to(os.path.relpath(self.at(target), self.at(path).parent))

    def function(self, path: str, ident: int = 0x1042, *, config: bytes = b"", driver: str = "virtio-pci") -> str:
        """A PCI function of Red Hat's at ``path`` in /sys/devices."""
        name = path.rpartition("/")[2]
        self.file(f"{path}/vendor", "0x1af4\n")
        self.file(f"{path}/device", f"0x{ident:04x}\n")
        self.file(f"{path}/revision", f"0x{0 if ident < 0x1040 else 1:02x}\n")
        self.file(f"{path}/subsystem_device", "0x0002\n")
        self.file(f"{path}/config", config or config_space(ident)[:64])
        self.link(f"/sys/bus/pci/devices/{name}", path)
        self.at(f"/sys/bus/pci/drivers/{driver or 'none'}").mkdir(parents=True, exist_ok=True)
        if driver:
            self.link(f"{path}/driver", f"/sys/bus/pci/drivers/{driver}")
        return path

    def virtio(
        self, parent: str, *, kind: int = 2, word: int = VERSION_1, status: str = "0x0000000f\n", name: str = "virtio0"
    ) -> str:
        """A virtio device that sits on ``parent``."""
        at = f"{parent}/{name}"
        self.file(f"{at}/device", f"0x{kind:04x}\n")
        self.file(f"{at}/status", status)
        self.file(f"{at}/features", features(word))
        self.at("/sys/bus/virtio/drivers/virtio_blk").mkdir(parents=True, exist_ok=True)
        self.link(f"{at}/driver", "/sys/bus/virtio/drivers/virtio_blk")
        self.link(f"/sys/bus/virtio/devices/{name}", at)
        return at

    def group(self, number: int, kind: str, members: Iterable[str]) -> None:
        """An IOMMU group of ``kind`` with these devices."""
        at = f"/sys/kernel/iommu_groups/{number}"
        self.file(f"{at}/type", f"{kind}\n")
        for member in members:
            self.link(f"{member}/iommu_group", at)
            self.link(f"{at}/devices/{member.rpartition('/')[2]}", member)

    def unit(self, name: str, *devices: str) -> None:
        """An IOMMU unit that the kernel programs, and the devices behind it."""
        self.at(f"/sys/devices/virtual/iommu/{name}").mkdir(parents=True)
        self.link(f"/sys/class/iommu/{name}", f"/sys/devices/virtual/iommu/{name}")
        for device in devices:
            self.link(f"{device}/iommu", f"/sys/devices/virtual/iommu/{name}")

    def view(self) -> View:
        """What the collector makes of it."""
        return linux.collect(LiveTree(str(self.root), "box"))

    def one(self) -> tuple[View, Device]:
        """The view, and its only device."""
        view = self.view()
        assert len(view.devices) == 1, [device.name for device in view.devices]
        return view, view.devices[0]

    def scan(self) -> Scan:
        """The whole scan."""
        return scan_view(self.view())

    def row(self) -> ScannedDevice:
        """The scan's only row."""
        rows = self.scan().devices
        assert len(rows) == 1, rows
        return rows[0]


def config_space(ident: int = 0x1042, *, ats: bool | None = None, size: int = 4096) -> bytes:
    """A function's configuration space. ``ats``: it has the capability, behind another one; enabled or not."""
    data = bytearray(size)
    struct.pack_into("<HHHHB", data, 0, 0x1AF4, ident, 0x0406, 0x10, 0 if ident < 0x1040 else 1)
    struct.pack_into("<HBB", data, 9, 0x0180 << 8 & 0xFFFF, 0x01, 0)
    struct.pack_into("<HH", data, 0x2C, 0x1AF4, 0x0002)
    data[0x34] = 0x40
    # Express, version 2, an endpoint: without it nobody looks for extended capabilities.
    struct.pack_into("<BBH", data, 0x40, 0x10, 0x00, 0x0002)
    if ats is not None and size > 0x110:
        # Advanced errors first, then address translation services.
        struct.pack_into("<I", data, 0x100, 0x0001 | 2 << 16 | 0x150 << 20)
        struct.pack_into("<IHH", data, 0x150, 0x000F | 1 << 16, 0x0020, 0x8000 if ats else 0)
    return bytes(data)


def acpi_table(name: str, body: bytes, oem: str = "BOCHS ") -> bytes:
    """A table with its header; the sum is right."""
    length = 36 + len(body)
    head = struct.pack("<4sIBB6s8sI4sI", name.encode(), length, 1, 0, oem.encode(), b"BXPC    ", 1, b"BXPC", 1)
    table = bytearray(head + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def dmar(units: int = 1) -> bytes:
    """DMAR with so many remapping units, and a root port's ATS in between."""
    drhd = struct.pack("<HHBBHQ", 0, 16, 1, 0, 0, 0xFED90000)
    atsr = struct.pack("<HHBBH", 2, 8, 1, 0, 0)
    return acpi_table("DMAR", struct.pack("<BB10x", 38, 1) + atsr.join([drhd] * units) + atsr)
