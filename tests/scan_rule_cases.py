# SPDX-License-Identifier: Apache-2.0
"""Machines for the rules about isolation, topology and start: for each rule machines that it is about, and the nearest
that it is not, with all that is to be said of them."""

from __future__ import annotations

from typing import Any

from scan_rule_kit import Case, device, machine, put
from virtiova.collect.facts import Certainty, Device

INTEL: dict[str, Any] = {"iommu": "intel", "vmm": "qemu", "vmm_version": "7.2.22"}
LINUX: dict[str, Any] = {"os": "linux", "kernel": "6.1.0", "vmm": "qemu"}
OFF: dict[str, Any] = {"offered": False, "accepted": False, "version_1": True, "status": 0x0F}
ON: dict[str, Any] = {"offered": True, "accepted": True, "version_1": True, "status": 0x0F}
REFUSED: dict[str, Any] = {"offered": True, "accepted": False, "wrote_bit_33": False, "version_1": True, "status": 0x83}
VHOST: dict[str, Any] = {"backend": "vhost-user", "iommu_platform": True, "offered": True}
QEMU = "qemu-system-x86_64: -device virtio-blk-pci,drive=d,id={}: {}\n"
NOT_BY_DEVICE = "iommu_platform=true is not supported by the device"
STILL_LEGACY = "VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device"
DMAR = (
    "DMAR: [DMA Write NO_PASID] Request device [00:03.0] fault addr 0x4f000 [fault reason 0x02] Present bit is clear\n"
)
AMD = "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:00:03.0 domain=0x0001 address=0x4f000 flags=0x0020]\n"
SMMU = (
    "arm-smmu-v3 9050000.smmuv3: event: F_TRANSLATION client: 0000:00:03.0 sid: 0x18 ssid: 0x0 iova: 0x4f000 ipa: 0x0\n"
)
RAW = "arm-smmu-v3 9050000.smmuv3: event 0x10 received:\narm-smmu-v3 9050000.smmuv3: \t0x0000001800000010\n"
NOT_KNOWN = "qemu-system-x86_64: virtio_iommu_translate sid=16 is not known!!\n"
VIOMMU = "virtio_iommu virtio0: page fault from EP 24 at 0x4f000 [R]\n"


def seen_and(
    running_value: bool,
    written_value: bool,
    *,
    running: Certainty = Certainty.SEEN,
    written: Certainty = Certainty.DEFAULT,
) -> Device:
    """A device that runs with or without the bit, and what its configuration comes to."""
    made = device()
    put(made.facts, running, offered=running_value)
    put(made.facts, written, offered=written_value)
    return made


def two_views(key: str, *values: object, sure: Certainty = Certainty.SEEN) -> Device:
    """A device of which two views say two things."""
    made = Device("virtio0")
    put(made.facts, type="blk", transport="pci")
    put(made.facts, **{key: values[0]})
    put(made.facts, sure, **{key: values[1]})
    return made


