# SPDX-License-Identifier: Apache-2.0
"""Command lines by chance, and what a real QEMU makes of them: places, bit 33, interfaces, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from scan_qemu_kit import Refused, real, rows, said
from virtiova.result import Path
from virtiova.scan import scan_view

KINDS = ("rng", "rng", "net", "serial", "scsi", "keyboard", "gpu")
MACHINES = (
    ("qemu-system-x86_64", "q35", "pcie.0"),
    ("qemu-system-x86_64", "pc", "pci.0"),
    ("qemu-system-x86_64", "pc-i440fx-2.5", "pci.0"),
    ("qemu-system-aarch64", "virt", "pcie.0"),
    ("qemu-system-ppc64", "pseries", "pci.0"),
)
GLOBALS = (
    *("virtio-device.iommu_platform=on", "virtio-pci.disable-legacy=on", "virtio-pci.iommu_platform=off"),
    *("virtio-rng-pci.iommu_platform=on", "virtio-net-device.iommu_platform=on", "virtio-pci.disable-legacy=auto"),
    *("virtio-serial-pci.disable-legacy=off", "virtio-mmio.force-legacy=false", "virtio-gpu-pci.ats=on"),
)
TYPED = {"on": True, "off": False}


class Line:
    """One command line on its way."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        binary, machine, self.root = self.random.choice(MACHINES)
        self.mmio = machine == "virt"
        self.buses = [self.root]
        self.express = [self.root] if self.root == "pcie.0" else []
        self.count = 0
        self.words = [binary, "-M", machine]
        if self.random.random() < 0.6:
            self.words.append("-nodefaults")
        if machine != "virt" and self.random.random() < 0.3:
            self.words.append("-usb")
        for _ in range(self.random.choice((0, 0, 1, 3))):
            self.words += ["-global", self.random.choice(GLOBALS)]
        for _ in range(self.random.randint(1, 9)):
            self.random.choices((self.device, self.bridge, self.other), (6, 2, 1))[0]()

    def said(self, driver: str, options: dict[str, str]) -> None:
        """A device, in one of the ways to say it."""
        if self.random.random() < 0.2:
            typed = {
                key: TYPED.get(value, value) if key == "iommu_platform" else value for key, value in options.items()
            }
            self.words += ["-device", json.dumps({"driver": driver, **typed})]
        else:
            self.words += ["-device", ",".join([driver, *(f"{key}={value}" for key, value in options.items())])]

    def device(self) -> None:
        """A virtio device somewhere."""
        options: dict[str, str] = {}
        kind = self.random.choice(KINDS)
        if self.random.random() < 0.3:
            options["iommu_platform"] = self.random.choice(("on", "off"))
        if self.mmio and kind != "gpu" and self.random.random() < 0.3:
            self.said(f"virtio-{kind}-device", options)
            return
        flavour = ""
        if kind not in ("keyboard", "gpu"):
            flavour = self.random.choices(("", "-transitional", "-non-transitional"), (8, 1, 1))[0]
        if not flavour and self.random.random() < 0.5:
            options["disable-legacy"] = self.random.choice(("on", "on", "off", "auto"))
        options |= self.place()
        self.said(f"virtio-{kind}-pci{flavour}", options)

    def place(self) -> dict[str, str]:
        """Which bus and slot, if either is said."""
        found = {"bus": self.random.choice(self.buses)} if self.random.random() < 0.6 else {}
        if self.random.random() < 0.3:
            slot = self.random.randint(3, 30)
            found["addr"] = self.random.choice((f"{slot:x}", f"0x{slot:x}", f"{slot:02x}.0"))
        return found

    def bridge(self) -> None:
        """A bridge, and the bus behind it."""
        self.count += 1
        name = f"b{self.count}"
        kinds = ["pci-bridge"] if not self.express else ["pcie-root-port", "pcie-pci-bridge", "i82801b11-bridge"]
        kind = self.random.choice(kinds)
        bus = self.root if self.express else self.random.choice(self.buses)
        number = {"pci-bridge": "chassis_nr", "pcie-root-port": "chassis"}.get(kind)
        more = f",{number}={self.count}" if number else ""
        # Not as JSON, which comes after all others: its bus would be there too late.
        self.words += ["-device", f"{kind},id={name},bus={bus}{more}"]
        self.buses.append(name)

    def other(self) -> None:
        """A device that is no virtio and takes a slot all the same, or none."""
        self.said(self.random.choice(("e1000", "qemu-xhci", "usb-ehci", "VGA", "pvpanic-pci", "intel-hda")), {})


def compared(seed: int) -> tuple[str, str]:
    """What QEMU did with a line (``started``, ``refused`` on account of bit 33, or something ``else``), and where the
    scan says otherwise; empty where it does not."""
    words = Line(seed).words
    view = said(words, version="7.2")
    try:
        wanted = real(words)
    except Refused as error:
        if "VIRTIO_F_IOMMU_PLATFORM" not in str(error):
            return "else", ""
        verdicts = {row.verdict for row in scan_view(view).devices}
        return "refused", "" if Path.REFUSED in verdicts else f"{words}: {error}; {verdicts}"
    return "started", "" if rows(view) == wanted else f"{words}: {rows(view)}, QEMU {wanted}"


def agree(seeds: range, started: int, refused: int) -> None:
    """All agree, and so many of them are started and refused that it means something."""
    found = [compared(seed) for seed in seeds]
    assert [different for _, different in found if different] == []
    did = Counter(what for what, _ in found)
    assert did["started"] >= started, did
    assert did["refused"] >= refused, did


def test_a_few_lines_by_chance() -> None:
    agree(range(12), 3, 1)


@pytest.mark.sweep
def test_many_lines_by_chance() -> None:
    agree(range(100, 400), 120, 40)
