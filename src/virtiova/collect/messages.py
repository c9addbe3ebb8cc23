# SPDX-License-Identifier: Apache-2.0
"""What logs say, word for word: the one list that the collector of logs keeps lines by, and that rules ask for.

A text is the part of a message that never varies, without the prefix that names the device: ``dmesg --color`` puts an
escape sequence between the two. Each was looked up in the source that prints it, or a real one was made to print it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its text, who prints it, and whether it is about one virtio device."""

    text: str
    who: str
    names_device: bool = False

    def __str__(self) -> str:
        return self.text


# -- QEMU, on its standard error -------------------------------------------------------------------------------------

STILL_LEGACY: Final = Message(
    "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device",
    "QEMU, hw/virtio/virtio-pci.c",
    names_device=True,
)
NOT_BY_DEVICE: Final = Message(
    "iommu_platform=true is not supported by the device", "QEMU, hw/virtio/virtio-bus.c, since 6.1", names_device=True
)
NO_REPLY_ACK: Final = Message(
    "IOMMU support requires reply-ack and ", "QEMU, hw/virtio/vhost-user.c", names_device=True
)
QEMU_NO_MAPPING: Final = Message("no mapping for 0x", "QEMU, hw/virtio/virtio-iommu.c")
QEMU_NO_ENDPOINT: Final = Message("is not known!!", "QEMU, hw/virtio/virtio-iommu.c")
QEMU_VTD_FAULT: Final = Message("detected translation failure", "QEMU, hw/i386/intel_iommu.c")
NOT_VIABLE: Final = Message("is not viable", "QEMU, hw/vfio: a group of which not all devices are vfio's")

# -- guest kernels ---------------------------------------------------------------------------------------------------

NO_BIT_33: Final = Message(
    "device must provide VIRTIO_F_ACCESS_PLATFORM", "Linux, drivers/virtio/virtio.c", names_device=True
)
NO_VERSION_1: Final = Message(
    "device must provide VIRTIO_F_VERSION_1", "Linux, drivers/virtio/virtio.c", names_device=True
)
REFUSED: Final = Message("device refuses features:", "Linux, drivers/virtio/virtio.c", names_device=True)
NOT_A_HEAD: Final = Message(" is not a head!", "Linux, drivers/virtio/virtio_ring.c", names_device=True)
BOUNCE_FULL: Final = Message("swiotlb buffer is full", "Linux, kernel/dma/swiotlb.c")
VTD_FAULT: Final = Message("] Request device [", "Linux, drivers/iommu/intel/dmar.c")
AMD_FAULT: Final = Message("Event logged [IO_PAGE_FAULT", "Linux, drivers/iommu/amd/iommu.c")
SMMU_EVENT: Final = Message("arm-smmu-v3", "Linux, drivers/iommu/arm/arm-smmu-v3")
VIRTIO_IOMMU_FAULT: Final = Message(" fault from EP ", "Linux, drivers/iommu/virtio-iommu.c")

# -- Xen, on its console (``xl dmesg``) ------------------------------------------------------------------------------

XEN_IO: Final = Message("I/O virtualisation ", "Xen, xen/drivers/passthrough/iommu.c: enabled, or disabled")
XEN_DOM0: Final = Message("Dom0 mode: ", "Xen, xen/drivers/passthrough/iommu.c: Passthrough, Strict or Relaxed")

# -- drivers outside of a kernel, firmware ---------------------------------------------------------------------------

DPDK_REFUSED: Final = Message("Failed to set FEATURES_OK status!", "DPDK, drivers/net/virtio", names_device=True)
SPDK_REFUSED: Final = Message("failed to set FEATURES_OK status!", "SPDK, lib/virtio", names_device=True)
SEABIOS_REFUSED: Final = Message(
    "device didn't accept features", "SeaBIOS, src/hw/virtio-blk.c and others", names_device=True
)

# -- who speaks, and what the machine is -----------------------------------------------------------------------------

LINUX: Final = Message("Linux version ", "Linux, init/version.c")
COMMAND_LINE: Final = Message("Kernel command line: ", "Linux, init/main.c")
ENCRYPTED: Final = Message("Memory Encryption Features active:", "Linux, arch/x86/mm/mem_encrypt.c")
HYPERVISOR: Final = Message("Hypervisor detected: ", "Linux, arch/x86/kernel/cpu/hypervisor.c")
DRHD: Final = Message("DRHD base: ", "Linux, drivers/iommu/intel/dmar.c: one for each unit that the table describes")
DMAR_UNIT: Final = Message(": reg_base_addr ", "Linux, drivers/iommu/intel/dmar.c: one for each unit that it set up")
AMD_UNIT: Final = Message("Found IOMMU ", "Linux, drivers/iommu/amd/init.c")
DOMAIN_TYPE: Final = Message("Default domain type: ", "Linux, drivers/iommu/iommu.c")
LIBVIRT_START: Final = Message("starting up libvirt version: ", "libvirt, the log of a domain's QEMU")
DPDK_VERSION: Final = Message("RTE Version: ", "DPDK, lib/eal")
SPDK_VERSION: Final = Message("Starting SPDK v", "SPDK, lib/event/app.c")
DPDK_FEATURES: Final = Message("negotiated Virtio features: 0x", "DPDK, lib/vhost/vhost_user.c")

MESSAGES: Final[tuple[Message, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Message))
