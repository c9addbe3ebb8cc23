# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: what can be known of a machine and of a device. An open set; names are stable."""

from __future__ import annotations

from typing import Final

from virtiova.collect.facts import Key

# -- of a machine: who it is -----------------------------------------------------------------------------------------

NAME: Final = Key[str]("name", "what it is called: host name, -name, libvirt's name")
UUID: Final = Key[str]("uuid", "in lower case with dashes, as DMI, -uuid and libvirt have it")
OS: Final = Key[str]("os", "linux, windows, firmware")
KERNEL: Final = Key[str]("kernel", "the release, as uname -r says it")
ARCH: Final = Key[str]("arch", "x86_64, aarch64, ppc64, s390x, riscv64, sparc64")
KERNEL_OPTIONS: Final = Key[str]("kernel-options", "the kernel's command line")
HYPERVISOR: Final = Key[str]("hypervisor", "kvm, xen, hyperv, ...; none on bare metal")
XEN_DOMAIN: Final = Key[bool]("xen-domain", "its kernel runs as a domain of Xen's, for which the DMA API is used")
RESTRICTED: Final = Key[str]("restricted", "memory that devices cannot reach: sev, sev-es, sev-snp, tdx, s390-pv, xen")

RUNS_ON: Final = Key[str]("runs-on", "the system that it was found on, by the source of that system's view")

# -- of a machine: its IOMMU -----------------------------------------------------------------------------------------

IOMMUS: Final = Key[tuple[str, ...]]("iommus", "the IOMMU units that the system programs, by its names (dmar0)")
IOMMU_UNITS: Final = Key[int]("iommu-units", "how many units the firmware describes")
IOMMU_GROUPS: Final = Key[int]("iommu-groups", "how many groups there are")
IOMMU: Final = Key[str](
    "iommu",
    "the kind: intel amd virtio smmuv3 sabre tce phb zpci riscv; none where there is none; a device's may be vduse",
)
IOMMU_OPTIONS: Final = Key[tuple[str, ...]]("iommu-options", "what it was told, key=value each")
IOMMU_BYPASS: Final = Key[str]("iommu-bypass", "it lets all through: off, pt, pt=on; empty where it translates")
FIRMWARE_TABLES: Final = Key[tuple[str, ...]]("firmware-tables", "the ACPI tables that are there: DMAR IVRS IORT VIOT")
SWIOTLB_SLOTS: Final = Key[int]("swiotlb-slots", "bounce slots of 2 KiB")
SWIOTLB_USED: Final = Key[int]("swiotlb-used", "of those, in use")
NOIOMMU: Final = Key[bool]("noiommu", "vfio's enable_unsafe_noiommu_mode")

# -- of a machine: what runs it --------------------------------------------------------------------------------------

VMM: Final = Key[str]("vmm", "qemu, cloud-hypervisor, firecracker, ...")
VMM_VERSION: Final = Key[str]("vmm-version", "its version: 7.2.22")
MACHINE_TYPE: Final = Key[str](
    "machine-type", "q35, pc, virt, pseries, s390-ccw-virtio, with its version if it has one"
)
FIRMWARE: Final = Key[str]("firmware", "what boots: seabios, edk2, direct (a kernel is given), ...")
ROOT_BUSES: Final = Key[tuple[str, ...]]("root-buses", "PCI root buses, and which of them go around the IOMMU: pcie.0")
RAM: Final = Key[tuple[int, ...]]("ram", "first and last address of each piece of RAM, one after the other")
RUN_STATE: Final = Key[str]("run-state", "what QEMU says that it does: running, paused, prelaunch, inmigrate, ...")
INCOMING: Final = Key[bool]("migrates", "it takes part in a migration, or was told to wait for one")
MAPPED_SMALL: Final = Key[tuple[str, ...]](
    "mapped-small", "physical devices that are passed through behind its IOMMU, with memory in pages of 4 KiB"
)
VFIO_USER: Final = Key[tuple[str, ...]]("vfio-user", "devices that another process serves by the vfio-user protocol")
KATA: Final = Key[bool]("kata", "Kata Containers started it")
KATA_IOMMU_PLATFORM: Final = Key[bool]("kata-iommu-platform", "enable_iommu_platform of Kata's configuration")

# -- of a device: who it is ------------------------------------------------------------------------------------------

