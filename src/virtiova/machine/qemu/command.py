# SPDX-License-Identifier: Apache-2.0
"""From what a user names (a device, an IOMMU) to QEMU's command line, and what QEMU's refusal means."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Final

from virtiova.errors import MachineError, RefusedError, UsageError
from virtiova.machine.qemu.boards import Board
from virtiova.machine.qemu.options import OptionSpec, is_on

_ROOT_PORT: Final = "pcie-root-port,id=rp,bus=pcie.0,addr=5,chassis=1"
_DEVICE: Final = re.compile(r"virtio-(blk|net|rng)-pci(-transitional|-non-transitional)?")
DEVICES: Final = tuple(
    f"virtio-{kind}-pci{flavour}"
    for kind in ("blk", "net", "rng")
    for flavour in ("", "-transitional", "-non-transitional")
)
CONTROL_DEVICE: Final = "edu"
_HELP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The device under test, as the user named it, on a board."""

    spec: OptionSpec
    board: Board

    @classmethod
    def parse(cls, text: str, board: Board) -> DeviceSpec:
        """Check the name; options are QEMU's to judge."""
        spec = OptionSpec.parse(text)
        if spec.name != CONTROL_DEVICE and not _DEVICE.fullmatch(spec.name):
            raise UsageError.unknown("device", spec.name, DEVICES)
        return cls(spec, board)

    @classmethod
    def of_any_type(cls, text: str, board: Board) -> DeviceSpec:
        """Any type that QEMU may have: whether it does is for QEMU to say. There may be no driver for it here."""
        return cls(OptionSpec.parse(text), board)

    @property
    def kind(self) -> str:
        """``blk``, ``net``, ``rng``; for all others the name itself: ``edu``, ``virtio-gpu-pci``."""
        match = _DEVICE.fullmatch(self.spec.name)
        return match.group(1) if match else self.spec.name

    @property
    def declared(self) -> bool:
        """Was the device asked to offer bit 33?"""
        return self.spec.on("iommu_platform")

    @property
    def _place_is_ours(self) -> bool:
        return not self.spec.options.keys() & {"bus", "addr"} and self.kind != CONTROL_DEVICE

    @property
    def behind_root_port(self) -> bool:
        """The place is ours to choose unless the user named one."""
        return self._place_is_ours and self.board.root_port

    @property
    def placed(self) -> OptionSpec:
        """The device with the place that it gets."""
        options = dict(self.spec.options)
        if self.behind_root_port:
            options["bus"] = "rp"
        elif self._place_is_ours:
            options = self.board.place | options
        return OptionSpec(self.spec.name, options)

    @property
    def can_be_legacy(self) -> bool:
        """Does the device have a legacy interface? QEMU's ``auto`` means: yes, unless behind a PCI Express port."""
        spec = self.placed
        if spec.name.endswith("-non-transitional"):
            return False
        if spec.name.endswith("-transitional") or spec.on("disable-modern"):
            return True
        legacy = spec.options.get("disable-legacy", "auto")
        if legacy == "auto":
            return not self.behind_root_port and spec.options.get("bus", "pcie.0") == "pcie.0"
        return not is_on(legacy)


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
        """All of them."""
        return (self.bios, self.ram, self.qtest, self.qmp, self.image, self.net)


def command_line(binary: str, device: DeviceSpec, iommu: OptionSpec, fds: Descriptors) -> list[str]:
    """The whole command line: a machine whose processor does nothing, its IOMMU, and the device under test."""
    board = device.board
    choice = board.iommus[iommu.name]
    machine = [board.machine]
    ram: list[str] = []
    if board.ram_is_mapped:
        machine.append("memory-backend=ram0")
        path = f"mem-path=/proc/self/fd/{fds.ram}"
        ram = ["-object", f"memory-backend-file,id=ram0,size={board.ram_size},{path},share=on"]
    machine += [choice.machine] if choice.machine else []
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-monitor", "none"]
    argv += ["-M", ",".join(machine), "-m", f"{board.ram_size >> 20}M", *ram, "-accel", "tcg"]
    argv += [argument.format(bios=f"/proc/self/fd/{fds.bios}") for argument in board.arguments]
    # qtest insists on a character device of that name.
    argv += ["-chardev", f"socket,id=qtest,fd={fds.qtest}", "-qtest", "chardev:qtest", "-qtest-log", "none"]
    argv += ["-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"]
    if choice.device:
        theirs = {key: value for key, value in iommu.options.items() if key not in choice.ours}
        argv += ["-device", str(OptionSpec(choice.device, theirs))]
    return argv + _device_arguments(device, fds)


def _device_arguments(device: DeviceSpec, fds: Descriptors) -> list[str]:
    """The device under test with what it needs behind it."""
    argv = []
    options = dict(device.placed.options)
    if device.kind == "blk" and "drive" not in options:
        argv += ["-add-fd", f"fd={fds.image},set=1"]
        argv += ["-blockdev", "driver=raw,node-name=d0,file.driver=file,file.filename=/dev/fdset/1"]
        options["drive"] = "d0"
    if device.kind == "net" and "netdev" not in options:
        argv += ["-netdev", f"dgram,id=n0,local.type=fd,local.str={fds.net}"]
        options["netdev"] = "n0"
    if device.behind_root_port:
        argv += ["-device", _ROOT_PORT]
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
    usage = r"can't find value|Invalid parameter|Supported values for|Parameter '[^']+' (expects|is)"
    if match or re.search(usage, words):
        return UsageError(f"QEMU: {words}")
    return RefusedError(f"QEMU refused {device.spec}", words)


def _help(binary: str, what: str, pattern: str) -> list[str]:
    try:
        done = subprocess.run(
            [binary, "-device", what], capture_output=True, text=True, timeout=_HELP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(pattern, done.stdout, re.MULTILINE)