ISOLATION = [
    Case("ordinary", machine(device(**OFF), iommu="none", **LINUX)),
    Case("ordinary, nothing known", machine(device())),
    Case("all on", machine(device(**ON), **INTEL)),
    Case("bypass", machine(device(**OFF), **INTEL), {"VA101 virtio0"}),
    Case(
        "bypass, behind a port",
        machine(device(model="virtio-blk-pci", can_be_legacy=False, **OFF), **INTEL),
        {"VA101 virtio0"},
    ),
    Case(
        "bypass, non-transitional",
        machine(device(model="virtio-blk-pci-non-transitional", **OFF), **INTEL),
        {"VA101 virtio0"},
    ),
    Case("bypass, model", machine(device(model="virtio-blk-pci", **OFF), **INTEL), {"VA101 virtio0"}),
    Case("bypass, of no known type", machine(device(type="", **OFF), **INTEL), {"VA101 virtio0"}),
    Case("its bus is led around", machine(device(behind_iommu=False, **OFF), **INTEL)),
    Case("the group is identity", machine(device(group="1", group_type="identity", **OFF), **INTEL)),
    Case(
        "from inside",
        machine(
            device(group="1", group_type="DMA", accepted=False, version_1=True, status=15, driver="virtio_blk"), **LINUX
        ),
        {"VA101 virtio0"},
    ),
    Case("not taken", machine(device(**{**OFF, "offered": True}), **INTEL), {"VA102 virtio0"}),
    Case("not taken, Windows", machine(device(**{**OFF, "offered": True}), os="windows", **INTEL)),
    Case("not taken, vDPA", machine(device(**{**OFF, "offered": True, "transport": "vdpa"}), **INTEL)),
    Case("not taken, restricted", machine(device(**OFF), restricted="sev", **INTEL), {"VA101 virtio0"}),
    Case("not taken, nothing in front", machine(device(**{**OFF, "offered": True}), iommu="none", vmm="qemu")),
    *(
        Case(f"faults {log[:8]}", machine(device(**OFF), log=log, **INTEL), {"VA101 virtio0", "VA103 virtio0"})
        for log in (DMAR, AMD, SMMU, RAW, VIOMMU)
    ),
    Case("faults of another", machine(device(address="0000:00:04.0", **ON), log=DMAR, **INTEL)),
    Case("faults of one that is on", machine(device(**ON), log=DMAR, **INTEL)),
    Case("faults, bit unknown", machine(device(), log=DMAR), {"VA103? virtio0"}),
    Case("faults, and no more is given", machine(log=DMAR), {"VA103? 00:03.0"}),
    Case("faults, not offered", machine(device(offered=False), log=DMAR, iommu="none"), {"VA103 virtio0"}),
    Case("faults, not accepted", machine(device(accepted=False), log=DMAR, iommu="none"), {"VA103 virtio0"}),
    Case(
        "something else is said, no address",
        machine(device(address="", **OFF), log="swiotlb buffer is full\n", iommu="none"),
    ),
    Case("faults, no address", machine(device(address="", accepted=False, offered=False), log=DMAR, iommu="none")),
    Case(
        "in user space", machine(device(vfio=True, driver="vfio-pci", offered=False), iommu="none"), {"VA108 virtio0"}
    ),
    Case(
        "in user space, behind",
        machine(device(vfio=True, driver="vfio-pci", offered=False), **INTEL),
        {"VA108 virtio0"},
    ),
    Case("in user space, offered", machine(device(vfio=True, driver="vfio-pci", offered=True), **INTEL)),
    Case(
        "in user space, mmio",
        machine(device(vfio=True, driver="vfio-platform", transport="mmio", offered=False), iommu="none"),
        {"VA108 virtio0"},
    ),
    Case("in user space, not known", machine(device(vfio=True, driver="vfio-pci")), {"VA108? virtio0"}),
]

AROUND: dict[str, Any] = {"behind_iommu": False, "iommu_platform": True, "offered": True, "transport": "pci"}
ISOLATION += [
    Case("the bit on a bus that goes around", machine(device(**AROUND), **INTEL), {"VA109 virtio0"}),
    Case("the bit on a bus behind it", machine(device(**{**AROUND, "behind_iommu": True}), **INTEL)),
    Case("around, the bit not asked for", machine(device(**{**AROUND, "iommu_platform": False}), **INTEL)),
    Case("around, nobody says what was asked", machine(device(behind_iommu=False, offered=True), **INTEL)),
    Case("the bit, no IOMMU", machine(device(**AROUND), iommu="none")),
    Case("the bit, no IOMMU known of", machine(device(**AROUND))),
    Case("the bit, not on PCI", machine(device(**{**AROUND, "transport": "mmio"}), **INTEL)),
    Case("the bit, no bus known", machine(device(iommu_platform=True, offered=True, transport="pci"), **INTEL)),
]

