# SPDX-License-Identifier: Apache-2.0
"""The machine around the devices: who it is, what boots it, whether its memory is restricted, and what follows."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, View
from virtiova.collect.qemu.iommus import place_of
from virtiova.collect.qemu.machines import MachineType
from virtiova.collect.qemu.options import CommandLine, Option
from virtiova.collect.qemu.properties import Properties, Value

_GUESTS: Final = {
    "sev-guest": "sev", "sev-snp-guest": "sev-snp", "tdx-guest": "tdx", "s390-pv-guest": "s390-pv", "pef-guest": "pef",
}  # fmt: skip
_SEV_ES: Final = 4
"""The bit of sev-guest's policy that asks for it."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_WINDOWS: Final = re.compile(r",\s*[+]?hv[-_](?:relaxed|vapic|time|spinlocks|passthrough)\b")
_EDK2: Final = re.compile(r"OVMF|AAVMF|edk2|QEMU_EFI", re.IGNORECASE)
_FLASH: Final = re.compile(r"\.fd\b|pflash|CODE|VARS", re.ASCII)
_KATA_NAME: Final = re.compile(r"sandbox-[0-9a-f]{64}", re.ASCII)
_KATA_FILES: Final = ("/run/vc/vm/", "/run/vc/sbs/", "/kata-containers/", "/usr/share/kata")
_NAME: Final = 200


def put_platform(line: CommandLine, machine: Option, type_: MachineType, version: str, view: View, name: str) -> None:
    """The facts about the machine that are not of its IOMMU."""
    put = view.machine.put
    whole = place_of(None, name)
    put(k.VMM, "qemu", whole, Certainty.SAID)
    if version:
        put(k.VMM_VERSION, version, whole, Certainty.SAID)
    if type_.arch:
        put(k.ARCH, type_.arch, whole, Certainty.SAID)
    if type_.name:
        said = "type" in machine
        place = place_of(machine if said else None, name)
        put(k.MACHINE_TYPE, type_.name[:_NAME], place, Certainty.SAID if said else Certainty.DEFAULT)
    _who(line, view, name)
    _boots(line, type_, view, name)
    restricted = guest(line, machine)
    if restricted is not None:
        kind, option = restricted
        put(k.RESTRICTED, kind, place_of(option, name), Certainty.SAID)
    cpu = line.last("cpu")
    if cpu is not None and _WINDOWS.search(cpu.text):
        # What Hyper-V offers its guests is put on for Windows; Linux has no use for it under KVM.
        put(k.OS, "windows", place_of(cpu, name), Certainty.INFERRED)
    incoming = line.last("incoming")
    if incoming is not None:
        put(k.INCOMING, True, place_of(incoming, name), Certainty.SAID)


def _who(line: CommandLine, view: View, name: str) -> None:
    put = view.machine.put
    named, uuid = line.last("name"), _uuid(line)
    if named is not None and named.get("guest"):
        view.name = named.get("guest")[:_NAME]
        put(k.NAME, view.name, place_of(named, name), Certainty.SAID)
        if _KATA_NAME.fullmatch(named.get("guest")):
            put(k.KATA, True, place_of(named, name), Certainty.INFERRED)
    for option in line.options:
        if any(part in option.text for part in _KATA_FILES):
            put(k.KATA, True, place_of(option, name), Certainty.INFERRED)
            break
    if uuid is not None:
        text = (uuid.get("uuid") or uuid.text).lower()
        if _UUID.fullmatch(text):
            put(k.UUID, text, place_of(uuid, name), Certainty.SAID)
        else:
            view.problems.append(f"{name}: {str(uuid)[:80]}: no UUID")


def _uuid(line: CommandLine) -> Option | None:
    """The last option that says the machine's UUID: that of SMBIOS is the same one."""
    said = [each for each in line.all("uuid", "smbios") if each.name == "uuid" or "uuid" in each]
    return said[-1] if said else None


def _boots(line: CommandLine, type_: MachineType, view: View, name: str) -> None:
    put = view.machine.put
    images = [option for option in line.all("drive", "blockdev", "bios", "pflash") if _is_firmware(option)]
    kernel, bios = line.last("kernel"), line.last("bios")
    if kernel is not None:
        put(k.FIRMWARE, "direct", place_of(kernel, name), Certainty.SAID)
        words = line.last("append")
        if words is not None:
            put(k.KERNEL_OPTIONS, words.text, place_of(words, name), Certainty.SAID)
    elif images:
        put(k.FIRMWARE, "edk2", place_of(images[0], name), Certainty.INFERRED)
    elif bios is not None:
        put(k.FIRMWARE, bios.text.rpartition("/")[2][:_NAME], place_of(bios, name), Certainty.SAID)
    elif type_.family is not None and type_.family.firmware:
        put(k.FIRMWARE, type_.family.firmware, place_of(None, name), Certainty.DEFAULT)


def _is_firmware(option: Option) -> bool:
    """An image of EDK2's. A disk may be called so, too: among drives only flash counts, and what is called so."""
    if option.name == "drive" and option.get("if") != "pflash":
        return False
    if option.name == "blockdev" and _FLASH.search(option.text) is None:
        return False
    return _EDK2.search(option.text) is not None


def guest(line: CommandLine, machine: Option) -> tuple[str, Option] | None:
    """The kind of confidential guest that the machine is told to be, and the object that says so."""
    wanted = machine.get("confidential-guest-support") or machine.get("memory-encryption")
    if not wanted:
        return None
    for option in line.all("object"):
        if option.get("id") == wanted:
            kind = _GUESTS.get(option.get("qom-type"), option.get("qom-type")[:40])
            return ("sev-es" if kind == "sev" and _policy(option) & _SEV_ES else kind), option
    return None


def _policy(option: Option) -> int:
    try:
        return int(option.get("policy", "0"), 0)
    except ValueError:
        return 0


def default_properties(
    properties: Properties, line: CommandLine, machine: Option, type_: MachineType, version: str
) -> None:
    """What the machine says of its virtio devices where nobody else does."""
    if type_.version and type_.version <= (2, 6) and type_.family is not None:
        # "virtio-pci: disable modern by default" for machine types up to 2.6 (hw_compat_2_6).
        properties.default("virtio-pci", "disable-modern", Value("on"))
        properties.default("virtio-pci", "disable-legacy", Value("off"))
    if type_.name.startswith("sun4u") and _at_least(version, 9, 1):
        # "hw/sparc64: set iommu_platform=on for virtio devices attached to the sun4u machine" (v9.1).
        properties.default("virtio-pci", "disable-legacy", Value("on"))
        properties.default("virtio-device", "iommu_platform", Value("on"))
    option = next((o for o in reversed(line.all("machine")) if _asks(o)), None)
    if option is not None and guest(line, machine) is not None:
        # "confidential guest support: Alter virtio default properties for protected guests" (v6.0).
        inferred = "confidential-guest-support" not in option
        certainty = Certainty.INFERRED if inferred else Certainty.DEFAULT
        properties.default("virtio-pci", "disable-legacy", Value("on", certainty, option))
        properties.default("virtio-device", "iommu_platform", Value("on", certainty, option))


def _asks(option: Option) -> bool:
    return "confidential-guest-support" in option or "memory-encryption" in option


def _at_least(version: str, major: int, minor: int) -> bool:
    match = re.match(r"(\d{1,4})\.(\d{1,4})", version)
    return match is not None and (int(match[1]), int(match[2])) >= (major, minor)
