# SPDX-License-Identifier: Apache-2.0
"""From what a user names (a device, an IOMMU) to QEMU's command line, and what QEMU's refusal means."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from typing import Final

from virtiova.errors import MachineError, RefusedError, UsageError

RAM_SIZE: Final = 64 << 20
_ROOT_PORT: Final = "pcie-root-port,id=rp,bus=pcie.0,addr=5,chassis=1"
_ON: Final = frozenset({"on", "yes", "true", "y"})
_DEVICE: Final = re.compile(r"virtio-(blk|net|rng)-pci(-transitional|-non-transitional)?")
DEVICES: Final = tuple(
    f"virtio-{kind}-pci{flavour}"
    for kind in ("blk", "net", "rng")
    for flavour in ("", "-transitional", "-non-transitional")
)
CONTROL_DEVICE: Final = "edu"
IOMMUS: Final = ("none", "intel")
INVALIDATION: Final = "invalidation"
INVALIDATIONS: Final = ("register", "queue")
_IOMMU_DEVICE: Final = {"intel": "intel-iommu"}
MACHINES: Final = ("q35",)
_HELP_SECONDS: Final = 10.0
_MAX_SPEC: Final = 4096


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """``name,key=value,...`` as QEMU takes it."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> OptionSpec:
        """Parse what a user typed. A bare key means ``on``, as in QEMU."""
        if not text or len(text) > _MAX_SPEC or not text.isprintable():
            raise UsageError(f"not a device: {text[:60]!r}")
        name, *rest = text.split(",")
        options = {}
        for item in rest:
            key, _, value = item.partition("=")
            if not key:
                raise UsageError(f"{text!r}: empty option")
            options[key] = value or "on"
        return cls(name, options)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def on(self, key: str) -> bool:
        """Is a boolean option given and on?"""
        return self.options.get(key, "off").lower() in _ON


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The device under test, as the user named it."""

    spec: OptionSpec

    @classmethod
    def parse(cls, text: str) -> DeviceSpec:
        """Check the name; options are QEMU's to judge."""
        spec = OptionSpec.parse(text)
        if spec.name != CONTROL_DEVICE and not _DEVICE.fullmatch(spec.name):
            raise UsageError.unknown("device", spec.name, DEVICES)
        return cls(spec)

    @property
    def kind(self) -> str:
        """``blk``, ``net``, ``rng``; ``edu`` for the control device."""
        match = _DEVICE.fullmatch(self.spec.name)
        return match.group(1) if match else CONTROL_DEVICE

    @property
    def declared(self) -> bool:
        """Was the device asked to offer bit 33?"""
        return self.spec.on("iommu_platform")

    @property
    def behind_root_port(self) -> bool:
        """The place is ours to choose unless the user named one."""
        named = self.spec.options.keys() & {"bus", "addr"}
        # A device without a modern interface has no place behind a PCI Express port.
        return not named and self.kind != CONTROL_DEVICE and not self.spec.on("disable-modern")

    @property
    def can_be_legacy(self) -> bool:
        """Does the device have a legacy interface? QEMU's ``auto`` means: yes, unless behind a PCI Express port."""
        name, options = self.spec.name, self.spec.options
        if name.endswith("-non-transitional"):
            return False
        if name.endswith("-transitional") or self.spec.on("disable-modern"):
            return True
        legacy = options.get("disable-legacy", "auto")
        if legacy == "auto":
            return not self.behind_root_port and options.get("bus", "pcie.0") == "pcie.0"
        return legacy.lower() not in _ON


def parse_iommu(text: str) -> OptionSpec:
    """``none`` or ``intel``, with options for QEMU's IOMMU device (``intel,aw-bits=48``), and one of our own:
    ``invalidation=queue`` tells the IOMMU of changes through its queue, not by register."""
    spec = OptionSpec.parse(text)
    if spec.name not in IOMMUS:
        raise UsageError.unknown("IOMMU", spec.name, IOMMUS)
    if spec.options.get(INVALIDATION, INVALIDATIONS[0]) not in INVALIDATIONS:
        raise UsageError.unknown(INVALIDATION, spec.options[INVALIDATION], INVALIDATIONS)
    if spec.name == "none" and spec.options:
        raise UsageError("the IOMMU 'none' has no options")
    return spec


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The inherited descriptors that the command line names."""

    bios: int
    ram: int
    qtest: int
    qmp: int
    image: int
    net: int

    def all(self) -> tuple[int, ...]:
        return (self.bios, self.ram, self.qtest, self.qmp, self.image, self.net)


def command_line(binary: str, device: DeviceSpec, iommu: OptionSpec, fds: Descriptors) -> list[str]:
    """The whole command line: a halted q35 machine, its IOMMU, and the device under test."""
    argv = [
        *(
            binary,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "none",
            "-monitor",
            "none",
        ),
        *("-M", "q35,memory-backend=ram0", "-m", f"{RAM_SIZE >> 20}M"),
        "-object",
        f"memory-backend-file,id=ram0,size={RAM_SIZE},mem-path=/proc/self/fd/{fds.ram},share=on",
        *("-accel", "tcg", "-bios", f"/proc/self/fd/{fds.bios}"),
        # qtest insists on a character device of that name.
        *("-chardev", f"socket,id=qtest,fd={fds.qtest}", "-qtest", "chardev:qtest", "-qtest-log", "none"),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"),
    ]
    if iommu.name != "none":
        theirs = {key: value for key, value in iommu.options.items() if key != INVALIDATION}
        argv += ["-device", str(OptionSpec(_IOMMU_DEVICE[iommu.name], theirs))]
    options = dict(device.spec.options)
    if device.kind == "blk" and "drive" not in options:
        argv += ["-add-fd", f"fd={fds.image},set=1"]
        argv += ["-blockdev", "driver=raw,node-name=d0,file.driver=file,file.filename=/dev/fdset/1"]
        options["drive"] = "d0"
    if device.kind == "net" and "netdev" not in options:
        argv += ["-netdev", f"dgram,id=n0,local.type=fd,local.str={fds.net}"]
        options["netdev"] = "n0"
    if device.behind_root_port:
        argv += ["-device", _ROOT_PORT]
        options["bus"] = "rp"
    return [*argv, "-device", str(OptionSpec(device.spec.name, options))]


def refusal(binary: str, device: DeviceSpec, stderr: str) -> MachineError | UsageError:
    """What QEMU's refusal means: a name that it does not know, or a device that it will not have."""
    words = stderr.strip() or "QEMU ended without a word"
    if "is not a valid device model name" in words:
        return UsageError.unknown("device", device.spec.name, _help(binary, "help", r'name "([^"]+)"'))
    match = re.search(r"Property '([\w-]+)\.([\w.-]+)' not found", words)
    if match and match.group(1).startswith(device.spec.name.split("-")[0]):
        properties = _help(binary, f"{device.spec.name},help", r"^\s+([\w-]+)=")
        return UsageError.unknown(f"option of {device.spec.name}", match.group(2), properties)
    # Only a refusal on account of the bit says anything about the device; the rest is what the user typed. QEMU
    # quotes the command line, so the option's own name proves nothing.
    if re.search("VIRTIO_F_IOMMU_PLATFORM|iommu_platform=true is not supported", words):
        return RefusedError(f"QEMU refused {device.spec}", words)
    if "-device " in words:
        return UsageError(f"QEMU: {words}")
    return MachineError("QEMU would not start", words)


def _help(binary: str, what: str, pattern: str) -> list[str]:
    try:
        done = subprocess.run(
            [binary, "-device", what], capture_output=True, text=True, timeout=_HELP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(pattern, done.stdout, re.MULTILINE)
