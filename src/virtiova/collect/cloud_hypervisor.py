# SPDX-License-Identifier: Apache-2.0
"""A command line of Cloud Hypervisor: its virtio devices, and which of them are behind its virtio-iommu.

What it does was read in its source (``vmm/src/config.rs``, ``vmm/src/device_manager.rs``, August 2026): a device that
it serves itself offers bit 33 if ``iommu=on`` or in a confidential guest, a vhost-user device in a confidential guest
only, and a vDPA device must have it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View, ViewKind
from virtiova.collect.types import TYPES
from virtiova.result.scan import Place

_BINARY: Final = re.compile(r"cloud-hypervisor(?:-static)?(?:-\w+)?|clh")
_MOST: Final = 4096
_NAME: Final = 200
# Options that make a device each, in the order in which it makes them: its type, what its name begins with.
_DEVICES: Final[dict[str, tuple[str, str]]] = {
    "console": ("console", "__console"),
    "disk": ("blk", "_disk"),
    "net": ("net", "_net"),
    "rng": ("rng", "__rng"),
    "generic-vhost-user": ("", "_generic_vhost_user"),
    "fs": ("fs", "_fs"),
    "pmem": ("pmem", "_pmem"),
    "vsock": ("vsock", "_vsock"),
    "balloon": ("balloon", "__balloon"),
    "watchdog": ("watchdog", "__watchdog"),
    "vdpa": ("", "_vdpa"),
    "rtc": ("clock", "__rtc"),
}
_ALWAYS: Final = {"console": "tty", "rng": "src=/dev/urandom"}
_NO_DEVICE: Final = {"off", "null", "false"}
_REFUSES_IOMMU: Final = frozenset({"fs", "generic-vhost-user", "user-device", "watchdog"})
_UNKNOWN: Final = frozenset({"machine", "virtio-mem"})
_ON: Final = frozenset({"on", "true"})


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    text: str
    told: dict[str, str]

    def on(self, key: str) -> bool:
        return self.told.get(key, "") in _ON


def is_command(words: Sequence[str]) -> bool:
    """Is this a command line of Cloud Hypervisor's?"""
    return bool(words) and _BINARY.fullmatch(posixpath.basename(words[0])) is not None


def collect(words: Sequence[str], place: Place) -> View:
    """All that a command line says."""
    view = View(ViewKind.CONFIGURATION, place.name, place.name)
    options = list(_options(words))
    put = view.machine.put
    put(k.VMM, "cloud-hypervisor", place, Certainty.SAID)
    platform = next((each for each in options if each.name == "platform"), None)
    restricted = _restricted(platform)
    if platform is not None and re.fullmatch(r"[0-9a-fA-F-]{36}", platform.told.get("system_uuid", "")):
        put(k.UUID, platform.told["system_uuid"].lower(), place, Certainty.SAID)
    if restricted:
        put(k.RESTRICTED, restricted, place, Certainty.SAID)
    behind = [each for each in options if each.on("iommu") and each.name not in _REFUSES_IOMMU]
    put(k.IOMMU, "virtio" if behind else "none", place, Certainty.INFERRED)
    _boots(view, options, place)
    served = tuple(each.told.get("socket", each.text)[:_NAME] for each in options if each.name == "user-device")
    if served:
        put(k.VFIO_USER, served, place, Certainty.SAID)
    passed = tuple(each.told.get("path", each.text)[:_NAME] for each in behind if each.name == "device")
    if passed and not any(each.on("hugepages") for each in options if each.name in ("memory", "memory-zone")):
        put(k.MAPPED_SMALL, passed, place, Certainty.SAID)
    numbers: dict[str, int] = {}
    for each in _devices(options):
        number = numbers.setdefault(each.name, 0)
        numbers[each.name] += 1
        view.devices.append(_device(view, each, number, place, restricted))
    return view


def _devices(options: Sequence[_Option]) -> Iterator[_Option]:
    for name in _DEVICES:
        said = [each for each in options if each.name == name]
        if not said and name in _ALWAYS:
            said = [_Option(name, _ALWAYS[name], _told(_ALWAYS[name]))]
        for each in said:
            if name == "console" and each.text.partition(",")[0] in _NO_DEVICE:
                continue
            yield each


