# SPDX-License-Identifier: Apache-2.0
"""Machines for the rules about back ends, guests and memory: for each rule machines that it is about, and the nearest
that it is not, with all that is to be said of them."""

from __future__ import annotations

from typing import Any

from scan_rule_kit import Case, device, machine

VTD: dict[str, Any] = {"iommu": "intel", "vmm": "qemu"}
TLB: dict[str, Any] = {**VTD, "iommu_options": ("intremap=off", "device-iotlb=on"), "vmm_version": "7.2.4"}
USER: dict[str, Any] = {"type": "net", "backend": "vhost-user", "iommu_platform": True, "offered": True}
KERNEL: dict[str, Any] = {**USER, "backend": "vhost"}
DPDK: dict[str, Any] = {**USER, "backend_product": "dpdk 22.11", "backend_offered": False}
BUGGY: dict[str, Any] = {**USER, "backend_product": "dpdk 20.11", "backend_offered": True, "backend_accepted": True}
SLOW = "VA602 virtio0"


def windows(**values: Any) -> dict[str, Any]:
    """A Windows guest on a machine of these facts."""
    return {**values, "os": "windows"}


DPDK_OFF = [
    Case("dpdk without the flag", machine(device(**DPDK), iommu="none", vmm="qemu"), {"VA205 virtio0"}),
    Case("dpdk, offered only", machine(device(**{**DPDK, "iommu_platform": None}), iommu="none"), {"VA205 virtio0"}),
    Case(
        "dpdk, told only",
        machine(device(**{**DPDK, "offered": False}), iommu="none", vmm="qemu"),
        {"VA205 virtio0"},
    ),
    Case(
        "ovs without the flag",
        machine(device(**{**DPDK, "backend_product": "ovs-vswitchd"}), iommu="none"),
        {"VA205 virtio0"},
    ),
    Case("dpdk with the flag", machine(device(**{**DPDK, "backend_offered": True}), iommu="none")),
    Case("dpdk, nobody knows", machine(device(**{**DPDK, "backend_offered": None}), iommu="none")),
    Case("dpdk, no bit wanted", machine(device(**{**DPDK, "iommu_platform": False, "offered": False}), iommu="none")),
    Case("not dpdk", machine(device(**{**DPDK, "backend_product": "spdk 24.01"}), iommu="none")),
    Case("dpdk, but for vhost", machine(device(**{**DPDK, "backend": "vhost"}), iommu="none")),
    Case("dpdk, protected, no iommu", machine(device(**DPDK), iommu="none", restricted="tdx")),
    Case("dpdk, protected, iommu unknown", machine(device(**DPDK), restricted="tdx")),
    Case("dpdk, protected and iommu", machine(device(**DPDK), iommu="intel", restricted="tdx"), {"VA205 virtio0"}),
]
OLD = [
    Case(
        "virtiofsd, QEMU 5",
        machine(device(**{**USER, "type": "fs"}), vmm="qemu", vmm_version="5.0.0", iommu="none"),
        {"VA401 virtio0"},
    ),
    Case(
        "disk, no bit, QEMU 6.0",
        machine(device(**{**USER, "type": "blk", "backend_offered": False}), vmm="qemu", vmm_version="6.0.1"),
        {"VA401 virtio0"},
    ),
    Case("disk, nobody knows, QEMU 6.0", machine(device(**{**USER, "type": "blk"}), vmm="qemu", vmm_version="6.0.1")),
    Case(
        "virtiofsd, QEMU 6.1", machine(device(**{**USER, "type": "fs", "backend_offered": False}), vmm_version="6.1.0")
    ),
    Case("virtiofsd, bit offered", machine(device(**{**USER, "type": "fs", "backend_offered": True}), vmm_version="5")),
    Case(
        "a disk with the bit, QEMU 5",
        machine(device(**{**USER, "type": "fs", "backend_offered": True}), vmm="qemu", vmm_version="5.0.0"),
    ),
    Case(
        "virtiofsd, no bit wanted",
        machine(
            device(type="fs", backend="vhost-user", offered=False, iommu_platform=False), vmm="qemu", vmm_version="5.0"
        ),
    ),
    Case("fs in QEMU", machine(device(type="fs", offered=True, iommu_platform=True), vmm="qemu", vmm_version="5.0")),
    Case(
        "another program's 5.0",
        machine(device(**{**USER, "type": "fs", "backend_offered": False}), vmm="crosvm", vmm_version="5.0"),
    ),
    Case(
        "rng, no bit",
        machine(device(**{**USER, "type": "rng", "backend_offered": False}), vmm="qemu", vmm_version="7.2.22"),
        {"VA401 virtio0"},
    ),
    Case(
        "rng, no bit, QEMU of no known version",
        machine(device(**{**USER, "type": "rng", "backend_offered": False})),
        {"VA401 virtio0"},
    ),
    Case("rng, nobody knows", machine(device(**{**USER, "type": "rng"}), vmm="qemu", vmm_version="7.2.22")),
    Case("rng, vhost", machine(device(**{**USER, "type": "rng", "backend": "vhost", "backend_offered": False}))),
    Case(
        "rng of Cloud Hypervisor",
        machine(device(**{**USER, "type": "rng", "backend_offered": False}), vmm="cloud-hypervisor"),
    ),
    Case("net of 7.2, no bit", machine(device(**{**USER, "backend_offered": False}), vmm="qemu", vmm_version="7.2.22")),
]
ATS = [
    Case("ats, never enabled", machine(device(ats=True, ats_enabled=False, **KERNEL), **TLB), {"VA402 virtio0", SLOW}),
    Case("no ats at all", machine(device(ats=False, **KERNEL), **TLB), {"VA402 virtio0", SLOW}),
    Case(
        "ats, vhost-user",
        machine(device(ats=True, ats_enabled=False, **{**USER, "type": "blk"}), **TLB),
        {"VA402 virtio0", SLOW},
    ),
    Case("ats enabled", machine(device(ats=True, ats_enabled=True, **KERNEL), **TLB), {SLOW}),
    Case("ats, nobody knows", machine(device(ats=True, **KERNEL), **TLB), {"VA402? virtio0", SLOW}),
    Case("ats, fixed", machine(device(ats=False, **KERNEL), **{**TLB, "vmm_version": "7.2.5"}), {SLOW}),
    Case(
        "ats, before the fix of 8.0",
        machine(device(ats=False, **KERNEL), **{**TLB, "vmm_version": "8.0.3"}),
        {"VA402 virtio0", SLOW},
    ),
    Case("ats, fixed in 8.0.4", machine(device(ats=False, **KERNEL), **{**TLB, "vmm_version": "8.0.4"}), {SLOW}),
    Case("ats, fixed in 8.1", machine(device(ats=False, **KERNEL), **{**TLB, "vmm_version": "8.1.0"}), {SLOW}),
    Case(
        "ats, no version",
        machine(device(ats=False, **KERNEL), **{**TLB, "vmm_version": ""}),
        {"VA402? virtio0", SLOW},
    ),
    Case("ats, no version, nobody knows", machine(device(ats=True, **KERNEL), **{**TLB, "vmm_version": ""}), {SLOW}),
    Case(
        "a back end that has no bit",
        machine(device(**{**USER, "type": "fs"}), **VTD, vmm_version="9.0"),
    ),
    Case("no device-iotlb", machine(device(ats=False, **KERNEL), **{**TLB, "iommu_options": ("pt=on",)}), {SLOW}),
    Case("no options known", machine(device(ats=False, **KERNEL), **VTD, vmm_version="7.2.4"), {SLOW}),
    Case("not VT-d", machine(device(ats=False, **KERNEL), **{**TLB, "iommu": "virtio"}), {SLOW}),
    Case("in QEMU", machine(device(**{**KERNEL, "backend": ""}), **TLB)),
    Case("bit not wanted", machine(device(backend="vhost", offered=False, iommu_platform=False, ats=False), **TLB)),
    Case("its bus goes around", machine(device(behind_iommu=False, ats=False, **KERNEL), **TLB)),
    Case("bit not taken", machine(device(accepted=False, ats=False, version_1=False, **KERNEL), **TLB)),
    Case(
        "a QEMU of another name",
        machine(device(ats=False, **KERNEL), **{**TLB, "vmm": "crosvm"}),
        {"VA402? virtio0", SLOW},
    ),
    Case("Windows", machine(device(ats=True, **KERNEL), **windows(**TLB)), {"VA406 virtio0", "VA304? virtio0", SLOW}),
    Case(
        "Windows, the first that has the bit",
        machine(device(accepted=True, **KERNEL), **windows(**{**TLB, "vmm_version": "6.2.0"})),
        {"VA406 virtio0", SLOW},
    ),
    Case(
        "Windows, fixed",
        machine(device(ats=True, accepted=True, **KERNEL), **windows(**{**TLB, "vmm_version": "8.1"})),
        {SLOW},
    ),
    Case(
        "Windows, no version",
        machine(device(accepted=True, **KERNEL), **windows(**{**TLB, "vmm_version": ""})),
        {"VA406? virtio0", SLOW},
    ),
    Case(
        "Windows, a disk",
        machine(device(ats=False, accepted=True, **{**KERNEL, "type": "scsi"}), **windows(**TLB)),
        {"VA402 virtio0", SLOW},
    ),
    Case("Windows, in QEMU", machine(device(accepted=True, **{**KERNEL, "backend": ""}), **windows(**TLB))),
]
MIGRATES: dict[str, Any] = {**VTD, "migrates": True, "vmm_version": "7.2.0"}
MIGRATION = [
    Case("migrates", machine(device(**KERNEL), **MIGRATES), {"VA403 virtio0", SLOW}),
    Case("migrates, vhost-user", machine(device(**USER), **MIGRATES), {"VA403 virtio0", SLOW}),
    Case("migrates, fixed", machine(device(**KERNEL), **{**MIGRATES, "vmm_version": "7.2.1"}), {SLOW}),
    Case("migrates, fixed in 8", machine(device(**KERNEL), **{**MIGRATES, "vmm_version": "8.0.0"}), {SLOW}),
    Case(
        "migrates, candidate",
        machine(device(**KERNEL), **{**MIGRATES, "vmm_version": "8.0.0-rc0"}),
        {"VA403 virtio0", SLOW},
    ),
    Case(
        "migrates, no version", machine(device(**KERNEL), **{**MIGRATES, "vmm_version": ""}), {"VA403? virtio0", SLOW}
    ),
    Case("does not migrate", machine(device(**KERNEL), **{**MIGRATES, "migrates": False}), {SLOW}),
    Case("migrates, nothing in front", machine(device(**KERNEL), **{**MIGRATES, "iommu": "none"})),
    Case("migrates, lets through", machine(device(group="1", group_type="identity", **KERNEL), **MIGRATES)),
    Case("migrates, off", machine(device(dma_root="vtd-nodmar", **KERNEL), **MIGRATES)),
    Case("migrates, in QEMU", machine(device(**{**KERNEL, "backend": ""}), **MIGRATES)),
    Case("migrates, no bit", machine(device(backend="vhost", offered=False), **{**MIGRATES, "iommu": "none"})),
    Case("migrates, no bit, bypass", machine(device(backend="vhost", offered=False, iommu_platform=False), **MIGRATES)),
    Case(
        "migrates, old dpdk",
        machine(device(backend_product="dpdk 19.08", **USER), **{**MIGRATES, "vmm_version": "8.2.0"}),
        {"VA403 virtio0", "VA404 virtio0", SLOW},
    ),
    Case(
        "migrates, new dpdk",
        machine(device(backend_product="dpdk 24.11", **USER), **{**MIGRATES, "vmm_version": "8.2.0"}),
        {SLOW},
    ),
]
BUGS = [
    Case("dpdk 20.11", machine(device(**BUGGY), iommu="none"), {"VA404 virtio0"}),
    Case(
        "dpdk 20.11, nobody says",
        machine(device(backend_product="dpdk 20.11", **USER), iommu="none"),
        {"VA404 virtio0"},
    ),
    Case("dpdk 21.11", machine(device(**{**BUGGY, "backend_product": "dpdk 21.11"}), iommu="none")),
    Case("dpdk 23.07 behind vhost-user", machine(device(**{**BUGGY, "backend_product": "dpdk 23.07"}), iommu="none")),
    Case(
        "dpdk 23.07 with VDUSE",
        machine(device(**{**BUGGY, "backend_product": "dpdk 23.07", "backend": "vdpa"}), iommu="none"),
        {"VA404 virtio0"},
    ),
    Case(
        "dpdk 23.03 with VDUSE",
        machine(device(**{**BUGGY, "backend_product": "dpdk 23.03", "backend": "vdpa"}), iommu="none"),
    ),
    Case("dpdk, no version", machine(device(**{**BUGGY, "backend_product": "dpdk"}), iommu="none")),
    Case("spdk 20.01", machine(device(**{**BUGGY, "backend_product": "spdk 20.01"}), iommu="none")),
    Case("dpdk 20.11, not taken", machine(device(**{**BUGGY, "backend_accepted": False}), iommu="none")),
    Case(
        "dpdk 20.11, not offered",
        machine(device(**{**BUGGY, "backend_offered": False, "backend_accepted": None}), iommu="none"),
        {"VA205 virtio0"},
    ),
    Case("dpdk 20.11, no bit", machine(device(**{**BUGGY, "offered": False, "iommu_platform": False}), iommu="none")),
    Case(
        "dpdk 20.11 by its log",
        machine(device(**USER), log="EAL: RTE Version: 'DPDK 20.11.3'\n", iommu="none"),
        {"VA404 virtio0"},
    ),
    Case(
        "dpdk 20.11 by its log, vhost",
        machine(device(**KERNEL), log="EAL: RTE Version: 'DPDK 20.11.3'\n", iommu="none"),
    ),
    Case("dpdk of nobody", machine(device(**{**BUGGY, "backend_product": None}), iommu="none")),
]
BIT_21 = [
    Case(
        "bit 21, rust", machine(device(backend_protocol=1 << 21, backend_product="vhost-device-gpu")), {"VA405 virtio0"}
    ),
    Case(
        "bit 21, virtiofsd",
        machine(device(backend_protocol=1 << 21, backend_product="virtiofsd 1.x")),
        {"VA405 virtio0"},
    ),
    Case("bit 21, unknown", machine(device(backend_protocol=1 << 21)), {"VA405? virtio0"}),
    Case("bit 21, not rust", machine(device(backend_protocol=1 << 21, backend_product="dpdk 22.11"))),
    Case("bits 21 and 22", machine(device(backend_protocol=3 << 21, backend_product="vhost-device-gpu"))),
    Case("bit 22", machine(device(backend_protocol=1 << 22, backend_product="vhost-device-gpu"))),
    Case("other protocol features", machine(device(backend_protocol=0x10CBF, backend_product="vhost-device-gpu"))),
    Case("no protocol features", machine(device(backend_product="vhost-device-gpu"))),
]
GROUP: dict[str, Any] = {"vfio": True, "driver": "vfio-pci", "group": "3", "type": "net"}
USER_SPACE = [
    Case("uio", machine(device(vfio=True, driver="uio_pci_generic"), iommus=()), {"VA107 virtio0"}),
    Case("igb_uio", machine(device(vfio=True, driver="igb_uio"), iommus=()), {"VA107 virtio0"}),
    Case("noiommu", machine(device(**GROUP), noiommu=True, iommus=()), {"VA107 virtio0"}),
    Case("noiommu, protected", machine(device(group_type="DMA", offered=True, **GROUP), noiommu=True)),
    Case("vfio", machine(device(group_type="DMA", offered=True, **GROUP), noiommu=False)),
    Case("vfio, nothing known", machine(device(offered=True, **GROUP))),
    Case(
        "mixed",
        machine(device(group_drivers=("vfio-pci", "virtio-pci"), offered=True, **GROUP)),
        {"VA107 virtio0"},
    ),
    Case("all vfio's", machine(device(group_drivers=("vfio-pci", "pcieport", "", "vfio-pci"), offered=True, **GROUP))),
    Case("the kernel's", machine(device(driver="virtio-pci", group_drivers=("virtio-pci", "vfio-pci"), noiommu=True))),
    Case("uio, though not handed out", machine(device(driver="uio_pci_generic"))),
    Case("another driver", machine(device(vfio=True, driver="x", group_drivers=("e1000e",)), noiommu=True)),
]
WINDOWS = [
    Case(
        "refused on Windows",
        machine(device(type="net", offered=True, accepted=False, version_1=True), **windows(**VTD)),
        {"VA304 virtio0"},
    ),
    Case("viofs", machine(device(type="fs", offered=True, accepted=True), **windows(**VTD)), {"VA304 virtio0"}),
    Case("viofs, nothing in front", machine(device(type="fs", offered=True, accepted=True), **windows(iommu="none"))),
    Case("netkvm", machine(device(type="net", offered=True, accepted=True), **windows(**VTD))),
    Case("netkvm, nobody knows", machine(device(type="net", offered=True), **windows(**VTD)), {"VA304? virtio0"}),
    Case("netkvm, nothing in front", machine(device(type="net", offered=True), **windows(iommu="none"))),
    Case("not offered on Windows", machine(device(type="fs", offered=False, accepted=False), **windows(iommu="none"))),
    Case("not Windows", machine(device(type="fs", offered=True, accepted=False), os="linux", **VTD)),
]
CARRIES_ON = [
    Case("goes on", machine(device(status=0x07, version_1=True)), {"VA306 virtio0"}),
    Case("started by QEMU", machine(device(status=0x03, version_1=True, started=True)), {"VA306 virtio0"}),
    Case(
        "sets its rings up",
        machine(device(status=0x03, version_1=True, ring_addresses=(4096, 0, 0))),
        {"VA306 virtio0"},
    ),
    Case("rings of nothing", machine(device(status=0x03, version_1=True, ring_addresses=(0, 0, 0)))),
    Case("negotiates", machine(device(status=0x03, version_1=True, started=False))),
    Case("works", machine(device(status=0x0F, version_1=True, started=True, ring_addresses=(4096, 0, 0)))),
    Case("gave up", machine(device(status=0x87, version_1=True, started=True))),
    Case("legacy", machine(device(status=0x07, version_1=False, started=True))),
    Case("legacy, perhaps", machine(device(status=0x07, started=True))),
    Case("no status", machine(device(version_1=True, started=True))),
]
VDPA = [
    Case("vdpa, not taken", machine(device(transport="vdpa", accepted=False, status=0x83)), {"VA307 virtio0"}),
    Case(
        "vdpa, not offered, no driver", machine(device(transport="vdpa", offered=False, driver="")), {"VA307 virtio0"}
    ),
    Case("vdpa, not offered, failed", machine(device(transport="vdpa", offered=False, status=0x83)), {"VA307 virtio0"}),
    Case(
        "vdpa, not offered, works", machine(device(transport="vdpa", offered=False, status=0x0F, driver="virtio_net"))
    ),
    Case("vdpa, not offered, nothing known", machine(device(transport="vdpa", offered=False))),
    Case("vdpa, on", machine(device(transport="vdpa", offered=True, accepted=True, status=0x0F))),
    Case("vdpa, failed without", machine(device(transport="vdpa", features=1 << 32, status=0x83)), {"VA307 virtio0"}),
    Case("vdpa, failed with", machine(device(transport="vdpa", features=3 << 32, status=0x83))),
    Case("vdpa, failed, nothing known", machine(device(transport="vdpa", status=0x83))),
    Case("vdpa, on, no driver", machine(device(transport="vdpa", offered=True, driver=""))),
    Case("a pci device without driver", machine(device(offered=False, accepted=False, driver=""))),
    Case("vdpa behind", machine(device(backend="vdpa", backend_offered=False)), {"VA307 virtio0"}),
    Case("vdpa behind, on", machine(device(backend="vdpa", backend_offered=True))),
    Case("vhost behind", machine(device(backend="vhost", backend_offered=False))),
]
KATA = [
    Case("kata, protected", machine(device(offered=False), kata=True, restricted="tdx", iommu="none"), {"VA309"}),
    Case("kata, all on", machine(device(offered=True), kata=True, restricted="tdx", iommu="none")),
    Case("kata, nobody knows", machine(device(), kata=True, restricted="tdx", iommu="none")),
    Case(
        "kata, one of two",
        machine(device("a", offered=True), device("b", offered=False), kata=True, restricted="tdx"),
        {"VA309"},
    ),
    Case("kata, ordinary", machine(device(offered=False), kata=True, iommu="none")),
    Case("kata, nothing known", machine(device(offered=False), kata=True)),
    Case("protected, not kata", machine(device(offered=False), restricted="tdx", iommu="none")),
    Case(
        "kata, iommu lets through",
        machine(device(offered=False, group="1", group_type="identity"), kata=True, iommu="intel"),
        {"VA309"},
    ),
    Case("kata, goes around", machine(device(offered=False), kata=True, iommu="intel")),
    Case("kata's file", machine(kata=True, kata_iommu_platform=False, iommu="intel", vmm="qemu"), {"VA309"}),
    Case("kata's file, on", machine(kata=True, kata_iommu_platform=True, iommu="intel", vmm="qemu")),
    Case("kata's file, no iommu", machine(kata=True, kata_iommu_platform=False, iommu="none", vmm="qemu")),
    Case("kata's file, nothing said", machine(kata=True, iommu="intel", vmm="qemu")),
    Case("kata's file, QEMU protects", machine(kata=True, kata_iommu_platform=False, restricted="s390-pv", vmm="qemu")),
    Case(
        "kata's file, another protects",
        machine(kata=True, kata_iommu_platform=False, restricted="tdx", vmm="other"),
        {"VA309"},
    ),
]
ARM: dict[str, Any] = {"arch": "aarch64", "iommus": ()}
TREE: dict[str, Any] = {"transport": "mmio", "accepted": True}
HEAD = "virtio_blk virtio0: req.0:id 0 is not a head!\n"
COHERENT = [
    Case("incoherent", machine(device(dma_coherent=False, **TREE), **ARM), {"VA501 virtio0"}),
    Case("incoherent, 32 bits", machine(device(dma_coherent=False, **TREE), arch="arm", iommus=()), {"VA501 virtio0"}),
    Case("coherent", machine(device(dma_coherent=True, **TREE), log=HEAD, **ARM)),
    Case("incoherent, flat", machine(device(dma_coherent=False, transport="mmio", accepted=False), **ARM)),
    Case(
        "incoherent, xen",
        machine(device(dma_coherent=False, transport="mmio", accepted=False), xen_domain=True, **ARM),
        {"VA501 virtio0"},
    ),
    Case(
        "incoherent, protected",
        machine(device(dma_coherent=False, transport="mmio", accepted=False), restricted="cca", **ARM),
        {"VA501 virtio0"},
    ),
    Case("incoherent, x86", machine(device(dma_coherent=False, **TREE), arch="x86_64", iommus=())),
    Case("incoherent, pci", machine(device(dma_coherent=False, accepted=True), **ARM)),
    Case("no head", machine(device(**TREE), log=HEAD, **ARM), {"VA501? virtio0"}),
    Case("no head, flat", machine(device(**{**TREE, "accepted": False}), log=HEAD, **ARM)),
    Case("nothing said", machine(device(**TREE), **ARM)),
]
NET: dict[str, Any] = {"type": "net", "driver": "virtio_net"}
PREMAPPED = [
    Case("6.10", machine(device(**NET), kernel="6.10.9-amd64"), {"VA502 virtio0"}),
    Case("6.11-rc", machine(device(**NET), kernel="6.11.0-rc7"), {"VA502 virtio0"}),
    Case("6.10-rc1", machine(device(**NET), kernel="6.10.0-rc1+"), {"VA502 virtio0"}),
    Case("6.11", machine(device(**NET), kernel="6.11.0-29-generic")),
    Case("6.9", machine(device(**NET), kernel="6.9.12")),
    Case("6.10, a disk", machine(device(driver="virtio_blk"), kernel="6.10.9")),
    Case("6.10, another driver", machine(device(type="net", driver="vfio-pci"), kernel="6.10.9")),
    Case("no kernel", machine(device(**NET))),
]
FULL = "virtio_blk virtio0: swiotlb buffer is full (sz: 4096 bytes), total 32768 (slots), used 32700 (slots)\n"
BOUNCE = [
    Case("full", machine(log=FULL), {"VA601"}),
    Case("full, large", machine(log=FULL.replace("4096", "262145"), swiotlb_slots=65536), {"VA601"}),
    Case("full, as large as it may be", machine(log=FULL.replace("4096", "262144")), {"VA601"}),
    Case("full, no size", machine(log="nvme 0000:00:05.0: swiotlb buffer is full\n"), {"VA601"}),
    Case("nearly", machine(swiotlb_slots=1000, swiotlb_used=900, restricted="sev"), {"VA601"}),
    Case("half", machine(swiotlb_slots=1000, swiotlb_used=899)),
    Case("none", machine(swiotlb_slots=0, swiotlb_used=0)),
    Case("not known", machine(swiotlb_slots=1000)),
    Case("used, of nobody knows what", machine(swiotlb_used=1000)),
]
SPEED = [
    Case("vhost", machine(device(**KERNEL), **VTD), {SLOW}),
    Case("vhost, nothing in front", machine(device(**KERNEL), iommu="none")),
    Case("vhost, lets through", machine(device(group="1", group_type="identity", **KERNEL), **VTD)),
    Case("vhost, not taken by QEMU", machine(device(backend_accepted=False, **KERNEL), **VTD)),
    Case("vhost, no bit there", machine(device(backend_offered=False, **KERNEL), **VTD)),
    Case("vhost, nobody knows", machine(device(backend="vhost"), iommu="none")),
    Case("vhost, nobody knows, behind", machine(device(backend="vhost"), **VTD)),
    Case("vdpa", machine(device(**{**KERNEL, "backend": "vdpa"}), **VTD)),
]
CASES2 = [
    *DPDK_OFF,
    *OLD,
    *ATS,
    *MIGRATION,
    *BUGS,
    *BIT_21,
    *USER_SPACE,
    *WINDOWS,
    *CARRIES_ON,
    *VDPA,
    *KATA,
    *COHERENT,
    *PREMAPPED,
    *BOUNCE,
    *SPEED,
]