TYPE: Final = Key[str]("type", "net blk console rng balloon scsi 9p gpu input vsock crypto iommu mem fs pmem ...")
MODEL: Final = Key[str]("model", "QEMU's or libvirt's name of it: virtio-net-pci")
TRANSPORT: Final = Key[str]("transport", "pci mmio ccw vdpa")
ADDRESS: Final = Key[str](
    "address", "as the system that it is in prints it: 0000:01:00.0, fe.0.0001, a000000.virtio_mmio"
)
PLACE: Final = Key[str](
    "place",
    "its address in a form that both sides know: 'pci:00:02.0/00.0' is root bus, then slot.function of each bridge and "
    "of itself, 'pci:0001:00:02.0' the same in PCI domain 1; 'ccw:fe.0.0001'; 'mmio:0xa003e00'",
)
ALSO_CALLED: Final = Key[tuple[str, ...]]("also-called", "its names in other views of the machine: the id of an option")
DRIVER: Final = Key[str]("driver", "the driver that is bound, or empty")
STATUS: Final = Key[int]("status", "the device status byte")
STARTED: Final = Key[bool]("started", "its driver has set DRIVER_OK")
VFIO: Final = Key[bool]("vfio", "it is given to user space by vfio (the driver is vfio-pci, or uio)")

# -- of a device: features -------------------------------------------------------------------------------------------

OFFERED: Final = Key[bool]("offered", "the device offers bit 33 to its driver")
ACCEPTED: Final = Key[bool]("accepted", "the driver took bit 33, and FEATURES_OK stayed")
VERSION_1: Final = Key[bool]("version-1", "VIRTIO_F_VERSION_1 was taken")
FEATURES: Final = Key[int]("features", "the negotiated feature word")
WROTE: Final = Key[bool]("wrote-bit-33", "the driver wrote bit 33 among its features, also where it was then refused")
WIDE_FEATURES: Final = Key[bool](
    "wide-features", "the kernel shows more than 64 feature bits, so that it asks for them"
)
CONFIGURED: Final = Key[bool]("iommu-platform", "it was told to offer bit 33: iommu_platform=on, <driver iommu='on'/>")
DISABLE_LEGACY: Final = Key[str]("disable-legacy", "on, off or auto")
CAN_BE_LEGACY: Final = Key[bool]("can-be-legacy", "it also has the legacy interface, which has no bit 33")
PCI_ID: Final = Key[str]("pci-id", "vendor and device as lspci -n has them: 1af4:1041")
PCI_REVISION: Final = Key[int]("pci-revision", "0 where it has the legacy interface only, or that as well")
ATS: Final = Key[bool]("ats", "it has the ATS capability (configured so, or seen)")
ATS_ENABLED: Final = Key[bool]("ats-enabled", "the guest has enabled ATS")

# -- of a device: what is in front -----------------------------------------------------------------------------------

GROUP: Final = Key[str]("group", "its IOMMU group")
GROUP_TYPE: Final = Key[str]("group-type", "DMA, DMA-FQ, identity, unknown")
GROUP_DRIVERS: Final = Key[tuple[str, ...]]("group-drivers", "the drivers of all functions of its group")
BEHIND_IOMMU: Final = Key[bool]("behind-iommu", "the topology puts the machine's IOMMU in front of it")
BRIDGED: Final = Key[bool]("bridged", "it is behind a bridge or root port")
DMA_ROOT: Final = Key[str]("dma-root", "the root of its DMA address space, as QEMU's info mtree names it: vtd-nodmar")
DMA_COHERENT: Final = Key[bool]("dma-coherent", "its device tree node says so")
IOMMU_NODE: Final = Key[str]("iommu-node", "how its device tree node names an IOMMU: iommus, iommu-map")
RESTRICTED_POOL: Final = Key[str]("restricted-pool", "the restricted-dma-pool that its device tree node names")
RING_ADDRESSES: Final = Key[tuple[int, ...]](
    "ring-addresses", "desc, avail, used of its first queue, as it was given them"
)
RINGS_IN_RAM: Final = Key[bool]("rings-in-ram", "read as physical addresses, they hold the ring that the device has")

# -- of a device: its back end ---------------------------------------------------------------------------------------

BACKEND: Final = Key[str](
    "backend", "who serves it outside of the machine: vhost, vhost-user, vdpa, vfio; empty: nobody"
)
BACKEND_SOCKET: Final = Key[str](
    "backend-socket", "what connects machine and back end: the path of a socket, or of a device of VDUSE's"
)
USERS: Final = Key[tuple[str, ...]]("users", "programs of user space that have it open, by way of vhost-vdpa")
BACKEND_OFFERED: Final = Key[bool]("backend-offered", "the back end offers bit 33 to the machine")
BACKEND_ACCEPTED: Final = Key[bool]("backend-accepted", "the machine says that it took bit 33 from the back end")
BACKEND_PROTOCOL: Final = Key[int]("backend-protocol", "the vhost-user protocol features that are in use, as a word")
BACKEND_PRODUCT: Final = Key[str]("backend-product", "name and version, as it says: virtiofsd 1.10, dpdk 22.11")
BACKEND_OPTIONS: Final = Key[tuple[str, ...]]("backend-options", "its command line, word by word")

# -- of an option that nobody knows ----------------------------------------------------------------------------------

UNKNOWN_OPTIONS: Final = Key[tuple[str, ...]]("unknown-options", "what was said of it that is not known here")