TWO: dict[str, Any] = {"iommu_units": 2, "iommus": ("dmar0",)}
CH: dict[str, Any] = {"vmm": "cloud-hypervisor", "iommu": "virtio"}
TOPOLOGY = [
    Case("one unit unused", machine(device(), device("virtio1", group="1", group_type="DMA", **ON), **TWO), {"VA104"}),
    Case("one unit unused, no device there", machine(device(group="1", group_type="DMA", **ON), **TWO)),
    Case("both units used", machine(device(), iommu_units=2, iommus=("dmar0", "dmar1"))),
    Case("no unit used", machine(device(), iommu_units=2, iommus=())),
    Case("an mmio device is under none", machine(device(transport="mmio"), **TWO)),
    Case("names that are no units", machine(device(), iommu_units=2, iommus=("x",))),
    Case("units not known", machine(device(), iommus=("dmar0",))),
    Case("not known what is used", machine(device(), iommu_units=2)),
    Case("mmio on Cloud Hypervisor", machine(device(transport="mmio", behind_iommu=False, **ON), **CH), {"VA105"}),
    Case(
        "mmio, by the units",
        machine(
            device(transport="mmio", behind_iommu=False, offered=True), vmm="cloud-hypervisor", iommus=("virtio0",)
        ),
        {"VA105"},
    ),
    Case("passed through in pieces", machine(mapped_small=("/sys/x",), **CH), {"VA105"}),
    Case("passed through in pieces, no IOMMU", machine(mapped_small=("/sys/x",), vmm="cloud-hypervisor", iommu="none")),
    Case(
        "in a group by the device tree",
        machine(device(group="1", behind_iommu=False, **OFF), **CH, arch="aarch64", os="linux"),
        {"VA105"},
    ),
    Case(
        "in a group by ACPI",
        machine(
            device(group="1", behind_iommu=False, **OFF), **CH, arch="aarch64", os="linux", firmware_tables=("VIOT",)
        ),
    ),
    Case("in a group by a PC", machine(device(group="1", behind_iommu=False, **OFF), **CH, arch="x86_64", os="linux")),
    Case("in a group by who knows", machine(device(group="1", behind_iommu=False, **OFF), **CH, arch="aarch64")),
    Case("in a group, on", machine(device(group="1", **ON), **CH, arch="aarch64", os="linux")),
    Case("in no group", machine(device(behind_iommu=False, **OFF), **CH, arch="aarch64", os="linux")),
    Case("mmio without the bit", machine(device(transport="mmio", behind_iommu=False, **OFF), **CH)),
    Case("PCI on Cloud Hypervisor", machine(device(**ON), **CH)),
    Case("mmio on QEMU", machine(device(transport="mmio", behind_iommu=False, **ON), vmm="qemu", iommu="virtio")),
    Case("mmio, no IOMMU", machine(device(transport="mmio", **ON), vmm="cloud-hypervisor", iommu="none")),
    Case("vfio-user", machine(vfio_user=("nvme0",), **INTEL), {"VA106"}),
    Case("vfio-user, no IOMMU", machine(vfio_user=("nvme0",), iommu="none")),
    Case("vfio-user, IOMMU not known", machine(vfio_user=("nvme0",))),
    Case("no vfio-user", machine(vfio_user=(), **INTEL)),
]

