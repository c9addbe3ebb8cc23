# SPDX-License-Identifier: Apache-2.0
"""What is read of a Linux system, in one place: what the collector looks at, and what is gathered for one elsewhere.

Nothing secret: no keys, no environment, no serial numbers, and no other process's command line than that of a
hypervisor or back end. What may hold a password goes through `collect.redact` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DT: Final = "/sys/firmware/devicetree/base"
_NODE: Final = (
    "compatible", "device_type", "status", "reg", "dma-coherent", "iommus", "iommu-map", "memory-region",
    "ibm,dma-window", "ibm,my-dma-window", "ibm,ddw-applicable",
)  # fmt: skip


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
    Row("/proc", ("cpuinfo", "modules")),
    Row("/proc/sys/kernel", ("hostname", "osrelease", "ostype", "arch")),
    Row("/proc/xen", ("capabilities",)),
    Row("/sys/hypervisor", ("type", "guest_type", "uuid")),
    Row("/sys/hypervisor/version", ("major", "minor", "extra")),
    Row("/sys/hypervisor/properties", ("features",)),
    Row(
        "/sys/class/dmi/id",
        ("sys_vendor", "product_name", "product_version", "product_uuid", "bios_vendor", "bios_version"),
    ),
    Row("/sys/firmware/qemu_fw_cfg", ("rev",)),
    # -- what its firmware says
    Row("/sys/firmware/acpi/tables", ("DMAR", "IVRS", "IORT", "VIOT", "XMAR")),
    Row("/sys/firmware/efi"),
    Row("/sys/firmware/uv", ("prot_virt_guest", "prot_virt_host")),
    Row("/proc/device-tree"),
    Row(DT, ("compatible", "model", *_NODE)),
    Row(f"{DT}/hypervisor", ("compatible",)),
    Row(f"{DT}/*", _NODE),
    Row(f"{DT}/*/virtio*", _NODE),
    Row(f"{DT}/*/pci*", _NODE),
    Row(f"{DT}/*/*iommu*", _NODE),
    Row(f"{DT}/*/*smmu*", _NODE),
    # -- its IOMMUs, and bounce buffers
    Row("/sys/class"),
    Row("/sys/class/iommu/*", (), ("device",)),
    Row("/sys/class/iommu/*/intel-iommu", ("address", "cap", "ecap", "version")),
    Row("/sys/class/iommu/*/amd-iommu", ("cap", "features")),
    Row("/sys/class/iommu/*/devices/*"),
    Row("/sys/kernel/iommu_groups/*", ("type", "reserved_regions")),
    Row("/sys/kernel/iommu_groups/*/devices/*"),
    Row("/sys/kernel/debug/swiotlb", ("io_tlb_*",)),
    Row("/sys/kernel/debug/swiotlb/*", ("io_tlb_*",)),
    Row("/sys/module/vfio/parameters", ("enable_unsafe_noiommu_mode",)),
    Row("/sys/module/vfio_iommu_type1/parameters", ("allow_unsafe_interrupts",)),
    # -- memory that devices cannot reach
    Row("/sys/class/misc/sev-guest"),
    Row("/sys/class/misc/tdx_guest"),
    Row("/sys/class/misc/sev"),
    # -- its devices
    Row(
        "/sys/bus/virtio/devices/*",
        ("device", "vendor", "features", "status", "modalias"),
        ("driver", "iommu_group", "of_node"),
    ),
    Row(
        "/sys/bus/pci/devices/*",
        (
            "vendor", "device", "class", "revision", "subsystem_vendor", "subsystem_device", "config", "dma_mask_bits",
            "enable", "driver_override", "ats_enabled",
        ),
        ("driver", "iommu_group", "iommu", "of_node", "firmware_node", "physfn"),
    ),
    Row("/sys/bus/platform/devices/*virtio*", ("modalias", "driver_override"),
        ("driver", "iommu_group", "of_node", "firmware_node")),
    Row("/sys/bus/platform/devices/LNRO0005*", ("modalias", "driver_override"),
        ("driver", "iommu_group", "of_node", "firmware_node")),
    Row("/sys/bus/ccw/devices/*", ("cutype", "devtype", "online", "modalias"), ("driver",)),
    Row("/sys/bus/css/devices/*", ("type",), ("driver",)),
    Row("/sys/bus/vdpa/devices/*", ("driver_override",), ("driver",)),
)  # fmt: skip

KERNEL_OPTIONS: Final = "/proc/cmdline"
"""Read, too, without what may be a password."""

DMESG: Final = (
    "virtio", "vring", "vhost", "vdpa", "vfio", "iommu", "dmar", "amd-vi", "smmu", "swiotlb", "software io tlb", "tce",
    "bounce", "sev", "tdx", "memory encryption", "confidential", "protected virt", "ultravisor", "prot_virt", "xen",
    "hypervisor", "linux version", "is not a head", "dma-iommu", "dma mask", "coherent", "acpi: (dmar|ivrs|iort|viot)",
    "9pnet", "pci host bridge", "ddw", "zpci",
)  # fmt: skip
"""A line of the kernel's log is gathered if it holds one of these, in either case: extended regular expressions."""

HYPERVISORS: Final = (
    "qemu-system-*", "qemu-kvm", "kvm", "qemu", "cloud-hyperviso*", "firecracker", "crosvm", "kata-*",
)  # fmt: skip
"""Processes whose command lines are gathered, by the program's name (the kernel keeps 15 characters of it)."""
BACKENDS: Final = (
    "virtiofsd", "dpdk-testpmd", "testpmd", "spdk_tgt", "vhost", "ovs-vswitchd", "qemu-storage-da*", "vhost-device-*",
    "vhost-user-*", "virtiova", "swtpm", "passt",
)  # fmt: skip
XML: Final = ("/etc/libvirt/qemu/*.xml", "/run/libvirt/qemu/*.xml")
"""Libvirt's domains, as they are to be and as they run."""