def _device(view: View, option: _Option, number: int, place: Place, restricted: str) -> Device:
    kind, prefix = _DEVICES[option.name]
    plain = prefix.startswith("__")
    device = Device((option.told.get("id") or (prefix if plain else f"{prefix}{number}"))[:_NAME])
    put = device.facts.put
    said = Certainty.SAID
    told = option.told.get("device_type") or option.told.get("virtio_id") or ""
    if not kind and told:
        kind = TYPES.get(int(told), f"type {told}") if told.isdecimal() and len(told) < 6 else told
    if kind:
        put(k.TYPE, kind, place, said)
    put(k.TRANSPORT, "pci", place, Certainty.DEFAULT)
    put(k.CAN_BE_LEGACY, False, place, Certainty.DEFAULT)
    _seat(device, option, place)
    backend = _backend(option)
    put(k.BACKEND, backend, place, said)
    socket = option.told.get("socket")
    if backend == "vhost-user" and socket:
        put(k.BACKEND_SOCKET, socket, place, said)
    asked = option.on("iommu") and option.name not in _REFUSES_IOMMU and backend != "vhost-user"
    if option.on("iommu") and not asked:
        view.problems.append(f"{place.name}: --{option.name} {option.text[:80]}: iommu=on is refused for it")
    put(k.CONFIGURED, asked, place, said if "iommu" in option.told else Certainty.DEFAULT)
    if backend == "vdpa":
        # It takes no vDPA device without the bit, and passes on what the device offers.
        put(k.OFFERED, True, place, Certainty.INFERRED)
    else:
        sure = said if asked or "iommu" in option.told else Certainty.DEFAULT
        put(k.OFFERED, asked or bool(restricted), place, Certainty.INFERRED if restricted and not asked else sure)
    if view.machine.get(k.IOMMU) == "virtio":
        put(k.BEHIND_IOMMU, asked, place, Certainty.INFERRED)
    return device


def _seat(device: Device, option: _Option, place: Place) -> None:
    slot = option.told.get("pci_device_id", "")
    segment = option.told.get("pci_segment", "0")
    if slot.isdecimal() and len(slot) < 3 and segment.isdecimal() and len(segment) < 5:
        domain = f"{int(segment):04x}:" if int(segment) else ""
        device.facts.put(k.PLACE, f"pci:{domain}00:{int(slot):02x}.0", place, Certainty.SAID)
        device.facts.put(k.ADDRESS, f"{int(segment):04x}:00:{int(slot):02x}.0", place, Certainty.SAID)


def _backend(option: _Option) -> str:
    if option.name in ("fs", "generic-vhost-user") or option.on("vhost_user"):
        return "vhost-user"
    return "vdpa" if option.name == "vdpa" else ""


def _restricted(platform: _Option | None) -> str:
    if platform is None:
        return ""
    return "tdx" if platform.on("tdx") else "sev-snp" if platform.on("sev_snp") else ""


def _boots(view: View, options: Sequence[_Option], place: Place) -> None:
    for each in options:
        if each.name == "firmware" or (each.name == "kernel" and "CLOUDHV" in each.text):
            edk2 = "CLOUDHV" in each.text or "edk2" in each.text.lower()
            view.machine.put(k.FIRMWARE, "edk2" if edk2 else posixpath.basename(each.text), place, Certainty.SAID)
            return
    if any(each.name == "kernel" for each in options):
        view.machine.put(k.FIRMWARE, "direct", place, Certainty.SAID)


def _options(words: Sequence[str]) -> Iterator[_Option]:
    """Each option with each of its values: ``--disk path=a path=b`` are two disks."""
    name = ""
    had_value = True
    for word in words[1 : _MOST + 1]:
        if word.startswith("--"):
            if not had_value:
                yield _Option(name, "", {})
            name, equals, text = word[2:].partition("=")
            had_value = bool(equals)
            if equals:
                yield _Option(name, text, _told(text))
        elif name:
            had_value = True
            yield _Option(name, word, _told(word))
    if not had_value:
        yield _Option(name, "", {})


def _told(text: str) -> dict[str, str]:
    """``a=1,b=[2,3]`` by key; commas in brackets and quotes part nothing."""
    parts, depth, quoted, start = [], 0, False, 0
    for index, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif char in "[]" and not quoted:
            depth += 1 if char == "[" else -1
        elif char == "," and depth <= 0 and not quoted:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    pairs = (part.partition("=") for part in parts)
    return {key: value.strip('"') for key, equals, value in pairs if equals}