SEV: dict[str, Any] = {"restricted": "sev", "machine_type": "pc-i440fx-7.2", "iommu": "none", "vmm": "qemu"}
FS: dict[str, Any] = {"type": "fs", "backend": "vhost-user", "iommu_platform": True}
START = [
    Case("asked, legacy", machine(device(iommu_platform=True, can_be_legacy=True), iommu="none"), {"VA201 virtio0"}),
    Case("asked, modern", machine(device(iommu_platform=True, can_be_legacy=False, offered=True), **INTEL)),
    Case("legacy, not asked", machine(device(iommu_platform=False, can_be_legacy=True, offered=False), iommu="none")),
    Case(
        "QEMU said so", machine(device("d0", model="virtio-blk-pci"), log=QEMU.format("d0", STILL_LEGACY)), {"VA201 d0"}
    ),
    Case(
        "QEMU said so, no id",
        machine(
            device("d0", model="virtio-blk-pci"),
            device("d1", model="virtio-net-pci"),
            log="qemu: -device virtio-blk-pci,drive=d: " + STILL_LEGACY,
        ),
        {"VA201 d0"},
    ),
    Case(
        "QEMU said so, of which of two?",
        machine(
            device("d0", model="virtio-blk-pci"),
            device("d1", model="virtio-blk-pci"),
            log="qemu: -device virtio-blk-pci,drive=d: " + STILL_LEGACY,
        ),
        {"VA201 virtio-blk-pci"},
    ),
    Case(
        "QEMU said so in JSON",
        machine(device("d0"), log='qemu: -device {"driver":"virtio-rng-pci","id":"d0"}: ' + STILL_LEGACY),
        {"VA201 d0"},
    ),
    Case("QEMU said so, no more", machine(log=QEMU.format("d0", STILL_LEGACY)), {"VA201 d0"}),
    Case("QEMU said so of none", machine(log="qemu: " + STILL_LEGACY), {"VA201"}),
    Case("sev on pc", machine(device(offered=False, iommu_platform=False), **SEV), {"VA202"}),
    Case("sev on pc, legacy", machine(device(iommu_platform=True, can_be_legacy=True), **SEV), {"VA202"}),
    Case("sev on pc, made right", machine(device(iommu_platform=True, can_be_legacy=False, offered=True), **SEV)),
    Case("sev on pc, nothing known of a device", machine(device(), **SEV)),
    Case("tdx on pc", machine(device(offered=False), **{**SEV, "restricted": "tdx"}), {"VA301 virtio0"}),
    Case("sev on q35", machine(device(offered=False), **{**SEV, "machine_type": "pc-q35-7.2"}), {"VA301 virtio0"}),
    Case("pc", machine(device(offered=False), machine_type="pc", iommu="none")),
    Case("back end without", machine(device(backend_offered=False, **VHOST), **INTEL), {"VA203 virtio0"}),
    Case(
        "back end without, no IOMMU", machine(device(backend_offered=False, **VHOST), iommu="none"), {"VA203 virtio0"}
    ),
    Case("back end with", machine(device(backend_offered=True, **VHOST), **INTEL)),
    Case("back end not known", machine(device(**VHOST), **INTEL), {"VA203? virtio0"}),
    Case("back end not known, runs", machine(device(status=0, **VHOST), **INTEL)),
    Case("back end not known, accepted", machine(device(accepted=True, **VHOST), **INTEL)),
    Case("kernel's net", machine(device(type="net", **{**VHOST, "backend": "vhost"}), **INTEL)),
    Case(
        "kernel's scsi",
        machine(device(type="scsi", model="vhost-scsi-pci", **{**VHOST, "backend": "vhost"}), **INTEL),
        {"VA203 virtio0"},
    ),
    Case(
        "kernel's scsi, not asked",
        machine(device(type="scsi", model="vhost-scsi-pci", backend="vhost", offered=False), iommu="none"),
    ),
    Case("virtiofsd", machine(device(**FS), **INTEL), {"VA203 virtio0"}),
    Case("a file system of the machine's own", machine(device(type="fs", backend="", iommu_platform=True), **INTEL)),
    Case(
        "not taken, and so not by the back end",
        machine(
            device(backend="vhost", backend_accepted=False, offered=True, accepted=False, version_1=True, status=15),
            iommu="intel",
        ),
        {"VA102 virtio0"},
    ),
    Case("virtiofsd, which runs with it", machine(device(backend_offered=True, **FS), **INTEL)),
    Case("virtiofsd over mmio", machine(device(**{**FS, "transport": "mmio"}), iommu="none")),
    Case(
        "without, over mmio", machine(device(**{**VHOST, "transport": "mmio", "backend_offered": False}), iommu="none")
    ),
    Case(
        "without, ccw, 6.2",
        machine(device(**{**VHOST, "transport": "ccw", "backend_offered": False}), iommu="none", vmm_version="6.2.0"),
        {"VA203 virtio0"},
    ),
    Case(
        "without, ccw, 7.2",
        machine(device(**{**VHOST, "transport": "ccw", "backend_offered": False}), iommu="none", vmm_version="7.2.0"),
    ),
    Case("the machine's own device", machine(device(iommu_platform=True, offered=True, backend=""), **INTEL)),
    Case("QEMU refused it", machine(device("d0"), log=QEMU.format("d0", NOT_BY_DEVICE)), {"VA203 d0"}),
    Case(
        "IOVAs for who cannot",
        machine(device(backend="vhost-user", backend_accepted=False, **ON), iommu="intel"),
        {"VA203 virtio0"},
    ),
    Case("IOVAs for who can", machine(device(backend="vhost-user", backend_accepted=True, **ON), iommu="intel")),
    Case(
        "nothing in front of who cannot",
        machine(device(backend="vhost-user", backend_accepted=False, **ON), iommu="none"),
    ),
    Case(
        "confidential",
        machine(device(backend_offered=False, **VHOST), restricted="sev-snp", iommu="none"),
        {"VA204 virtio0"},
    ),
    Case(
        "confidential, said",
        machine(device("d0"), log=QEMU.format("d0", NOT_BY_DEVICE), restricted="tdx"),
        {"VA204 d0"},
    ),
    Case(
        "confidential, with IOMMU",
        machine(device(backend_offered=False, **VHOST), restricted="sev-snp", iommu="intel"),
        {"VA203 virtio0"},
    ),
    Case(
        "confidential, back end with",
        machine(device(backend_offered=True, **VHOST), restricted="sev-snp", iommu="none"),
    ),
    Case("rust", machine(device(backend_product="vhost-device-rng 0.2", **VHOST), **INTEL), {"VA206 virtio0"}),
    # A QEMU that does not refuse: VA401.
    Case(
        "rust, QEMU 5",
        machine(
            device(backend_product="virtiofsd 1.10", backend_offered=False, **FS),
            **{**INTEL, "vmm_version": "5.2.0"},
        ),
    ),
    Case(
        "rust, by its command",
        machine(device(backend_options=("/usr/libexec/virtiofsd", "--shared-dir=/x"), **FS), **INTEL),
        {"VA206 virtio0"},
    ),
    Case(
        "virtiofsd in C",
        machine(device(backend_options=("/usr/lib/qemu/virtiofsd", "-o", "source=/x"), **FS), **INTEL),
        {"VA203 virtio0"},
    ),
    Case(
        "rust, not asked",
        machine(device(backend_product="vhost-device-rng 0.2", backend="vhost-user", offered=False), iommu="none"),
    ),
    Case(
        "rust, said",
        machine(device("d0", backend_product="virtiofsd 1.10"), log=QEMU.format("d0", NOT_BY_DEVICE)),
        {"VA206 d0"},
    ),
    Case("rust, mmio", machine(device(backend_product="virtiofsd 1.10", **{**FS, "transport": "mmio"}), iommu="none")),
    Case(
        "rust, its own device",
        machine(device(backend_product="virtiofsd 1.10", iommu_platform=True, offered=True), **INTEL),
    ),
    Case(
        "rust, confidential",
        machine(device(backend_product="virtiofsd 1.10", **FS), restricted="tdx", iommu="none"),
        {"VA204 virtio0"},
    ),
    Case(
        "firmware",
        machine(device(**ON), iommu="virtio", iommu_options=("boot-bypass=off",), firmware="seabios"),
        {"VA308 virtio0"},
    ),
    Case("firmware, and no more is given", machine(log=NOT_KNOWN), {"VA308? 00:02.0"}),
    Case("firmware, of another", machine(device(**ON), log=NOT_KNOWN, iommu="none")),
    Case("blocked, no disk", machine(device(type="rng", address="0000:00:02.0", **ON), log=NOT_KNOWN, iommu="virtio")),
    Case("firmware, no option", machine(device(**ON), iommu="virtio", firmware="seabios")),
    Case(
        "firmware, bypass at boot",
        machine(device(**ON), iommu="virtio", iommu_options=("boot-bypass=on",), firmware="edk2"),
    ),
    Case(
        "a kernel is given",
        machine(device(**ON), iommu="virtio", iommu_options=("boot-bypass=off",), firmware="direct"),
    ),
    Case(
        "a disk with the quirk",
        machine(device(**OFF), iommu="virtio", iommu_options=("boot-bypass=off",)),
        {"VA101 virtio0"},
    ),
    Case("no disk", machine(device(type="rng", **ON), iommu="virtio", iommu_options=("boot-bypass=off",))),
    Case(
        "a disk led around",
        machine(device(behind_iommu=False, **ON), iommu="virtio", iommu_options=("boot-bypass=off",)),
    ),
    Case("another IOMMU", machine(device(**ON), iommu="intel", iommu_options=("boot-bypass=off",))),
]
