# SPDX-License-Identifier: Apache-2.0
"""Guest platforms as rows: which kernel on which machine, with what in front, and what that should come to."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError, ProtocolError, UsageError
from virtiova.guest import kernels
from virtiova.packages.store import Wanted, one_file
from virtiova.policy import Facts, Front

DISK: Final = "virtio-blk-{bus}"
_XEN_LIMIT: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Emulator:
    """A QEMU binary, and the Debian package that it is in."""

    binary: str
    package: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Debian kernel: architecture, meta package, and the pattern of what the meta package stands for."""

    architecture: str
    meta: str
    pattern: str

    def wanted(self) -> tuple[Wanted, Wanted]:
        """The kernel and the busybox of its architecture."""
        return (
            Wanted(self.meta, self.meta, self.architecture, kernels.pick, self.pattern),
            Wanted("busybox", "busybox-static", self.architecture, one_file("bin/busybox", "busybox")),
        )


def _xen(root: Path) -> Mapping[str, bytes]:
    """The hypervisor, unpacked: QEMU's multiboot loader takes only the bare 32-bit ELF."""
    packed = one_file("boot/xen-*.gz", "xen")(root)["xen"]
    try:
        # Through a bounded read: what a package claims to hold is not what it may fill memory with.
        import io

        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(_XEN_LIMIT)
    except (OSError, EOFError) as error:
        raise ProtocolError(f"the hypervisor is not a whole gzip file: {error}") from error
    if not content.startswith(b"\x7fELF"):
        raise NotPossibleError("the hypervisor of this package is no ELF file")
    return {"xen": content}


XEN: Final = Wanted("xen", "xen-system-amd64", "amd64", _xen, r"xen-hypervisor-[0-9.]+-amd64")

X86: Final = Emulator("qemu-system-x86_64", "qemu-system-x86")
ARM: Final = Emulator("qemu-system-aarch64", "qemu-system-arm")
PPC: Final = Emulator("qemu-system-ppc64", "qemu-system-ppc")
S390: Final = Emulator("qemu-system-s390x", "qemu-system-misc")

CLOUD: Final = Kernel("amd64", "linux-image-cloud-amd64", r"linux-image-[0-9].*-cloud-amd64")
FULL: Final = Kernel("amd64", "linux-image-amd64", r"linux-image-[0-9].*-amd64")
ARM64: Final = Kernel("arm64", "linux-image-cloud-arm64", r"linux-image-[0-9].*-cloud-arm64")
PPC64: Final = Kernel("ppc64el", "linux-image-powerpc64le", r"linux-image-[0-9].*-powerpc64le")
S390X: Final = Kernel("s390x", "linux-image-s390x", r"linux-image-[0-9].*-s390x")


@dataclass(frozen=True, slots=True)
class Platform:
    """One row. ``machine`` and ``iommu`` are the names of a cell; ``front`` is what should be in front of the disks.

    ``append`` goes to the kernel, ``arguments`` to QEMU. ``bus`` is how disks attach (``pci``, ``device`` for mmio,
    ``ccw``), ``places`` where (one ``bus=`` each; empty: QEMU chooses). ``trace`` are the translator's events.
    ``group`` is the type that the guest's own IOMMU group should have, where the kernel says it.
    """

    name: str
    title: str
    machine: str
    iommu: str
    emulator: Emulator
    kernel: Kernel
    arguments: tuple[str, ...]
    append: str
    front: Front = Front.NONE
    xen: str | None = None
    bus: str = "pci"
    places: tuple[str, ...] = ()
    memory: str = "512"
    trace: str = ""
    group: frozenset[str] = field(default_factory=frozenset)
    nodefaults: bool = True

    @property
    def device(self) -> str:
        """QEMU's name of the disk."""
        return DISK.format(bus=self.bus)

    def wanted(self) -> tuple[Wanted, ...]:
        """All that has to be fetched, but for QEMU itself."""
        return (*self.kernel.wanted(), *((XEN,) if self.xen is not None else ()))

    def facts(self, *, offered: bool | None, accepted: bool | None) -> Facts:
        """The facts for the rule, with what was seen of the bit."""
        return Facts(
            offered=offered,
            accepted=accepted,
            front=self.front,
            xen=self.xen is not None,
            insists=True,
        )


