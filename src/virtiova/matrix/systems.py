# SPDX-License-Identifier: Apache-2.0
"""The systems that the patch names, and the platforms that stand for each: knowledge only.

The systems are those of Linux commit 1a937693993f ("virtio: new feature to detect IOMMU device quirk") (in v4.8). A
board or an IOMMU that no row names is not left out: it is put where it belongs by what is in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.machine.qemu.boards import BOARDS
from virtiova.result import System

MOST: Final = "most"
IOMMU: Final = "iommu"
XEN: Final = "xen"
SPARC: Final = "sparc"
PPC64: Final = "ppc64"
NOTHING: Final = "nothing"
MIXES: Final = "mixes"
PAYLOADS: Final = "payloads"
BACKENDS: Final = "backends"
PHYSICAL: Final = "physical"
VHOST: Final = "vhost"
VDUSE: Final = "vduse"
TYPES: Final = "types"

SYSTEMS: Final = (
    System(
        MOST,
        "Most systems: a physical address is a bus address",
        "Nothing is in front of the device. It reaches the page that the driver names, whatever becomes of bit 33.",
    ),
    System(
        IOMMU,
        "A device behind a real IOMMU",
        "With bit 33 the driver must program the IOMMU, and the device goes through it. Without, the device has the "
        "quirk: it takes physical addresses and goes around the IOMMU, although its tables say otherwise.",
    ),
    System(
        XEN,
        "Xen",
        "What a guest takes for a physical address is none for the machine. The driver goes through the DMA API "
        "even without bit 33, and passes machine addresses.",
    ),
    System(
        SPARC,
        "SPARC64",
        "Every PCI device is listed as if it were behind the host bridge's IOMMU, and its tables are set up. Without "
        "bit 33 virtio ignores it: the driver must pretend that it is not there.",
    ),
    System(
        PPC64,
        "PPC64",
        "As on SPARC64: the partition's TCE tables are there for every PCI device, and a virtio device without bit "
        "33 goes around them.",
    ),
    System(
        NOTHING,
        "Transports with nothing in front",
        "Devices that are not on PCI have no IOMMU here. Bit 33 can be negotiated all the same, and changes nothing: "
        "the bytes go straight to memory.",
    ),
    System(
        MIXES,
        "A mix in one machine",
        "Several devices at once: with the bit and without, a legacy one, one that is no virtio device at all, behind "
        "one IOMMU and on a bus that is led around it. No answer is right for the machine as a whole, which is why the "
        "rule asks each device: those with the bit go through their own mappings, those without around, side by side.",
    ),
    System(
        PAYLOADS,
        "Addresses inside requests",
        "Some requests hold addresses. Where the device is to access what they name, like a GPU's backing entries, bit "
        "33 is about them, too. Where they name memory for the host to give, take or map, they are guest-physical "
        "whatever the bit says. With the bit, the ring goes through the IOMMU and such an address does not: mixed. "
        "A balloon's page numbers are the known case. Its page reporting uses descriptors, and is translated.",
    ),
    System(
        BACKENDS,
        "Back ends in processes of their own",
        "Over vhost-user a device is a process that maps the guest's memory, so that no IOMMU of the machine is in its "
        "way: each of them has to be taught it separately. One that knows bit 33 asks the machine for every address; "
        "one that does not takes bare ones, whatever its IOMMU says. Two are wrong on purpose.",
    ),
    System(
        PHYSICAL,
        "A physical device behind a physical IOMMU",
        "It is handed over to user space by VFIO, in a guest whose hypervisor plays the hardware: VT-d, and virtio "
        "devices. With bit 33 a device reaches what was mapped for it, and nothing else. Without it, it reaches all of "
        "memory with no mapping at all, which no group, container or limit keeps it from.",
    ),
    System(
        VHOST,
        "The kernel's own vhost back ends",
        "vhost-net and vhost-vsock are devices whose other half is the host's kernel. With bit 33 they ask for every "
        "address that they do not know (IOTLB), without they take guest-physical ones.",
    ),
    System(
        VDUSE,
        "Devices in user space, as devices of this machine (VDUSE)",
        "A vDPA device that a process serves must offer bit 33: it knows only what was mapped. It is handed over to "
        "user space (vhost-vdpa), or driven by the kernel's own driver (virtio-vdpa), through mappings of its own.",
    ),
    System(
        TYPES,
        "Every virtio device type that QEMU has",
        "As QEMU lists them itself. Where there is no driver here, the negotiation is asked all the same: is bit 33 "
        "offered, and is FEATURES_OK kept with it and without it?",
    ),
)


@dataclass(frozen=True, slots=True)
class Platform:
    """One machine with one IOMMU, and the system that it stands for.

    ``words`` say what shows it, where no process can be the machine's processor from outside.
    """

    system: str
    machine: str
    iommu: str
    words: str = ""
    options: str = ""
    """What the IOMMU is told, ``key=value,...``."""
    device: str = ""
    """What the devices are told besides bit 33."""
    more: tuple[str, ...] = ()
    """Experiments that are of interest here, besides the usual ones."""

    @property
    def told(self) -> bool:
        """Is it a variant of a platform that is there without options, too?"""
        return bool(self.options or self.device)


_KERNEL: Final = "only a real kernel shows it: --guests boots one"

_BYPASSED: Final = "bypass-bus=on"
_PACKED: Final = "packed=on"
_TOLD: Final = ("unmap", "unmap-stale", "remap")

PLATFORMS: Final = (
    Platform(MOST, "q35", "none"),
    Platform(MOST, "virt", "none"),
    # The machine leads the bus around an IOMMU that is there: nothing is in front.
    Platform(MOST, "q35", "intel", options=_BYPASSED, more=("msi",)),
    Platform(MOST, "q35", "intel", options=_BYPASSED, device=_PACKED, more=("msi",)),
    Platform(MOST, "q35", "amd", options=_BYPASSED, more=("msi",)),
    Platform(MOST, "q35", "virtio", options=_BYPASSED, more=("msi",)),
    Platform(MOST, "virt", "smmuv3", options=_BYPASSED, more=("msi",)),
    Platform(MOST, "virt", "virtio", options=_BYPASSED, more=("msi",)),
    Platform(IOMMU, "q35", "intel"),
    Platform(IOMMU, "q35", "intel", options="device-iotlb=on", device="ats=on", more=_TOLD),
    Platform(IOMMU, "q35", "intel", device=_PACKED, more=("indirect",)),
    Platform(IOMMU, "q35", "amd"),
    Platform(IOMMU, "q35", "virtio"),
    Platform(IOMMU, "virt", "smmuv3"),
    Platform(IOMMU, "virt", "smmuv3", options="stage=2"),
    Platform(IOMMU, "virt", "virtio"),
    Platform(IOMMU, "riscv-virt", "riscv"),
    Platform(IOMMU, "riscv-virt", "riscv", options="paging=sv39x4"),
    Platform(IOMMU, "riscv-virt", "riscv", options="kind=pci"),
    Platform(IOMMU, "s390-zpci", "zpci", _KERNEL),
    Platform(XEN, "xen-pv", "none", _KERNEL),
    Platform(SPARC, "sun4u", "sabre"),
    Platform(PPC64, "pseries", "tce"),
    Platform(PPC64, "powernv9", "phb", _KERNEL),
    Platform(BACKENDS, "vhost-user", "iotlb"),
    Platform(BACKENDS, "q35", "intel", options="device-iotlb=on"),
    Platform(PHYSICAL, "vfio", "vfio", _KERNEL),
    Platform(MIXES, "vfio", "vfio", _KERNEL),
    Platform(VHOST, "vhost", "iotlb", _KERNEL),
    Platform(VDUSE, "vdpa", "vdpa", _KERNEL),
    Platform(NOTHING, "virt-mmio", "none"),
    Platform(NOTHING, "s390-ccw", "none", _KERNEL),
)


def platforms() -> Iterator[Platform]:
    """The platforms in the order of the systems: those that are named, and all others that there are boards for."""
    named = {(row.machine, row.iommu) for row in PLATFORMS}
    others = [
        Platform(_system(board.name, iommu), board.name, iommu)
        for board in BOARDS.values()
        for iommu in board.iommus
        if (board.name, iommu) not in named
    ]
    for system in SYSTEMS:
        yield from (row for row in (*PLATFORMS, *others) if row.system == system.id)


def _system(machine: str, iommu: str) -> str:
    """Where a platform belongs that no row names: with its machine's other IOMMUs, if that is a system of its own."""
    own = {row.system for row in PLATFORMS if row.machine == machine} & {SPARC, PPC64, NOTHING}
    if own:
        return own.pop()
    return MOST if iommu == "none" else IOMMU
