# SPDX-License-Identifier: Apache-2.0
"""Who a system is: kernel, processor, what runs it, its UUID and memory. By DMI, device tree, ACPI, s390x' sysinfo."""

from __future__ import annotations

import os
import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Facts
from virtiova.collect.linux import devicetree
from virtiova.collect.linux.read import place, word
from virtiova.collect.tree import LIMIT, Tree, text
from virtiova.wire import acpi

DMI: Final = "/sys/class/dmi/id"
FACP: Final = "/sys/firmware/acpi/tables/FACP"
CLOCKS: Final = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
_UUID: Final = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_IOMEM: Final = r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) : System RAM"
_KATA: Final = r"\b(systemd\.unit=kata-containers\.target|agent\.log_vport=|init=\S*/kata-agent)"
_VERSIONED: Final = r"(pc-q35|pc-i440fx|virt)-[0-9]"
_PIECES: Final = 1024
CPU: Final = "/proc/cpuinfo"
_CPU: Final = 8192
"""Enough for the first processor: the file grows with their number, and with it the time that it takes."""
SYSINFO: Final = "/proc/sysinfo"

_VMMS: Final = (
    ("QEMU", "qemu"),
    ("Cloud Hypervisor", "cloud-hypervisor"),
    ("Amazon EC2", "nitro"),
    ("Microsoft Corporation Virtual Machine", "hyperv"),
    ("VMware", "vmware"),
    ("innotek GmbH VirtualBox", "virtualbox"),
    ("Google Google Compute Engine", "gce"),
    ("Xen HVM domU", "xen"),
    ("crosvm", "crosvm"),
    ("Parallels", "parallels"),
    ("Alibaba Cloud", "qemu"),
    ("OpenStack Foundation", "qemu"),
    ("Red Hat KVM", "qemu"),
)
"""How ``sys_vendor product_name`` begins."""
_OEMS: Final = {"FIRECK": "firecracker", "CLOUDH": "cloud-hypervisor", "BOCHS": "qemu", "CROSVM": "crosvm"}
"""By who made the ACPI tables, which root alone may read."""
_ACPI_DEVICES: Final = {"QEMU0002:00": "qemu", "AMZNC10C:00": "firecracker"}
"""AMZNC10C is a clock that QEMU may have, too: asked in this order."""
_PC: Final = (("Standard PC (Q35", "q35"), ("Standard PC (i440FX", "pc"), ("QEMU Virtual Machine", "virt"))


def put(tree: Tree, facts: Facts) -> None:
    """All of it."""
    for path, key in (
        ("/proc/sys/kernel/hostname", k.NAME),
        ("/proc/sys/kernel/osrelease", k.KERNEL),
        ("/proc/cmdline", k.KERNEL_OPTIONS),
    ):
        found = word(tree, path)
        # A system that was given no name has "(none)".
        if found is not None and found != "(none)":
            facts.put(key, found, place(path))
    if k.KERNEL in facts:
        facts.put(k.OS, "linux", place("/proc/sys/kernel/osrelease"))
    _architecture(tree, facts)
    _uuid(tree, facts)
    _vmm(tree, facts)
    _hypervisor(tree, facts)
    _memory(tree, facts)
    options = facts.fact(k.KERNEL_OPTIONS)
    if options is not None and re.search(_KATA, options.value):
        facts.put(k.KATA, True, options.place, Certainty.INFERRED)


def _architecture(tree: Tree, facts: Facts) -> None:
    path = "/proc/sys/kernel/arch"
    found = word(tree, path)
    if found is None and tree.live:
        found = os.uname().machine
    if found is not None:
        facts.put(k.ARCH, found, place(path))


def _uuid(tree: Tree, facts: Facts) -> None:
    for path in (f"{DMI}/product_uuid", f"{devicetree.ROOT}/vm,uuid", "/sys/hypervisor/uuid"):
        found = word(tree, path)
        if found is not None and re.fullmatch(_UUID, found.lower()) and set(found) - set("0-"):
            facts.put(k.UUID, found.lower(), place(path))
            return
    said = _sysinfo(tree).get("VM00 UUID", "").lower()
    if re.fullmatch(_UUID, said):
        facts.put(k.UUID, said, place(SYSINFO))