_VTD: Final = "intel-iommu,intremap=off"
_SPLIT: Final = ("-M", "q35,kernel-irqchip=split", "-cpu", "qemu64")
_PSERIES: Final = ("-M", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off", "-cpu", "power9")


def _x86(name: str, title: str, append: str, device: str, front: Front, *group: str) -> Platform:
    return Platform(
        name=name,
        title=title,
        machine="q35",
        iommu="intel",
        emulator=X86,
        kernel=CLOUD,
        arguments=(*_SPLIT, "-device", device),
        append=f"console=ttyS0 {append}",
        front=front,
        trace="vtd_dmar_translate",
        group=frozenset(group),
    )


_ROWS: Final = (
    Platform(
        name="x86",
        title="PC without an IOMMU",
        machine="q35",
        iommu="none",
        emulator=X86,
        kernel=CLOUD,
        arguments=_SPLIT,
        append="console=ttyS0",
    ),
    _x86("x86-vtd", "PC with VT-d", "intel_iommu=on", f"{_VTD},caching-mode=on", Front.TRANSLATING, "DMA", "DMA-FQ"),
    _x86("x86-vtd-off", "PC with VT-d, intel_iommu=off", "intel_iommu=off", _VTD, Front.OFF),
    _x86("x86-vtd-pt", "PC with VT-d, iommu=pt", "intel_iommu=on iommu=pt", _VTD, Front.PASSTHROUGH, "identity"),
    _x86("x86-vtd-strict", "PC with VT-d, strict", "intel_iommu=on iommu.strict=1", _VTD, Front.TRANSLATING, "DMA"),
    _x86("x86-vtd-lazy", "PC with VT-d, lazy", "intel_iommu=on iommu.strict=0", _VTD, Front.TRANSLATING, "DMA-FQ"),
    Platform(
        name="aarch64-smmuv3",
        title="Arm with SMMUv3",
        machine="virt",
        iommu="smmuv3",
        emulator=ARM,
        kernel=ARM64,
        arguments=("-M", "virt,iommu=smmuv3", "-cpu", "cortex-a57"),
        append="console=ttyAMA0",
        front=Front.TRANSLATING,
        trace="smmuv3_translate_*",
        group=frozenset({"DMA", "DMA-FQ"}),
    ),
    Platform(
        name="aarch64-smmuv3-pt",
        title="Arm with SMMUv3, iommu.passthrough=1",
        machine="virt",
        iommu="smmuv3",
        emulator=ARM,
        kernel=ARM64,
        arguments=("-M", "virt,iommu=smmuv3", "-cpu", "cortex-a57"),
        append="console=ttyAMA0 iommu.passthrough=1",
        front=Front.PASSTHROUGH,
        trace="smmuv3_translate_*",
        group=frozenset({"identity"}),
    ),
    Platform(
        name="aarch64-mmio",
        title="Arm, virtio-mmio",
        machine="virt-mmio",
        iommu="none",
        emulator=ARM,
        kernel=ARM64,
        arguments=("-M", "virt", "-cpu", "cortex-a57", "-global", "virtio-mmio.force-legacy=false"),
        append="console=ttyAMA0",
        bus="device",
    ),
    Platform(
        name="ppc64le-pseries",
        title="POWER pseries, 32-bit window (disable_ddw)",
        machine="pseries",
        iommu="tce",
        emulator=PPC,
        kernel=PPC64,
        arguments=_PSERIES,
        append="console=hvc0 disable_ddw",
        front=Front.TRANSLATING,
        trace="spapr_iommu_xlate",
    ),
    Platform(
        name="ppc64le-pseries-ddw",
        title="POWER pseries, 64-bit window onto all memory (DDW)",
        machine="pseries",
        iommu="tce",
        emulator=PPC,
        kernel=PPC64,
        arguments=_PSERIES,
        append="console=hvc0",
        front=Front.TRANSLATING,
        trace="spapr_iommu_xlate",
    ),
    Platform(
        name="ppc64le-powernv9",
        title="POWER9 without a hypervisor, PHB4",
        machine="powernv9",
        iommu="phb",
        emulator=PPC,
        kernel=PPC64,
        # Without -nodefaults, which would take the PHBs away as well.
        arguments=("-M", "powernv9", "-net", "none"),
        append="console=hvc0",
        front=Front.TRANSLATING,
        places=("pcie.0", "pcie.1"),
        memory="2G",
        nodefaults=False,
    ),
    Platform(
        name="xen-pv",
        title="Xen, paravirtual dom0",
        machine="xen-pv",
        iommu="none",
        emulator=X86,
        kernel=FULL,
        arguments=("-M", "q35", "-cpu", "qemu64"),
        append="console=hvc0",
        xen="console=com1 com1=115200,8n1 dom0_mem=512M,max:512M no-real-mode",
        memory="1G",
    ),
    Platform(
        name="xen-pv-vtd",
        title="Xen, paravirtual dom0, with VT-d",
        machine="xen-pv",
        iommu="intel",
        emulator=X86,
        kernel=FULL,
        arguments=(*_SPLIT, "-device", _VTD),
        append="console=hvc0",
        front=Front.TRANSLATING,
        xen="console=com1 com1=115200,8n1 dom0_mem=512M,max:512M no-real-mode iommu=force,no-intremap",
        memory="1G",
        trace="vtd_dmar_translate",
    ),
    Platform(
        name="s390x-ccw",
        title="s390x, virtio-ccw",
        machine="s390-ccw",
        iommu="none",
        emulator=S390,
        kernel=S390X,
        arguments=("-M", "s390-ccw-virtio", "-cpu", "max"),
        append="console=ttysclp0",
        bus="ccw",
    ),
    Platform(
        name="s390x-zpci",
        title="s390x, PCI",
        machine="s390-zpci",
        iommu="zpci",
        emulator=S390,
        kernel=S390X,
        arguments=("-M", "s390-ccw-virtio", "-cpu", "max"),
        append="console=ttysclp0",
        front=Front.TRANSLATING,
    ),
)

PLATFORMS: Final[dict[str, Platform]] = {row.name: row for row in _ROWS}


def find(name: str) -> Platform:
    """The row of that name."""
    if name not in PLATFORMS:
        raise UsageError.unknown("platform", name, PLATFORMS)
    return PLATFORMS[name]
