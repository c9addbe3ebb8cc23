# SPDX-License-Identifier: Apache-2.0
"""The machine of a domain as libvirt's QEMU driver makes it: its type, firmware, IOMMU, and what keeps it secret."""

from __future__ import annotations

from typing import Final

from virtiova.collect.libvirt.argv import Argv, Frontend
from virtiova.collect.libvirt.buses import Buses, alias, number
from virtiova.collect.libvirt.xml import Element

_MACHINES: Final = {
    "x86_64": "pc", "i686": "pc", "aarch64": "virt", "armv7l": "virt", "riscv64": "virt", "riscv32": "virt",
    "ppc64": "pseries", "ppc64le": "pseries", "s390x": "s390-ccw-virtio", "loongarch64": "virt",
}  # fmt: skip
"""What libvirt takes where no machine is named."""
_TARGETS: Final = {"i686": "i386", "ppc64le": "ppc64", "armv7l": "arm", "armv6l": "arm", "s390": "s390x"}
"""QEMU's names of architectures where libvirt has others."""
_SECRETS: Final = {
    "sev": "sev-guest", "sev-snp": "sev-snp-guest", "tdx": "tdx-guest", "s390-pv": "s390-pv-guest",
}  # fmt: skip
_IOMMUS: Final = {"intel": "intel-iommu", "amd": "amd-iommu"}
_IOMMU_OPTIONS: Final = {
    "intremap": "intremap", "caching_mode": "caching-mode", "eim": "eim", "iotlb": "device-iotlb",
    "aw_bits": "aw-bits", "dma_translation": "dma-translation", "passthrough": "pt", "xtsup": "xtsup",
    "granule": "granule",
}  # fmt: skip


def machine_of(domain: Element) -> tuple[str, str]:
    """Architecture, in libvirt's words, and machine type: as said, else as the emulator's name and libvirt have it."""
    arch = domain.said("os/type", "arch")
    if not arch:
        emulator = domain.words("devices/emulator").rpartition("/")[2]
        arch = emulator.removeprefix("qemu-system-") if emulator.startswith("qemu-system-") else "x86_64"
    return arch[:40], domain.said("os/type", "machine")[:80] or _MACHINES.get(arch, "")


def binary_of(arch: str) -> str:
    """The QEMU for that architecture."""
    return f"qemu-system-{_TARGETS.get(arch, arch)}"


def is_express(machine: str) -> bool:
    """Has that machine a PCI Express root?"""
    return machine in ("q35", "virt") or machine.startswith(("pc-q35-", "virt-"))


def has_pci(arch: str, machine: str) -> bool:
    """Does libvirt put virtio devices on a PCI bus of that machine?"""
    arm = arch in ("aarch64", "armv7l", "armv6l", "riscv64", "riscv32")
    return (is_express(machine) or not arm) and machine not in ("isapc", "microvm", "none")


def put_machine(argv: Argv, domain: Element, machine: str) -> None:
    """Who it is, what boots, what it hides."""
    os_type = domain.find("os/type")
    line = os_type.line_of("machine") if os_type is not None else domain.line
    for tag, option in (("name", "name"), ("uuid", "uuid")):
        found = domain.find(tag)
        if found is not None and found.text:
            if option == "name":
                argv.keyed("name", "", found.line, guest=found.text)
            else:
                argv.option("uuid", found.text, found.line)
    argv.option("machine", machine.replace(",", ",,"), line)
    _firmware(argv, domain)
    secret = domain.find("launchSecurity")
    if secret is not None:
        _secret(argv, secret)


def _firmware(argv: Argv, domain: Element) -> None:
    kernel, loader = domain.find("os/kernel"), domain.find("os/loader")
    if kernel is not None and kernel.text:
        argv.option("kernel", kernel.text, kernel.line)
    if loader is not None and loader.text:
        if loader.get("type") == "pflash":
            argv.keyed("drive", "if=pflash", loader.line, format="raw", unit="0", file=loader.text)
        else:
            argv.option("bios", loader.text, loader.line)


def _secret(argv: Argv, secret: Element) -> None:
    kind = secret.get("type")
    model = _SECRETS.get(kind)
    if model is None:
        # Kept, and said as it is.
        model = kind[:40] or "unknown"
    policy = secret.words("policy")
    more = {"policy": policy} if number(policy.lower()) is not None else {}
    argv.keyed("object", model.replace(",", ",,"), secret.line, id="lsec0", **more)
    argv.keyed("machine", "", secret.line_of("type"), confidential_guest_support="lsec0")


def put_iommu(argv: Argv, buses: Buses, devices: Element) -> Element | None:
    """The IOMMU, if there is one; the first of several."""
    found = devices.all("iommu")
    for index, element in enumerate(found):
        _iommu(argv, buses, element, alias(element, f"iommu{index}"))
    return found[0] if found else None


def _iommu(argv: Argv, buses: Buses, element: Element, identity: str) -> None:
    model, line = element.get("model"), element.line_of("model")
    bus = number(element.said("driver", "pciBus"))
    if model == "smmuv3" and bus is not None:
        # One of several, each for a bus.
        made = Frontend("arm-smmuv3", identity, line)
        made.properties["primary-bus"] = buses.name_of(bus)
        argv.device(made)
    elif model == "smmuv3":
        argv.keyed("machine", "", line, iommu="smmuv3")
    elif model == "virtio":
        made = Frontend("virtio-iommu-pci", identity, element.line)
        if element.find("address") is not None:
            buses.put(made, element)
        else:
            buses.on_root(made)
        _told(made, element)
        argv.device(made)
    elif model in _IOMMUS:
        made = Frontend(_IOMMUS[model], identity, line)
        _told(made, element)
        argv.device(made)
    else:
        argv.problem(line, f"an IOMMU of the model {model[:40]!r} is not known here")


def _told(made: Frontend, element: Element) -> None:
    driver = element.find("driver")
    for attribute, key in _IOMMU_OPTIONS.items():
        said = driver.get(attribute) if driver is not None else ""
        if driver is not None and said:
            made.set(key, said[:40], driver.line_of(attribute))