def _sysinfo(tree: Tree) -> dict[str, str]:
    """What s390x knows of the levels that it runs on."""
    lines = (line.partition(":") for line in (text(tree, SYSINFO, 1 << 16) or "").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _vmm(tree: Tree, facts: Facts) -> None:
    """What runs it, and which machine that is said to be."""
    product = word(tree, f"{DMI}/product_name") or ""
    told = f"{word(tree, f'{DMI}/sys_vendor') or ''} {product}"
    found = next((name for start, name in _VMMS if told.startswith(start) or product.startswith(start)), "")
    if found:
        facts.put(k.VMM, found, place(f"{DMI}/sys_vendor"))
    elif not _by_device_tree(tree, facts):
        _by_acpi(tree, facts)
    version = word(tree, f"{DMI}/product_version") or ""
    family = next((name for start, name in _PC if product.startswith(start)), "")
    if facts.get(k.VMM) == "qemu" and k.MACHINE_TYPE not in facts and (family or re.match(_VERSIONED, version)):
        facts.put(k.MACHINE_TYPE, version if re.match(_VERSIONED, version) else family, place(f"{DMI}/product_version"))
    _firmware(tree, facts)


def _by_device_tree(tree: Tree, facts: Facts) -> bool:
    """QEMU says who it is; others have a device tree that is nobody's in particular."""
    names = tree.names(devicetree.ROOT)
    if not names:
        return False
    for said in (*devicetree.compatible(tree), *devicetree.strings(tree, f"{devicetree.ROOT}/model")):
        where = place(f"{devicetree.ROOT}/compatible")
        if said.startswith("qemu,") or "emulated by qemu" in said:
            facts.put(k.VMM, "qemu", where)
            for machine in ("pseries", "powernv"):
                if machine in said.lower():
                    facts.put(k.MACHINE_TYPE, machine, where)
            return True
        if said == "firecracker":
            facts.put(k.VMM, said, where)
            return True
    if any(name.startswith("fw-cfg@") for name in names):
        facts.put(k.VMM, "qemu", place(f"{devicetree.ROOT}/fw-cfg"))
        return True
    return False


def _by_acpi(tree: Tree, facts: Facts) -> None:
    """Devices that only one VMM has, for everybody to see; else who made the tables, for root."""
    for name, vmm in _ACPI_DEVICES.items():
        if tree.exists(f"/sys/bus/acpi/devices/{name}"):
            facts.put(k.VMM, vmm, place(f"/sys/bus/acpi/devices/{name}"), Certainty.INFERRED)
            return
    header = tree.read(FACP, acpi.HEADER)
    found = _OEMS.get(acpi.oem(header)) if header else None
    if found:
        facts.put(k.VMM, found, place(FACP))


def _hypervisor(tree: Tree, facts: Facts) -> None:
    """Whose guest it is. ``none`` only if something that would name a hypervisor is there and names none."""
    named = word(tree, "/sys/hypervisor/type")
    if named is None and "control_d" in (word(tree, "/proc/xen/capabilities") or ""):
        named = "xen"
    if named is not None:
        facts.put(k.HYPERVISOR, named, place("/sys/hypervisor/type"))
        facts.put(k.XEN_DOMAIN, named == "xen", place("/sys/hypervisor/type"))
        return
    for ask in (_by_clock, _by_vmm, _by_node, _by_processor):
        found = ask(tree, facts)
        if found:
            facts.put(k.HYPERVISOR, found[0], place(found[1]), Certainty.INFERRED)
            return


def _by_clock(tree: Tree, _: Facts) -> tuple[str, str] | None:
    """Paravirtual clocks are offered by one hypervisor each."""
    clocks = (word(tree, CLOCKS) or "").split()
    for name, kind in (("kvm-clock", "kvm"), ("xen", "xen"), ("hyperv_clocksource_tsc_page", "hyperv")):
        if name in clocks:
            return kind, CLOCKS
    return None


def _by_vmm(_: Tree, facts: Facts) -> tuple[str, str] | None:
    """Who is run by a VMM is a guest, of whichever kind (an emulated processor has no hypervisor at all)."""
    vmm = facts.fact(k.VMM)
    return (vmm.value, vmm.place.name) if vmm is not None else None


def _by_node(tree: Tree, _: Facts) -> tuple[str, str] | None:
    """The device tree's node ``hypervisor``, and names that only made-up machines have."""
    node = f"{devicetree.ROOT}/hypervisor"
    for said in devicetree.compatible(tree, node):
        maker, _comma, name = said.partition(",")
        return ("xen" if maker == "xen" else name or said), f"{node}/compatible"
    platform = devicetree.compatible(tree)
    if "linux,dummy-virt" in platform:
        return "unnamed", f"{devicetree.ROOT}/compatible"
    if any(said.startswith("ibm,powernv") for said in platform):
        return "none", f"{devicetree.ROOT}/compatible"
    if any(said.startswith("IBM,") for said in devicetree.strings(tree, f"{devicetree.ROOT}/model")):
        return "phyp", f"{devicetree.ROOT}/model"
    return None


def _by_processor(tree: Tree, _: Facts) -> tuple[str, str] | None:
    """x86: the flag that a hypervisor sets for its guests. s390x: the levels. Else the maker of a real machine."""
    flags = cpu_flags(tree)
    if flags:
        return ("unnamed" if "hypervisor" in flags else "none"), CPU
    said = _sysinfo(tree)
    if said:
        program = said.get("VM00 Control Program", "")
        return ("none" if not program else "kvm" if program.startswith("KVM") else program.split()[0].lower()), SYSINFO
    if word(tree, f"{DMI}/board_vendor") or devicetree.compatible(tree):
        return "none", f"{DMI}/board_vendor"
    return None


def cpu_flags(tree: Tree) -> set[str]:
    """The first processor's flags on x86; empty elsewhere."""
    for line in (text(tree, CPU, _CPU) or "").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return set(flags.split())
    return set()


def _memory(tree: Tree, facts: Facts) -> None:
    """Pieces of RAM. Who may not know addresses is told that they are all 0."""
    found: list[int] = []
    for line in (text(tree, "/proc/iomem", LIMIT) or "").splitlines():
        match = re.fullmatch(_IOMEM, line)
        if match and len(found) < 2 * _PIECES:
            found += [int(match[1], 16), int(match[2], 16)]
    if any(found):
        facts.put(k.RAM, tuple(found), place("/proc/iomem"))


def _firmware(tree: Tree, facts: Facts) -> None:
    vendor = word(tree, f"{DMI}/bios_vendor")
    if vendor is None:
        return
    name = "seabios" if vendor == "SeaBIOS" else "edk2" if vendor.startswith(("EFI Development Kit", "EDK II")) else ""
    if name:
        facts.put(k.FIRMWARE, name, place(f"{DMI}/bios_vendor"))
