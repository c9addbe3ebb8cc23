# SPDX-License-Identifier: Apache-2.0
"""Which device a line of a log is about: by the kernel's name, QEMU's option, or an address."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device, LogLine, View
from virtiova.collect.messages import MESSAGES

_KERNEL: Final = re.compile(r"(?:\b([\w-]+) )?\b(virtio\d+)\b: ")
_OPTION: Final = re.compile(r"-device (\{.*\}|\S+): ")
_OF_DEVICES: Final = tuple(message.text for message in MESSAGES if message.names_device)
_DRIVERS: Final = {
    "virtiofs": "fs",
    "9pnet_virtio": "9p",
    "vmw_vsock_virtio_transport": "vsock",
    "virtio_rproc_serial": "rproc-serial",
}
"""Drivers whose name is not ``virtio_`` and the type."""


@dataclass(frozen=True, slots=True)
class Named:
    """How a line names its device: the kernel's name or the option's id, else empty; its type and model if said."""

    name: str
    type: str = ""
    model: str = ""
    driver: str = ""


def named(text: str) -> Named | None:
    """The device that a line is about; None if it names none."""
    if found := _OPTION.search(text):
        return _option(found[1])
    if found := _KERNEL.search(text):
        driver = found[1] or ""
        kind = (
            _DRIVERS.get(driver) or driver.removeprefix("virtio_") if driver.startswith(("virtio", "9p", "vmw")) else ""
        )
        return Named(found[2], kind if kind != driver else "", "", driver if kind else "")
    return None


def _option(words: str) -> Named | None:
    """``-device``'s argument as QEMU prints it back: its own form, or libvirt's JSON."""
    if words.startswith("{"):
        import json

        try:
            found = json.loads(words)
        except ValueError:
            return None
        options = {str(key): str(value) for key, value in found.items()}
        model = options.get("driver", "")
    else:
        first, *rest = words.split(",")
        options = dict(part.split("=", 1) for part in rest if "=" in part)
        model = first.removeprefix("driver=")
    kind = re.sub(r"^(virtio|vhost-user|vhost)-|-(pci|device|ccw)\b.*$", "", model)
    return Named(options.get("id", ""), {"serial": "console"}.get(kind, kind), model)


def is_about(line: LogLine, device: Device, view: View) -> bool:
    """Is the line about this device of the view?"""
    who = named(line.text)
    if who is None:
        return not device.name
    names = (device.name, *(device.facts.get(k.ALSO_CALLED) or ()))
    if who.name or who.model in names:
        return (who.name or who.model) in names
    # Without an id, the model says it if there is only one of it.
    same = [each for each in view.devices if each.facts.get(k.MODEL) == who.model]
    return same == [device]


def strangers(view: View) -> list[Device]:
    """The devices that only the logs name, by messages that some rule asks for; with what those say of them."""
    found: dict[str, Device] = {}
    addresses = {(device.facts.get(k.ADDRESS) or "")[-7:] for device in view.devices}
    for line in view.log:
        address = faulting(line.text) or not_set_up(line.text)
        if address and address not in addresses and address not in found:
            device = found[address] = Device(address)
            device.facts.put(k.ADDRESS, f"0000:{address}", line.place)
    for line in view.log:
        if not any(text in line.text for text in _OF_DEVICES):
            continue
        if any(is_about(line, device, view) for device in view.devices):
            continue
        # A message that does not say which device it is about is one about the machine: a device without a name.
        who = named(line.text) or Named("")
        name = who.name or who.model
        if name in found:
            continue
        device = found[name] = Device(name)
        for key, value in ((k.TYPE, who.type), (k.MODEL, who.model)):
            if value:
                device.facts.put(key, value, line.place)
    return list(found.values())


# -- faults

_FAULTS: Final = (
    re.compile(r"Request device \[(?:0x)?(?P<bus>\w\w):(?:0x)?(?P<slot>\w\w)\.(?P<fn>\d)\]"),
    re.compile(r"IO_PAGE_FAULT device=(?:\w{4}:)?(?P<bus>\w\w):(?P<slot>\w\w)\.(?P<fn>\d)"),
    re.compile(r"arm-smmu-v3 .* client: (?:\w{4}:)?(?P<bus>\w\w):(?P<slot>\w\w)\.(?P<fn>\d)"),
    # An endpoint's number is bus, slot and function as 16 bits; and so is the upper half of an SMMU event's first word.
    re.compile(r" fault from EP (?P<rid>\d+)"),
    re.compile(r"arm-smmu-v3 .*[ \t](?P<words>0x\w{8}000000(?:10|11|12|13))$"),
)
"""How the drivers of VT-d, AMD-Vi, SMMUv3 (newer kernels, older ones) and virtio-iommu report a fault."""


_NOT_SET_UP: Final = re.compile(r"virtio_iommu_translate sid=(?P<rid>\d+) is not known")
"""How QEMU's virtio-iommu says that nobody has set anything up for an endpoint."""


def faulting(line: str) -> str:
    """The function that a guest's driver reports a fault of, as ``01:00.0``; empty if the line reports none."""
    return _function(line, _FAULTS)


def not_set_up(line: str) -> str:
    """The function that QEMU's virtio-iommu blocked before a driver had set it up; empty if the line says none."""
    return _function(line, (_NOT_SET_UP,))


def _function(line: str, patterns: Sequence[re.Pattern[str]]) -> str:
    found = next((match for pattern in patterns if (match := pattern.search(line))), None)
    parts = found.groupdict() if found else {}
    if "bus" in parts:
        return f"{parts['bus']}:{parts['slot']}.{parts['fn']}".lower()
    if not parts:
        return ""
    rid = int(parts["rid"]) if "rid" in parts else int(parts["words"], 16) >> 32
    return f"{rid >> 8 & 0xFF:02x}:{rid >> 3 & 0x1F:02x}.{rid & 7}"
