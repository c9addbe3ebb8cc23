# SPDX-License-Identifier: Apache-2.0
"""Who a system is and what runs it, out of the files that say so; the kinds of IOMMUs by the names of their units."""

from __future__ import annotations

from pathlib import Path

import pytest

from sysfs_kit import Box, acpi_table
from virtiova.collect import keys as k

DT = "/sys/firmware/devicetree/base"


@pytest.mark.parametrize(
    ("files", "vmm", "hypervisor"),
    [
        ({"/sys/class/dmi/id/sys_vendor": "QEMU\n"}, "qemu", "qemu"),
        (
            {
                "/sys/class/dmi/id/sys_vendor": "QEMU\n",
                "/sys/devices/system/clocksource/clocksource0/available_clocksource": "tsc kvm-clock acpi_pm\n",
            },
            "qemu",
            "kvm",
        ),
        (
            {"/sys/class/dmi/id/product_name": "cloud-hypervisor\n", "/proc/cpuinfo": "flags : hypervisor\n"},
            None,
            "unnamed",
        ),
        ({"/sys/class/dmi/id/sys_vendor": "Cloud Hypervisor\n"}, "cloud-hypervisor", "cloud-hypervisor"),
        ({"/sys/firmware/acpi/tables/FACP": acpi_table("FACP", bytes(240), "FIRECK")}, "firecracker", "firecracker"),
        ({"/sys/bus/acpi/devices/QEMU0002:00/hid": "QEMU0002\n"}, "qemu", "qemu"),
        ({f"{DT}/hypervisor/compatible": "linux,kvm\0"}, None, "kvm"),
        ({f"{DT}/hypervisor/compatible": "xen,xen-4.17\0xen,xen\0"}, None, "xen"),
        ({f"{DT}/compatible": "ibm,powernv\0"}, None, "none"),
        ({f"{DT}/compatible": "qemu,powernv9\0ibm,powernv\0"}, "qemu", "qemu"),
        ({f"{DT}/model": "IBM,9009-42A\0", f"{DT}/compatible": "IBM,9009-42A\0"}, None, "phyp"),
        ({"/proc/sysinfo": "Type: 8561\nLPAR Name: P1\n"}, None, "none"),
        ({"/proc/sysinfo": "VM00 Control Program: z/VM    7.2.0\n"}, None, "z/vm"),
        ({"/proc/cpuinfo": "flags\t\t: fpu hypervisor\n"}, None, "unnamed"),
        ({"/proc/cpuinfo": "flags\t\t: fpu vmx\n"}, None, "none"),
        ({"/proc/xen/capabilities": "control_d\n"}, None, "xen"),
        ({}, None, None),
    ],
)
def test_who_runs_it(files: dict[str, str | bytes], vmm: str | None, hypervisor: str | None, tmp_path: Path) -> None:
    box = Box(tmp_path)
    for path, content in files.items():
        box.file(path, content)
    machine = box.view().machine
    assert (machine.get(k.VMM), machine.get(k.HYPERVISOR)) == (vmm, hypervisor)


@pytest.mark.parametrize(
    ("path", "content", "uuid"),
    [
        (
            "/sys/class/dmi/id/product_uuid",
            "6F2B1C1E-1111-4222-8333-0123456789AB\n",
            "6f2b1c1e-1111-4222-8333-0123456789ab",
        ),
        (f"{DT}/vm,uuid", "6f2b1c1e-1111-4222-8333-0123456789ab\0", "6f2b1c1e-1111-4222-8333-0123456789ab"),
        ("/proc/sysinfo", "VM00 UUID: 6f2b1c1e-1111-4222-8333-0123456789ab\n", "6f2b1c1e-1111-4222-8333-0123456789ab"),
        ("/sys/class/dmi/id/product_uuid", "00000000-0000-0000-0000-000000000000\n", None),
        ("/sys/class/dmi/id/product_uuid", "Not Settable\n", None),
    ],
)
def test_its_uuid(path: str, content: str, uuid: str | None, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.file(path, content)
    assert box.view().machine.get(k.UUID) == uuid


def test_the_machine_type_and_memory(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.file("/sys/class/dmi/id/sys_vendor", "QEMU\n")
    box.file("/sys/class/dmi/id/product_name", "Standard PC (Q35 + ICH9, 2009)\n")
    box.file(
        "/proc/iomem",
        "00001000-0009fbff : System RAM\n  0000c000-0000cfff : System RAM\n00100000-1fffffff : System RAM\n",
    )
    machine = box.view().machine
    assert (machine.get(k.MACHINE_TYPE), machine.get(k.RAM)) == ("q35", (0x1000, 0x9FBFF, 0x100000, 0x1FFFFFFF))
    box.file("/sys/class/dmi/id/product_version", "pc-q35-7.2\n")
    box.file("/proc/iomem", "00000000-00000000 : System RAM\n")
    machine = box.view().machine
    assert (machine.get(k.MACHINE_TYPE), machine.get(k.RAM)) == ("pc-q35-7.2", None)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        ("dmar12", "intel"),
        ("ivhd0", "amd"),
        ("smmu3.0x0000000009050000", "smmuv3"),
        ("smmu.0x0000000012c00000", "smmu"),
        ("s390-iommu.00000001", "zpci"),
        ("riscv-iommu@0000:00:01.0", "riscv"),
        ("0000:00:05.0", "virtio"),
        ("a003e00.virtio_mmio", "virtio"),
        ("ff650800.iommu", "iommu"),
        ("apple-dart.382f00000", "apple"),
        ("7", "unknown"),
    ],
)
def test_kinds_by_the_names_of_units(unit: str, kind: str, tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.unit(unit)
    assert box.view().machine.get(k.IOMMU) == kind
