# SPDX-License-Identifier: Apache-2.0
"""VA104 to VA106: devices that the machine's IOMMU cannot be in front of, or is not set up for."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.result.scan import Seen, Severity
from virtiova.scan.rule import About, Answer, Hit, Look, Rule
from virtiova.spec import Citation

_UNIT: Final = re.compile(r"dmar\d+|ivhd\d+|smmu.*|virtio\d+|riscv-iommu.*")


def _ignored_unit(look: Look) -> Answer:
    """Fewer units set up than described, and devices that are left without one. A unit with no device is no loss,
    and where none is set up the IOMMU is off altogether."""
    described, programmed = look.machine.fact(k.IOMMU_UNITS), look.machine.fact(k.IOMMUS)
    if described is None or programmed is None:
        return None
    used = [unit for unit in programmed.value if _UNIT.fullmatch(unit)]
    if not 0 < len(used) < described.value:
        return None
    outside: list[Seen] = []
    for device in look.view.devices:
        if device.facts.get(k.TRANSPORT) == "pci" and not device.facts.get(k.GROUP):
            outside.append(programmed.seen(f"{device.name} is in no IOMMU group"))
    if not outside:
        return None
    return Hit(
        [
            described.seen(f"the firmware describes {described.value} IOMMU units"),
            programmed.seen(f"the system uses {len(used)}: {', '.join(used)}"),
            *outside[:4],
        ]
    )


def _cloud_hypervisor(look: Look) -> Answer:
    """What Cloud Hypervisor's virtio-iommu cannot be in front of, is in front of unasked, or maps piece by piece."""
    if look.machine.get(k.VMM) != "cloud-hypervisor" or not _virtio_iommu(look):
        return None
    devices = [(device, device.facts.get(k.TRANSPORT)) for device in look.view.devices]
    unreached = [
        transport.seen(f"{device.name} is a virtio-mmio device, and offers bit 33")
        for device, kind in devices
        if kind == "mmio" and device.facts.get(k.OFFERED) and (transport := device.facts.fact(k.TRANSPORT))
    ]
    small = look.machine.fact(k.MAPPED_SMALL)
    pieces = [small.seen(f"passed through, in pages of 4 KiB: {', '.join(small.value)}")] if small else []
    unasked = []
    if (
        look.machine.get(k.ARCH) == "aarch64"
        and look.machine.get(k.OS) == "linux"
        and not look.machine.get(k.FIRMWARE_TABLES)
    ):
        unasked = [
            group.seen(f"{device.name} is in an IOMMU group, and bit 33 is not accepted")
            for device, _ in devices
            if device.facts.get(k.ACCEPTED) is False and (group := device.facts.fact(k.GROUP))
        ]
    if not (unreached or pieces or unasked):
        return None
    about = look.seen(k.VMM, k.IOMMU, k.IOMMUS)
    return Hit([*unreached, *pieces, *unasked[:4], *about], severity=None if unreached else Severity.NOTE)


def _virtio_iommu(look: Look) -> bool:
    units = look.machine.get(k.IOMMUS) or ()
    return look.machine.get(k.IOMMU) == "virtio" or any(unit.startswith("virtio") for unit in units)


def _vfio_user(look: Look) -> Answer:
    devices, iommu = look.machine.fact(k.VFIO_USER), look.machine.fact(k.IOMMU)
    if devices is None or not devices.value or iommu is None or iommu.value in ("", "none"):
        return None
    return Hit([devices.seen(), iommu.seen(f"the machine has an IOMMU: {iommu.value}")])


RULES: Final = (
    Rule(
        "VA104",
        "an IOMMU unit is described and not used: devices under it are not kept out",
        Severity.WARNING,
        About.MACHINE,
        _ignored_unit,
        "An operating system that sets up one unit of several leaves the devices of the others without translation: "
        "they reach all of memory, and nothing says so.",
        {
            "guest": "a system that sets up every unit of the firmware's table (DMAR, IVRS, IORT); Linux does",
            "QEMU": "one IOMMU for all devices: QEMU's machines have no use for a second",
        },
        Citation("Intel VT-d specification", "8.3", "each DMA remapping unit has a structure of its own in the table"),
        "asterinas/asterinas#3920",
    ),
    Rule(
        "VA105",
        "the limits of Cloud Hypervisor's IOMMU",
        Severity.WARNING,
        About.MACHINE,
        _cloud_hypervisor,
        "It is a virtio-iommu that a table of the firmware ties to PCI functions. A virtio-mmio device has no such "
        "entry: nothing is in front of it. With a device tree (arm64 without ACPI) every PCI device is in a group, "
        "whatever its iommu= says. And a device that is passed through is mapped page by page: VFIO's limit of 65,536 "
        "mappings is 256 MiB with pages of 4 KiB.",
        {
            "Cloud Hypervisor": "virtio-pci instead of virtio-mmio; firmware with ACPI; hugepages=on in --memory, and "
            "huge pages in the guest"
        },
        Citation(
            "Cloud Hypervisor",
            "docs/iommu.md",
            "which devices can be behind the IOMMU; the effect of a device tree; faster mappings",
        ),
        "cloud-hypervisor/cloud-hypervisor#314, #751",
    ),
    Rule(
        "VA106",
        "vfio-user devices in a machine with an IOMMU",
        Severity.WARNING,
        About.MACHINE,
        _vfio_user,
        "The process that serves a vfio-user device maps the guest's memory; that it follows an IOMMU's mappings is "
        "either refused (Cloud Hypervisor) or needs care with each of them (SPDK). No memory is kept from it.",
        {
            "QEMU": "the one or the other: no vfio-user device, or no IOMMU in front of it",
            "Cloud Hypervisor": "the one or the other: --user-device takes no iommu=on",
        },
        Citation("Cloud Hypervisor", "docs/vfio-user.md", "an IOMMU is not supported for vfio-user devices"),
        "cloud-hypervisor/cloud-hypervisor#3024",
    ),
)
