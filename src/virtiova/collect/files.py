# SPDX-License-Identifier: Apache-2.0
"""What is read of a Linux system, in one place: what the collector looks at, and what is gathered for one elsewhere.

Nothing secret: no keys, no environment, no serial numbers, and no other process's command line than that of a
hypervisor or back end. What may hold a password goes through `collect.redact` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtiova.collect.products import PRODUCTS

DT: Final = "/sys/firmware/devicetree/base"
_NODE: Final = (
    "compatible", "device_type", "dma-coherent", "iommus", "iommu-map", "memory-region", "phandle",
    "linux,direct64-ddr-window-info",
)  # fmt: skip
_SEAT: Final = ("driver", "subsystem", "iommu", "iommu_group", "of_node")


@dataclass(frozen=True, slots=True)
class Row:
    """A folder, and what is read in it: contents of ``files``, targets of ``links``. Wildcards as a shell has them.

    Where the folder is a link itself, that is noted, too. A folder that is there is noted although it is empty.
    """

    folder: str
    files: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


ROWS: Final = (
    # -- who it is
    Row("/proc", ("sysinfo",)),
    Row("/proc/sys/kernel", ("hostname", "osrelease", "arch")),
    Row("/proc/xen", ("capabilities",)),
    Row("/sys/hypervisor", ("type", "uuid")),
    Row(
        "/sys/class/dmi/id",
        ("sys_vendor", "product_name", "product_version", "product_uuid", "bios_vendor", "board_vendor"),
    ),
    Row("/sys/devices/system/clocksource/clocksource0", ("available_clocksource",)),
    Row("/sys/bus/acpi/devices/QEMU0002:00"),
    Row("/sys/bus/acpi/devices/AMZNC10C:00"),
    # -- what its firmware says
    Row("/sys/firmware/acpi/tables", ("DMAR", "IVRS", "IORT", "RIMT", "VIOT", "RMAD", "XMAR", "FACP")),
    Row(DT, ("model", "vm,uuid", *_NODE)),
    Row(f"{DT}/hypervisor", ("compatible",)),
    Row(f"{DT}/reserved-memory/*", _NODE),
    *(Row(f"{DT}/{above}{name}", _NODE) for above, name in (
        ("", "*"), ("*/", "*mmu*"), ("*/", "pci*"), ("*/", "bus*"), ("*/", "*virtio*"), ("*/*/", "*mmu*"),
    )),
    # -- its IOMMUs, and bounce buffers
    Row("/sys/class"),
    Row("/sys/class/iommu"),
    Row("/sys/class/iommu/*"),
    Row("/sys/kernel/iommu_groups"),
    Row("/sys/kernel/iommu_groups/*", ("type", "name")),
    Row("/sys/kernel/iommu_groups/*/devices/*", (), ("driver",)),
    Row("/sys/kernel/debug/swiotlb", ("io_tlb_nslabs", "io_tlb_used")),
    Row("/sys/module/vfio/parameters", ("enable_unsafe_noiommu_mode",)),
    # -- memory that devices cannot reach
    Row("/sys/class/misc/tdx_guest"),
    Row("/sys/class/misc/sev-guest"),
    Row("/sys/devices/system/cpu/sev", ("vmpl",)),
    Row("/sys/devices/platform/arm-cca-dev"),
    Row("/sys/kernel/security/coco/efi_secret"),
    Row("/sys/kernel/security/secrets/coco"),
    Row("/sys/firmware/uv", ("prot_virt_guest",)),
    # -- its devices
    Row("/sys/bus/virtio/devices"),
    Row("/sys/bus/virtio/devices/*", ("device", "features", "status"), ("driver",)),
    Row("/sys/kernel/debug/virtio"),
    Row("/sys/kernel/debug/virtio/*", ("device_features",)),
    Row("/sys/bus/pci/devices"),
    Row(
        "/sys/bus/pci/devices/*",
        ("vendor", "device", "revision", "subsystem_device", "config"),
        ("driver", "iommu_group", "iommu", "subsystem", "of_node"),
    ),
    Row("/sys/bus/platform/devices/*virtio*", (), _SEAT),
    Row("/sys/bus/platform/devices/LNRO0005*", (), _SEAT),
    Row("/sys/bus/pci/devices/*/of_node", _NODE),
    Row("/sys/devices/pci*", (), ("of_node",)),
    Row("/sys/devices/platform/*/pci*", (), ("of_node",)),
    Row("/sys/bus/platform/devices/*pci*", (), ("of_node",)),
    Row("/sys/bus/ccw/devices/*", (), _SEAT),
    Row("/sys/devices/css0", (), ("of_node",)),
    Row("/sys/bus/css/devices/*", (), ("of_node",)),
    Row("/sys/bus/vdpa/devices/*", (), _SEAT),
    Row("/sys/bus/vdpa/devices/*/vhost-vdpa-*"),
)  # fmt: skip

KERNEL_OPTIONS: Final = "/proc/cmdline"
"""Read, too, without what may be a password."""
CPU: Final = "/proc/cpuinfo"
"""Of this the first processor."""
IOMEM: Final = "/proc/iomem"
IOMEM_LINES: Final = ("System RAM", "virtio", "LNRO")
"""Of this the lines that hold one of these: where the kernel itself lies is nobody's business."""

DMESG: Final = (
    "virtio", "vring", "vhost", "vdpa", "vfio", "iommu", "dmar", "amd-vi", "smmu", "swiotlb", "software io tlb",
    "device (must provide|refuses)", "is not a head", "request device", "io_page_fault", "fault from ep", "drhd",
    "reg_base_addr",
    "memory encryption", "sev-snp", "tdx",
    "protected virt", "ultravisor", "on xen", "xen version", "hypervisor", "linux version",
    "kernel command line", "default domain type", "acpi: (dmar|ivrs|iort|viot)", "dma window", "9pnet",
)  # fmt: skip
"""A line of the kernel's log is gathered if it holds one of these, in either case: extended regular expressions."""

_COMM: Final = 15
"""Characters that the kernel keeps of a program's name."""
_INTERPRETERS: Final = ("python*", "__main__.py")
"""What they run may be anything."""


def _as_kept(name: str) -> str:
    return name if len(name) <= _COMM else f"{name[:_COMM].rstrip('*')}*"


HYPERVISORS: Final = ("qemu-system-*", "qemu-kvm", "kvm", "qemu", _as_kept("cloud-hypervisor"))
"""Processes whose command lines are gathered, by the program's name."""
BACKENDS: Final = tuple(
    dict.fromkeys(_as_kept(name) for each in PRODUCTS for name in each.commands if name not in _INTERPRETERS)
)
XML: Final = ("/etc/libvirt/qemu/*.xml", "/run/libvirt/qemu/*.xml")
"""Libvirt's domains, as they are to be and as they run."""
