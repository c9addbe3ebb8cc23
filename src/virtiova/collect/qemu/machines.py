# SPDX-License-Identifier: Apache-2.0
"""QEMU's machine types: their buses, what is on them already, what comes by default, and their own IOMMU."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

_TARGET: Final = re.compile(r"qemu-system-([a-z0-9_]+)", re.ASCII)
_ARCHES: Final = {"i386": "i686", "ppc64le": "ppc64", "sh4eb": "sh4"}
"""QEMU's names of targets where the kernel's are others."""
_DEFAULT: Final = {
    "x86_64": "pc", "i686": "pc", "ppc64": "pseries", "s390x": "s390-ccw-virtio", "sparc64": "sun4u",
    "riscv64": "spike", "riscv32": "spike", "ppc": "g3beige", "sparc": "SS-5", "alpha": "clipper", "hppa": "hppa",
    "m68k": "mcf5208evb", "mips": "malta", "mips64": "malta", "loongarch64": "virt",
}  # fmt: skip
"""The machine type of who names none. ARM has none."""
_VERSIONED: Final = re.compile(
    r"(pc-i440fx|pc-q35|pc|virt|pseries|s390-ccw-virtio)-(?:rhel|rhel-|)(\d+(?:\.\d+)*|[a-z][\w.-]*)", re.ASCII
)
_POWERNV: Final = re.compile(r"powernv\d*", re.ASCII)
_NUMBERS: Final = re.compile(r"\d{1,4}(?:\.\d{1,4})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Mmio:
    """virtio-mmio transports: address of the first, distance, and how many. The last one is taken first."""

    base: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class Family:
    """Machine types that are alike but for their version.

    ``root``: its first PCI root bus, empty if it has none. ``taken``: slots of it that are not free. ``nic`` and
    ``vga``: the models that come by default. ``order``: in which order those are created. ``iommu``: its own.
    """

    name: str
    root: str = ""
    express: bool = False
    taken: tuple[str, ...] = ()
    usb: tuple[str, ...] = ()
    nic: str = ""
    vga: str = ""
    order: tuple[str, ...] = ("vga", "nic")
    mmio: Mmio | None = None
    iommu: str = "none"
    virtio_drives: bool = False
    firmware: str = ""
    bridges: dict[str, str] = field(default_factory=dict)
    """Buses behind bridges that it comes with, and the slot of each bridge."""


_Q35: Final = Family(
    "q35",
    "pcie.0",
    express=True,
    taken=("00.0", "1f.0", "1f.2", "1f.3"),
    usb=("1d.0", "1d.1", "1d.2", "1d.7"),
    nic="e1000e",
    vga="VGA",
    firmware="seabios",
)
_PC: Final = Family(
    "pc",
    "pci.0",
    taken=("00.0", "01.0", "01.1", "01.3"),
    usb=("01.2",),
    nic="e1000",
    vga="VGA",
    firmware="seabios",
)
_MICROVM: Final = Family("microvm", mmio=Mmio(0xFEB00000, 0x200, 24), firmware="qboot")
_FAMILIES: Final[dict[tuple[str, str], Family]] = {
    ("x86", "q35"): _Q35,
    ("x86", "pc"): _PC,
    ("x86", "isapc"): Family("isapc", firmware="seabios"),
    ("x86", "microvm"): _MICROVM,
    ("arm", "virt"): Family(
        "virt",
        "pcie.0",
        express=True,
        taken=("00.0",),
        nic="virtio-net-pci",
        mmio=Mmio(0x0A000000, 0x200, 32),
        virtio_drives=True,
    ),
    ("riscv", "virt"): Family(
        "virt", "pcie.0", express=True, taken=("00.0",), mmio=Mmio(0x10001000, 0x1000, 8), virtio_drives=True
    ),
    ("ppc64", "pseries"): Family(
        "pseries", "pci.0", vga="VGA", order=("nic", "vga", "usb"), iommu="tce", firmware="slof"
    ),
    ("ppc64", "powernv"): Family("powernv", iommu="phb", firmware="skiboot"),
    ("s390x", "s390-ccw-virtio"): Family(
        "s390-ccw-virtio", "pci.0", nic="virtio-net-ccw", virtio_drives=True, firmware="s390-ccw"
    ),
    ("sparc64", "sun4u"): Family(
        "sun4u",
        "pci",
        taken=(*(f"{slot:02x}.0" for slot in range(32)), "01.1"),
        iommu="sabre",
        firmware="openbios",
        bridges={"pciB": "01.0", "pciA": "01.1"},
    ),
}
MICROVM_PCIE: Final = replace(_MICROVM, root="pcie.0", express=True, taken=("00.0",))
"""A microvm that was told to have PCI Express."""
_GROUPS: Final = {
    "x86_64": "x86", "i686": "x86", "aarch64": "arm", "arm": "arm", "riscv64": "riscv", "riscv32": "riscv",
    "ppc64": "ppc64", "s390x": "s390x", "sparc64": "sparc64",
}  # fmt: skip
_TYPICAL: Final = {
    "q35": "x86_64", "pc": "x86_64", "microvm": "x86_64", "isapc": "x86_64", "virt": "aarch64", "pseries": "ppc64",
    "powernv": "ppc64", "s390-ccw-virtio": "s390x", "sun4u": "sparc64",
}  # fmt: skip
"""Where the name of the binary does not say for which target it is (qemu-kvm), the machine type may."""


@dataclass(frozen=True, slots=True)
class MachineType:
    """A machine type as it was named. ``family`` is None where nothing is known of it here."""

    name: str
    arch: str
    family: Family | None
    version: tuple[int, ...] = ()
    """The numbers at the end of its name: of the QEMU whose behaviour it keeps; empty where it has none."""


def arch_of(binary: str) -> str:
    """The target of a binary, by its name; empty if that does not say it."""
    match = _TARGET.search(binary.rpartition("/")[2])
    return _ARCHES.get(match[1], match[1]) if match else ""


def machine_type(name: str, arch: str) -> MachineType:
    """The machine type ``name``, or the target's default where it is empty."""
    name = name or _DEFAULT.get(arch, "")
    plain, version = _plain(name)
    arch = arch or _TYPICAL.get(plain, "")
    family = _FAMILIES.get((_GROUPS.get(arch, arch), plain))
    return MachineType(name, arch, family, version)


def _plain(name: str) -> tuple[str, tuple[int, ...]]:
    """A machine type's name without its version, and that."""
    if _POWERNV.fullmatch(name):
        return "powernv", ()
    if name == "ubuntu-q35":
        return "q35", ()
    if name == "ubuntu":
        return "pc", ()
    match = _VERSIONED.fullmatch(name)
    if match is None:
        return name, ()
    plain = {"pc-q35": "q35", "pc-i440fx": "pc"}.get(match[1], match[1])
    # RHEL counts its own releases.
    numbers = match[2] if "rhel" not in name and _NUMBERS.fullmatch(match[2]) else ""
    return plain, tuple(int(part) for part in numbers.split(".")) if numbers else ()
